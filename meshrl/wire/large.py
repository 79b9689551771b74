"""Messages that end in one large array: a batch of observations, written and read with a copy less each way.

msgpack copies an array into its own buffer and the message out of that; and out of the message into bytes, of which the
array is made. Here the head of the message goes through msgpack and the array's bytes do not: they are joined behind
it, and found there again. What travels is the same msgpack, to the byte; a reader that knows nothing of this reads it,
and this reader reads what others write.

Copies of a large observation from a worker's array to its client's::

    into the message        1   (by msgpack's packer: 2; of a batch that was stacked before: 1 more)
    to and from the server  2   the kernel's, a side each
    out of the socket       1   into what the event loop reads
    into one message        1   with the reads joined
    into the client's array 0   (of items of one byte; else 1; by msgpack's unpacker: 2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np

from meshrl.wire.arrays import text_of

# Below this the copies are cheaper than what saves them.
LARGE_BYTES = 64 * 1024

# An array's map ends with its data, and data of this size is a msgpack bin 32.
_KEY = b"\xa4data"
_BIN_32 = b"\xc6"
_EMPTY_BIN = b"\xc4\x00"
_LENGTH_BYTES = 4


class Rows:
    """Arrays that a message takes one after another: the rows of a large array that is never made.

    Attributes:
        items: one or more, of one shape and dtype and in C order; see :func:`large_rows`.
        pieces: the same in larger arrays, where some stand side by side.
        shape: of the array.
        dtype: of it.
        nbytes: of it.
    """

    __slots__ = ("dtype", "items", "nbytes", "pieces", "shape")

    def __init__(
        self, items: Sequence[np.ndarray[Any, Any]], pieces: Sequence[np.ndarray[Any, Any]] | None = None
    ) -> None:
        self.items = items
        self.pieces = items if pieces is None else pieces
        self.shape = (len(items), *items[0].shape)
        self.dtype = items[0].dtype
        self.nbytes = len(items) * items[0].nbytes

    def __repr__(self) -> str:
        return f"<Rows of {self.shape} {self.dtype}>"

    def stacked(self) -> np.ndarray[Any, Any]:
        """The array."""
        return np.stack(self.items, out=np.empty(self.shape, self.dtype))  # with their byte order


def large_rows(items: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows | None:
    """``items`` as rows if each is such an array and all together are worth it, else None."""
    if not shape or dtype.kind in "Mm" or len(items) * math.prod(shape) * dtype.itemsize < LARGE_BYTES:
        return None
    for item in items:
        if type(item) is not np.ndarray or item.shape != shape or item.dtype != dtype or not item.flags.c_contiguous:
            return None
    return Rows(items)


def large_array(value: object) -> np.ndarray[Any, Any] | Rows | None:
    """``value`` in C order if it is an array for which this is worth it, else None."""
    if type(value) is Rows:
        return value
    if type(value) is not np.ndarray or value.nbytes < LARGE_BYTES or value.dtype.kind in "Mm":
        return None  # datetimes have no buffer protocol
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def pack_ending(
    pack: Callable[[Any], bytes], rest: dict[str, Any], key: str, array: np.ndarray[Any, Any] | Rows
) -> bytes:
    """The map ``rest`` with ``array`` under ``key`` behind it; see :func:`parts_ending`."""
    return b"".join(parts_ending(pack, rest, key, array))


def parts_ending(
    pack: Callable[[Any], bytes], rest: dict[str, Any], key: str, array: np.ndarray[Any, Any] | Rows
) -> list[Any]:
    """The same in pieces, of which the arrays are themselves.

    Args:
        pack: msgpack's packer, for values that need no more than that.
        rest: native values.
        key: not in ``rest``.
        array: of :func:`large_array`.

    Raises:
        UnencodableValue: the array's dtype does not travel.
    """
    form = {"nd": True, "type": text_of(array.dtype), "kind": "", "shape": list(array.shape), "data": b""}
    head = pack({**rest, key: form})
    assert head.endswith(_EMPTY_BIN), "the array's data is the last of the message"
    length = array.nbytes.to_bytes(_LENGTH_BYTES, "big")
    data = array.pieces if type(array) is Rows else (array,)
    return [head[: -len(_EMPTY_BIN)] + _BIN_32 + length, *data]


def unpack_ending(data: bytes | bytearray, revive: Callable[[dict[Any, Any]], Any], **limits: Any) -> tuple[bool, Any]:
    """The value of a message that ends in a large array, and whether it is one.

    Args:
        data: the message.
        revive: makes values of maps, as the unpacker's ``object_hook``.
        limits: of the unpacker.

    Raises:
        Exception: whatever the unpacker and ``revive`` raise for what is no message.
    """
    # Nearly always it is the first of that one byte, for which the C library looks twenty times faster than CPython for
    # the key; where it is not, only the key will do, since an array may be full of that byte.
    end = data.find(_BIN_32)
    if not _is_head(data, end):
        at = data.find(_KEY + _BIN_32)
        while at >= 0 and not _is_head(data, at + len(_KEY)):
            at = data.find(_KEY + _BIN_32, at + 1)
        if at < 0:
            return False, None
        end = at + len(_KEY)
    start = end + 1 + _LENGTH_BYTES
    tail: memoryview | None = memoryview(data)[start:]

    def hook(form: dict[Any, Any]) -> Any:
        nonlocal tail
        # The one array whose data is not there. A second one has none, and is malformed.
        empty = form.get("data")  # of any type: a user's own map may have an array there
        if tail is not None and type(empty) is bytes and not empty and form.get("nd") is True and _has_items(form):
            form["data"], tail = tail, None
        return revive(form)

    body = msgpack.unpackb(data[:end] + _EMPTY_BIN, object_hook=hook, **limits)
    # Where nothing took it, these were bytes that somebody called data.
    return tail is None, body


def _is_head(data: bytes | bytearray, end: int) -> bool:
    """Whether the array's data is announced at ``end``, and is all that follows."""
    start = end + 1 + _LENGTH_BYTES
    length = int.from_bytes(data[end + 1 : start], "big")
    return end >= len(_KEY) and start + length == len(data) and data.startswith(_KEY, end - len(_KEY))


def _has_items(form: dict[Any, Any]) -> bool:
    shape = form.get("shape")
    return type(shape) is list and all(type(length) is int and length > 0 for length in shape)
