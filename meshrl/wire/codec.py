"""Values to msgpack bytes and back, with their exact Python types.

Rule: what comes out has the type and the bits of what went in, or the value is refused by path before
anything is sent; and no bytes whatever do more on arrival than become a value or a
:class:`~meshrl.errors.MalformedMessage`.

msgpack itself keeps None, bool, int up to 64 bit, float, str, bytes, list and dicts with text keys. Arrays
and numpy scalars travel as msgpack-numpy's maps (:mod:`meshrl.wire.arrays`), complex numbers as its
``{"complex": True, "data": "(1+2j)"}``, and the rest as ``{"py": kind, "v": value}``::

    tuple, set, frozenset   v: the items                 bytearray   v: bin
    map                     v: [[key, value], ...]       int         v: "-0x1f..." beyond 64 bit
    graph                   v: [nodes, edges, links]     complex     v: [re, im] where repr loses bits (NaN)
    str                     v: bin, UTF-8 with lone surrogates passed

A dict with a key that is not text, or with one of the reserved keys (``nd``, ``py``, ``complex``), travels
as ``map``, so no value of a user's is ever taken for a form. Instances of subclasses (OrderedDict,
defaultdict, namedtuples, IntEnum, StrEnum, subclasses of int, float, str...) travel as their base type.
Subclasses of ndarray (a masked array has more than its data) and everything else raise
:class:`~meshrl.errors.UnencodableValue`.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from gymnasium.spaces import GraphInstance

from meshrl.errors import MalformedMessage, UnencodableValue
from meshrl.wire.arrays import SCALAR_TYPES, KeyStyle, array_map, from_map, scalar_map
from meshrl.wire.forms import RESERVED, revive
from meshrl.wire.large import LARGE_BYTES, Rows, large_array, pack_ending, parts_ending, unpack_ending

if TYPE_CHECKING:
    from collections.abc import Iterable

_TEXT: frozenset[type] = frozenset({str})
_LEAVES: frozenset[type] = SCALAR_TYPES | {type(None), bool, int, float, str, bytes, complex, np.ndarray}
_SEQUENCES: frozenset[type] = frozenset({list, tuple, set, frozenset, GraphInstance})

_ATOMS: frozenset[type] = frozenset({type(None), bool, int, float, str, bytes})

_ARRAY_KEYS: frozenset[str] = frozenset({"nd", "type", "kind", "shape", "data"})

# What is read without a hook at first may have to be read again: of a small message, that costs little.
_SMALL_BYTES = 4096
_MAX_DEPTH = 500  # msgpack's packer stops at 511

# The packer's buffer never shrinks: after a message larger than this it is thrown away with its packer.
_KEPT_BUFFER_BYTES = 4 * 1024 * 1024


class _NotNative(Exception):
    """The packer met a value that needs the slow path (a dict key that is an Enum, say)."""


class Codec:
    """Packs values for a peer; owned by one thread.

    A codec has one packer, which is not safe to share between threads: a worker has one codec a thread and
    key style. The functions :func:`pack` and :func:`unpack` are safe anywhere.

    Args:
        key_style: how the keys of array maps are written: ``"str"``, or ``"bytes"`` for peers that read with
            msgpack-numpy. Both are always read.
    """

    def __init__(self, key_style: KeyStyle = "str") -> None:
        self.key_style = key_style
        self._packer = self._new_packer()

    def _new_packer(self) -> msgpack.Packer:
        return msgpack.Packer(autoreset=True, strict_types=True, default=partial(_form, self.key_style))

    def pack(self, obj: Any) -> bytes:
        """The value as msgpack.

        Raises:
            UnencodableValue: it has no exact form; ``details["path"]`` tells where, as in ``info.x[3]``.
        """
        try:
            # The packer takes some types for others without asking (bytearray for bytes) and cannot see that
            # a dict has a reserved key; a look at the types in each container finds those cases.
            if _is_native(obj):
                body: bytes = self._packer.pack(obj)
            else:
                body = self._pack_lowered(obj)
        except UnencodableValue:
            body = self._pack_lowered(obj)  # raises the same with its path
        except (_NotNative, ValueError, OverflowError, RecursionError, RuntimeError):
            # a key of another type, a lone surrogate, too deep, or changed by another thread meanwhile
            body = self._pack_lowered(obj)
        if len(body) > _KEPT_BUFFER_BYTES:
            self._packer = self._new_packer()
        return body

    def pack_batch(self, frame: dict[str, Any]) -> bytes:
        """The same for a map with a batch of observations under ``obs``, which goes to its end if it is large.

        They may be :class:`~meshrl.wire.large.Rows` as well.
        """
        obs = large_array(frame.get("obs"))
        if obs is not None and self.key_style == "str":
            rest = {key: value for key, value in frame.items() if key != "obs"}
            # Where something needs the slow way, or has none, all of it goes there.
            with contextlib.suppress(
                UnencodableValue, _NotNative, ValueError, OverflowError, RecursionError, RuntimeError
            ):
                if _is_native(rest):
                    return pack_ending(self._packer.pack, rest, "obs", obs)
        return self.pack({**frame, "obs": obs.stacked()} if type(obs) is Rows else frame)

    def pack_in_parts(self, rest: dict[str, Any], key: str, array: np.ndarray[Any, Any] | Rows) -> list[Any]:
        """The map ``rest`` with a large array under ``key`` behind it, in pieces of which the array is itself.

        Raises:
            UnencodableValue: something of it has no exact form.
        """
        with contextlib.suppress(UnencodableValue, _NotNative, ValueError, OverflowError, RecursionError, RuntimeError):
            if _is_native(rest):
                return parts_ending(self._packer.pack, rest, key, array)
        return [self.pack({**rest, key: array.stacked() if type(array) is Rows else array})]

    def _pack_lowered(self, obj: Any) -> bytes:
        try:
            body: bytes = self._packer.pack(_lower(obj, self.key_style, "", 0))
        except RecursionError as exc:
            raise UnencodableValue("the value is nested too deeply, or contains itself", path="") from exc
        except (ValueError, OverflowError, TypeError) as exc:
            if isinstance(exc, UnencodableValue):
                raise
            raise UnencodableValue(f"the value cannot be packed: {exc}", path="") from exc
        return body

    def unpack(self, data: bytes | bytearray | memoryview) -> Any:
        """As the function :func:`unpack`."""
        return unpack(data)


class _PerThread(threading.local):
    codec: Codec | None = None


_PER_THREAD = _PerThread()


def pack(obj: Any) -> bytes:
    """The value as msgpack, keys of arrays as text; safe from any thread.

    Raises:
        UnencodableValue: it has no exact form; ``details["path"]`` tells where, as in ``info.x[3]``.
    """
    codec = _PER_THREAD.codec
    if codec is None:
        codec = _PER_THREAD.codec = Codec()
    return codec.pack(obj)


def pack_in_parts(rest: dict[str, Any], key: str, array: np.ndarray[Any, Any] | Rows) -> list[Any]:
    """As :meth:`Codec.pack_in_parts`; safe from any thread."""
    codec = _PER_THREAD.codec
    if codec is None:
        codec = _PER_THREAD.codec = Codec()
    return codec.pack_in_parts(rest, key, array)


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """The value that a message holds; safe from any thread.

    Reads both key styles. Maps with a key twice keep the last value, as msgpack does: looking for that would
    cost half as much again as reading. Nothing else is forgiven.

    Args:
        data: one whole message, from a peer; of a bytearray the caller keeps nothing: arrays may be made in it.

    Raises:
        MalformedMessage: it is anything else than one value of this codec.
    """
    try:
        if len(data) <= _SMALL_BYTES:
            body = msgpack.unpackb(data, ext_hook=_refuse_ext, max_ext_len=0)
            if type(body) is dict and _revived(body):
                return body
        elif len(data) >= LARGE_BYTES and not isinstance(data, memoryview):
            is_one, body = unpack_ending(data, revive, ext_hook=_refuse_ext, max_ext_len=0)
            if is_one:
                return body
        return msgpack.unpackb(data, object_hook=revive, ext_hook=_refuse_ext, max_ext_len=0)
    except MalformedMessage:
        raise
    except Exception as exc:  # unpackb raises a dozen classes; hooks TypeError (a list in a set) and more
        text = str(exc) or type(exc).__name__
        raise MalformedMessage(f"not a message: {text[:200]}", size_bytes=_size(data)) from exc


def _revived(body: dict[Any, Any]) -> bool:
    """Whether a map that was read without the hook is now as with it: it held nothing but plain values and arrays.

    A hook is a Python call for every map, and that is what most requests and replies of the step path hold.
    """
    if not RESERVED.isdisjoint(body):
        return False
    for key, value in body.items():
        kind = type(value)
        if kind in _ATOMS or not value:
            continue
        if kind is dict:
            if "nd" in value and _ARRAY_KEYS.issuperset(value):  # nothing in it that from_map does not look at
                body[key] = from_map(value, "str")
            elif not _revived(value):
                return False
        elif not _ATOMS.issuperset(map(type, value)):
            return False
    return True


def _size(data: object) -> int:
    return len(data) if isinstance(data, (bytes, bytearray, memoryview)) else -1


def _refuse_ext(code: int, data: bytes) -> Any:
    raise MalformedMessage(f"msgpack extension type {code} ({len(data)} bytes) is not of this protocol")


# ------------------------------------------------------------------------- out


def _is_native(value: Any, depth: int = 0) -> bool:
    """Whether packer and :func:`_form` write the value exactly."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or key in RESERVED:
                return False
            if type(item) not in _LEAVES and (depth == _MAX_DEPTH or not _is_native(item, depth + 1)):
                return False
        return True
    if kind not in _SEQUENCES:
        return kind in _LEAVES
    if _LEAVES.issuperset(map(type, value)):  # long lists of numbers at the speed of C
        return True
    for item in value:  # a generator costs as much as all the rest
        if type(item) not in _LEAVES and (depth == _MAX_DEPTH or not _is_native(item, depth + 1)):
            return False
    return True


