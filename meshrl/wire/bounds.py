"""Arrays of numbers as plain numbers and lists, for descriptions that other languages and JSON read.

Rule: one number stands for an array whose items are all the same, so that the bounds of an image take one
number and not a hundred thousand; the infinities, which JSON lacks, are ``"inf"`` and ``"-inf"``. Whoever
reads bounds the shape before an array of it is made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def numbers_of(array: np.ndarray[Any, Any]) -> Any:
    """An array's items: one if all have the same bits (0.0 and -0.0 do not), else all in C order."""
    array = np.asarray(array)
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size and flat.tobytes() == flat[:1].tobytes() * flat.size:
        return _number(flat[0].item())
    return [_number(item) for item in flat.tolist()]


def _number(item: float) -> Any:
    return repr(item) if isinstance(item, float) and math.isinf(item) else item


def array_of(value: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The array that :func:`numbers_of` wrote; the caller has bounded the shape.

    Args:
        value: a number, or a list with one for each item in C order, from a peer.
        shape: what the array shall have.
        dtype: bool, integer or floating.

    Raises:
        MalformedMessage: a number is missing, or is none that the dtype holds exactly.
    """
    if isinstance(value, list):
        if len(value) != math.prod(shape):
            raise MalformedMessage(f"{len(value)} numbers for an array of shape {shape}")
        return np.array([item_of(item, dtype) for item in value], dtype).reshape(shape)
    return np.full(shape, item_of(value, dtype), dtype)


def item_of(value: object, dtype: np.dtype[Any]) -> Any:
    """One number, checked to be one that the dtype holds exactly.

    Raises:
        MalformedMessage: it is not.
    """
    if dtype.kind == "b":
        exact = type(value) is bool
    elif dtype.kind == "f":
        if isinstance(value, str):
            value = _INFINITIES.get(value)
        with np.errstate(over="ignore"):
            exact = type(value) in (int, float) and float(dtype.type(value)) == value
    else:
        limits = np.iinfo(dtype)
        exact = type(value) is int and limits.min <= value <= limits.max
    if not exact:
        raise MalformedMessage(f"{str(value)[:40]} is not a number of type {dtype}")
    return value


def shape_of(value: object) -> tuple[int, ...]:
    """A shape: up to 64 natural numbers in a list.

    Raises:
        MalformedMessage: it is anything else.
    """
    if not isinstance(value, list) or len(value) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise MalformedMessage(f"a space of shape {str(value)[:40]}")
    return tuple(value)
