"""Exporting: episodes gathered, written under a name that no loader looks at, and put in their place when whole."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshrl.adapters.datasets.gathered import Gathered, gather
from meshrl.adapters.datasets.source import Episodes, OnProgress, Progress, Skipped, Source
from meshrl.client.episode import Episode
from meshrl.client.mesh import Mesh
from meshrl.errors import UsageError

# Of what is not whole. Loaders look at nothing that begins with a dot.
UNFINISHED = ".meshrl-export-"


@dataclass(frozen=True, slots=True)
class Exported:
    """A dataset that was written.

    Attributes:
        target: what it is loaded by: a path, or the id of a Minari dataset.
        path: where it is.
        episodes: how many it has.
        steps: of those.
        skipped: episodes that could not be read, and are not in it.
        recoverable: whether it has the spec of its env.
    """

    target: str
    path: Path
    episodes: int
    steps: int
    skipped: Sequence[Skipped]
    recoverable: bool


class Writing(ABC):
    """A dataset on its way to a file or directory."""

    @abstractmethod
    def add(self, episode: Episode) -> None:
        """The next episode.

        Raises:
            FormatCannotHold: something of it has no form.
        """

    @abstractmethod
    def finish(self) -> Path:
        """There are no more; gives what is to be put in its place."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more is written, whether it is whole or not."""


class Format(ABC):
    """A file format.

    Attributes:
        target: what the dataset is loaded by.
        path: where it will be.
    """

    target: str
    path: Path

    @abstractmethod
    def begin(self, gathered: Gathered, place: Path) -> Writing:
        """Begin a dataset in a directory of its own.

        Raises:
            FormatCannotHold: there is no form for a space or an info.
        """


async def export(
    m: Mesh,
    episodes: Episodes,
    format_: Format,
    *,
    wait: float,
    skip_unreadable: bool,
    on_progress: OnProgress | None,
    infos: bool,
) -> Exported:
    """Write a dataset; what the functions of the formats have in common.

    Raises:
        UsageError: there is something at its place already, or no episode.
        MeshError: as of :func:`~meshrl.adapters.datasets.gathered.gather`.
    """
    _is_free(format_)
    format_.path.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=format_.path.parent))
    try:
        source = Source(m, episodes, wait, skip_unreadable)
        gathered = await gather(
            source.read(), place / "episodes", infos=infos, skipped=source.skipped, on_progress=on_progress
        )
        writing = format_.begin(gathered, place)
        try:
            whole = await _write(gathered, writing, on_progress)
        finally:
            writing.close()
        _is_free(format_)
        whole.rename(format_.path)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    recoverable = gathered.spec is not None
    return Exported(format_.target, format_.path, gathered.count, gathered.steps, gathered.skipped, recoverable)


async def _write(gathered: Gathered, writing: Writing, on_progress: OnProgress | None) -> Path:
    count = steps = 0
    for episode in gathered.episodes():
        writing.add(episode)
        count, steps = count + 1, steps + len(episode)
        if on_progress is not None:
            on_progress(Progress("writing", count, steps, len(gathered.skipped)))
        await asyncio.sleep(0)  # an export of hours can be cancelled, and leaves the loop to others
    return writing.finish()


def _is_free(format_: Format) -> None:
    if format_.path.exists():
        raise UsageError(f"{format_.path} is there already, and is left as it is; remove it, or name another place")


def needed(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        name = (exc.name or module).partition(".")[0]
        raise UsageError(f"{name} is not installed; pip install 'meshrl[{extra}]'", missing=[name]) from exc
