"""The rows of a Parquet file of transitions, written and read. Imported where pyarrow is wanted.

Their columns, in order::

    episode_id, step                       of each transition; those of an episode stand together, in order
    observation, action, reward, terminated, truncated, next_observation, info
    reset_info                             of the first of an episode; null in others
    policy_version                         of whoever chose the action; null where nobody said
    at_s                                   when it was told, in seconds since the reset
    env, env_id, session, ...              of the episode, the same in each of its rows

What is said of the dataset is JSON under ``meshrl`` in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gymnasium import spaces

from meshrl.adapters.datasets.columns import ARRAYS, column_of
from meshrl.adapters.datasets.exporting import Writing
from meshrl.adapters.datasets.gathered import Gathered
from meshrl.adapters.datasets.infos import MISSING, InfoColumn
from meshrl.adapters.datasets.parquet_forms import Form, Packed, fits, form_for
from meshrl.adapters.datasets.parquet_infos import InfoForm
from meshrl.adapters.datasets.provenance import (
    dataset_facts,
    episode_facts,
    episode_from,
    infos_in,
    recordings_of,
)
from meshrl.client.episode import Episode
from meshrl.errors import FormatCannotHold, MalformedMessage, UsageError
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import batched
from meshrl.wire import spaces as wire_spaces
from meshrl.wire.batches import batching, form_of

OWN = b"meshrl"
# A row group has about so many rows or bytes, whichever is less: what a reader has in memory, and can skip.
GROUP_ROWS = 65_536
GROUP_BYTES = 64 * 1024 * 1024
_READ_ROWS = 4096
_ROLES = ("observations", "actions")
# Of an episode's facts, those that are numbers and truths; all others are texts.
_NUMBERS = {"env_id": "int64", "recording": "int32", "remade": "bool_", "seed": "int64"}


class Rows(Writing):
    """A file on its way.

    Args:
        gathered: the episodes; they are looked at once before the first is written.
        path: of the file.
    """

    def __init__(self, gathered: Gathered, path: Path) -> None:
        self._gathered = gathered
        self._path = path
        looks = {"observations": _Look(gathered.observation_space), "actions": _Look(gathered.action_space)}
        for episode in gathered.episodes():
            for role, look in looks.items():
                look.look(getattr(episode, role), len(episode) + (role == "observations"))
        self._looks = looks
        self._forms = {role: look.form() for role, look in looks.items()}
        self._info = _info_form(gathered.infos)
        facts = dataset_facts(gathered) | {"forms": {role: look.to_json() for role, look in looks.items()}}
        self._schema = _schema(self._forms, self._info).with_metadata({OWN: json.dumps(facts).encode()})
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._tables: list[Any] = []
        self._rows = self._bytes = 0

    def add(self, episode: Episode) -> None:
        """The next episode."""
        n = len(episode)
        shown = self._forms["observations"].encode(
            self._looks["observations"].fitted(episode.observations, n + 1), n + 1
        )
        infos = self._info.encode(list(episode.infos), n + 1)
        facts = episode_facts(episode, self._gathered.recording_of(episode))
        first = pa.array([0, *[None] * (n - 1)], pa.int64())
        columns = {
            "step": pa.array(np.arange(n)),
            "observation": shown.slice(0, n),
            "action": self._forms["actions"].encode(self._looks["actions"].fitted(episode.actions, n), n),
            "reward": pa.array(episode.rewards),
            "terminated": pa.array(episode.terminations),
            "truncated": pa.array(episode.truncations),
            "next_observation": shown.slice(1, n),
            "info": infos.slice(1, n),
            "reset_info": infos.take(first),
            "policy_version": pa.array(episode.policy_versions, mask=episode.policy_versions < 0),
            "at_s": pa.array(episode.at_s),
        }
        for name, value in facts.items():
            columns[name] = pa.repeat(pa.scalar(value, self._schema.field(name).type), n)
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        self._tables.append(table)
        self._rows, self._bytes = self._rows + n, self._bytes + table.nbytes
        if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def finish(self) -> Path:
        """There are no more; gives the file."""
        self._flush()
        self._writer.close()
        return self._path

    def close(self) -> None:
        """Nothing more is written."""
        self._writer.close()

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=GROUP_ROWS)
        self._tables, self._rows, self._bytes = [], 0, 0


class _Look:
    """What the values of a space are like, as episodes are looked at one after another.

    Attributes:
        space: of one value.
        packed: whether some are not of it, so that all are packed.
        dtypes: of their arrays, in order, once some were seen.
    """

    def __init__(
        self, space: spaces.Space[Any], dtypes: list[np.dtype[Any]] | None = None, *, packed: bool = False
    ) -> None:
        self.space = space
        self.dtypes = dtypes
        self.packed = packed

    def look(self, values: Any, n: int) -> None:
        if self.packed:
            return
        fitted = self.fitted(values, n)
        if fitted is None:
            self.packed = True
            return
        dtypes = list(_dtypes(self.space, fitted))
        if self.dtypes is None:
            self.dtypes = dtypes
        plain = _is_plain(self.space)
        if dtypes != self.dtypes or not (plain or fits(form_for(self.space, dtypes), fitted, n)):
            self.packed = True

    def fitted(self, values: Any, n: int) -> Any:
        """``n`` values as its form takes them; None where they are not of the space."""
        if self.packed:
            return list(batching(self.space).rows(values, n)) if type(values) is not list else values
        if type(values) is not list:
            return values
        try:
            return _as_batch(column_of(self.space, values, "", ""))
        except FormatCannotHold:
            return None

    def form(self) -> Form:
        """How they stand in a column."""
        return Packed() if self.packed else form_for(self.space, self.dtypes)

    def to_json(self) -> dict[str, Any]:
        """What a reader needs to know of it."""
        return {"packed": self.packed, "dtypes": [dtype.str for dtype in self.dtypes or ()]}

    @classmethod
    def from_json(cls, space: spaces.Space[Any], told: Mapping[str, Any]) -> _Look:
        """The same as its reader has it."""
        return cls(space, [np.dtype(str(text)) for text in told["dtypes"]], packed=bool(told["packed"]))


def _as_batch(column: Any) -> Any:
    """A column as batches are: texts are a tuple there."""
    if isinstance(column, dict):
        return {key: _as_batch(part) for key, part in column.items()}
    return tuple(map(_as_batch, column)) if type(column) is tuple else tuple(column) if type(column) is list else column


def _dtypes(space: spaces.Space[Any], values: Any) -> Iterator[np.dtype[Any]]:
    """Of the arrays of a batch, in the space's order; those within a Sequence and the like are the space's."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _dtypes(part, values[key])
    elif isinstance(space, spaces.Tuple) and type(values) is tuple and form_of(space) == "tuple":
        for part, one in zip(space.spaces, values, strict=True):
            yield from _dtypes(part, one)
    elif isinstance(values, np.ndarray):
        yield values.dtype


