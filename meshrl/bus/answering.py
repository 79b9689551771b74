"""Answering: on the subject that a request names, where that is an inbox, and nowhere else.

Whoever may ask chooses the subject of the answer, and who answers may publish where they may not. What an env told
would else be said in the registry or stored as a recording, for whoever asks for it.
"""

from __future__ import annotations

import logging

from meshrl.bus.connection import Connection

log = logging.getLogger("meshrl.bus")

# Those of clients, and what servers put in their place between accounts and clusters, which no client may name.
INBOXES = ("_INBOX.", "_R_.", "_GR_.")


def answer(connection: Connection, reply: str, body: bytes, *, mark: tuple[int, int, int] | None = None) -> None:
    """Publish ``body`` for whoever wants it on ``reply``; as :meth:`~meshrl.bus.connection.Connection.publish`."""
    if reply.startswith(INBOXES):
        connection.publish(reply, body, mark=mark)
    elif reply:
        log.warning("an answer is wanted on %r, which is no inbox: nobody gets it", reply[:256])
