"""Reading a Minari dataset, whoever wrote it, as episodes of single values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.adapters.datasets.exporting import needed
from meshrl.adapters.datasets.infos import infos_of, length_of, rows_of, value_of
from meshrl.adapters.datasets.minari import OWN, dataset_facts_of, facts_of
from meshrl.adapters.datasets.provenance import infos_in, recordings_of, seed_in
from meshrl.errors import MalformedMessage, UsageError
from meshrl.protocol.seeds import is_seed
from meshrl.wire import spaces as wire_spaces
from meshrl.wire.batches import batching
from meshrl.wire.recorded import Recorded


@dataclass(slots=True)
class Read:
    """An episode of a dataset.

    Attributes:
        seed: that it was reset with, where that is known.
        options: of that reset.
        observations: T + 1 of them.
        actions: T of them.
        rewards: float64.
        terminations: bool.
        truncations: bool.
        infos: T + 1 of them.
        at_s: when each step was told, in seconds since the reset; None where nobody knows.
        policy_versions: of whoever chose each action; None where nobody knows.
    """

    seed: int | None
    options: dict[str, Any] | None
    observations: list[Any]
    actions: list[Any]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    infos: list[dict[str, Any]]
    at_s: NDArray[np.float64] | None = None
    policy_versions: NDArray[np.int64] | None = None


class MinariFile:
    """A Minari dataset on disk.

    Args:
        dataset: its id, or a path to where it is.

    Attributes:
        id: of it.
        observation_space: of one observation.
        action_space: of one action.
        spec: of its env, as ``gymnasium.EnvSpec.to_json`` gives it; None where it does not say.
        recordings: where this package wrote it, what it was made of.
        algorithm: by which its actions were chosen, where it says so.

    Raises:
        UsageError: Minari is not installed, or there is no such dataset here.
    """

    def __init__(self, dataset: str | Path) -> None:
        self._dataset = _loaded(dataset)
        storage = self._dataset.storage
        self.id: str = self._dataset.id
        self._told = dataset_facts_of(Path(storage.data_path))
        spec = self._dataset.env_spec
        self.spec: str | None = None if spec is None else spec.to_json()
        self.algorithm: str | None = storage.metadata.get("algorithm_name")
        self.recordings: list[Recorded] = [] if self._told is None else recordings_of(self._told)
        self._infos = None if self._told is None else infos_in(self._told)
        self._arrow = storage.FORMAT != "hdf5"
        self.observation_space = self._space("observation_space")
        self.action_space = self._space("action_space")

    def __len__(self) -> int:
        return int(self._dataset.total_episodes)

    def _space(self, name: str) -> spaces.Space[Any]:
        """As it was recorded, where that is said: Minari keeps no dtype of a Discrete."""
        if self._told is not None:
            return wire_spaces.rebuild(self._told.get(name))
        space: spaces.Space[Any] = getattr(self._dataset, name)
        return space

    def episodes(self) -> Iterator[Read]:
        """Each of them, in order; one at a time in memory.

        Raises:
            MalformedMessage: one is none; ``details["index"]`` says which. The iterator can be asked for the next.
        """
        return map(self.episode, range(len(self)))

    def episode(self, index: int) -> Read:
        """One of them.

        Raises:
            MalformedMessage: it is none.
        """
        try:
            return self._episode(int(self._dataset.episode_indices[index]))
        except (MalformedMessage, ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            raise MalformedMessage(f"episode {index} of {self.id} is none: {exc}", index=index) from exc

    def _episode(self, index: int) -> Read:
        data = next(iter(self._dataset.iterate_episodes([index])))
        metadata = next(iter(self._dataset.storage.get_episode_metadata([index])))
        n = len(data.rewards)
        flags = [np.asarray(one, np.bool_).reshape(n) for one in (data.terminations, data.truncations)]
        if not n or (flags[0] | flags[1])[:-1].any():
            raise MalformedMessage("an episode has steps, and ends with the first that terminates or truncates it")
        facts = facts_of(metadata) if self._told is not None else None
        infos = dict(data.infos or {})
        at_s = versions = None
        if facts is None:
            seed, options = _reset_of(metadata)
        else:
            seed, options = seed_in(facts), None if facts["options"] is None else value_of(facts["options"])
            infos = _nested(infos) if self._arrow else _unescaped(infos)
            own = infos.pop(OWN)
            at_s, versions = np.asarray(own["at_s"])[1:], np.asarray(own["policy_version"])[1:]
        return Read(
            seed=seed,
            options=options,
            observations=_rows(self.observation_space, data.observations, n + 1, "observations"),
            actions=_rows(self.action_space, data.actions, n, "actions"),
            rewards=np.asarray(data.rewards, np.float64).reshape(n),
            terminations=flags[0],
            truncations=flags[1],
            infos=self._read_infos(infos, n),
            at_s=at_s,
            policy_versions=versions,
        )

    def _read_infos(self, columns: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
        if self._infos is not None:
            return infos_of(self._infos, columns, n + 1)
        length = length_of(columns)
        if length == n:  # of the steps alone
            return [{}, *rows_of(columns, n)]
        if columns and length != n + 1:
            raise MalformedMessage("its infos are not one a step, or one more")
        return rows_of(columns, n + 1)


def _loaded(dataset: str | Path) -> Any:
    minari = needed("minari", "minari")
    path = Path(dataset)
    try:
        if (path / "data" / "metadata.json").is_file():
            return minari.MinariDataset(path / "data")
        return minari.load_dataset(str(dataset))
    except ImportError as exc:
        raise UsageError(f"{dataset} needs {exc.name}; pip install 'meshrl[minari]'", missing=[exc.name]) from exc
    except FileNotFoundError as exc:
        raise UsageError(
            f"there is no Minari dataset {dataset} here; `minari list local` lists those that there are, and "
            "`minari download` gets others"
        ) from exc


def _rows(space: spaces.Space[Any], column: Any, n: int, what: str) -> list[Any]:
    batches = batching(space)
    batch = _as_batch(space, column)
    batches.check(batch, n, what, exact=False)
    return list(batches.rows(batch, n))


def _as_batch(space: spaces.Space[Any], column: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _as_batch(part, column[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_as_batch(part, one) for part, one in zip(space.spaces, column, strict=True))
    return tuple(column) if isinstance(space, spaces.Text) else np.asarray(column)


def _reset_of(metadata: Mapping[str, Any]) -> tuple[int | None, dict[str, Any] | None]:
    seed, options = metadata.get("seed"), metadata.get("options")
    return (
        None if seed is None or not is_seed(seed) else int(seed),
        dict(options) if isinstance(options, Mapping) and options else None,
    )


def _unescaped(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {_key(key): _unescaped(one) if isinstance(one, Mapping) else one for key, one in columns.items()}


def _nested(columns: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, column in columns.items():
        *before, last = path.split("/")
        at = nested
        for key in before:
            at = at.setdefault(_key(key), {})
        at[_key(last)] = column
    return nested


def _key(text: str) -> str:
    if text == "%-":
        return ""
    return text[1:] if text.startswith("%.") else unquote(text)
