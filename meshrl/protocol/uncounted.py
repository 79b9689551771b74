"""Answers that are in no digest yet (R8): few ever have to be, since a journal that begins anew needs none before it.

They are kept as they arrived, in the order in which they were told, up to a number of them and of bytes. What is beyond
that is to be counted, the oldest first: one for each that comes, so that nobody waits for many of them at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# To count so many takes about a tenth of a second.
MOST = 1024


class Uncounted(Generic[T]):
    """Answers that may have to be counted.

    Args:
        most_bytes: of all that are kept.
        size: how many an answer has.
    """

    __slots__ = ("_bytes", "_entries", "_most_bytes", "_size")

    def __init__(self, most_bytes: int, size: Callable[[T], int]) -> None:
        self._entries: deque[T] = deque()
        self._bytes = 0
        self._most_bytes = most_bytes
        self._size = size

    def __repr__(self) -> str:
        return f"<Uncounted: {len(self._entries)} answers, {self._bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest(self) -> T:
        """There is one."""
        return self._entries[0]

    def copy(self) -> Uncounted[T]:
        """Another one, with the same in it."""
        other = Uncounted(self._most_bytes, self._size)
        other._entries.extend(self._entries)
        other._bytes = self._bytes
        return other

    def add(self, entry: T) -> None:
        """Keep an answer."""
        self._entries.append(entry)
        self._bytes += self._size(entry)

    @property
    def overfull(self) -> bool:
        """Whether the oldest is to be counted."""
        return self._bytes > self._most_bytes or len(self._entries) > MOST

    def take(self) -> T:
        """The oldest, which is kept no more."""
        entry = self._entries.popleft()
        self._bytes -= self._size(entry)
        return entry

    def clear(self) -> None:
        """None of them will be needed."""
        self._entries.clear()
        self._bytes = 0
