"""Comparing: why a value is outside a space, where two episodes differ, which arrays can be written to.

Equal means equal bits: two values are the same when they have the same form on the wire, types included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.wire.codec import pack

SHOWN_CHARS = 80


@dataclass
class Transition:
    """What one step gave."""

    obs: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: Any


@dataclass
class Episode:
    """What one reset and the steps after it gave.

    Attributes:
        worker: the id of the worker where it ran.
        obs: of the reset.
        info: of the reset.
        steps: one a step.
    """

    worker: str
    obs: Any
    info: Any
    steps: list[Transition] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the env ended it, rather than the suite."""
        return bool(self.steps) and bool(self.steps[-1].terminated or self.steps[-1].truncated)

    def observations(self) -> Iterator[tuple[str, Any]]:
        """Each observation, and where it came from in words."""
        yield "reset", self.obs
        for n, step in enumerate(self.steps, 1):
            yield f"step {n}", step.obs


def same(one: object, other: object) -> bool:
    """Whether two values are equal bit for bit, NaN and types included."""
    return pack(one) == pack(other)


def difference(one: Episode, other: Episode) -> str | None:
    """Where two episodes first differ in observation, reward or flags; None when nowhere."""
    if not same(one.obs, other.obs):
        return f"the observation of reset is {short(one.obs)} and {short(other.obs)}"
    for n, (a, b) in enumerate(zip(one.steps, other.steps, strict=False), 1):
        for what in ("obs", "reward", "terminated", "truncated"):
            x, y = getattr(a, what), getattr(b, what)
            if not same(x, y):
                what = "observation" if what == "obs" else what  # noqa: PLW2901
                return f"{what} of step {n} is {short(x)} and {short(y)}"
    if len(one.steps) != len(other.steps):
        return f"one has {len(one.steps)} steps, the other {len(other.steps)}"
    return None


def info_difference(one: Episode, other: Episode) -> str | None:
    """The first key of an info in which two episodes differ that are equal otherwise; None when there is none."""
    pairs = [
        (one.info, other.info),
        *((a.info, b.info) for a, b in zip(one.steps, other.steps, strict=False)),
    ]
    for n, (a, b) in enumerate(pairs):
        if not (isinstance(a, dict) and isinstance(b, dict)):
            continue  # the check of infos is about that
        for key in {**a, **b}:
            if key not in a or key not in b or not same(a[key], b[key]):
                return f"info[{key!r}] of {f'step {n}' if n else 'reset'}"
    return None


def why_outside(space: spaces.Space[Any], value: Any, at: str = "") -> str | None:
    """Why ``value`` is no member of ``space``, in words that begin with what it is; None when it is one."""
    where = f"at {at} it " if at else "it "
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping):
            return f"{where}is {type(value).__name__}, not a dict"
        if set(value) != set(space.spaces):
            return f"{where}has the keys {sorted(map(str, value))}, not {sorted(map(str, space.spaces))}"
        return _first(why_outside(part, value[key], f"{at}[{key!r}]") for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple):
            return f"{where}is {type(value).__name__}, not a tuple"
        if len(value) != len(space.spaces):
            return f"{where}has {len(value)} parts, not {len(space.spaces)}"
        return _first(why_outside(part, value[i], f"{at}[{i}]") for i, part in enumerate(space.spaces))
    if isinstance(space, spaces.Box):
        # Box.contains warns about anything that is not an array, and says nothing about why.
        return _outside_box(space, value, where)
    if space.contains(value):
        return None
    return f"{where}is {short(value)} ({type(value).__name__}), not in {short(space)}"


def _outside_box(space: spaces.Box, value: Any, where: str) -> str | None:
    if not isinstance(value, np.ndarray):
        return f"{where}is {type(value).__name__}, not an array of shape {space.shape} and dtype {space.dtype}"
    if not np.can_cast(value.dtype, space.dtype):
        return f"{where}has dtype {value.dtype}, not {space.dtype}"
    if value.shape != space.shape:
        return f"{where}has shape {value.shape}, not {space.shape}"
    if value.dtype.kind == "f" and bool(np.isnan(value).any()):
        return f"{where}has NaN at index {list(_index(np.isnan(value)))}"
    outside = (value < space.low) | (value > space.high)
    if bool(outside.any()):
        i = _index(outside)
        at = f" at index {list(i)}" if i else ""
        return f"{where}has {value[i]}{at}, not from {space.low[i]} to {space.high[i]}"
    return None


def _index(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])


def _first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def arrays(value: Any) -> Iterator[NDArray[Any]]:
    """Every array in a value, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from arrays(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from arrays(part)


def short(value: object) -> str:
    """``value`` in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
