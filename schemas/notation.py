"""Values as JSON that says their exact types: how the golden vectors write what a message means.

A value is a map with one key, its type (``float`` has its bits beside it)::

    {"none": null}  {"bool": true}  {"int": "123"}  {"str": "text"}  {"bytes": "00ff"}  {"bytearray": "00ff"}
    {"float": 1.5, "bits": "3ff8000000000000"}     null and the bits for NaN and the infinities
    {"complex": ["3ff8000000000000", "0000000000000000"]}
    {"list": [...]}  {"tuple": [...]}  {"set": [...]}  {"frozenset": [...]}  {"dict": [[key, value], ...]}
    {"graph": [nodes, edges, links]}
    {"array": {"dtype": "<f4", "shape": [2], "data": "0000803f00000040"}}   {"scalar": {"dtype": "<f8", "data": ...}}

Bytes are hexadecimal. Two values are the same, types and bits included, when their notations are equal.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance

Notation = dict[str, Any]


def note(value: Any) -> Notation:
    """A value in the notation.

    Raises:
        TypeError: it has none.
    """
    if isinstance(value, np.ndarray):
        return {"array": {"dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes().hex()}}
    if isinstance(value, np.generic):
        return {"scalar": _note_scalar(value)}
    if isinstance(value, GraphInstance):
        return {"graph": [note(part) for part in value]}
    write = _WRITE.get(type(value))
    if write is None:
        raise TypeError(f"{type(value).__name__} has no notation")
    return write(value)


def _note_scalar(value: np.generic) -> Notation:
    if isinstance(value, np.str_):
        data = value.encode("utf-32-le", "surrogatepass")
        return {"dtype": f"<U{len(data) // 4}", "data": data.hex()}
    if isinstance(value, np.bytes_):
        return {"dtype": f"|S{len(value)}", "data": bytes(value).hex()}
    return {"dtype": value.dtype.str, "data": value.tobytes().hex()}


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _in_order(items: Any) -> list[Notation]:
    return sorted((note(item) for item in items), key=json.dumps)


_WRITE: dict[type, Callable[[Any], Notation]] = {
    type(None): lambda _: {"none": None},
    bool: lambda value: {"bool": value},
    int: lambda value: {"int": str(value)},
    float: lambda value: {"float": value if math.isfinite(value) else None, "bits": _bits(value)},
    complex: lambda value: {"complex": [_bits(value.real), _bits(value.imag)]},
    str: lambda value: {"str": value},
    bytes: lambda value: {"bytes": value.hex()},
    bytearray: lambda value: {"bytearray": value.hex()},
    list: lambda value: {"list": [note(item) for item in value]},
    tuple: lambda value: {"tuple": [note(item) for item in value]},
    set: lambda value: {"set": _in_order(value)},
    frozenset: lambda value: {"frozenset": _in_order(value)},
    dict: lambda value: {"dict": [[note(key), note(item)] for key, item in value.items()]},
}


def value_of(notation: Notation) -> Any:
    """The value that a notation stands for."""
    kind, content = next(iter(notation.items()))
    return _READ[kind](notation["bits"] if kind == "float" else content)


def _float(bits: str) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return number


def _array(content: Notation) -> np.ndarray[Any, Any]:
    data = bytearray.fromhex(content["data"])
    return np.frombuffer(data, np.dtype(content["dtype"])).reshape(content["shape"])


def _scalar(content: Notation) -> np.generic:
    data, dtype = bytes.fromhex(content["data"]), content["dtype"]
    if dtype[1] == "U":
        return np.str_(data.decode("utf-32-le", "surrogatepass"))
    if dtype[1] == "S":
        return np.bytes_(data)
    scalar: np.generic = np.frombuffer(data, np.dtype(dtype))[0]
    return scalar


_READ: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "bool": bool,
    "int": int,
    "float": _float,
    "complex": lambda parts: complex(_float(parts[0]), _float(parts[1])),
    "str": str,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "list": lambda items: [value_of(item) for item in items],
    "tuple": lambda items: tuple(value_of(item) for item in items),
    "set": lambda items: {value_of(item) for item in items},
    "frozenset": lambda items: frozenset(value_of(item) for item in items),
    "dict": lambda items: {value_of(key): value_of(item) for key, item in items},
    "graph": lambda parts: GraphInstance(*(value_of(part) for part in parts)),
    "array": _array,
    "scalar": _scalar,
}
