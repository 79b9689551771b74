"""Answering: on the subject that a request names, where that is an inbox, and nowhere else.

Whoever may ask chooses the subject of the answer, and who answers may publish where they may not. What an env told
would else be said in the registry or stored as a recording, for whoever asks for it.
"""

from __future__ import annotations

import logging
import math
import time

from meshrl.bus.connection import Connection

log = logging.getLogger("meshrl.bus")

# Those of clients, and what servers put in their place between accounts and clusters, which no client may name.
INBOXES = ("_INBOX.", "_R_.", "_GR_.")

# Between warnings: whoever may ask could fill a log with them.
SAID_S = 10.0


class _Refused:
    """Requests that were answered nowhere since it was last said."""

    count = 0
    said_at = -math.inf


def may_be_answered(reply: str, inboxes: tuple[str, ...] = INBOXES, who: str = "") -> bool:
    """Whether a reply subject is one of these inboxes; what is none, and not empty, is logged once in a while.

    Args:
        reply: where an answer is wanted.
        inboxes: how those begin on which this one may be.
        who: asks, where that is known.
    """
    if reply.startswith(inboxes):
        return True
    if reply:
        _Refused.count += 1
        now = time.monotonic()
        if now - _Refused.said_at >= SAID_S:
            text = "%d answers were wanted where they may not be given (the last on %r%s): nobody gets them"
            log.warning(text, _Refused.count, reply[:256], f", by {who}" if who else "")
            _Refused.count, _Refused.said_at = 0, now
    return False


def answer(connection: Connection, reply: str, body: bytes, *, mark: tuple[int, int, int] | None = None) -> None:
    """Publish ``body`` for whoever wants it on ``reply``; as :meth:`~meshrl.bus.connection.Connection.publish`."""
    if may_be_answered(reply):
        connection.publish(reply, body, mark=mark)
