"""What is exported, read once and held on disk: a dataset's columns are known only when its last episode is.

Memory holds one episode. Where an episode is run again for its observations, it is run once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import gymnasium

from meshrl.adapters.datasets.infos import InfoColumn, InfoKeys
from meshrl.adapters.datasets.source import OnProgress, Progress, Skipped
from meshrl.client.episode import Episode
from meshrl.errors import SpacesDiffer, UsageError
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.recorded import Recorded

_LENGTH_BYTES = 8


@dataclass(slots=True)
class Gathered:
    """The episodes of a dataset.

    Attributes:
        path: of the file that holds them.
        recordings: what their recordings say of themselves, each once.
        infos: what their infos hold.
        steps: of all of them.
        count: of them.
        skipped: those that could not be read.
    """

    path: Path
    recordings: list[Recorded] = field(default_factory=list)
    infos: dict[str, InfoColumn] = field(default_factory=dict)
    steps: int = 0
    count: int = 0
    skipped: Sequence[Skipped] = ()
    _positions: dict[int, int] = field(default_factory=dict)

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one observation of each."""
        return spaces.rebuild(self.recordings[0].description.observation_space)

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one action of each."""
        return spaces.rebuild(self.recordings[0].description.action_space)

    @property
    def spec(self) -> str | None:
        """Of the env, as ``gymnasium.EnvSpec.to_json`` gives it; None where they are not all of the same."""
        specs = {one.description.spec for one in self.recordings}
        return specs.pop() if len(specs) == 1 else None

    def episodes(self) -> Iterator[Episode]:
        """Each of them, in order."""
        with self.path.open("rb") as file:
            while head := file.read(_LENGTH_BYTES):
                body = unpack(file.read(int.from_bytes(head, "big")))
                recorded, ended_at = self.recordings[body.pop("recording")], body.pop("ended_at")
                yield Episode(**body, recorded=recorded, ended_at=datetime.fromisoformat(ended_at))

    def recording_of(self, episode: Episode) -> int:
        """The position of its recording in :attr:`recordings`."""
        if not self._positions:
            self._positions = {id(one): i for i, one in enumerate(self.recordings)}
        return self._positions[id(episode.recorded)]


_PACKED = [one.name for one in fields(Episode) if one.name != "recorded"]


async def gather(
    episodes: AsyncIterator[Episode],
    path: Path,
    *,
    infos: bool = True,
    skipped: Sequence[Skipped] = (),
    on_progress: OnProgress | None = None,
) -> Gathered:
    """Read all of them, into a file.

    Args:
        episodes: as they are read.
        path: of the file.
        infos: whether they are wanted.
        skipped: those that could not be read, which grows meanwhile.
        on_progress: called after each.

    Raises:
        UsageError: there is none.
        SpacesDiffer: they are of envs with several spaces.
        FormatCannotHold: an info has a key that is no text.
        MeshError: as ``episodes`` do.
    """
    gathered, keys, known = Gathered(path, skipped=skipped), InfoKeys(), dict[bytes, int]()
    first: Episode | None = None
    with path.open("xb") as file:
        async for episode in episodes:
            first = first or episode
            _same_spaces(first, episode)
            told = episode.recorded.to_stream()
            if told not in known:
                known[told] = len(gathered.recordings)
                gathered.recordings.append(episode.recorded)
            told_infos = [dict(info) for info in episode.infos] if infos else [{}] * (len(episode) + 1)
            keys.look(told_infos)
            body = {name: getattr(episode, name) for name in _PACKED}
            body |= {"infos": told_infos, "ended_at": episode.ended_at.isoformat(), "recording": known[told]}
            packed = pack(body)
            file.write(len(packed).to_bytes(_LENGTH_BYTES, "big") + packed)
            gathered.count += 1
            gathered.steps += len(episode)
            if on_progress is not None:
                on_progress(Progress("reading", gathered.count, gathered.steps, len(gathered.skipped)))
    if not gathered.count:
        left_out = f" ({len(gathered.skipped)} could not be read)" if gathered.skipped else ""
        raise UsageError(f"there is no episode to export{left_out}; `meshrl episodes` lists those that there are")
    gathered.infos = keys.parts()
    return gathered


def _same_spaces(first: Episode, other: Episode) -> None:
    one, two = first.recorded.description, other.recorded.description
    for name in ("observation_space", "action_space"):
        if getattr(one, name) != getattr(two, name):
            raise SpacesDiffer(
                f"the {name.replace('_', ' ')} of episode {other.episode_id} ({other.env}) is another than that of "
                f"{first.episode_id} ({first.env}), and a dataset has one; export each env by itself (--env)",
                episode_id=other.episode_id,
            )
