"""Infos of sub-environments, as they travel and as the client merges them (or takes them apart again).

Rule: what :func:`merge_infos` returns is what one local SyncVectorEnv over all the sub-environments would have built
with Gymnasium's ``_add_info``, whatever the shards: keys in the same order, the same arrays, dtypes and ``_key``
masks. Whatever cannot be told for certain from whole columns is left to ``_add_info`` itself, entry by entry.

What travels under ``infos`` of a reply has one of three forms::

    entries   {"entries": [[i, info], ...]}
    columns   {"columns": [group, ...], "at": int array, "group": int array}
    merged    {"merged": {key: column}}          by a vector implementation that merges infos itself

    group     {key: column}                      the entries with these keys, and values of these types
    column    [kind, values]

*entries* are any infos, in the order of the sub-environments; one that ended in SAME_STEP has two. *columns* are the
same list turned on its side: ``at`` has the sub-environment of each entry (left out when there is one for each, in
order), ``group`` the number of its group (left out when there is one group), numbered as they first appear. A step
where most sub-environments tell the same things, and the ones that ended something else, is two or three groups. Keys
of a group are text that does not begin with ``_``, so that none can meet the mask of another. Kinds of column::

    scalar    array (n,) of int64, float64 or bool: Python's int, float and bool
    numpy     array (n,): numpy scalars of its dtype
    array     array (n, *shape): arrays of one dtype and shape
    object    list of n: what Gymnasium keeps in object arrays (None, text, lists...; final_obs always)
    map       a group again: dicts of the same keys and types
    value     (of merged only) one value that is not by sub-environment, as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire.arrays import SCALAR_TYPES

Group = dict[str, list[Any]]
Rows = slice | NDArray[np.int64]

# A worker that sends a group an entry would have the client do by group what is done faster by entry.
MAX_GROUPS = 16
_MAX_DEPTH = 32

_PYTHON: dict[type, type[np.generic]] = {int: np.int64, float: np.float64, bool: np.bool_}
# timedelta64 is a np.number too, but the unit is of the value, not of the type that _add_info makes the array of.
_NUMPY = frozenset(kind for kind in SCALAR_TYPES if issubclass(kind, np.number)) - {np.timedelta64}
# Exact types that _add_info keeps in object arrays, before the codec and after it.
_OBJECTS = frozenset(
    {
        *map(type, (None, "", b"", bytearray(), 0j, [], (), set(), frozenset())),
        np.bool_,
        np.str_,
        np.bytes_,
        np.datetime64,
    }
)
_INDICES = "infos whose indices are not those of the shard, ascending and at most two of each"
_LEAF_KINDS = frozenset({"scalar", "numpy", "array", "object"})


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
    if key == "final_obs" or kind in _OBJECTS:
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
        if len(shape) >= _MAX_DEPTH or dtype.hasobject or any(v.shape != shape or v.dtype != dtype for v in values):
            return None
        return ["array", np.array(values, dtype)]  # a third of the time of np.stack, and in their byte order
    if kind is dict and depth < _MAX_DEPTH:
        first = _signature(values[0])
        if all(_signature(value) == first for value in values):
            inner = _group(values, depth + 1)
            return None if inner is None else ["map", inner]
    return None


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
        if type(value) is dict and depth < _MAX_DEPTH:
            group[key] = ["map", _merged_group(value, num_envs, depth + 1)]
        elif not _is_by_env(value, num_envs):
            group[key] = ["value", value]
        elif not value.dtype.hasobject:
            group[key] = ["array", value]
        else:  # an object array of more axes has no form: the codec says so, with its path
            group[key] = ["object", list(value)] if value.ndim == 1 else ["value", value]
    return group


def _is_by_env(value: object, num_envs: int) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == num_envs


# -------------------------------------------------------------------------- in


def merge_infos(parts: Sequence[tuple[Any, int, int]], num_envs: int) -> dict[str, Any]:
    """The infos of a vector, from those of its shards.

    Parts of the *merged* form are joined key by key along the first axis; a shard without a key has zeros there (None
    in object arrays, False in masks). What cannot be joined (dtypes or shapes differ, or it is a value of a whole
    shard) becomes an object array with each sub-environment's row, or its shard's value. The only part, if it is all
    of the vector, is given back as it was.

    The parts are used up: values of theirs may be in the result.

    Args:
        parts: of each shard, what travelled under ``infos`` (None if nothing did), the index of its first
            sub-environment, and how many it has; the last two are the client's own knowledge.
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
    plain = [part for part in read if not isinstance(part, _Merged)]
    try:
        if len(plain) == len(read):
            return _merge(plain, num_envs)
        return _join([(_alone(part), part.offset, part.count) for part in read], num_envs)
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
            if isinstance(read, _Merged):
                raise MalformedMessage("infos that were merged already cannot be taken apart")
            for i, info in read.entries():
                infos[i].append(info)
    except RecursionError as exc:
        raise MalformedMessage("infos that are nested too deeply") from exc
    return infos


