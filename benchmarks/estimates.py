"""Medians over rounds, and what they are worth: paired ratios and differences with bootstrap intervals.

Both sides of a ratio were measured within moments of each other in each round. So the ratio is taken a round, and the
median of those is the figure: what the machine did to one round, it did to both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 4000

Values = Sequence[float | None]
"""A value a round; None where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A median over rounds with its interval.

    Attributes:
        value: the median.
        low: of the bootstrap interval of the median, at :data:`LEVEL`.
        high: of the same.
        rounds: how many values it is of.
    """

    value: float
    low: float
    high: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def present(values: Values) -> list[float]:
    """The rounds that have a value."""
    return [one for one in values if one is not None]


def median(values: Values) -> float:
    """Over the rounds that have a value.

    Raises:
        ValueError: none has.
    """
    there = present(values)
    if not there:
        raise ValueError("no round has a value")
    return statistics.median(there)


def estimate(values: Values) -> Estimate:
    """The median and its percentile bootstrap interval (Efron 1979); the same draws for the same number of rounds.

    Raises:
        ValueError: no round has a value.
    """
    there = np.asarray(present(values), np.float64)
    middle = median(values)
    draws = np.random.default_rng(0).integers(0, len(there), (DRAWS, len(there)))
    low, high = np.quantile(np.median(there[draws], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(middle, float(low), float(high), len(there))


def ratio(over: Values, under: Values) -> Estimate:
    """The median of each round's ``over / under``.

    Raises:
        ValueError: no round has both.
    """
    return estimate(_paired(over, under, lambda a, b: a / b))


def difference(of: Values, less: Values) -> Estimate:
    """The median of each round's ``of - less``.

    Raises:
        ValueError: no round has both.
    """
    return estimate(_paired(of, less, lambda a, b: a - b))


def quantiles(samples: Sequence[float], parts: int = 200) -> list[float]:
    """``parts + 1`` evenly spaced quantiles, the least and the greatest included."""
    return [round(float(one), 2) for one in np.quantile(np.asarray(samples), np.linspace(0, 1, parts + 1))]


def _paired(left: Values, right: Values, combine: Callable[[float, float], float]) -> list[float]:
    pairs = zip(left, right, strict=True)
    return [combine(a, b) for a, b in pairs if a is not None and b is not None]
