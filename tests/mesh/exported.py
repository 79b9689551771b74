"""What was exported, against what was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meshrl import Mesh
from meshrl.adapters.datasets import export_npz
from meshrl.client.episode import Episode

TOLD = ("observations", "actions", "rewards", "terminations", "truncations")


async def same_as_exported(m: Mesh, env: str, read: Mapping[str, Episode], path: Path) -> None:
    """A dataset of an env's episodes has the same arrays to the bit; tests/exports has those of Minari and Parquet."""
    ids = [one.episode_id async for one in m.episodes(env)]
    assert ids, f"there are no episodes of {env}"
    await export_npz(m, ids, path)
    with np.load(path, allow_pickle=False) as file:
        parts: dict[str, list[Any]] = {}
        for id_ in ids:
            for name, array in leaves({name: getattr(read[id_], name) for name in TOLD}):
                parts.setdefault(name, []).append(array)
        assert {name for name in file if name.partition("/")[0] in TOLD} == set(parts)
        for name, arrays in parts.items():
            if not isinstance(arrays[0], np.ndarray):
                assert file[name].tolist() == [text for texts in arrays for text in texts], f"{env}: {name}"
                continue
            whole = np.concatenate(arrays)
            assert (file[name].dtype, file[name].shape) == (whole.dtype, whole.shape), f"{env}: {name}"
            assert file[name].tobytes() == whole.tobytes(), f"{env}: {name}"


def leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays and texts of nested values, each by its path."""
    if isinstance(values, Mapping):
        for key, part in values.items():
            yield from leaves(part, f"{name}/{key}".lstrip("/"))
    elif isinstance(values, tuple) and not all(isinstance(part, str) for part in values):
        for n, part in enumerate(values):
            yield from leaves(part, f"{name}/{n}")
    else:
        yield name, values
