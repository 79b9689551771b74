"""Export to one Parquet file, a row a transition, and the reader that gives its episodes back.

Needs the extra ``meshrl[parquet]``. Everything that can be recorded can be in it; how its columns are is
:mod:`~meshrl.adapters.datasets.parquet_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from meshrl.adapters.datasets.exporting import Exported, Format, Writing, export, needed
from meshrl.adapters.datasets.gathered import Gathered
from meshrl.adapters.datasets.source import Episodes, OnProgress
from meshrl.client.episode import Episode
from meshrl.client.mesh import Mesh


async def export_parquet(
    m: Mesh,
    episodes: Episodes,
    path: str | Path,
    *,
    infos: bool = True,
    wait: float = 30.0,
    skip_unreadable: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Write recorded episodes as one Parquet file; :func:`read_parquet` gives them back.

    Args:
        m: the mesh that has them.
        episodes: an id, several, or what ``m.episodes(...)`` gives.
        path: of the file.
        infos: store them.
        wait: seconds to wait for a worker and a slot, where an episode is run again.
        skip_unreadable: leave out what cannot be read or made again, and say so in the result.
        on_progress: called after each episode.

    Raises:
        UsageError: pyarrow is not installed, the file is there already, or there is no episode.
        SpacesDiffer: the episodes are of envs with several spaces.
        MeshError: an episode cannot be read, as of :meth:`meshrl.Mesh.episode`.

    Cancelled, it leaves nothing behind; killed, nothing under that name.
    """
    return await export(
        m,
        episodes,
        ParquetFormat(Path(path)),
        wait=wait,
        skip_unreadable=skip_unreadable,
        on_progress=on_progress,
        infos=infos,
    )


class ParquetFormat(Format):
    """One file; as of :func:`export_parquet`."""

    def __init__(self, path: Path) -> None:
        self._rows = _rows()
        self.path = path
        self.target = str(path)

    def begin(self, gathered: Gathered, place: Path) -> Writing:
        """Begin it."""
        writing: Writing = self._rows.Rows(gathered, place / "whole.parquet")
        return writing


def _rows() -> ModuleType:
    rows: ModuleType = needed("meshrl.adapters.datasets.parquet_rows", "parquet")
    return rows


def read_parquet(path: str | Path) -> Iterator[Episode]:
    """The episodes of a file that :func:`export_parquet` wrote, as ``m.episode`` gave them; one at a time in memory.

    Where an env did not keep to its space, and its values could yet be one array, they are one here.

    Raises:
        UsageError: pyarrow is not installed, or the file was not written by an export.
        MalformedMessage: what it says of itself cannot be read.
    """
    yield from _rows().read(path)
