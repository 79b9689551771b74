"""One direction of a link of the :mod:`~tests.chaos.proxy`: what becomes of the bytes that come in."""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum

# More than this, held or delayed in one direction, is read no further: the sender meets the window of a slow network.
MAX_HELD_BYTES = 16 * 1024 * 1024
# Of what was thrown away in one direction, so much can be looked at afterwards.
MAX_LOST_BYTES = 1024 * 1024


class Direction(Enum):
    """Of bytes on a link."""

    UP = "up"
    DOWN = "down"


UP, DOWN = Direction.UP, Direction.DOWN
BOTH = (UP, DOWN)


class Flow:
    """One direction of a link: a queue of what came, with the moment at which each piece is to go on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.delay_s = 0.0
        self.holding = False
        self.losing = False
        self.passed_bytes = 0
        self.lost = b""
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued_bytes = 0
        self._full = False  # the sink's own buffer is
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def came(self, data: bytes) -> None:
        if self.losing:
            self.lost = (self.lost + data)[:MAX_LOST_BYTES]
            return
        self._queue.append((self._loop.time() + self.delay_s, data))
        self._queued_bytes += len(data)
        self.go_on()

    def go_on(self) -> None:
        """Send what is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        sink = self.sink
        if sink is not None and not self.holding and not sink.is_closing():
            while self._queue and self._queue[0][0] <= self._loop.time():
                _, data = self._queue.popleft()
                self._queued_bytes -= len(data)
                self.passed_bytes += len(data)
                sink.write(data)
            if self._queue:
                self._timer = self._loop.call_at(self._queue[0][0], self.go_on)
            elif self._ended:
                sink.close()
        self._throttle()

    def full(self, full: bool) -> None:
        """The sink takes nothing for a while, or does so again."""
        self._full = full
        self._throttle()

    def _throttle(self) -> None:
        if self.source is not None and not self.source.is_closing():
            if self._full or self._queued_bytes > MAX_HELD_BYTES:
                self.source.pause_reading()
            else:
                self.source.resume_reading()

    def lose(self) -> None:
        """Throw away what is kept, and what comes."""
        self.losing = True
        self.lost = b"".join((self.lost, *(data for _, data in self._queue)))[:MAX_LOST_BYTES]
        self.forget()

    def forget(self) -> None:
        """Throw away what is kept."""
        self._queue.clear()
        self._queued_bytes = 0
        self._throttle()

    def end(self) -> None:
        """Its source says no more: the sink is closed after what is kept, or hears nothing of it where that is lost."""
        self._ended = True
        if not self.losing:
            self.go_on()

    def close(self) -> None:
        self.forget()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
