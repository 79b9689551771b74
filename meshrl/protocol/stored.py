"""Stored: how much of what was noted is, and who waits until it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

# With None, or with why something is not stored.
Told = Callable[[str | None], None]


class Stored:
    """Of one transcript, in bytes noted since it began; used from any thread."""

    __slots__ = ("_lock", "_missing", "_until", "_waiting")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0
        self._missing: str | None = None  # why some of it was not stored, at any time
        self._waiting: deque[tuple[int, Told]] = deque()

    def when(self, until: int, told: Told) -> None:
        """Call ``told``, on any thread, when so much is stored, or when something is not."""
        with self._lock:
            missing = self._missing
            if missing is None and self._until < until:
                self._waiting.append((until, told))
                return
        told(missing)

    def settled(self, until: int, why: str | None) -> None:
        """So much is stored, or, where it is said why, what is not stored by now will not be."""
        ready = []
        with self._lock:
            self._until = until
            self._missing = self._missing or why
            while self._waiting and self._waiting[0][0] <= until:
                ready.append(self._waiting.popleft()[1])
        for told in ready:
            told(why)
