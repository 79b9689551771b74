"""Actions are refused before anything is sent when shape, structure, dtype or a discrete range is wrong (D4).

A Box's bounds are checked only when asked for: real trainers send float64 and 1.0000001. What is sent is exactly what
the caller gave; nothing is cast or clipped here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from meshrl.errors import InvalidAction

Check = Callable[[Any], None]

_INTEGERS = (int, np.integer)


def checker(space: spaces.Space[Any], name: str, *, strict: bool = False) -> Check:
    """A function that raises for an action which does not fit ``space``.

    Args:
        space: the action space.
        name: the env's, for messages.
        strict: check a Box's bounds too.

    Returns:
        a function that gives None or raises :class:`~meshrl.errors.InvalidAction`.
    """
    check = _checker(space, strict, "")

    def checked(action: Any) -> None:
        problem = check(action)
        if problem is not None:
            raise InvalidAction(f"{name}: the action {problem} (action space: {_short(space)})", action=_short(action))

    return checked


_Problem = Callable[[Any], str | None]


def _checker(space: spaces.Space[Any], strict: bool, at: str) -> _Problem:
    where = f"at {at} " if at else ""
    if type(space) is spaces.Discrete:
        return _discrete(space, where)
    if type(space) is spaces.Box:
        return _box(space, where, strict)
    if type(space) in (spaces.MultiDiscrete, spaces.MultiBinary):
        return _multi(space, where)
    if type(space) is spaces.Dict:
        return _dict({key: _checker(part, strict, f"{at}[{key!r}]") for key, part in space.spaces.items()}, where)
    if type(space) is spaces.Tuple:
        return _tuple([_checker(part, strict, f"{at}[{i}]") for i, part in enumerate(space.spaces)], where)
    if type(space) is spaces.OneOf:
        return _one_of([_checker(part, strict, f"{at}[{i}]") for i, part in enumerate(space.spaces)], where)
    if type(space) is spaces.Sequence and not space.stack:
        return _sequence(_checker(space.feature_space, strict, f"{at}[...]"), where)

    def contained(action: Any) -> str | None:
        try:
            fits = space.contains(action)
        except Exception as exc:  # noqa: BLE001  # a space may stumble over what it does not expect
            return f"{where}cannot be checked: {type(exc).__name__}: {exc}"
        return None if fits else f"{where}is not in the space: {_short(action)}"

    return contained


def _discrete(space: spaces.Discrete[Any], where: str) -> _Problem:
    start = int(space.start)
    stop = start + int(space.n)

    def check(action: Any) -> str | None:
        if type(action) is int or isinstance(action, _INTEGERS):
            value = action
        elif isinstance(action, np.ndarray):
            if action.shape != () or action.dtype.kind not in "iu":
                return f"{where}is an array of shape {action.shape} and dtype {action.dtype}, not one whole number"
            value = action.item()
        else:
            return f"{where}is {type(action).__name__}, not a whole number"
        return None if start <= value < stop else f"{where}is {value}, not from {start} to {stop - 1}"

    return check


def _box(space: spaces.Box, where: str, strict: bool) -> _Problem:
    shape, dtype = space.shape, space.dtype
    # A float for an integer Box would be cut off somewhere; an integer or a wider float for a float Box is what
    # trainers send.
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(dtype.kind, dtype.kind)
    low, high = space.low, space.high

    def check(action: Any) -> str | None:
        if not isinstance(action, np.ndarray):
            if not isinstance(action, (list, tuple, float, int, np.generic)):
                return f"{where}is {type(action).__name__}, not an array of shape {shape}"
            try:
                action = np.asarray(action)
            except ValueError:
                return f"{where}is a ragged {type(action).__name__}, not an array of shape {shape}"
        if action.shape != shape:
            return f"{where}has shape {action.shape}, not {shape}"
        if action.dtype.kind not in kinds:
            return f"{where}has dtype {action.dtype}, not {dtype}"
        if strict and not bool(np.all((action >= low) & (action <= high))):
            return f"{where}is outside the bounds: {_short(action)}"
        return None

    return check


def _multi(space: Any, where: str) -> _Problem:
    shape = space.shape
    if isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(shape, np.int64), np.full(shape, 2, np.int64)
    else:
        low = np.asarray(space.start, np.int64) if hasattr(space, "start") else np.zeros(shape, np.int64)
        high = low + np.asarray(space.nvec, np.int64)

    def check(action: Any) -> str | None:
        if not isinstance(action, (np.ndarray, list, tuple)):
            return f"{where}is {type(action).__name__}, not an array of shape {shape}"
        try:
            values = np.asarray(action)
        except ValueError:
            return f"{where}is ragged, not an array of shape {shape}"
        if values.shape != shape:
            return f"{where}has shape {values.shape}, not {shape}"
        if values.dtype.kind not in "iub":
            return f"{where}has dtype {values.dtype}, not whole numbers"
        wrong = np.argwhere((values < low) | (values >= high))
        if len(wrong):
            index = tuple(int(i) for i in wrong[0])
            return f"{where}has {values[index]} at index {list(index)}, not from {low[index]} to {high[index] - 1}"
        return None

    return check


def _dict(parts: Mapping[Any, _Problem], where: str) -> _Problem:
    keys = set(parts)

    def check(action: Any) -> str | None:
        if not isinstance(action, Mapping):
            return f"{where}is {type(action).__name__}, not a dict with the keys {sorted(map(str, keys))}"
        if set(action) != keys:
            return f"{where}has the keys {sorted(map(str, action))}, not {sorted(map(str, keys))}"
        for key, part in parts.items():
            problem = part(action[key])
            if problem is not None:
                return problem
        return None

    return check


def _tuple(parts: list[_Problem], where: str) -> _Problem:
    def check(action: Any) -> str | None:
        if not isinstance(action, (tuple, list)):
            return f"{where}is {type(action).__name__}, not a tuple of {len(parts)}"
        if len(action) != len(parts):
            return f"{where}has {len(action)} parts, not {len(parts)}"
        for part, value in zip(parts, action, strict=True):
            problem = part(value)
            if problem is not None:
                return problem
        return None

    return check


def _one_of(parts: list[_Problem], where: str) -> _Problem:
    def check(action: Any) -> str | None:
        if not isinstance(action, (tuple, list)) or len(action) != 2 or not isinstance(action[0], _INTEGERS):
            return f"{where}is not a pair of a whole number and a value"
        which, value = action
        if not 0 <= which < len(parts):
            return f"{where}chooses {which}, not from 0 to {len(parts) - 1}"
        return parts[which](value)

    return check


def _sequence(item: _Problem, where: str) -> _Problem:
    def check(action: Any) -> str | None:
        if not isinstance(action, (tuple, list)):
            return f"{where}is {type(action).__name__}, not a tuple"
        return next((problem for value in action if (problem := item(value)) is not None), None)

    return check


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
