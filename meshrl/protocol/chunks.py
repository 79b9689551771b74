"""Chunks: what the lanes of a session did, in columns; the messages of a recording after its first.

A row is a reset or a step of one lane, and rows stand in the order in which they happened, of each lane at least. Only
steps have actions; only resets have a seed and what else it takes to do them again.

    every row      lane, reset, reward, terminated, truncated, digest, at (and with "full": observation, info)
    a reset        number, seed, state, options
    a step         action

A chunk is a msgpack map in a Zstandard frame. Whatever is read of one was checked: columns have the lengths and dtypes
that are said here, and a row of them can be looked up without a thought. Only batches are left to those who know their
space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.protocol.seeds import is_seed
from meshrl.wire.codec import pack, pack_in_parts, unpack
from meshrl.wire.compressed import compress, compress_parts, decompress
from meshrl.wire.large import Rows
from meshrl.wire.messages import check_version
from meshrl.wire.subjects import VERSION

# Of a chunk, unpacked; what is cut at half a megabyte has one row more than that, of at most 64 MiB.
MAX_CHUNK_BYTES = 128 * 1024 * 1024
MAX_ROWS = 1 << 24
MAX_LANES = 65_536
# "batch": as the space's batches are. "items": single values, of an env that does not keep to its space.
ColumnForm = Literal["batch", "items"]


@dataclass(frozen=True, slots=True)
class Column:
    """Values of a space, one a row.

    Attributes:
        form: how they stand there.
        values: a batch of the space, or a list.
    """

    form: ColumnForm
    values: Any


@dataclass(frozen=True, slots=True)
class Resets:
    """What it takes to do the resets of a chunk again, in the order of their rows.

    Attributes:
        numbers: int64, of the episode that begins, counted from 0 since the env was made.
        seeds: of each; None where the env's generator went on.
        states: of each, what outlives a reset without a seed, as a worker tells it; None where that is not known.
        options: of each.
    """

    numbers: NDArray[np.int64]
    seeds: list[int | None]
    states: list[bytes | None]
    options: list[dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Change:
    """Something else that changes an env.

    Attributes:
        row: the first that came after it.
        lane: whose env.
        op: ``call`` or ``set_attr``.
        given: what was asked for.
    """

    row: int
    lane: int
    op: str
    given: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What lanes did.

    Attributes:
        n: which chunk of its session this is, from 1.
        lanes: int32, of each row.
        resets: bool, whether a row is one.
        rewards: float64; 0 of a reset.
        terminations: bool.
        truncations: bool.
        digests: uint64, of each row: of all that its episode has told so far.
        at_us: uint32, when it was told, in microseconds since the first row of the chunk.
        actions: one a step.
        started: what the resets were given.
        numbers: int64, of each lane the episode that it was in before the first row; -1 before its first.
        steps: int64, of each lane how many steps that had.
        returns: float64, of each lane the rewards of those.
        over: bool, of each lane whether that had ended.
        first: int64, of each lane the number in the stream of a message before which none is of that; 0 if not known.
        observations: one a row; None where only actions are recorded.
        infos: pairs (row, info) of those that are not empty; None likewise.
        changes: what else was asked of envs.
        policies: pairs (row, version): from that row on it was that policy's.
        touched: lanes of which an earlier chunk has changes: what was asked of them then may outlive resets.
        lost: lanes of whose episode before the first row a part could not be kept.
        end: why the session ended; empty as long as it goes on.
    """

    n: int
    lanes: NDArray[np.int32]
    resets: NDArray[np.bool_]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    at_us: NDArray[np.uint32]
    actions: Column
    started: Resets
    numbers: NDArray[np.int64]
    steps: NDArray[np.int64]
    returns: NDArray[np.float64]
    over: NDArray[np.bool_]
    first: NDArray[np.int64]
    observations: Column | None = None
    infos: list[tuple[int, dict[str, Any]]] | None = None
    changes: tuple[Change, ...] = ()
    policies: tuple[tuple[int, int], ...] = ()
    touched: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    end: str = ""

    def __len__(self) -> int:
        return len(self.lanes)


# Name, dtype, of each row.
_ROWS: tuple[tuple[str, type[np.generic]], ...] = (
    ("lanes", np.int32),
    ("resets", np.bool_),
    ("rewards", np.float64),
    ("terminations", np.bool_),
    ("truncations", np.bool_),
    ("digests", np.uint64),
    ("at_us", np.uint32),
)
# The same of each lane.
_LANES: tuple[tuple[str, type[np.generic]], ...] = (
    ("numbers", np.int64),
    ("steps", np.int64),
    ("returns", np.float64),
    ("over", np.bool_),
    ("first", np.int64),
)


def pack_chunk(chunk: Chunk) -> bytes:
    """The chunk as a message.

    Raises:
        UnencodableValue: an info, an action or an option has no form on the wire.
    """
    body: dict[str, Any] = {"v": VERSION, "n": chunk.n}
    body |= {name: getattr(chunk, name) for name, _ in (*_ROWS, *_LANES)}
    body["actions"] = _column(chunk.actions)
    started = chunk.started
    body["started"] = [started.numbers, *(_sparse(each) for each in (started.seeds, started.states, started.options))]
    shown = chunk.observations
    if shown is not None:
        body["infos"] = [list(one) for one in chunk.infos or ()]
    if chunk.changes:
        body["changes"] = [[one.row, one.lane, one.op, one.given] for one in chunk.changes]
    for name in ("policies", "touched", "lost"):
        if getattr(chunk, name):
            body[name] = [list(one) if type(one) is tuple else one for one in getattr(chunk, name)]
    if chunk.end:
        body["end"] = chunk.end
    if shown is None:
        return compress(pack(body))
    if shown.form == "batch" and _is_plain(shown.values):  # the most of it, and behind all else: it is never copied
        return compress_parts(pack_in_parts(body, "observations", shown.values))
    return compress(pack({**body, "observations": _column(shown)}))


