"""Messages that are kept while a user may write to the arrays in them.

A large message is joined of what was read from the socket, and its arrays are made where it is: they are their user's.
Who has to know later what arrived keeps the reads instead, which nobody else has: that costs no copy before somebody
looks.
"""

from __future__ import annotations

from collections.abc import Sequence


class Reads:
    """A large message as it was read.

    Args:
        parts: of it, in order; nobody writes to them.
    """

    __slots__ = ("_bytes", "_parts")

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._parts = parts
        self._bytes = sum(map(len, parts))

    def __repr__(self) -> str:
        return f"<Reads of {self._bytes} bytes>"

    def __len__(self) -> int:
        return self._bytes

    def joined(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


Kept = bytes | Reads


def kept(message: bytes, reads: Reads | None) -> Kept:
    """What to keep of a message: itself if nobody can write to it, else its reads, or a copy where those are not known.

    Args:
        message: bytes, or a bytearray.
        reads: those of a bytearray.
    """
    return bytes(message) if reads is None else reads


def whole(message: Kept) -> bytes:
    """The message."""
    return message.joined() if isinstance(message, Reads) else message
