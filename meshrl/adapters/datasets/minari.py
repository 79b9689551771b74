"""Export to Minari, by its own storage classes, so that ``minari.load_dataset`` gives back what was recorded.

Needs the extra ``meshrl[minari]``. What Minari has no form for is refused before it is tried: some of it, a Box without
elements in Arrow, ends the process in native code.

    spaces    Sequence, Graph, OneOf and others than Gymnasium's; boxes of which JSON does not tell the shape, such as
              (0, 2); Dicts with keys that are no texts, and with some that HDF5 takes for paths; in Arrow, boxes and
              dicts without anything in them, and the other byte order
    texts     with a NUL, in HDF5
    episodes  of more than 131,071 steps, in Arrow: Minari's reader takes each for one batch of pyarrow's

A Discrete space that is not of int64 comes back as one that is; its values keep their dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from meshrl.adapters.datasets.columns import ARRAYS, cannot_hold, column_of, leaves_of
from meshrl.adapters.datasets.exporting import Exported, Format, Writing, export, needed
from meshrl.adapters.datasets.gathered import Gathered
from meshrl.adapters.datasets.infos import columns_of
from meshrl.adapters.datasets.provenance import dataset_facts, episode_facts
from meshrl.adapters.datasets.source import Episodes, OnProgress
from meshrl.client.episode import Episode
from meshrl.client.mesh import Mesh
from meshrl.errors import InvalidName

Storage = Literal["hdf5", "arrow"]
OWN = "meshrl"
"""What this package adds stands under it: in a dataset's metadata, in an episode's, and in infos."""

# Rows of one batch of pyarrow's datasets; an episode has one row more than steps.
MAX_ARROW_STEPS = 131_072 - 1
# Episodes that are given to Minari together: so many, or of so many bytes.
BATCH_EPISODES = 64
BATCH_BYTES = 8 * 1024 * 1024
# Of an attribute of HDF5.
MAX_ATTRIBUTE_BYTES = 60_000
# (namespace/)name-v0, as Minari has it; a version is needed to load it.
_ID = re.compile(r"(?:(?P<namespace>[-_\w][-_\w/]*[-_\w])/)?[-_\w]+-v\d+")


async def export_minari(
    m: Mesh,
    episodes: Episodes,
    dataset_id: str,
    *,
    storage: Storage = "hdf5",
    jpeg: bool = False,
    infos: bool = True,
    wait: float = 30.0,
    skip_unreadable: bool = False,
    on_progress: OnProgress | None = None,
    description: str | None = None,
) -> Exported:
    """Write recorded episodes as a Minari dataset.

    Observations, actions, rewards and flags are equal to the bit when it is loaded, dtypes included. Where the
    episodes are of one env whose ``EnvSpec`` was recorded, ``recover_environment()`` makes it.

    Args:
        m: the mesh that has them.
        episodes: an id, several, or what ``m.episodes(...)`` gives.
        dataset_id: ``name-v0`` or ``namespace/name-v0``; it is written where Minari looks for it
            (``$MINARI_DATASETS_PATH``, else ``~/.minari/datasets``).
        storage: ``hdf5`` or ``arrow``.
        jpeg: store pictures (boxes of uint8 from 0 to 255, of at least 32 x 32) as JPEG: smaller, and not the same.
        infos: store them.
        wait: seconds to wait for a worker and a slot, where an episode is run again.
        skip_unreadable: leave out what cannot be read or made again, and say so in the result.
        on_progress: called after each episode.
        description: of the dataset, for people.

    Raises:
        UsageError: Minari is not installed, the dataset is there already, or there is no episode.
        InvalidName: the id is none of Minari's.
        SpacesDiffer: the episodes are of envs with several spaces.
        FormatCannotHold: Minari has no form for something; the error names a format that has.
        MeshError: an episode cannot be read, as of :meth:`meshrl.Mesh.episode`.

    Cancelled, it leaves nothing behind; killed, nothing that loads.
    """
    format_ = MinariFormat(dataset_id, storage, description, jpeg=jpeg)
    return await export(
        m,
        episodes,
        format_,
        wait=wait,
        skip_unreadable=skip_unreadable,
        on_progress=on_progress,
        infos=infos,
    )


class MinariFormat(Format):
    """A dataset where Minari looks for it; as of :func:`export_minari`."""

    def __init__(
        self, dataset_id: str, storage: Storage, description: str | None = None, *, jpeg: bool = False
    ) -> None:
        match = _ID.fullmatch(dataset_id)
        if match is None:
            raise InvalidName(
                f"{dataset_id!r} is no id of a Minari dataset, such as cartpole/any-v0 (two letters or more before /)"
            )
        needed("h5py" if storage == "hdf5" else "pyarrow", "minari")
        needed("PIL", "minari")
        self.version: str = needed("minari", "minari").__version__
        roots = needed("minari.storage.datasets_root_dir", "minari")
        self.target = dataset_id
        self.root = Path(roots.get_dataset_path())
        self.path = self.root / dataset_id
        self.namespace = match["namespace"]
        self.storage: Storage = storage
        self.jpeg = jpeg
        self.description = description

    def begin(self, gathered: Gathered, place: Path) -> Writing:
        """Begin it."""
        named = f"Minari ({self.storage})"
        _check(gathered.observation_space, "observations", self.storage, named)
        _check(gathered.action_space, "actions", self.storage, named)
        if OWN in gathered.infos:
            raise cannot_hold(named, f"infos[{OWN!r}]", "policy versions and times stand there")
        return _Dataset(self, gathered, place / "dataset", named)


class _Dataset(Writing):
    def __init__(self, format_: MinariFormat, gathered: Gathered, path: Path, named: str) -> None:
        self._format = format_
        self._gathered = gathered
        self._path = path
        self._named = named
        self._spaces = gathered.observation_space, gathered.action_space
        self._count = 0
        (path / "data").mkdir(parents=True)
        spec = gathered.spec
        self._sized = needed("minari.dataset.minari_storage", "minari").MinariStorage.new(
            path / "data",
            *self._spaces,
            None if spec is None else EnvSpec.from_json(spec),
            format_.storage,
            jpeg_encoding=format_.jpeg,
        )
        # Its own looks at every file that there is, at each episode, for the size of all.
        unsized = type("Unsized", (type(self._sized),), {"get_size": lambda _: 0.0})
        self._storage = unsized(path / "data", *self._spaces, jpeg_encoding=format_.jpeg)
        self._waiting: list[tuple[Any, dict[str, Any]]] = []
        self._bytes = 0
        self._buffer = needed("minari.data_collector.episode_buffer", "minari").EpisodeBuffer

    def add(self, episode: Episode) -> None:
        where = f"episode {episode.episode_id}"
        if self._format.storage == "arrow" and len(episode) > MAX_ARROW_STEPS:
            raise cannot_hold(self._named, where, f"it has more than {MAX_ARROW_STEPS} steps; so does --format minari")
        columns = [
            self._column(space, values, what)
            for space, values, what in zip(
                self._spaces, (episode.observations, episode.actions), ("observations", "actions"), strict=True
            )
        ]
        told = episode_facts(episode, self._gathered.recording_of(episode))
        buffer = self._buffer(
            seed=told["seed"],
            observations=columns[0],
            actions=columns[1],
            rewards=episode.rewards,
            terminations=episode.terminations,
            truncations=episode.truncations,
            infos=self._infos(episode),
        )
        self._waiting.append((buffer, self._attributes(told, where)))
        self._bytes += sum(leaf.nbytes for _, leaf in leaves_of(tuple(columns)) if isinstance(leaf, np.ndarray))
        if len(self._waiting) >= BATCH_EPISODES or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Files are opened and closed at each call of Minari's."""
        count = self._count + len(self._waiting)
        self._storage.update_episodes([buffer for buffer, _ in self._waiting])
        self._storage.update_episode_metadata([told for _, told in self._waiting], range(self._count, count))
        self._count, self._waiting, self._bytes = count, [], 0

    def close(self) -> None:
        """Minari's storage opens and closes its files at each episode."""

    def finish(self) -> Path:
        self._flush()
        told: dict[str, Any] = {
            "dataset_id": self._format.target,
            "minari_version": self._format.version,
            OWN: dataset_facts(self._gathered),
        }
        if self._format.description is not None:
            told["description"] = self._format.description
        policies = {one.policy for one in self._gathered.recordings}
        if len(policies) == 1 and None not in policies:
            told["algorithm_name"] = policies.pop()
        self._sized.update_metadata(told | {"dataset_size": self._sized.get_size()})
        namespaces, namespace = needed("minari.namespace", "minari"), self._format.namespace
        if namespace is not None and namespace not in namespaces.list_local_namespaces():
            namespaces.create_namespace(namespace)
        return self._path

    def _column(self, space: spaces.Space[Any], values: Any, what: str) -> Any:
        column = column_of(space, values, what, self._named)
        for path, leaf in leaves_of(column):
            where = what + "".join(f"[{key!r}]" for key in path)
            if isinstance(leaf, list):
                _check_texts(leaf, where, self._format.storage, self._named)
        return self._cast(space, column, what) if self._format.storage == "arrow" else column

    def _cast(self, space: spaces.Space[Any], column: Any, what: str) -> Any:
        """With the space's dtypes, which Arrow's columns have."""
        if isinstance(column, dict):
            parts = zip(column.items(), space.spaces.values(), strict=True)  # type: ignore[attr-defined]
            return {key: self._cast(part, one, f"{what}[{key!r}]") for (key, one), part in parts}
        if isinstance(column, tuple):
            pairs = enumerate(zip(space.spaces, column, strict=True))  # type: ignore[attr-defined]
            return tuple(self._cast(part, one, f"{what}[{i}]") for i, (part, one) in pairs)
        if isinstance(column, list):
            return column
        with np.errstate(over="ignore", invalid="ignore"):
            cast = column.astype(space.dtype)
        if cast.astype(column.dtype).tobytes() != column.tobytes():
            why = f"values are {column.dtype}, their space {space.dtype}, and not each has a form in that"
            raise cannot_hold(self._named, what, f"{why}; so does --format minari")
        return cast

    def _infos(self, episode: Episode) -> dict[str, Any]:
        columns = columns_of(self._gathered.infos, episode.infos)
        columns[OWN] = {
            "policy_version": np.append(-1, episode.policy_versions),
            "at_s": np.append(0.0, episode.at_s),
        }
        return _nested(columns) if self._format.storage == "hdf5" else dict(_flat(columns))

    def _attributes(self, told: Mapping[str, Any], where: str) -> dict[str, Any]:
        given = {key: value for key, value in told.items() if value is not None}
        if self._format.storage == "arrow":
            return {OWN: given}
        for key, value in given.items():
            if isinstance(value, str) and ("\0" in value or len(value.encode()) > MAX_ATTRIBUTE_BYTES):
                raise cannot_hold(self._named, f"the {key} of {where}", "it is too long for an attribute, or has a NUL")
        return {f"{OWN}/{key}": value for key, value in given.items()}