def _form(key_style: KeyStyle, value: Any) -> Any:
    """One level of what the packer does not know: called by it, as its ``default``."""
    kind = type(value)
    if kind is np.ndarray:
        return array_map(value, key_style)
    if kind in SCALAR_TYPES:
        return scalar_map(value, key_style)
    if kind is tuple:
        return {"py": "tuple", "v": list(value)}
    if kind is int:
        return {"py": "int", "v": hex(value)}  # hexadecimal: linear in length, and no limit on digits
    if kind is complex:
        return _complex_form(value, key_style)
    if kind is set:
        return {"py": "set", "v": list(value)}
    if kind is frozenset:
        return {"py": "frozenset", "v": list(value)}
    if kind is GraphInstance:
        return {"py": "graph", "v": list(value)}
    raise _NotNative


def _complex_form(value: complex, key_style: KeyStyle) -> dict[Any, Any]:
    if value.real != value.real or value.imag != value.imag:  # NaN, whose bits repr loses
        return {"py": "complex", "v": [value.real, value.imag]}
    if key_style == "bytes":
        return {b"complex": True, b"data": repr(value)}
    return {"complex": True, "data": repr(value)}


def _lower(value: Any, key_style: KeyStyle, path: str, depth: int) -> Any:
    """The whole tree in the packer's own types: the slow path, for values that are not native and for errors.

    Raises:
        UnencodableValue: with the path of the first value that has no form.
    """
    if depth > _MAX_DEPTH:
        raise UnencodableValue("the value is nested too deeply, or contains itself", path=path)
    kind = type(value)
    if kind in _NATIVE or (kind is int and -(1 << 63) <= value < 1 << 64):
        return value
    if isinstance(value, dict):
        return _lower_dict(value, key_style, path, depth)
    if kind is list:
        return _lower_items(value, key_style, path, depth)
    if isinstance(value, str) and not isinstance(value, np.str_):
        return _lower_text(str.__str__(value))
    if kind is bytearray:
        return {"py": "bytearray", "v": bytes(value)}
    base = _base(value)
    if base is not value:
        return _lower(base, key_style, path, depth)
    try:
        # by isinstance: np.longlong is a type of its own where np.int64 is a C long, with the same text
        form = scalar_map(value, key_style) if isinstance(value, np.generic) else _form(key_style, value)
    except (_NotNative, UnencodableValue) as exc:
        name = f"{kind.__module__}.{kind.__qualname__}"
        why = exc.message if isinstance(exc, UnencodableValue) else f"{name} has no exact form on the wire"
        message = f"{path}: {why}" if path else why
        raise UnencodableValue(message, path=path, type=name) from None
    if isinstance(value, (tuple, set, frozenset)):
        form["v"] = _lower_items(form["v"], key_style, path, depth)
    return form


