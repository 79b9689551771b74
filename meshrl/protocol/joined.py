"""Joined: what was noted of a session's lanes as columns, a row an answer to a lane.

Where a step ended an episode and its lane was reset with it (SAME_STEP, and pools), one row shows the reset; the last
observation of the step, its hash and its info stand apart, as a *final*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.protocol.chunks import Column
from meshrl.protocol.digests import Words, hashes_of
from meshrl.protocol.noted import Asked, Began, Indices, Note, One, rows_in
from meshrl.protocol.shelf import rows_of
from meshrl.protocol.transcript import Transcript
from meshrl.protocol.values import hashes_of_values, numbers_of, truths_of
from meshrl.wire.batches import Batching
from meshrl.wire.codec import pack
from meshrl.wire.large import Rows

_NOTHING = Column("items", [])
Noted = Sequence[Note | One | Asked]


@dataclass(slots=True)
class Told:
    """Rows, in the order in which they were noted.

    Attributes:
        lanes: int64.
        rewards: float64.
        terminations: bool.
        truncations: bool.
        at: float64, when each was told, in monotonic seconds.
        resets: bool, of rows that are a reset and no step.
        begun: what each reset was given, by the row that shows its observation.
        finals: int64, the rows of steps that were followed by a reset at once.
        hashes: uint64, of the rows and, behind them, of the finals.
        actions: of the rows that are no resets.
        observations: in the order of ``hashes``, where they are kept.
        infos: packed, by row, and whether it is that of a final.
        policies: the first row of each version.
        asked: what else was asked, by the row that came next.
    """

    lanes: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    rewards: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    terminations: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    truncations: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    at: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    resets: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    begun: dict[int, Began] = field(default_factory=dict)
    finals: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    hashes: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    actions: Column = _NOTHING
    observations: Column | None = None
    infos: list[tuple[int, bool, bytes]] = field(default_factory=list)
    policies: list[tuple[int, int]] = field(default_factory=list)
    asked: list[tuple[int, Asked]] = field(default_factory=list)


def joined(transcript: Transcript, noted: Noted) -> Told:
    """What was noted in ``transcript``, the oldest first, as columns."""
    kinds = set(map(type, noted))
    if One in kinds:
        told = _of_ones(transcript, [one for one in noted if type(one) is One])
    elif Note in kinds:
        told = _of_notes(transcript, [one for one in noted if type(one) is Note])
    else:
        told = Told()
    if not transcript.shows:
        told.observations = None
    if Asked in kinds or list(map(attrgetter("policy"), noted)).count(None) < len(noted):
        _put_between(told, noted)
    return told


def _put_between(told: Told, noted: Noted) -> None:
    """What else was asked, and who chose the actions, by the rows before which they stand."""
    row, policy = 0, None
    for one in noted:
        if isinstance(one, Asked):
            told.asked.append((row, one))
            continue
        size = rows_in(one)
        if one.policy is not None:
            for at, version in enumerate(one.policy if isinstance(one.policy, list) else (one.policy,), row):
                if version is not None and version != policy:
                    told.policies.append((at, version))
                    policy = version
        row += size


def halves(transcript: Transcript, noted: Noted) -> tuple[Noted, Noted] | None:
    """What was noted in two parts, to be taken one after the other; None where it is one row."""
    if len(noted) > 1:
        return noted[: len(noted) // 2], noted[len(noted) // 2 :]
    if not noted or not isinstance(noted[0], Note) or len(noted[0].rewards) < 2:
        return None
    note = noted[0]
    size = len(note.rewards)
    return [_part(transcript, note, 0, size // 2)], [_part(transcript, note, size // 2, size)]


def _part(transcript: Transcript, note: Note, start: int, stop: int) -> Note:
    """Some rows of a note."""
    size, hashes, actions = len(note.rewards), note.hashes, note.actions
    lanes = np.arange(transcript.count) if note.lanes is None else note.lanes
    if hashes is not None:
        behind = [size + k for k, (row, _) in enumerate(note.finals) if start <= row < stop]
        hashes = hashes[[*range(start, stop), *behind]]
    if actions is not None:
        actions = actions[start:stop] if type(actions) is list else transcript.actions.cut(actions, start, stop)
    return note._replace(
        at=np.repeat(*_times([note]))[start:stop],
        lanes=lanes[start:stop],
        actions=actions,
        obs=None if note.obs is None else transcript.observations.cut(note.obs, start, stop),
        rewards=note.rewards[start:stop],
        terminations=note.terminations[start:stop],
        truncations=note.truncations[start:stop],
        begun={row - start: began for row, began in note.begun.items() if start <= row < stop},
        finals=[(row - start, obs) for row, obs in note.finals if start <= row < stop],
        infos=[(row - start, is_final, info) for row, is_final, info in note.infos if start <= row < stop],
        policy=note.policy[start:stop] if isinstance(note.policy, list) else note.policy,
        nbytes=note.nbytes * (stop - start) // size,
        hashes=hashes,
    )


def _of_ones(transcript: Transcript, ones: Sequence[One]) -> Told:
    at, actions, obs, rewards, terminated, truncated, infos, begun, *_, numbers = map(list, zip(*ones, strict=True))
    resets = [one is not None for one in begun]
    anew = [row for row, reset in enumerate(resets) if reset]
    told = numbers_of(rewards), truths_of(terminated), truths_of(truncated)
    hashed, observations = ones[0].hashed, None
    if None not in numbers:
        hashes = hashes_of([np.array(numbers, np.uint64)], *told, anew)
        if not hashed:
            observations = Column("batch", rows_of(obs))
    elif hashed:  # one by one, where not each is an array like those of its space
        hashes = np.array([_hash_of(one) for one in ones], np.uint64)
    elif (batch := _arrays(transcript.observations, obs)) is not None:
        hashes = hashes_of(list(transcript.observations.leaves(batch, len(obs))), *told, anew)
        observations = Column("batch", batch)
    else:
        hashes = hashes_of_values(transcript.observations, obs, rewards, terminated, truncated, anew)
        observations = column_of(transcript.observations, obs) if transcript.shows else None
    return Told(
        lanes=np.zeros(len(ones), np.int64),
        rewards=told[0],
        terminations=told[1],
        truncations=told[2],
        at=np.array(at),
        resets=np.array(resets),
        begun={row: begun[row] for row in anew},
        hashes=hashes,
        actions=column_of(transcript.actions, [one for one, reset in zip(actions, resets, strict=True) if not reset]),
        observations=observations,
        infos=[(row, False, info) for row, info in enumerate(infos) if info is not None],
    )


def _hash_of(one: One) -> int:
    if one.hash is not None:
        return one.hash
    told = numbers_of([one.reward]), truths_of([one.terminated]), truths_of([one.truncated])
    return int(hashes_of([np.array([one.seen], np.uint64)], *told, [] if one.begun is None else [0])[0])


def _whole(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _times(notes: Sequence[Note]) -> tuple[Any, Any]:
    """When each answer was, and of how many rows it is: what ``np.repeat`` takes."""
    if len(notes) == 1 and isinstance(notes[0].at, np.ndarray):
        return notes[0].at, len(notes[0].rewards) // len(notes[0].at)
    at: list[float] = []
    rows: list[int] = []
    for note in notes:
        times = note.at.tolist() if isinstance(note.at, np.ndarray) else [note.at]
        at += times
        rows += [len(note.rewards) // len(times)] * len(times)
    return at, rows


def _of_notes(transcript: Transcript, notes: Sequence[Note]) -> Told:
    told, sizes = Told(), [len(note.rewards) for note in notes]
    starts = (np.cumsum(sizes) - sizes).tolist()
    count = sum(sizes)
    every = np.arange(transcript.count)
    told.lanes = _whole([every if note.lanes is None else note.lanes for note in notes])
    told.rewards = _whole([note.rewards for note in notes])
    told.terminations = _whole([note.terminations for note in notes])
    told.truncations = _whole([note.truncations for note in notes])
    told.at = np.repeat(*_times(notes))
    told.resets = np.zeros(count, np.bool_)
    finals: list[tuple[int, Any]] = []
    for start, size, note in zip(starts, sizes, notes, strict=True):
        if note.actions is None:
            told.resets[start : start + size] = True
        if not (note.begun or note.infos):
            continue
        told.begun |= {start + row: began for row, began in note.begun.items()} if start else note.begun
        finals += [(start + row, obs) for row, obs in note.finals]
        told.infos += [(start + row, is_final, info) for row, is_final, info in note.infos]
    told.finals = np.array([row for row, _ in finals], np.int64)
    told.resets[list(told.begun)] = True
    told.resets[told.finals] = False
    if notes[0].hashes is not None:
        hashes = [note.hashes for note in notes if note.hashes is not None]
        own = [one[:size] for one, size in zip(hashes, sizes, strict=True)]
        behind = [one[size:] for one, size in zip(hashes, sizes, strict=True)]
        told.hashes = np.concatenate([*own, *behind])
    else:
        batches = transcript.observations
        parts, lengths = [note.obs for note in notes], list(sizes)
        if finals:
            parts.append(batches.stack([obs for _, obs in finals]))
            lengths.append(len(finals))
        batch = batches.joined(parts, lengths)
        columns = told.rewards, told.terminations, told.truncations
        if finals:
            rows = np.concatenate([np.arange(count), told.finals])
            columns = told.rewards[rows], told.terminations[rows], told.truncations[rows]
        leaves = list(batches.leaves(batch, len(columns[0])))
        told.hashes = hashes_of(leaves, *columns, list(told.begun))
        told.observations = Column("batch", batch)
    told.actions = _actions(transcript.actions, notes, told.resets)
    return told


def _actions(batches: Batching, notes: Sequence[Note], resets: NDArray[np.bool_]) -> Column:
    """Of the rows that are no resets: an autoreset was asked for by a step, whose action counts nothing."""
    steps = [(note.actions, len(note.rewards)) for note in notes if note.actions is not None]
    if not steps:
        return _NOTHING
    explicit = np.repeat([note.actions is None for note in notes], [len(note.rewards) for note in notes])
    if any(type(actions) is list for actions, _ in steps):  # a pool's, or of a replay, each as its lane was given it
        rows = (actions if type(actions) is list else batches.rows(actions, size) for actions, size in steps)
        column = column_of(batches, [action for part in rows for action in part])
    else:
        column = _exactly(batches, [one for one, _ in steps], [size for _, size in steps])
    acted = ~resets[~explicit]
    return column if acted.all() else picked(batches, column, np.flatnonzero(acted))


def _exactly(batches: Batching, parts: Sequence[Any], sizes: Sequence[int]) -> Column:
    """Batches as one, their arrays with the dtypes that they have: a trainer's float64 for a Box of float32, say."""
    if len(parts) == 1:
        return Column("batch", parts[0])
    if all(type(part) is np.ndarray for part in parts):
        dtypes = {part.dtype for part in parts}
        if len(dtypes) == 1:
            whole = np.empty((sum(sizes), *parts[0].shape[1:]), parts[0].dtype)
            return Column("batch", np.concatenate(parts, out=whole))
    else:
        joined = batches.joined(parts, sizes)
        wanted = _dtypes(batches, joined, sum(sizes))
        if all(_dtypes(batches, part, size) == wanted for part, size in zip(parts, sizes, strict=True)):
            return Column("batch", joined)
    pairs = zip(parts, sizes, strict=True)
    return Column("items", [row for part, size in pairs for row in batches.rows(part, size)])


