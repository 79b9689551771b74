"""Export to one ``.npz`` file, which ``numpy.load`` opens without pickle.

Its arrays are those of all episodes, one after another::

    observations, or observations/<key>/...    of each reset and step, a name for each array of a Dict or Tuple
    infos/<key>/...                            likewise, with masks under ``_`` and the key
    actions, or actions/<key>/...              of each step
    rewards, terminations, truncations, policy_versions, at_s    the same
    episode_offsets                            n + 1 of them: episode i has the steps from offsets[i] to offsets[i + 1]
    observation_offsets                        the same, of observations and infos, of which each has one more
    meta                                       JSON, as a text: spaces, what infos hold, where each episode is from
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from meshrl.adapters.datasets.columns import cannot_hold, column_of, common_dtype, leaves_of
from meshrl.adapters.datasets.exporting import Exported, Format, Writing, export
from meshrl.adapters.datasets.gathered import Gathered
from meshrl.adapters.datasets.infos import columns_of
from meshrl.adapters.datasets.provenance import dataset_facts, episode_facts
from meshrl.adapters.datasets.source import Episodes, OnProgress
from meshrl.client.episode import Episode
from meshrl.client.mesh import Mesh

_TOLD = ("rewards", "terminations", "truncations", "policy_versions", "at_s")


async def export_npz(
    m: Mesh,
    episodes: Episodes,
    path: str | Path,
    *,
    infos: bool = True,
    wait: float = 30.0,
    skip_unreadable: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Write recorded episodes as one ``.npz`` file, equal to the bit.

    Args:
        m: the mesh that has them.
        episodes: an id, several, or what ``m.episodes(...)`` gives.
        path: of the file.
        infos: store them.
        wait: seconds to wait for a worker and a slot, where an episode is run again.
        skip_unreadable: leave out what cannot be read or made again, and say so in the result.
        on_progress: called after each episode.

    Raises:
        UsageError: the file is there already, or there is no episode.
        SpacesDiffer: the episodes are of envs with several spaces.
        FormatCannotHold: there is no array for something; the error names a format that has a form for it.
        MeshError: an episode cannot be read, as of :meth:`meshrl.Mesh.episode`.

    Cancelled, it leaves nothing behind; killed, nothing under that name.
    """
    return await export(
        m,
        episodes,
        NpzFormat(Path(path)),
        wait=wait,
        skip_unreadable=skip_unreadable,
        on_progress=on_progress,
        infos=infos,
    )


class NpzFormat(Format):
    """One file; as of :func:`export_npz`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = str(path)

    def begin(self, gathered: Gathered, place: Path) -> Writing:
        """Begin it."""
        return _Arrays(gathered, place)


class _Arrays(Writing):
    def __init__(self, gathered: Gathered, place: Path) -> None:
        self._gathered = gathered
        self._place = place
        self._spaces = {"observations": gathered.observation_space, "actions": gathered.action_space}
        self._parts: dict[str, _Part] = {}
        self._lengths: list[int] = []
        self._episodes: list[Mapping[str, Any]] = []

    def add(self, episode: Episode) -> None:
        columns: dict[str, Any] = {
            role: column_of(space, getattr(episode, role), role, "npz") for role, space in self._spaces.items()
        }
        columns["infos"] = columns_of(self._gathered.infos, episode.infos)
        columns |= {name: getattr(episode, name) for name in _TOLD}
        names = set()
        for path, leaf in leaves_of(columns):
            name = "/".join(quote(str(key), safe="") for key in path)
            if name in names:
                raise cannot_hold("npz", name, "there are two arrays of that name")
            names.add(name)
            self._part(name).add(leaf if isinstance(leaf, np.ndarray) else _texts(leaf, name))
        self._lengths.append(len(episode))
        self._episodes.append(episode_facts(episode, self._gathered.recording_of(episode)))

    def _part(self, name: str) -> _Part:
        if name not in self._parts:
            self._parts[name] = _Part(name, self._place / f"part-{len(self._parts)}")
        return self._parts[name]

    def finish(self) -> Path:
        whole = self._place / "whole.npz"
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        meta = dataset_facts(self._gathered) | {"episodes": self._episodes}
        own = {
            "episode_offsets": offsets,
            "observation_offsets": offsets + np.arange(len(offsets)),
            "meta": np.array(json.dumps(meta)),
        }
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in own.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, array, allow_pickle=False)
            for part in self._parts.values():
                with archive.open(f"{part.name}.npy", "w", force_zip64=True) as out:
                    part.write(out)
        return whole

    def close(self) -> None:
        for part in self._parts.values():
            part.close()


class _Part:
    """One array of all episodes, on its way: each episode's in a file, one after another."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        self._file = path.open("xb")
        self._dtypes: set[np.dtype[Any]] = set()
        self._shape: tuple[int, ...] = ()
        self._rows = self._blocks = 0

    def add(self, array: NDArray[Any]) -> None:
        """An episode's."""
        np.lib.format.write_array(self._file, array, allow_pickle=False)
        self._dtypes.add(array.dtype)
        self._shape = array.shape[1:]
        self._rows, self._blocks = self._rows + len(array), self._blocks + 1

    def write(self, out: IO[bytes]) -> None:
        """All of it, as one array of a dtype that holds each value.

        Raises:
            FormatCannotHold: there is no such dtype.
        """
        if all(dtype.kind == "U" for dtype in self._dtypes):
            dtype: np.dtype[Any] | None = max(self._dtypes, key=lambda one: one.itemsize)
        else:
            dtype = common_dtype(self._dtypes)
        if dtype is None:
            kinds = ", ".join(sorted(map(str, self._dtypes)))
            raise cannot_hold("npz", self.name, f"values are {kinds}, and no dtype holds all of them")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(out, header | {"shape": (self._rows, *self._shape)})
        for array in self._each():
            out.write(array.astype(dtype, copy=False).tobytes())

    def _each(self) -> Iterator[NDArray[Any]]:
        self._file.close()
        with self._path.open("rb") as file:
            for _ in range(self._blocks):
                yield np.lib.format.read_array(file, allow_pickle=False)

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()


def _texts(texts: list[str], what: str) -> NDArray[np.str_]:
    if any(text.endswith("\0") for text in texts):
        raise cannot_hold("npz", what, "a text ends with a NUL, which NumPy's texts leave out")
    return np.array(texts, np.str_)
