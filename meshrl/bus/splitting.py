"""Split messages over one connection: sent in windows, put together again on arrival (D4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from meshrl.errors import MeshError
from meshrl.wire.codec import pack
from meshrl.wire.frames import error_reply
from meshrl.wire.parts import Assembler, is_part, split

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
    """Sends messages in parts, never more than :data:`WINDOW_BYTES` ahead of the server.

    A message is under way until the server has taken its last part; the same one (subject, reply subject, lane, seq)
    is not sent a second time meanwhile: asking again over a slow link would only make it slower. One that loses its
    connection is given up, since whoever needs it asks again (R9).

    Args:
        publish: sends one part.
        taken: waits so many seconds until the server has taken what was sent; False when the connection was lost.
        failed: is told of what no caller waits for.
    """

    def __init__(
        self,
        publish: Callable[[str, str, bytes], None],
        taken: Callable[[float], Awaitable[bool]],
        failed: Callable[[Exception], None],
    ) -> None:
        self._publish = publish
        self._taken = taken
        self._failed = failed
        self._turn = asyncio.Lock()
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._sending: dict[tuple[str, str, int, int], asyncio.Task[None]] = {}

    def send(self, subject: str, reply: str, body: bytes, limit: int, mark: tuple[int, int, int]) -> None:
        """Send ``body`` in parts of at most ``limit`` bytes, after the messages before, if it is not under way.

        Raises:
            MessageTooLarge: it is over every limit.
        """
        lane, seq, attempt = mark
        key = (subject, reply, lane, seq)
        if key in self._sending:
            return
        parts = split(body, limit, lane=lane, seq=seq, attempt=attempt)
        task = asyncio.get_running_loop().create_task(self._send(subject, reply, parts))
        self._sending[key] = task
        task.add_done_callback(lambda done: self._done(key, done))

    @property
    def busy(self) -> bool:
        """Whether any message is under way."""
        return bool(self._sending)

    def sending(self, reply: str) -> bool:
        """Whether a message with that reply subject is under way."""
        return any(key[1] == reply for key in self._sending)

    async def _send(self, subject: str, reply: str, parts: list[bytes]) -> None:
        async with self._turn:
            for part in parts:
                ahead = self._sent_bytes - self._taken_bytes
                if ahead and ahead + len(part) > WINDOW_BYTES and not await self._settle():
                    return
                self._publish(subject, reply, part)
                self._sent_bytes += len(part)
        await self._settle()

    async def _settle(self) -> bool:
        """Wait until all of it is taken, or lost with the connection."""
        sent = self._sent_bytes
        there = await self._taken(MAX_JOIN_AGE_S)
        self._taken_bytes = max(self._taken_bytes, sent)
        return there

    def _done(self, key: tuple[str, str, int, int], task: asyncio.Task[None]) -> None:
        del self._sending[key]
        if not task.cancelled() and isinstance(exc := task.exception(), Exception):
            self._failed(exc)

    async def close(self) -> None:
        """Stop sending; what is under way is not finished."""
        tasks = list(self._sending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def whole(deliver: Deliver) -> Callable[[str, str, bytes, bytes], None]:
    """A raw handler for subjects that carry no parts (queue groups)."""

    def passed(subject: str, reply: str, body: bytes, _head: bytes) -> None:
        deliver(subject, reply, body)

    return passed