def _alone(part: _Entries | _Columns | _Merged) -> dict[str, Any]:
    """The infos of a vector that is this part only."""
    return part.infos if isinstance(part, _Merged) else _merge([replace(part, offset=0)], part.count)


def _merge(parts: list[_Entries | _Columns], num_envs: int) -> dict[str, Any]:
    vector = _Local(num_envs)
    infos: dict[str, Any] = {}
    if all(isinstance(part, _Columns) and part.place(vector, infos) for part in parts):
        return infos
    infos = {}
    for part in parts:
        for i, info in part.entries():
            infos = vector.add(infos, info, i)
    return infos


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
            vector.add(infos, {key: {} if kind == "map" else _value(kind, values, 0)}, first)
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
            for i, value in zip(_indices(rows), values, strict=True):
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


def _indices(rows: Rows) -> Iterable[int]:
    if isinstance(rows, slice):
        return range(rows.start, rows.stop)
    indices: list[int] = rows.tolist()
    return indices


def _value(kind: str, values: Any, row: int) -> Any:
    """The value of one row of a column that is no map."""
    if kind == "scalar":
        return values[row].item()
    if kind == "array":
        return values[row, ...].copy()  # the dots keep a 0-d array an array
    return values[row]


def _infos_of(group: Group, count: int) -> list[dict[str, Any]]:
    """The infos that a group was made of."""
    columns = [
        _infos_of(values, count) if kind == "map" else [_value(kind, values, row) for row in range(count)]
        for kind, values in group.values()
    ]
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(group, row, strict=True)) for row in zip(*columns, strict=True)]


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
    if isinstance(read, _Merged):
        raise MalformedMessage("infos that were merged already cannot be taken apart")
    new = {int(row): k for k, row in enumerate(rows)}
    picked = [[new[i], info] for i, info in read.entries() if i in new]
    picked.sort(key=itemgetter(0))  # stable: the entries of one sub-environment keep their order
    return {"entries": picked} if picked else None


# ------------------------------------------------------------------ the forms, checked


@dataclass(slots=True)
class _Entries:
    told: list[tuple[int, dict[str, Any]]]
    offset: int
    count: int

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each entry with the global index of its sub-environment."""
        return ((i + self.offset, info) for i, info in self.told)


@dataclass(slots=True)
class _Columns:
    columns: list[Group]
    at: NDArray[np.int64] | None
    members: list[NDArray[np.intp]] | None  # of each group, which entries; None: one group
    offset: int
    count: int

    def place(self, vector: _Local, infos: dict[str, Any]) -> bool:
        """Put all groups into the infos; see :func:`_place`."""
        return all(_place(vector, infos, group, rows, not n) for n, (group, rows) in enumerate(self.groups()))

    def groups(self) -> Iterator[tuple[Group, Rows]]:
        """Each group with the global indices of its sub-environments."""
        if self.members is None:
            whole = slice(self.offset, self.offset + self.count)
            yield self.columns[0], whole if self.at is None else self.at + self.offset
            return
        for group, members in zip(self.columns, self.members, strict=True):
            yield group, (members if self.at is None else self.at[members]) + self.offset

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each entry with the global index of its sub-environment, in order."""
        length = self.count if self.at is None else len(self.at)
        members = [np.arange(length)] if self.members is None else self.members
        told: list[tuple[int, dict[str, Any]]] = [(0, {})] * length
        for (group, rows), places in zip(self.groups(), members, strict=True):
            infos = _infos_of(group, len(places))
            for place, i, info in zip(places.tolist(), _indices(rows), infos, strict=True):
                told[place] = (i, info)
        return iter(told)


@dataclass(slots=True)
class _Merged:
    infos: dict[str, Any]
    offset: int
    count: int


def _read(part: object, offset: int, count: int) -> _Entries | _Columns | _Merged:
    """What travelled, checked so that nothing in it can fail later but Gymnasium's own merging."""
    if type(part) is dict:
        if "columns" in part:
            return _read_columns(part, offset, count)
        if "entries" in part:
            return _Entries(_read_entries(part["entries"], count), offset, count)
        if "merged" in part:
            return _Merged(_read_merged(part["merged"], count, 0), offset, count)
    raise MalformedMessage("infos that are neither entries, nor columns, nor merged")


def _read_entries(told: object, count: int) -> list[tuple[int, dict[str, Any]]]:
    if type(told) is not list:
        raise MalformedMessage("entries of infos that are not a list")
    entries: list[tuple[int, dict[str, Any]]] = []
    last = before = -1
    for entry in told:
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not int or type(entry[1]) is not dict:
            raise MalformedMessage("an entry of infos that is not an index and an info")
        i, info = entry
        if not (0 <= i < count and last <= i and before < i):
            raise MalformedMessage(_INDICES)
        before, last = last, i
        entries.append((i, info))
    return entries


def _is_ordered(at: NDArray[Any]) -> bool:
    return bool((at[1:] >= at[:-1]).all() and (at[2:] > at[:-2]).all())