def _is_plain(space: spaces.Space[Any]) -> bool:
    """Whether a batch of it is arrays and nothing else, which come out of a form as they went in."""
    if isinstance(space, spaces.Dict | spaces.Tuple) and form_of(space) in {"dict", "tuple"}:
        return all(_is_plain(part) for part in (space.spaces.values() if isinstance(space, spaces.Dict) else space))
    return type(space) in ARRAYS


def _info_form(infos: Mapping[str, InfoColumn]) -> Form:
    return InfoForm(InfoColumn("dict", parts=infos))


def _schema(forms: Mapping[str, Form], info: Form) -> Any:
    text = pa.dictionary(pa.int32(), pa.string())
    names = [
        "env",
        "env_id",
        "recording",
        "session",
        "worker",
        "user",
        "labels",
        "policy",
        "seed",
        "wide_seed",
        "options",
    ]
    names += ["reason", "ended_at", "remade", "platform", "versions"]
    return pa.schema(
        [
            pa.field("episode_id", text),
            pa.field("step", pa.int64()),
            forms["observations"].field("observation"),
            forms["actions"].field("action"),
            pa.field("reward", pa.float64()),
            pa.field("terminated", pa.bool_()),
            pa.field("truncated", pa.bool_()),
            forms["observations"].field("next_observation"),
            info.field("info"),
            info.field("reset_info"),
            pa.field("policy_version", pa.int64()),
            pa.field("at_s", pa.float64()),
            *(pa.field(name, getattr(pa, _NUMBERS[name])() if name in _NUMBERS else text) for name in names),
        ]
    )


# --------------------------------------------------------------------------- reading


def read(path: str | Path) -> Iterator[Episode]:
    """As :func:`~meshrl.adapters.datasets.parquet.read_parquet`."""
    with pq.ParquetFile(path) as file:
        metadata = file.schema_arrow.metadata or {}
        if OWN not in metadata:
            raise UsageError(f"{path} is no export of recorded episodes; any reader of Parquet files can read it")
        try:
            facts = json.loads(metadata[OWN])
            reading = _Reading(facts)
        except (ValueError, KeyError, TypeError) as exc:
            raise MalformedMessage(f"what {path} says of itself cannot be read") from exc
        yield from reading.episodes(file.iter_batches(batch_size=_READ_ROWS))


class _Reading:
    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._recordings = recordings_of(facts)
        self._looks = {
            role: _Look.from_json(wire_spaces.rebuild(facts[space]), facts["forms"][role])
            for role, space in zip(_ROLES, ("observation_space", "action_space"), strict=True)
        }
        self._forms = {role: look.form() for role, look in self._looks.items()}
        self._info = _info_form(infos_in(facts))

    def episodes(self, batches: Iterator[Any]) -> Iterator[Episode]:
        """Those whose rows are in batches of the file's."""
        parts: list[Any] = []
        for batch in batches:
            starts = np.flatnonzero(batch.column("step").to_numpy() == 0).tolist()
            for begin, end in zip([0, *starts], [*starts, len(batch)], strict=True):
                if begin in starts and parts:
                    yield self._episode(parts)
                    parts = []
                if end > begin:
                    parts.append(batch.slice(begin, end - begin))
        if parts:
            yield self._episode(parts)

    def _episode(self, parts: list[Any]) -> Episode:
        rows = pa.Table.from_batches(parts).combine_chunks()
        n = len(rows)

        def column(name: str) -> Any:
            return rows.column(name).combine_chunks() if n else pa.nulls(0)

        facts = {name: rows.column(name)[0].as_py() for name in rows.column_names[12:]}
        shown = pa.concat_arrays([column("observation"), column("next_observation").slice(n - 1, 1)])
        infos = pa.concat_arrays([column("reset_info").slice(0, 1), column("info")])
        versions = column("policy_version").fill_null(-1).to_numpy(zero_copy_only=False)
        return episode_from(
            facts | {"episode_id": rows.column("episode_id")[0].as_py()},
            self._recordings,
            observations=self._batch("observations", shown),
            actions=self._batch("actions", column("action")),
            rewards=np.array(column("reward")),
            terminations=np.array(column("terminated")),
            truncations=np.array(column("truncated")),
            infos=[{} if info is MISSING else info for info in self._info.decode(infos)],
            at_s=np.array(column("at_s")),
            policy_versions=np.array(versions, np.int64),
        )

    def _batch(self, role: str, array: Any) -> Any:
        values = self._forms[role].decode(array)
        if type(values) is not list:
            return values
        return batched(batching(self._looks[role].space), Column("items", values)).values