_NATIVE: frozenset[type] = frozenset({type(None), bool, float, bytes})


def _base(value: Any) -> Any:
    """An instance of a subclass as its base type; anything else as it is."""
    if type(value) in _LEAVES or type(value) in _SEQUENCES or isinstance(value, np.generic):
        return value
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, bytes):
        return bytes(memoryview(value))
    if isinstance(value, bytearray):
        return bytearray(memoryview(value))
    if isinstance(value, complex):
        return complex(value.real, value.imag)
    for base in (tuple, list, set, frozenset):
        if isinstance(value, base):
            return base(value)
    return value


def _lower_items(items: Iterable[Any], key_style: KeyStyle, path: str, depth: int) -> list[Any]:
    return [_lower(item, key_style, f"{path}[{i}]", depth + 1) for i, item in enumerate(items)]


def _lower_dict(value: dict[Any, Any], key_style: KeyStyle, path: str, depth: int) -> dict[str, Any]:
    pairs = [
        [_lower(k, key_style, _at(path, k), depth + 1), _lower(v, key_style, _at(path, k), depth + 1)]
        for k, v in dict.items(value)
    ]
    if all(type(k) is str and k not in RESERVED for k, _ in pairs):
        plain = dict(pairs)
        if len(plain) == len(pairs):
            return plain
    return {"py": "map", "v": pairs}


def _lower_text(text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:
        return {"py": "str", "v": text.encode("utf-8", "surrogatepass")}
    return text


def _at(path: str, key: object) -> str:
    if type(key) is str and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{str(key)[:40]!r}]" if isinstance(key, str) else f"{path}[{type(key).__name__}]"
