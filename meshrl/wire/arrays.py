"""Numpy arrays and scalars as msgpack-numpy's maps.

Rule: no text from the wire ever reaches ``np.dtype`` unless it is in a table of known texts or matches a
strict pattern with bounded sizes; no size from the wire is believed unless it equals the bytes that came
with it.

The form (msgpack-numpy 0.4.8), with keys as text (``"str"``) or, as msgpack-numpy itself has them, bytes
(``"bytes"``)::

    array   {"nd": True, "type": "<f4", "kind": "", "shape": [2, 3], "data": bin}
    scalar  {"nd": False, "type": "<f8", "data": bin}

Its other kinds are refused: ``V`` (structured) and ``O``, whose data is a pickle and runs code when read.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from meshrl.errors import MalformedMessage, UnencodableValue

if TYPE_CHECKING:
    from collections.abc import Mapping

KeyStyle = Literal["str", "bytes"]

_FIXED: dict[str, np.dtype[Any]] = {
    text: np.dtype(text)
    for text in (
        *("|b1", "|i1", "|u1"),
        *(order + width for order in "<>" for width in ("i2", "i4", "i8", "u2", "u4", "u8")),
        *(order + width for order in "<>" for width in ("f2", "f4", "f8", "c8", "c16")),
    )
}
# By equality, so that aliases (np.longlong where np.int64 is a C long) find the fixed-width type's text.
_TEXT_OF = {dtype: text for text, dtype in _FIXED.items()}

# Sizes are bounded to six digits: numpy may allocate one item for an empty array.
_SIZED = re.compile(
    r"\|S[1-9][0-9]{0,5}"
    r"|[<>]U[1-9][0-9]{0,5}"
    r"|[<>][Mm]8(?:\[(?:[1-9][0-9]{0,5})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?",
    re.ASCII,
)
_TEXT_SCALAR = re.compile(r"(?:\|S|[<>]U)(?:0|[1-9][0-9]{0,8})", re.ASCII)

SCALAR_TYPES: frozenset[type] = frozenset(
    {dtype.type for dtype in _FIXED.values()} | {np.str_, np.bytes_, np.datetime64, np.timedelta64}
)
"""The numpy scalar types that travel; others (``longdouble``, ``void``) have no exact form."""

# Below this a copy by tobytes() is cheaper than making a memoryview (50 against 120 ns).
_VIEW_FROM_BYTES = 2048
_MAX_CODE_POINT = 0x10FFFF
_FEW_BYTES = 1024


@lru_cache(maxsize=256)  # bounded: a peer chooses the texts
def _sized(text: str) -> np.dtype[Any] | None:
    return np.dtype(text) if _SIZED.fullmatch(text) else None


def dtype_of(text: object) -> np.dtype[Any]:
    """The dtype that a text of the wire names.

    Args:
        text: what stood under ``type``: ``"<f4"``, ``"|S12"``, ``"<M8[ns]"``...; ASCII bytes of the same are
            read too, as old msgpack-numpy writes them.

    Raises:
        MalformedMessage: it is not in the allow-list (objects, void, structured and unknown types).
    """
    if type(text) is bytes and text.isascii():
        text = text.decode("ascii")
    if type(text) is str:
        dtype = _FIXED.get(text)
        if dtype is None and len(text) <= 16:
            dtype = _sized(text)
        if dtype is not None:
            return dtype
    raise MalformedMessage(f"array type {str(text)[:40]!r} is not one that travels")


def text_of(dtype: np.dtype[Any]) -> str:
    """The text by which a dtype is known on the wire, such as ``"<f4"``.

    Raises:
        UnencodableValue: the dtype is not in the allow-list.
    """
    text = _TEXT_OF.get(dtype)
    if text is None:
        if dtype.kind in "SUMm" and _SIZED.fullmatch(dtype.str):
            return dtype.str
        raise UnencodableValue(f"arrays of dtype {dtype} have no exact form on the wire", dtype=str(dtype))
    return text


def array_map(array: np.ndarray[Any, Any], key_style: KeyStyle) -> dict[Any, Any]:
    """An array as the map that travels; any shape (0-d and empty too), any memory order.

    Copies until it is a message: one into C order if it is not (or is small), one into the packer's buffer,
    one out of it. A large contiguous array is handed to the packer as a view of its own memory.

    Raises:
        UnencodableValue: the dtype is not in the allow-list.
    """
    dtype = array.dtype
    text = text_of(dtype)
    data: bytes | memoryview
    if array.nbytes >= _VIEW_FROM_BYTES and array.flags.c_contiguous:
        # datetimes have no buffer protocol: their integers do
        data = (array.view(np.int64) if dtype.kind in "Mm" else array).data
    else:
        data = array.tobytes()
    if key_style == "bytes":
        return {b"nd": True, b"type": text, b"kind": b"", b"shape": list(array.shape), b"data": data}
    return {"nd": True, "type": text, "kind": "", "shape": list(array.shape), "data": data}


def scalar_map(scalar: np.generic, key_style: KeyStyle) -> dict[Any, Any]:
    """A numpy scalar as the map that travels.

    Raises:
        UnencodableValue: its type is not in the allow-list.
    """
    data: bytes
    if isinstance(scalar, np.str_):
        # not by its buffer: np.str_("") has one of four bytes, and "a\0" read back as an item loses the NUL
        data = scalar.encode("utf-32-le", "surrogatepass")
        text = f"<U{len(data) // 4}"
    elif isinstance(scalar, np.bytes_):
        data = bytes(scalar)
        text = f"|S{len(data)}"
    else:
        text, data = text_of(scalar.dtype), scalar.tobytes()
    if key_style == "bytes":
        return {b"nd": False, b"type": text, b"data": data}
    return {"nd": False, "type": text, "data": data}


def from_map(form: Mapping[Any, Any], key_style: KeyStyle) -> np.ndarray[Any, Any] | np.generic:
    """The array or scalar that a map stands for.

    Args:
        form: a map with the key ``nd`` in the given style, from a peer.
        key_style: how the map's keys are written.

    Returns:
        a scalar, or an array that nobody else has, writable, C-contiguous and aligned: one copy of the data, which was
        itself copied once, out of the message (or not: a view of one, see :mod:`meshrl.wire.large`).

    Raises:
        MalformedMessage: a field is missing or of a wrong type, the dtype is not in the allow-list, or shape
            and number of bytes do not fit.
    """
    if key_style == "bytes":
        nd, text, kind = form[b"nd"], form.get(b"type"), form.get(b"kind")
        shape, data = form.get(b"shape"), form.get(b"data")
    else:
        nd, text, kind = form["nd"], form.get("type"), form.get("kind")
        shape, data = form.get("shape"), form.get("data")
    if type(nd) is not bool or (type(data) is not bytes and type(data) is not memoryview):
        raise MalformedMessage("an array without its nd flag or its data")
    if kind:  # "V": structured; "O": a pickle
        raise MalformedMessage("an array of a kind that never travels")
    return _array(text, shape, data) if nd else _scalar(text, bytes(data))


def _array(text: object, shape: object, data: bytes | memoryview) -> np.ndarray[Any, Any]:
    dtype = dtype_of(text)
    if type(shape) is not list or len(shape) > 64:
        raise MalformedMessage("an array without a shape, or with more dimensions than there are")
    size = dtype.itemsize  # Python's integers do not overflow; numpy itself refuses more dimensions than it has
    for length in shape:
        # bounded, because the product of long ints takes minutes
        if type(length) is not int or not 0 <= length < 1 << 63:
            raise MalformedMessage("an array whose shape is not of natural numbers")
        size *= length
    if size != len(data):
        raise MalformedMessage(f"an array of shape {str(shape)[:60]} and type {text} with {len(data)} bytes")
    if dtype.kind in "bU":
        _check_items(dtype, data)
    try:
        array = np.ndarray(shape, dtype, data)
        # A message that can be written to is its reader's own; items of one byte lie right in it wherever they lie.
        return array if array.flags.writeable and array.flags.aligned else array.copy()
    except ValueError as exc:  # too many dimensions, or empty with one too long
        raise MalformedMessage(f"an array of shape {str(shape)[:60]}: {exc}") from exc


def _scalar(text: object, data: bytes) -> np.generic:
    if type(text) is str and _TEXT_SCALAR.fullmatch(text):
        return _text_scalar(text, data)
    dtype = dtype_of(text)
    if dtype.itemsize != len(data):
        raise MalformedMessage(f"a scalar of type {text} with {len(data)} bytes")
    _check_items(dtype, data)
    scalar: np.generic = np.frombuffer(data, dtype)[0]
    return scalar


def _text_scalar(text: str, data: bytes) -> np.generic:
    size = int(text[2:])
    if text[1] == "S":
        if size != len(data):
            raise MalformedMessage(f"a scalar of type {text} with {len(data)} bytes")
        return np.bytes_(data)
    if size * 4 != len(data):
        raise MalformedMessage(f"a scalar of type {text} with {len(data)} bytes")
    try:
        return np.str_(data.decode("utf-32-le" if text[0] == "<" else "utf-32-be", "surrogatepass"))
    except UnicodeDecodeError as exc:
        raise MalformedMessage("a text scalar with what is not a code point") from exc


def _check_items(dtype: np.dtype[Any], data: bytes | memoryview) -> None:
    """Refuse bytes that numpy would take but no array of this dtype holds."""
    if not data:
        return
    if dtype.kind == "b":
        # For few, numpy takes longer to begin than all of this.
        if type(data) is bytes and len(data) <= _FEW_BYTES:
            others = bool(data.translate(None, b"\0\1"))
        else:
            others = bool(np.frombuffer(data, np.uint8).max() > 1)
        if others:
            raise MalformedMessage("an array of bool with bytes other than 0 and 1")
    elif dtype.kind == "U" and np.frombuffer(data, dtype.byteorder + "u4").max() > _MAX_CODE_POINT:
        raise MalformedMessage("an array of text with what is not a code point")