def _dtypes(batches: Batching, batch: Any, size: int) -> list[Any]:
    return [getattr(leaf, "dtype", None) for leaf in batches.leaves(batch, size)]


def column_of(batches: Batching, values: list[Any]) -> Column:
    """One env's own values: as a batch, where that keeps each of them to the bit, else as they are."""
    if (batch := _arrays(batches, values)) is not None:
        return Column("batch", batch)
    space: Any = batches.space
    kinds = set(map(type, values))
    if kinds and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds) and space.shape == ():
        numbers = np.array(values)
        if numbers.dtype.kind in "iu" and (numbers.astype(space.dtype) == numbers).all():
            return Column("batch", numbers.astype(space.dtype))
    return Column("items", values)


def _arrays(batches: Batching, values: list[Any]) -> NDArray[Any] | None:
    """Arrays of the space's dtype and shape as a batch; None where there are none, or one is something else."""
    dtype, shape, count = batches.space.dtype, batches.space.shape, len(values)
    if not values or dtype is None or shape is None or list(map(type, values)).count(np.ndarray) < count:
        return None
    if list(map(attrgetter("dtype"), values)).count(dtype) < count:
        return None
    if list(map(attrgetter("shape"), values)).count(shape) < count:
        return None
    if not shape:
        return np.array(values, dtype)
    batch = np.empty((count, *shape), dtype)  # which has the byte order of each, unlike what is concatenated
    np.concatenate(values, out=batch.reshape(count * shape[0], *shape[1:]))
    return batch


