"""The forms in which infos travel, and the checks of what arrived.

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

What is read here is checked so that nothing in it can fail later but Gymnasium's own merging.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage

Group = dict[str, list[Any]]
Rows = slice | NDArray[np.int64]

# A worker that sends a group an entry would have the client do by group what is done faster by entry.
MAX_GROUPS = 16
MAX_DEPTH = 32
# Exact types that _add_info keeps in object arrays, before the codec and after it.
OBJECTS = frozenset(
    {
        *map(type, (None, "", b"", bytearray(), 0j, [], (), set(), frozenset())),
        np.bool_,
        np.str_,
        np.bytes_,
        np.datetime64,
    }
)
_INDICES = "infos whose indices are not those of the shard, ascending and at most two of each"
LEAF_KINDS = frozenset({"scalar", "numpy", "array", "object"})


# ------------------------------------------------------------------ entries and columns


@dataclass(slots=True)
class Entries:
    """Infos of one shard, one by one.

    Attributes:
        told: pairs (index within the shard, info).
        offset: the global index of its first sub-environment.
        count: how many it has.
    """

    told: list[tuple[int, dict[str, Any]]]
    offset: int
    count: int

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each entry with the global index of its sub-environment."""
        return ((i + self.offset, info) for i, info in self.told)


@dataclass(slots=True)
class Columns:
    """Infos of one shard by columns.

    Attributes:
        columns: the groups.
        at: of each entry, its sub-environment within the shard; None: one for each, in order.
        members: of each group, which entries; None: one group.
        offset: the global index of its first sub-environment.
        count: how many it has.
    """

    columns: list[Group]
    at: NDArray[np.int64] | None
    members: list[NDArray[np.intp]] | None
    offset: int
    count: int

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
            infos = infos_of(group, len(places))
            for place, i, info in zip(places.tolist(), indices_of(rows), infos, strict=True):
                told[place] = (i, info)
        return iter(told)


def indices_of(rows: Rows) -> Iterable[int]:
    """The indices one by one."""
    if isinstance(rows, slice):
        return range(rows.start, rows.stop)
    indices: list[int] = rows.tolist()
    return indices


def value_of(kind: str, values: Any, row: int) -> Any:
    """The value of one row of a column that is no map."""
    if kind == "scalar":
        return values[row].item()
    if kind == "array":
        return values[row, ...].copy()  # the dots keep a 0-d array an array
    return values[row]


def infos_of(group: Group, count: int) -> list[dict[str, Any]]:
    """The infos that a group was made of."""
    columns = [
        infos_of(values, count) if kind == "map" else [value_of(kind, values, row) for row in range(count)]
        for kind, values in group.values()
    ]
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(group, row, strict=True)) for row in zip(*columns, strict=True)]


# ------------------------------------------------------------------ what arrived


def read_told(part: object, offset: int, count: int) -> Entries | Columns | None:
    """What travelled, checked; None when it has neither of these forms.

    Args:
        part: what travelled.
        offset: the global index of its first sub-environment.
        count: how many it is of.

    Raises:
        MalformedMessage: an index, length or type in it is wrong.
    """
    if type(part) is dict:
        if "columns" in part:
            return _read_columns(part, offset, count)
        if "entries" in part:
            return Entries(_read_entries(part["entries"], count), offset, count)
    return None


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


def _read_columns(part: dict[Any, Any], offset: int, count: int) -> Columns:
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
    return Columns(columns, at, members, offset, count)


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
    if type(group) is not dict or depth > MAX_DEPTH:
        raise MalformedMessage("a group of infos that is not a map, or nested too deeply")
    for key, column in group.items():
        if type(key) is not str or key.startswith("_"):
            raise MalformedMessage("a column of infos whose key is not text, or may be that of a mask")
        kind, values = pair(column)
        if kind == "map":
            _check_group(values, length, depth + 1)
        elif kind not in LEAF_KINDS or not is_column(kind, values, length):
            raise MalformedMessage(f"a column of infos that is not {length} values of a known kind")
        elif kind == "object" and key != "final_obs" and not OBJECTS.issuperset(map(type, values)):
            raise MalformedMessage("a column of objects with what Gymnasium does not keep in object arrays")


def pair(column: object) -> tuple[str, Any]:
    """A column's kind and values.

    Raises:
        MalformedMessage: it is no such pair.
    """
    if type(column) is not list or len(column) != 2 or type(column[0]) is not str:
        raise MalformedMessage("a column of infos that is not a kind and its values")
    return column[0], column[1]


def is_column(kind: str, values: object, length: int) -> bool:
    """Whether these are ``length`` values of a kind that is no map."""
    if kind == "object":
        return type(values) is list and len(values) == length
    if not is_by_env(values, length):
        return False
    assert isinstance(values, np.ndarray)
    if kind == "array":
        return True
    return values.ndim == 1 and values.dtype.kind in ("bif" if kind == "scalar" else "iufc")


def is_by_env(value: object, num_envs: int) -> bool:
    """Whether it is an array whose first axis is that long."""
    return isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == num_envs
