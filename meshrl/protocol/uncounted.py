"""Answers that are in no digest yet (R8): few ever have to be, since a journal that begins anew needs none before it.

They are kept as they arrived, in the order in which they were told, up to a number of them and of bytes. What is beyond
that is to be counted, the oldest first: one for each that comes, so that nobody waits for many of them at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

# A tuple that begins with the position of its request and the answer as it arrived.
T = TypeVar("T", bound=tuple[Any, ...])

# To count so many takes about a tenth of a second.
MOST = 1024


class Uncounted(Generic[T]):
    """Answers that may have to be counted: tuples, of which each begins with its request's position and its bytes.

    Args:
        most_bytes: of all that are kept.
    """

    __slots__ = ("_bytes", "_entries", "_most_bytes")

    def __init__(self, most_bytes: int) -> None:
        self._entries: deque[T] = deque()
        self._bytes = 0
        self._most_bytes = most_bytes

    def __repr__(self) -> str:
        return f"<Uncounted: {len(self._entries)} answers, {self._bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> Uncounted[T]:
        """Another one, with the same in it."""
        other: Uncounted[T] = Uncounted(self._most_bytes)
        other._entries.extend(self._entries)
        other._bytes = self._bytes
        return other

    def add(self, entries: Sequence[T]) -> list[T]:
        """Keep answers; gives those that are to be counted now, the oldest first, and keeps them no more."""
        self._entries.extend(entries)
        self._bytes += sum([len(entry[1]) for entry in entries])
        overdue = []
        while self._bytes > self._most_bytes or len(self._entries) > MOST:
            overdue.append(self.take())
        return overdue

    def take(self) -> T:
        """The oldest, which is kept no more."""
        entry = self._entries.popleft()
        self._bytes -= len(entry[1])
        return entry

    def drop_before(self, position: int) -> None:
        """Keep no answers to requests before that."""
        entries = self._entries
        while entries and entries[0][0] < position:
            self._bytes -= len(entries.popleft()[1])

    def clear(self) -> None:
        """None of them will be needed."""
        self._entries.clear()
        self._bytes = 0
