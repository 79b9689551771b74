"""Values that envs told, as they are: not all of them keep to their space, and some write to the same arrays again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.digests import Words, hashes_of
from meshrl.wire.batches import Batching


def hashes_of_values(
    batches: Batching,
    obs: list[Any],
    rewards: list[Any],
    terminated: list[Any],
    truncated: list[Any],
    anew: Sequence[int],
) -> Words:
    """Of what one env told, by its own values: as those of a batch, where they can be one."""
    told = numbers_of(rewards), truths_of(terminated), truths_of(truncated)
    try:
        leaves = list(batches.leaves(batches.rows_or_stack(obs), len(obs)))
    except Exception:  # noqa: BLE001  # an env need not keep to its space
        if len(obs) == 1:
            return hashes_of([obs], *told, anew)
        # What one is hashed as may not depend on those beside it.
        rows = zip(obs, rewards, terminated, truncated, strict=True)
        return np.concatenate(
            [
                hashes_of_values(batches, [one], [reward], [end], [cut], [0] if k in anew else [])
                for k, (one, reward, end, cut) in enumerate(rows)
            ]
        )
    return hashes_of(leaves, *told, anew)


def numbers_of(values: list[Any]) -> NDArray[np.float64]:
    """Rewards of one env as numbers; NaN for what is none."""
    try:
        column = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        column = np.empty(0)
    return column if column.shape == (len(values),) else np.fromiter(map(_number, values), np.float64)


def _number(value: Any) -> float:
    try:
        return float(np.asarray(value, np.float64).item())
    except (TypeError, ValueError):
        return float("nan")


def truths_of(values: list[Any]) -> NDArray[np.bool_]:
    """Flags of one env, by their truth."""
    return np.fromiter(map(bool, values), np.bool_, len(values))


def own(value: Any) -> Any:
    """A value with arrays that nobody else writes to."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: own(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a graph
        return type(value)(*map(own, value))
    return type(value)(map(own, value)) if type(value) in (tuple, list) else value