def _is_plain(values: Any) -> bool:
    """Whether a batch is one array, as it is."""
    if type(values) is Rows:
        return True
    return (
        type(values) is np.ndarray and values.flags.c_contiguous and values.dtype.kind not in "Mm" and values.size > 0
    )


def read_chunk(data: bytes) -> Chunk:
    """The chunk that a message holds.

    Raises:
        UnsupportedVersion: it is of another major version.
        MalformedMessage: it is none, or is broken.
    """
    body = unpack(decompress(data, MAX_CHUNK_BYTES))
    if type(body) is not dict:
        raise MalformedMessage("a chunk of a recording is a map")
    check_version(body, "Chunk")
    return _Reading(body).chunk()


def _column(column: Column) -> list[Any]:
    return [column.form, column.values]


def _sparse(values: list[Any]) -> list[Any] | None:
    """As they are, or nothing where each of them is."""
    return None if values.count(None) == len(values) else values


class _Reading:
    """A chunk's map, looked at field by field."""

    def __init__(self, body: dict[Any, Any]) -> None:
        self._body = body

    def chunk(self) -> Chunk:
        get = self._body.get
        lanes = self._array("lanes", np.int32, None)
        count = len(lanes)
        columns = {name: self._array(name, dtype, count) for name, dtype in _ROWS}
        numbers = self._array("numbers", np.int64, None)
        of_lanes = len(numbers)
        self._need(0 < of_lanes <= MAX_LANES, "numbers")
        self._need(not count or 0 <= int(lanes.min()) <= int(lanes.max()) < of_lanes, "lanes")
        resets = int(np.count_nonzero(columns["resets"]))
        n: Any = get("n")
        end = get("end", "")
        self._need(type(n) is int and 0 < n < 1 << 62, "n")
        self._need(type(end) is str, "end")
        observations = None if "observations" not in self._body else self._column("observations", count)
        return Chunk(
            n=n,
            **columns,
            actions=self._column("actions", count - resets),
            started=self._started(resets),
            **{name: self._array(name, dtype, of_lanes) for name, dtype in _LANES},
            observations=observations,
            infos=None if observations is None else self._infos(count),
            changes=tuple(self._change(one, count, of_lanes) for one in self._list("changes")),
            policies=tuple(self._policy(one, count) for one in self._list("policies")),
            touched=tuple(self._lane(one, of_lanes, "touched") for one in self._list("touched")),
            lost=tuple(self._lane(one, of_lanes, "lost") for one in self._list("lost")),
            end=end,
        )

    def _need(self, holds: bool, field: str) -> None:
        if not holds:
            raise MalformedMessage(f"a chunk's {field} is none", field=field)

    def _array(self, name: str, dtype: type[np.generic], count: int | None, value: Any = None) -> NDArray[Any]:
        value = self._body.get(name) if value is None else value
        self._need(isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == 1, name)
        assert isinstance(value, np.ndarray)
        self._need(len(value) <= MAX_ROWS if count is None else len(value) == count, name)
        return value

    def _list(self, name: str, value: Any = None, count: int | None = None) -> list[Any]:
        value = self._body.get(name, []) if value is None else value
        self._need(type(value) is list and len(value) <= MAX_ROWS and count in {None, len(value)}, name)
        return list(value)

    def _column(self, name: str, count: int) -> Column:
        value = self._body.get(name)
        if isinstance(value, np.ndarray):
            return Column("batch", value)
        self._need(type(value) is list and len(value) == 2 and value[0] in ("batch", "items"), name)
        assert isinstance(value, list)
        form, values = value
        self._need(form == "batch" or (type(values) is list and len(values) == count), name)
        return Column(form, values)

    def _started(self, count: int) -> Resets:
        value = self._list("started", count=4)
        numbers = self._array("started", np.int64, count, value[0])
        seeds, states, options = (self._sparse(one, count) for one in value[1:])
        self._need(all(seed is None or is_seed(seed) for seed in seeds), "started")
        self._need(all(state is None or type(state) is bytes for state in states), "started")
        self._need(all(given is None or type(given) is dict for given in options), "started")
        return Resets(numbers, seeds, states, options)

    def _sparse(self, value: Any, count: int) -> list[Any]:
        return [None] * count if value is None else self._list("started", value, count)

    def _infos(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        infos = []
        for one in self._list("infos"):
            self._need(type(one) is list and len(one) == 2 and self._is_row(one[0], count), "infos")
            self._need(type(one[1]) is dict, "infos")
            infos.append((one[0], one[1]))
        return infos

    def _change(self, one: Any, count: int, of_lanes: int) -> Change:
        self._need(type(one) is list and len(one) == 4 and self._is_row(one[0], count + 1), "changes")
        self._need(one[2] in ("call", "set_attr") and type(one[3]) is dict, "changes")
        return Change(one[0], self._lane(one[1], of_lanes, "changes"), one[2], one[3])

    def _policy(self, one: Any, count: int) -> tuple[int, int]:
        self._need(type(one) is list and len(one) == 2 and self._is_row(one[0], count), "policies")
        self._need(type(one[1]) is int and abs(one[1]) < 1 << 62, "policies")
        return one[0], one[1]

    def _lane(self, one: Any, of_lanes: int, field: str) -> int:
        self._need(self._is_row(one, of_lanes), field)
        return int(one)

    @staticmethod
    def _is_row(value: object, count: int) -> bool:
        return type(value) is int and 0 <= value < count
