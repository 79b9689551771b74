"""Split messages over one connection: sent in windows, put together again on arrival (D4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from meshrl.errors import MeshError
from meshrl.wire.codec import pack
from meshrl.wire.frames import error_reply
from meshrl.wire.parts import Assembler, is_part

# At most this much of split messages is on its way before the server has said (by a pong) that it took it.
WINDOW_BYTES = 8 * 1024 * 1024
# What may wait for its missing parts, over all peers of one connection, and for how long.
MAX_JOIN_BYTES = 512 * 1024 * 1024
MAX_JOIN_AGE_S = 60.0

Deliver = Callable[[str, str, bytes], None]


class Joining:
    """Puts parts together; whole messages pass through.

    Args:
        answer: publishes to a reply subject; parts that make no message are refused there.
    """

    def __init__(self, answer: Callable[[str, bytes], None]) -> None:
        self._answer = answer
        self._parts = Assembler(max_bytes=MAX_JOIN_BYTES, max_age_s=MAX_JOIN_AGE_S)
        self._timer: asyncio.TimerHandle | None = None

    def handler(self, deliver: Deliver) -> Callable[[str, str, bytes, bytes], None]:
        """A raw handler that gives ``deliver`` subject, reply subject and whole bodies."""

        def joined(subject: str, reply: str, body: bytes, _head: bytes) -> None:
            if body and is_part(body):
                # A reply subject is of one request; the subject has the user, so that no other can add parts to it.
                try:
                    whole = self._parts.feed(f"{subject} {reply}", body, time.monotonic())
                except MeshError as exc:
                    if not reply:
                        raise
                    self._answer(reply, pack(error_reply(exc)))
                    return
                if whole is not None:
                    deliver(subject, reply, whole)
                elif self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(MAX_JOIN_AGE_S, self._sweep)
            else:
                deliver(subject, reply, body)

        return joined

    def _sweep(self) -> None:
        self._parts.sweep(time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(MAX_JOIN_AGE_S, self._sweep) if len(self._parts) else None

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Window:
    """Sends parts, never more than :data:`WINDOW_BYTES` ahead of the server."""

    def __init__(self, publish: Callable[[str, str, bytes], None], flush: Callable[[float], Awaitable[None]]) -> None:
        self._publish = publish
        self._flush = flush
        self._turn = asyncio.Lock()

    async def send(self, subject: str, reply: str, parts: list[bytes]) -> None:
        """Send all parts of one message, after those of the message before."""
        async with self._turn:
            under_way = 0
            for part in parts:
                self._publish(subject, reply, part)
                under_way += len(part)
                if under_way >= WINDOW_BYTES:
                    await self._flush(MAX_JOIN_AGE_S)
                    under_way = 0


def whole(deliver: Deliver) -> Callable[[str, str, bytes, bytes], None]:
    """A raw handler for subjects that carry no parts (queue groups)."""

    def passed(subject: str, reply: str, body: bytes, _head: bytes) -> None:
        deliver(subject, reply, body)

    return passed
