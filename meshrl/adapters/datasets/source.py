"""Reading recorded episodes for an export: one after another, in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from meshrl.client.episode import Episode
from meshrl.client.mesh import Mesh
from meshrl.client.rerunning import NEVER_AGAIN
from meshrl.errors import WorkerError
from meshrl.recording.episodes import EpisodeSummary

Episodes = str | Iterable[str | EpisodeSummary] | AsyncIterable[str | EpisodeSummary]
"""Which are meant: an id, several, or what :meth:`meshrl.Mesh.episodes` gives."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an export or an import is.

    Attributes:
        phase: ``reading`` episodes, or ``writing`` them.
        episodes: that are done, of this phase.
        steps: of those.
        skipped: that could not be read.
    """

    phase: str
    episodes: int
    steps: int
    skipped: int = 0


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Skipped:
    """An episode that was left out.

    Attributes:
        episode_id: of it.
        code: of the error.
        why: its sentence.
    """

    episode_id: str
    code: str
    why: str


@dataclass(slots=True)
class Source:
    """Episodes of a mesh, as they are read.

    Attributes:
        mesh: that has them.
        episodes: which.
        wait: seconds to wait for a worker and a slot, where one is run again.
        skip_unreadable: go on where one cannot be read.
        skipped: those that could not.
    """

    mesh: Mesh
    episodes: Episodes
    wait: float = 30.0
    skip_unreadable: bool = False
    skipped: list[Skipped] = field(default_factory=list)

    async def read(self) -> AsyncIterator[Episode]:
        """Each of them, whole.

        Raises:
            MeshError: as of :meth:`meshrl.Mesh.episode`, with the id of the episode in its message and details.
        """
        async for wanted in self._wanted():
            id_ = wanted if isinstance(wanted, str) else wanted.episode_id
            try:
                episode = await self.mesh.episode(id_, wait=self.wait)
            except (*NEVER_AGAIN, WorkerError) as exc:
                if not self.skip_unreadable:
                    exc.details.setdefault("episode_id", id_)
                    if id_ not in exc.message:
                        exc.message = f"episode {id_} cannot be made again: {exc.message}"
                    raise
                self.skipped.append(Skipped(id_, exc.code, exc.message))
                continue
            yield episode

    async def _wanted(self) -> AsyncIterator[str | EpisodeSummary]:
        if isinstance(self.episodes, str):
            yield self.episodes
        elif isinstance(self.episodes, AsyncIterable):
            async for one in self.episodes:
                yield one
        else:
            for one in self.episodes:
                yield one