# --------------------------------------------------------------------------- infos


def escaped(key: str) -> str:
    """A key of infos as neither storage takes it for several, or for none."""
    return quote(key, safe=" !\"#$&'()*+,:;<=>?@[]^`{|}~") if key.strip(".") else f"%{key or '-'}"


def _nested(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {escaped(key): _nested(one) if isinstance(one, dict) else one for key, one in columns.items()}


def _flat(columns: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Of Arrow: Minari's reader knows no columns within columns, and takes arrays of one axis for pictures of none."""
    flat: list[tuple[str, Any]] = []
    for key, one in columns.items():
        path = before + escaped(key)
        if isinstance(one, dict):
            flat += _flat(one, f"{path}/")
        else:
            flat.append((path, list(one) if isinstance(one, np.ndarray) and one.ndim == 1 else one))
    return flat


# --------------------------------------------------------------------------- what has no form


def _check(space: spaces.Space[Any], what: str, storage: Storage, named: str) -> None:
    """Whether Minari can hold values of a space.

    Raises:
        FormatCannotHold: it cannot.
    """
    cls = type(space)
    if cls not in (*ARRAYS, spaces.Text, spaces.Dict, spaces.Tuple):
        raise cannot_hold(named, what, f"Minari has no form for {cls.__name__} spaces")
    if isinstance(space, spaces.Box) and np.shape(space.low.tolist()) != space.shape:
        raise cannot_hold(named, what, f"Minari tells no shape {space.shape}")
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            if type(key) is not str or (storage == "hdf5" and ("/" in key or not key.strip(".") or "\0" in key)):
                raise cannot_hold(named, f"{what}[{key!r}]", "the key is no text, or one that HDF5 takes for a path")
            _check(part, f"{what}[{key!r}]", storage, named)
    if isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            _check(part, f"{what}[{i}]", storage, named)
    if storage == "arrow":
        if isinstance(space, spaces.Dict | spaces.Tuple) and not len(space.spaces):
            raise cannot_hold(named, what, f"an empty {cls.__name__} has no column; so does --format minari")
        if isinstance(space, ARRAYS) and not (math.prod(space.shape or ()) and np.dtype(space.dtype).isnative):
            why = "its arrays are empty, or of the other byte order; --format minari can hold it, too"
            raise cannot_hold(named, what, why)


def _check_texts(texts: list[str], what: str, storage: Storage, named: str) -> None:
    for text in texts:
        if storage == "hdf5" and "\0" in text:
            raise cannot_hold(named, what, "a text has a NUL in it; --format minari-arrow can hold it, too")
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise cannot_hold(named, what, "a text has half of a surrogate pair, for which UTF-8 has no form") from exc


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What this package said of an episode in its metadata; None where somebody else wrote it."""
    told = metadata.get(OWN)
    if not isinstance(told, Mapping):
        return None
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in told.items()}
    return dict.fromkeys(("policy", "seed", "wide_seed", "options")) | plain


def dataset_facts_of(data_path: Path) -> dict[str, Any] | None:
    """What this package said of a dataset; None where somebody else wrote it."""
    metadata = json.loads((data_path / "metadata.json").read_text())
    told = metadata.get(OWN)
    return told if isinstance(told, dict) else None