def batched(batches: Batching, column: Column) -> Column:
    """A column as a batch, where that keeps each value to the bit; else as it is."""
    if column.form == "batch":
        return column
    values = column.values
    try:
        stacked = batches.stack(values)
        rows = list(batches.rows(stacked, len(values)))
    except Exception:  # noqa: BLE001  # an env need not keep to its space
        return column
    return Column("batch", stacked) if all(map(_is, rows, values)) else column


def _is(row: Any, value: Any) -> bool:
    """Whether a row of a batch is that value, whichever of Python's and NumPy's numbers either is."""
    if isinstance(row, np.ndarray | np.generic) and not isinstance(value, np.ndarray):
        return bool(np.asarray(row == value).all()) and not isinstance(value, str)
    if isinstance(row, dict):
        return isinstance(value, dict) and row.keys() == value.keys() and all(_is(row[key], value[key]) for key in row)
    if isinstance(row, tuple):
        return isinstance(value, tuple) and len(row) == len(value) and all(map(_is, row, value))
    return pack(row) == pack(value)


def picked(batches: Batching, column: Column, rows: Indices) -> Column:
    """Some rows of a column."""
    if not len(rows):
        return _NOTHING
    if column.form == "items":
        return Column("items", [column.values[row] for row in rows.tolist()])
    if type(column.values) is Rows:
        return Column("batch", Rows([column.values.items[row] for row in rows.tolist()]))
    return Column("batch", batches.pick(column.values, rows))


def joined_columns(batches: Batching, columns: Sequence[Column]) -> Column:
    """Columns that were checked as one, in order; single values where one of them holds those."""
    sizes = [size_of(batches, column) for column in columns]
    filled = [(column, size) for column, size in zip(columns, sizes, strict=True) if size]
    if not filled:
        return _NOTHING
    if all(column.form == "batch" for column, _ in filled):
        return _exactly(batches, [column.values for column, _ in filled], [size for _, size in filled])
    values: list[Any] = []
    for column, size in filled:
        values += column.values if column.form == "items" else list(batches.rows(column.values, size))
    return Column("items", values)


def size_of(batches: Batching, column: Column) -> int:
    """How many values a column has."""
    if column.form == "items":
        return len(column.values)
    leaf = next(iter(batches.leaves(column.values, 0)), ())
    return len(leaf)


def checked(batches: Batching, column: Column, count: int, what: str) -> None:
    """Whether a column that was read is one of its space, with so many values.

    Raises:
        MalformedMessage: it is not.
    """
    if column.form == "batch":
        batches.check(column.values, count, what, exact=False)
    elif len(column.values) != count:
        raise MalformedMessage(f"a chunk has {len(column.values)} {what}, not {count}", field=what)
