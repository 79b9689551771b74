"""Replies: what a worker sends back, and the errors among them."""

from __future__ import annotations

import itertools

from meshrl.bus.answering import answer
from meshrl.bus.connection import Connection
from meshrl.errors import MeshError, UnencodableValue
from meshrl.wire.codec import pack
from meshrl.wire.frames import error_reply


class Replies:
    """Sends replies over a worker's first connection, from its event loop."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self._attempts = itertools.count(1)

    def send(self, to: str, packed: bytes, lane: int = 0, seq: int = 0) -> None:
        """Send; a request without an inbox for it gets none."""
        if self.connection is not None and not self.connection.closed:
            answer(self.connection, to, packed, mark=(lane, seq, next(self._attempts)))

    def refuse(self, to: str, exc: MeshError, seq: int | None = None) -> None:
        """Send an error; facts of it that cannot travel (an env may raise anything) stay here."""
        try:
            packed = pack(error_reply(exc, seq))
        except UnencodableValue:
            packed = pack(error_reply(type(exc)(exc.message, remote_traceback=exc.remote_traceback), seq))
        self.send(to, packed)
