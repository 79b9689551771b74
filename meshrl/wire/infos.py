"""Infos of sub-environments, packed where they arise, and merged (or taken apart again) where they arrive.

Rule: what :func:`merge_infos` returns is what one local SyncVectorEnv over all the sub-environments would have built
with Gymnasium's ``_add_info``, whatever the shards: keys in the same order, the same arrays, dtypes and ``_key``
masks. Whatever cannot be told for certain from whole columns is left to ``_add_info`` itself, entry by entry.

How they travel is said in :mod:`meshrl.wire.info_forms`. A vector implementation that merges infos itself has a form of
its own, :mod:`meshrl.wire.merged_infos`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire.arrays import SCALAR_TYPES
from meshrl.wire.info_forms import (
    MAX_DEPTH,
    MAX_GROUPS,
    OBJECTS,
    Columns,
    Entries,
    Group,
    Rows,
    indices_of,
    read_told,
    value_of,
)
from meshrl.wire.merged_infos import Merged, join_merged, read_merged

__all__ = ["MAX_GROUPS", "merge_infos", "pack_infos", "pick_infos", "split_infos"]

_PYTHON: dict[type, type[np.generic]] = {int: np.int64, float: np.float64, bool: np.bool_}
# timedelta64 is a np.number too, but the unit is of the value, not of the type that _add_info makes the array of.
_NUMPY = frozenset(kind for kind in SCALAR_TYPES if issubclass(kind, np.number)) - {np.timedelta64}
# Exact types that _add_info keeps in object arrays, before the codec and after it.


class _Local(VectorEnv[Any, Any, Any]):
    """Gymnasium's own ``_add_info``, of the version that is installed."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def add(self, infos: dict[str, Any], info: dict[str, Any], i: int) -> dict[str, Any]:
        return self._add_info(infos, info, i)


# ------------------------------------------------------------------------- out


def pack_infos(entries: Sequence[tuple[int, dict[str, Any]]], num_envs: int) -> Any:
    """The infos of one step or reset, as they travel.

    Arrays and other values of the infos may be in the result: it is to be packed before the envs run again.

    Args:
        entries: pairs (index of the sub-environment within the shard, its info) in the order in which SyncVectorEnv
            would add them: ascending, at most two of each. Empty infos may be left out, or cost some 30 ns each.
        num_envs: sub-environments of the shard.

    Returns:
        what goes under ``infos``; None when there is nothing in any info, and the field is left out.
    """
    told = [entry for entry in entries if entry[1]]
    if not told:
        return None
    return _pack_columns(told, num_envs) or {"entries": [[i, info] for i, info in told]}