def _read_columns(part: dict[Any, Any], offset: int, count: int) -> _Columns:
    columns, at, group = part["columns"], part.get("at"), part.get("group")
    if type(columns) is not list or not 1 <= len(columns) <= MAX_GROUPS:
        raise MalformedMessage(f"columns of infos that are not a list of 1 to {MAX_GROUPS} groups")
    length = count
    if at is not None:
        at = _whole_numbers(at)
        if not (len(at) and at[0] >= 0 and at[-1] < count and _is_ordered(at)):
            raise MalformedMessage(_INDICES)
        length = len(at)
    if not length:
        raise MalformedMessage("columns of infos without entries")
    members = None
    if group is None:
        if len(columns) > 1:
            raise MalformedMessage("several groups of infos, and nothing that tells their entries apart")
        if at is not None and not (at[1:] > at[:-1]).all():
            raise MalformedMessage("a group of infos with a sub-environment twice")
    else:
        members = _members(_whole_numbers(group), len(columns), length, at)
    for i, each in enumerate(columns):
        _check_group(each, length if members is None else len(members[i]), 0)
    return _Columns(columns, at, members, offset, count)


def _whole_numbers(value: object) -> NDArray[np.int64]:
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise MalformedMessage("infos whose at or group is not an array of whole numbers")
    return value.astype(np.int64)  # what is over its range turns negative, and is refused as that


def _members(
    group: NDArray[np.int64], groups: int, length: int, at: NDArray[np.int64] | None
) -> list[NDArray[np.intp]]:
    """Which entries are of each group."""
    members = [np.flatnonzero(group == g) for g in range(groups)]
    if len(group) != length or sum(map(len, members)) != length or not all(map(len, members)):
        raise MalformedMessage("infos whose group is not of each entry, or a group without entries")
    firsts = [int(places[0]) for places in members]
    if firsts != sorted(firsts):
        raise MalformedMessage("groups of infos that are not numbered as they first appear")
    if at is not None and any(bool((np.diff(at[places]) == 0).any()) for places in members):
        raise MalformedMessage("a group of infos with a sub-environment twice")
    return members


def _check_group(group: object, length: int, depth: int) -> None:
    if type(group) is not dict or depth > _MAX_DEPTH:
        raise MalformedMessage("a group of infos that is not a map, or nested too deeply")
    for key, column in group.items():
        if type(key) is not str or key.startswith("_"):
            raise MalformedMessage("a column of infos whose key is not text, or may be that of a mask")
        kind, values = _pair(column)
        if kind == "map":
            _check_group(values, length, depth + 1)
        elif kind not in _LEAF_KINDS or not _is_column(kind, values, length):
            raise MalformedMessage(f"a column of infos that is not {length} values of a known kind")
        elif kind == "object" and key != "final_obs" and not _OBJECTS.issuperset(map(type, values)):
            raise MalformedMessage("a column of objects with what Gymnasium does not keep in object arrays")


def _pair(column: object) -> tuple[str, Any]:
    if type(column) is not list or len(column) != 2 or type(column[0]) is not str:
        raise MalformedMessage("a column of infos that is not a kind and its values")
    return column[0], column[1]


def _is_column(kind: str, values: object, length: int) -> bool:
    if kind == "object":
        return type(values) is list and len(values) == length
    if not _is_by_env(values, length):
        return False
    assert isinstance(values, np.ndarray)
    if kind == "array":
        return True
    return values.ndim == 1 and values.dtype.kind in ("bif" if kind == "scalar" else "iufc")


def _read_merged(group: object, count: int, depth: int) -> dict[str, Any]:
    if type(group) is not dict or depth > _MAX_DEPTH:
        raise MalformedMessage("merged infos that are not a map, or nested too deeply")
    infos: dict[str, Any] = {}
    for key, column in group.items():
        kind, values = _pair(column)
        if kind == "map":
            infos[key] = _read_merged(values, count, depth + 1)
        elif kind == "value":
            infos[key] = values
        elif kind in ("array", "object") and _is_column(kind, values, count):
            infos[key] = values if kind == "array" else np.fromiter(values, object, count)
        else:
            raise MalformedMessage(f"a column of merged infos that is not {count} values of a known kind")
    return infos


# ------------------------------------------------------------------ merged by the workers


def _join(pieces: list[tuple[dict[str, Any], int, int]], num_envs: int) -> dict[str, Any]:
    """Infos that are merged already, each of a shard (infos, offset, count), along the first axis."""
    if len(pieces) == 1 and pieces[0][2] == num_envs:
        return pieces[0][0]
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for infos, _, _ in pieces for key in infos):
        held = [(infos[key], offset, count) for infos, offset, count in pieces if key in infos]
        if all(type(value) is dict for value, _, _ in held):
            joined[key] = _join(held, num_envs)
        else:
            joined[key] = _join_rows(held, num_envs)
    return joined


def _join_rows(held: list[tuple[Any, int, int]], num_envs: int) -> NDArray[Any]:
    """One key's values of several shards as one array."""
    by_env = [_is_by_env(value, count) for value, _, count in held]
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
