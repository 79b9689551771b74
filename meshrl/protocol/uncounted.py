"""Answers that are in no digest yet (R8): few ever have to be, since a journal that begins anew needs none before it.

They are kept as they arrived, in the order in which they were told, up to a number of bytes. What is beyond it is to be
counted, the oldest first: one for each that comes, so that nobody waits for many of them at once.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Uncounted(Generic[T]):
    """Answers that may have to be counted.

    Args:
        most_bytes: of all that are kept.
    """

    __slots__ = ("_bytes", "_entries", "_most_bytes")

    def __init__(self, most_bytes: int) -> None:
        self._entries: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._most_bytes = most_bytes

    def __repr__(self) -> str:
        return f"<Uncounted: {len(self._entries)} answers, {self._bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest(self) -> T:
        """There is one."""
        return self._entries[0][0]

    def copy(self) -> Uncounted[T]:
        """Another one, with the same in it."""
        other: Uncounted[T] = Uncounted(self._most_bytes)
        other._entries.extend(self._entries)
        other._bytes = self._bytes
        return other

    def add(self, entry: T, size: int) -> None:
        """Keep an answer of so many bytes."""
        self._entries.append((entry, size))
        self._bytes += size

    @property
    def overfull(self) -> bool:
        """Whether the oldest is to be counted."""
        return self._bytes > self._most_bytes

    def take(self) -> T:
        """The oldest, which is kept no more."""
        entry, size = self._entries.popleft()
        self._bytes -= size
        return entry

    def clear(self) -> None:
        """None of them will be needed."""
        self._entries.clear()
        self._bytes = 0
