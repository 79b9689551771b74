"""Infos of vector implementations that merge them themselves, as they travel and as the client joins them.

Rule: keys and masks stay as the implementation made them; nothing is merged again, only joined along the first axis.
The form is ``{"merged": {key: column}}``, with the columns of :mod:`meshrl.wire.info_forms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire.info_forms import MAX_DEPTH, Group, is_by_env, is_column, pair


@dataclass(slots=True)
class Merged:
    """Infos that are merged already, of one shard.

    Attributes:
        infos: as the implementation gave them.
        offset: the global index of its first sub-environment.
        count: how many it has.
    """

    infos: dict[str, Any]
    offset: int
    count: int


def pack_merged(infos: dict[str, Any], num_envs: int) -> Any:
    """The infos of a vector implementation that merges them itself, as they travel.

    Arrays whose first axis is ``num_envs`` long are by sub-environment, dicts are looked into, anything else is one
    value of the whole shard. Arrays are not copied: the result is to be packed before the envs run again.

    Args:
        infos: what the implementation's step or reset returned, masks included.
        num_envs: sub-environments of the shard.

    Returns:
        what goes under ``infos``; None when there is nothing in it, and the field is left out.
    """
    return {"merged": _merged_group(infos, num_envs, 0)} if infos else None


def _merged_group(infos: dict[str, Any], num_envs: int, depth: int) -> Group:
    group: Group = {}
    for key, value in infos.items():
        if type(value) is dict and depth < MAX_DEPTH:
            group[key] = ["map", _merged_group(value, num_envs, depth + 1)]
        elif not is_by_env(value, num_envs):
            group[key] = ["value", value]
        elif not value.dtype.hasobject:
            group[key] = ["array", value]
        else:  # an object array of more axes has no form: the codec says so, with its path
            group[key] = ["object", list(value)] if value.ndim == 1 else ["value", value]
    return group


def read_merged(group: object, count: int, depth: int = 0) -> dict[str, Any]:
    """What travelled under ``merged``, checked, as the implementation gave it.

    Args:
        group: what travelled.
        count: sub-environments of the shard.
        depth: how deep it stands.

    Raises:
        MalformedMessage: it is nothing that :func:`pack_merged` gives.
    """
    if type(group) is not dict or depth > MAX_DEPTH:
        raise MalformedMessage("merged infos that are not a map, or nested too deeply")
    infos: dict[str, Any] = {}
    for key, column in group.items():
        kind, values = pair(column)
        if kind == "map":
            infos[key] = read_merged(values, count, depth + 1)
        elif kind == "value":
            infos[key] = values
        elif kind in ("array", "object") and is_column(kind, values, count):
            infos[key] = values if kind == "array" else np.fromiter(values, object, count)
        else:
            raise MalformedMessage(f"a column of merged infos that is not {count} values of a known kind")
    return infos


def join_merged(pieces: list[tuple[dict[str, Any], int, int]], num_envs: int) -> dict[str, Any]:
    """Infos that are merged already, along the first axis.

    Args:
        pieces: of each shard its infos, the index of its first sub-environment, and how many it has.
        num_envs: sub-environments of the whole vector.
    """
    if len(pieces) == 1 and pieces[0][2] == num_envs:
        return pieces[0][0]
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for infos, _, _ in pieces for key in infos):
        held = [(infos[key], offset, count) for infos, offset, count in pieces if key in infos]
        if all(type(value) is dict for value, _, _ in held):
            joined[key] = join_merged(held, num_envs)
        else:
            joined[key] = _join_rows(held, num_envs)
    return joined


def _join_rows(held: list[tuple[Any, int, int]], num_envs: int) -> NDArray[Any]:
    """One key's values of several shards as one array."""
    by_env = [is_by_env(value, count) for value, _, count in held]
    made: NDArray[Any] = np.full(num_envs, None, object)
    first = held[0][0]
    if all(by_env) and all(v.dtype == first.dtype and v.shape[1:] == first.shape[1:] for v, _, _ in held):
        if not first.dtype.hasobject:
            made = np.zeros((num_envs, *first.shape[1:]), first.dtype)
        for value, offset, count in held:
            made[offset : offset + count] = value
        return made
    for (value, offset, count), rows in zip(held, by_env, strict=True):
        for i in range(count):
            row = value[i] if rows else value
            made[offset + i] = row.copy() if isinstance(row, np.ndarray) else row
    return made
