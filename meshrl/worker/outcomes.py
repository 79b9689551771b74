"""Outcomes: what came of steps and resets of sub-environments, as the columns of a reply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Info = dict[str, Any]


class Outcome(NamedTuple):
    """What came of one sub-environment's step or reset.

    Attributes:
        infos: those that are not empty, in the order in which Gymnasium merges them.
    """

    obs: Any
    reward: Any
    terminated: Any
    truncated: Any
    infos: Sequence[Info]


class Outcomes:
    """What came of several, in the order of the request: the columns of a reply."""

    __slots__ = ("infos", "obs", "rewards", "terminated", "truncated")

    def __init__(self) -> None:
        self.obs: list[Any] = []
        self.rewards: list[Any] = []
        self.terminated: list[Any] = []
        self.truncated: list[Any] = []
        self.infos: list[tuple[int, Info]] = []

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Outcomes:
        """The columns of single outcomes."""
        columns = cls()
        for k, outcome in enumerate(outcomes):
            columns.obs.append(outcome.obs)
            columns.rewards.append(outcome.reward)
            columns.terminated.append(outcome.terminated)
            columns.truncated.append(outcome.truncated)
            columns.infos += [(k, info) for info in outcome.infos]
        return columns


def rewards_of(values: list[Any]) -> NDArray[np.float64]:
    """Rewards as Gymnasium's vector envs cast them.

    Raises:
        Exception: one of them is no number.
    """
    column = np.asarray(values, np.float64)
    return column if column.ndim == 1 else _cast(values, np.dtype(np.float64))


def flags_of(values: list[Any]) -> NDArray[np.bool_]:
    """Terminations or truncations as Gymnasium's vector envs cast them."""
    column = np.asarray(values, np.bool_)
    return column if column.ndim == 1 else _cast(values, np.dtype(np.bool_))


def _cast(values: list[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    column = np.zeros(len(values), dtype)
    for k, value in enumerate(values):
        column[k] = value
    return column