def _pack_columns(told: list[tuple[int, dict[str, Any]]], num_envs: int) -> dict[str, Any] | None:
    """The infos as columns; None when they have no such form, or it would not be the shorter one."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    numbers: dict[tuple[Any, ...], int] = {}
    group = []
    for _, info in told:
        signature = _signature(info)
        if signature in groups:
            groups[signature].append(info)
        else:
            numbers[signature] = len(groups)
            groups[signature] = [info]
        group.append(numbers[signature])
    if len(groups) > MAX_GROUPS or 2 * len(groups) > len(told):
        return None
    columns = []
    for infos in groups.values():
        column = _group(infos, 0)
        if column is None:
            return None
        columns.append(column)
    packed: dict[str, Any] = {"columns": columns}
    at = [i for i, _ in told]
    if at != list(range(num_envs)):
        if len(set(zip(at, group, strict=True))) != len(at):
            return None  # a sub-environment twice in one group: which is the later one would be lost
        packed["at"] = np.array(at, np.int32)
    if len(groups) > 1:
        packed["group"] = np.array(group, np.uint8)
    return packed


def _signature(info: dict[str, Any]) -> tuple[Any, ...]:
    """The keys, then the types of their values."""
    return (*info, *map(type, info.values()))


def _group(infos: list[dict[str, Any]], depth: int) -> Group | None:
    """Infos of one signature as columns; None when a value has no column."""
    group: Group = {}
    for key, first in infos[0].items():
        if type(key) is not str or key.startswith("_"):
            return None
        column = _column(key, type(first), [info[key] for info in infos], depth)
        if column is None:
            return None
        group[key] = column
    return group


def _column(key: str, kind: type, values: list[Any], depth: int) -> list[Any] | None:
    """Values of one exact type as a column; None when they have none that gives back just them."""
    if key == "final_obs" or kind in OBJECTS:
        return ["object", values]
    if kind in _PYTHON:
        try:
            return ["scalar", np.array(values, _PYTHON[kind])]
        except OverflowError:  # an int over 64 bit
            return None
    if kind in _NUMPY:
        return ["numpy", np.array(values, kind)]
    if kind is np.ndarray:
        shape, dtype = values[0].shape, values[0].dtype
        if len(shape) >= MAX_DEPTH or dtype.hasobject or any(v.shape != shape or v.dtype != dtype for v in values):
            return None
        return ["array", np.array(values, dtype)]  # a third of the time of np.stack, and in their byte order
    if kind is dict and depth < MAX_DEPTH:
        first = _signature(values[0])
        if all(_signature(value) == first for value in values):
            inner = _group(values, depth + 1)
            return None if inner is None else ["map", inner]
    return None


# -------------------------------------------------------------------------- in


def merge_infos(parts: Sequence[tuple[Any, int, int]], num_envs: int) -> dict[str, Any]:
    """The infos of a vector, from those of its shards.

    Parts of the *merged* form are joined key by key along the first axis; a shard without a key has zeros there (None
    in object arrays, False in masks). What cannot be joined (dtypes or shapes differ, or it is a value of a whole
    shard) becomes an object array with each sub-environment's row, or its shard's value. The only part, if it is all
    of the vector, is given back as it was.

    The parts are used up: values of theirs may be in the result.

    Args:
        parts: of each shard, what travelled under ``infos`` (None if nothing did) or what
            :func:`~meshrl.wire.info_forms.read_told` made of it, the index of its first sub-environment, and how many
            it has; the last two are the client's own knowledge.
        num_envs: sub-environments of the whole vector.

    Returns:
        the infos: arrays of first axis ``num_envs``, owned and writable, with their masks.

    Raises:
        MalformedMessage: a part has none of the forms, or an index, length or type in it is wrong.
        Exception: the infos themselves cannot be merged: what ``_add_info`` raises, as it would locally. A value that
            an array does not take is a ValueError, TypeError or OverflowError, a dict where another sub-environment
            has something else an AttributeError or IndexError.
    """
    present = [part for part in parts if part[0] is not None]
    if not present:
        return {}
    read = [_read(*part) for part in sorted(present, key=lambda part: part[1])]
    plain = [part for part in read if not isinstance(part, Merged)]
    try:
        if len(plain) == len(read):
            return _merge(plain, num_envs)
        return join_merged([(_alone(part), part.offset, part.count) for part in read], num_envs)
    except RecursionError as exc:
        raise MalformedMessage("infos that are nested too deeply") from exc


def split_infos(parts: Sequence[tuple[Any, int, int]], num_envs: int) -> list[list[dict[str, Any]]]:
    """The infos of a vector one by one, with exactly the types that the envs gave; nothing is merged.

    The parts are used up: values of theirs may be in the result.

    Args:
        parts: as for :func:`merge_infos`.
        num_envs: sub-environments of the whole vector.

    Returns:
        of each sub-environment, in global order, what :func:`pack_infos` was given: no info where it was empty, and in
        SAME_STEP two at most: ``final_obs`` with ``final_info``, and the reset's.

    Raises:
        MalformedMessage: a part is nothing that :func:`pack_infos` gives, or an index, length or type in it is wrong.
    """
    infos: list[list[dict[str, Any]]] = [[] for _ in range(num_envs)]
    try:
        for part in parts:
            if part[0] is None:
                continue
            read = _read(*part)
            if isinstance(read, Merged):
                raise MalformedMessage("infos that were merged already cannot be taken apart")
            for i, info in read.entries():
                infos[i].append(info)
    except RecursionError as exc:
        raise MalformedMessage("infos that are nested too deeply") from exc
    return infos


def _alone(part: Entries | Columns | Merged) -> dict[str, Any]:
    """The infos of a vector that is this part only."""
    return part.infos if isinstance(part, Merged) else _merge([replace(part, offset=0)], part.count)


def _merge(parts: list[Entries | Columns], num_envs: int) -> dict[str, Any]:
    vector = _Local(num_envs)
    infos: dict[str, Any] = {}
    if all(isinstance(part, Columns) and _place_groups(vector, infos, part) for part in parts):
        return infos
    infos = {}
    for part in parts:
        for i, info in part.entries():
            infos = vector.add(infos, info, i)
    return infos


def _place_groups(vector: _Local, infos: dict[str, Any], part: Columns) -> bool:
    """Put all groups of a shard into the infos; see :func:`_place`."""
    return all(_place(vector, infos, group, rows, not n) for n, (group, rows) in enumerate(part.groups()))


def _place(vector: _Local, infos: dict[str, Any], group: Group, rows: Rows, first_here: bool) -> bool:
    """Put the columns of one group into the infos, a key at a time.

    A key's array and mask are made by ``_add_info``, of the group's first value. Groups come in global order of first
    appearance, since that decides the order of keys and the dtypes.

    Args:
        vector: of the whole.
        infos: to be filled.
        group: checked columns.
        rows: the global indices of their sub-environments.
        first_here: whether no other group of these sub-environments has been placed.

    Returns:
        whether that is certainly what ``_add_info`` would have done entry by entry; if not, ``infos`` are worthless.
    """
    first = rows.start if isinstance(rows, slice) else int(rows[0])
    for key, (kind, values) in group.items():
        known = key in infos
        if not known:
            vector.add(infos, {key: {} if kind == "map" else value_of(kind, values, 0)}, first)
        array, mask = infos[key], infos[f"_{key}"]
        if kind == "map":
            if type(array) is not dict or not _place(vector, array, values, rows, first_here):
                return False
        elif not isinstance(array, np.ndarray):
            return False
        elif known and not first_here and mask[rows].any():
            return False  # a sub-environment has two values, of which the later one counts
        elif kind == "object":
            if not array.dtype.hasobject:
                return False
            for i, value in zip(indices_of(rows), values, strict=True):
                array[i] = value
        elif _takes(array, values):
            array[rows] = values
        else:
            return False
        mask[rows] = True
    return True


def _takes(array: NDArray[Any], values: NDArray[Any]) -> bool:
    """Whether assigning the values at once casts them as assigning them one by one does, and cannot fail."""
    if array.dtype == values.dtype:
        return array.shape[1:] == values.shape[1:]
    if array.ndim != 1 or values.ndim != 1:
        return False
    # FrozenLake's reset says {"prob": 1}, its step {"prob": 0.33}: with autoreset one meets the other in each step.
    if array.dtype == np.float64:
        return values.dtype in (np.int64, np.bool_)
    if array.dtype == np.int64:
        if values.dtype == np.float64:  # cut off towards zero; NaN and what has no int64 is an error one by one
            return bool((np.abs(values) < 2.0**63).all())
        return values.dtype == np.bool_
    return False


def pick_infos(part: Any, rows: Sequence[int] | NDArray[np.int64], num_envs: int) -> Any:
    """What travelled, of some sub-environments alone.

    Args:
        part: as :func:`pack_infos` gave it.
        rows: which, each once; they are numbered anew in this order.
        num_envs: how many sub-environments it is of.

    Raises:
        MalformedMessage: it is nothing that :func:`pack_infos` gives.
    """
    read = _read(part, 0, num_envs)
    if isinstance(read, Merged):
        raise MalformedMessage("infos that were merged already cannot be taken apart")
    new = {int(row): k for k, row in enumerate(rows)}
    picked = [[new[i], info] for i, info in read.entries() if i in new]
    picked.sort(key=itemgetter(0))  # stable: the entries of one sub-environment keep their order
    return {"entries": picked} if picked else None


def _read(part: object, offset: int, count: int) -> Entries | Columns | Merged:
    """What travelled, checked so that nothing in it can fail later but Gymnasium's own merging."""
    if isinstance(part, Entries | Columns):  # it was read before
        return replace(part, offset=offset)
    told = read_told(part, offset, count)
    if told is not None:
        return told
    if type(part) is dict and "merged" in part:
        return Merged(read_merged(part["merged"], count), offset, count)
    raise MalformedMessage("infos that are neither entries, nor columns, nor merged")
