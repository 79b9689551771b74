"""Experience: the transitions of recorded episodes, one batch after another, for learners that come later.

A feed follows the index of episodes, so that it needs nothing of whoever made them. One with a name is durable: it says
in a stream how far it has come, and whoever asks for it again under that name goes on from there. Each name has a
position of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.storing import store
from meshrl.client.rerunning import rerun
from meshrl.client.verifying import judge
from meshrl.errors import EnvError, EpisodeTorn, MalformedMessage, StreamMissing, UsageError
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import column_of, joined_columns, picked
from meshrl.recording.episodes import Described, RecordedEpisode
from meshrl.recording.library import Located
from meshrl.recording.streams import POSITIONS
from meshrl.wire.codec import pack, unpack

if TYPE_CHECKING:
    from meshrl.client.context import Context

log = logging.getLogger("meshrl.client")

# Between looks whether more has been recorded; chunks come once a second.
LOOK_S = 0.25
COMMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of ``n`` transitions; those of an episode are in order.

    Attributes:
        observations: n of them, as a batch of their space; a list where an env did not keep to its space.
        actions: likewise.
        rewards: float64.
        next_observations: as ``observations``.
        terminations: bool.
        truncations: bool.
        steps: int64, of each which step of its episode it is, from 0.
        episode_ids: of each, whose.
        policy_versions: int64, of whoever chose the action; -1 where nobody said.
        ages_s: float64, how long ago each happened, by this machine's clock and the server's.
    """

    observations: Any
    actions: Any
    rewards: NDArray[np.float64]
    next_observations: Any
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    steps: NDArray[np.int64]
    episode_ids: NDArray[np.str_]
    policy_versions: NDArray[np.int64]
    ages_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a feed stands: how many steps it has given of an episode of an entry of the index."""

    seq: int = 1
    row: int = 0
    step: int = 0

    def to_stream(self) -> bytes:
        return pack([self.seq, self.row, self.step])

    @classmethod
    def from_stream(cls, data: bytes) -> _Place:
        body = unpack(data)
        if type(body) is not list or len(body) != 3 or not all(type(one) is int and one >= 0 for one in body):
            raise MalformedMessage("the position of a consumer is three whole numbers")
        return cls(*body)


class ExperienceFeed:
    """Batches of experience; made by :meth:`meshrl.Mesh.experience`, used with ``async for``.

    What was given with a batch counts as taken once the next one is asked for, or :meth:`commit` is called. Whoever is
    killed before is given it again.

    Attributes:
        skipped: episodes that could not be read, or that did not go as they were recorded when they were run again.
    """

    def __init__(
        self,
        context: Context,
        env: str,
        *,
        name: str | None,
        since: datetime | None,
        batch_size: int,
        follow: bool,
        labels: Mapping[str, str],
        policy: str | None,
        min_return: float | None,
        wait: float,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is a number from 1, not {batch_size!r}")
        self.skipped = 0
        self._context = context
        self._env = env
        self._name = name
        self._since = since
        self._batch_size = batch_size
        self._follow = follow
        self._labels = dict(labels).items()
        self._policy = policy
        self._min_return = min_return
        self._wait = wait
        self._given = _Place()  # behind what the last batch had
        self._committed: _Place | None = None
        self._batches: AsyncIterator[tuple[Experience, _Place]] | None = None

    def __repr__(self) -> str:
        named = f" {self._name!r}" if self._name else ""
        return f"<ExperienceFeed{named} of {self._env}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Experience:
        """The next batch; waits for it where the feed follows.

        Raises:
            StopAsyncIteration: there is nothing more, of a feed that does not follow.
            MeshError: the server is away, or the login may not read recordings.
        """
        if self._committed is None:
            self._given = self._committed = await self._position()
        else:
            await self.commit()
        if self._batches is None:
            self._batches = self._all()
        try:
            batch, self._given = await anext(self._batches)
        except StopAsyncIteration:
            raise
        except BaseException:  # who asks again gets what comes behind the last batch
            self._batches = None
            raise
        return batch

    async def commit(self) -> None:
        """What was given so far is taken: whoever asks for this feed by its name again goes on behind it.

        Raises:
            MeshError: it cannot be stored.
        """
        if self._name is None or self._given == self._committed:
            return
        context = self._context
        subject = context.subjects.position(context.connection.user, self._env, self._name)
        place = self._given
        message_id = f"{subject}:{place.seq}:{place.row}:{place.step}:{time.monotonic_ns()}"
        await store(context.connection, subject, place.to_stream(), COMMIT_S, message_id=message_id)
        self._committed = place

    async def _position(self) -> _Place:
        if self._name is None:
            return _Place()
        context, library = self._context, await self._context.library()
        subject = context.subjects.position(context.connection.user, self._env, self._name)
        try:
            last = await library.reader.last(POSITIONS, subject)
        except StreamMissing:
            return _Place()
        return _Place() if last is None else _Place.from_stream(last.body)

    # ---------------------------------------------------------------- batches

    async def _all(self) -> AsyncIterator[tuple[Experience, _Place]]:
        gathered = _Gathered()
        async for episode, place in self._episodes():
            if episode is None:  # nothing more at the moment
                if len(gathered):
                    yield gathered.taken(), place
                continue
            if gathered.described is not None and not _alike(gathered.described, episode.described):
                yield gathered.taken(), place
            step, size = place.step, len(episode.rewards)
            while step < size:
                until = min(size, step + self._batch_size - len(gathered))
                gathered.add(episode, step, until)
                step = until
                if len(gathered) >= self._batch_size:
                    behind = _Place(place.seq, place.row, step) if step < size else _Place(place.seq, place.row + 1)
                    yield gathered.taken(), behind

    async def _episodes(self) -> AsyncIterator[tuple[RecordedEpisode | None, _Place]]:
        """Each with where it begins; None, and where that is, when there is nothing more at the moment."""
        library = await self._context.library()
        place, since = self._given, self._since if self._given == _Place() else None
        while True:
            async for seq, entries in library.entries(self._env, place.seq, since=since):
                since = None
                at = place if seq == place.seq else _Place(seq)
                for row in range(at.row, len(entries)):
                    episode = await self._read(entries[row]) if self._wanted(entries[row]) else None
                    if episode is not None:
                        yield episode, _Place(seq, row, at.step if row == at.row else 0)
                place = _Place(seq + 1)
            yield None, place
            if not self._follow:
                return
            await asyncio.sleep(LOOK_S)

    def _wanted(self, located: Located) -> bool:
        summary = located.summary
        return (
            (self._min_return is None or summary.episode_return >= self._min_return)
            and self._labels <= summary.labels.items()
            and self._policy in {None, summary.policy}
        )

    async def _read(self, located: Located) -> RecordedEpisode | None:
        library = await self._context.library()
        try:
            episode = await library.read(located)
            if episode.observations is None:
                again = await rerun(self._context, episode, wait=self._wait)
                if not judge(episode, again):
                    raise EpisodeTorn(f"episode {episode.id} did not go as it was recorded when it was run again")
                episode.observations = column_of(episode.described.observations, again.obs)
        except (EpisodeTorn, EnvError) as exc:
            self.skipped += 1
            log.info("%r skips an episode: %s", self, exc.message)
            return None
        return episode


class _Gathered:
    """Parts of episodes on their way into a batch."""

    def __init__(self) -> None:
        self.described: Described | None = None
        self._columns: list[tuple[Column, Column, Column]] = []
        self._parts: list[tuple[RecordedEpisode, int, int]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, episode: RecordedEpisode, start: int, stop: int) -> None:
        """Some steps of an episode."""
        described, shown = episode.described, episode.observations
        assert shown is not None, "it was run again for them"
        self.described = described
        rows = np.arange(start, stop)
        self._columns.append(
            (
                picked(described.observations, shown, rows),
                picked(described.actions, episode.actions, rows),
                picked(described.observations, shown, rows + 1),
            )
        )
        self._parts.append((episode, start, stop))
        self._count += stop - start

    def taken(self) -> Experience:
        """What was gathered; nothing is left."""
        described = self.described
        assert described is not None, "there is something in it"
        spaces = (described.observations, described.actions, described.observations)
        obs, actions, following = (
            joined_columns(batches, columns).values
            for batches, columns in zip(spaces, zip(*self._columns, strict=True), strict=True)
        )
        now = datetime.now(UTC).timestamp()
        told = {
            name: np.concatenate([getattr(episode, name)[start:stop] for episode, start, stop in self._parts])
            for name in ("rewards", "terminations", "truncations", "policies")
        }
        ages = [
            now - episode.summary.ended_at.timestamp() + episode.at_s[-1] - episode.at_s[start:stop]
            for episode, start, stop in self._parts
        ]
        lengths = [stop - start for _, start, stop in self._parts]
        batch = Experience(
            observations=obs,
            actions=actions,
            rewards=told["rewards"],
            next_observations=following,
            terminations=told["terminations"],
            truncations=told["truncations"],
            steps=np.concatenate([np.arange(start, stop) for _, start, stop in self._parts]),
            episode_ids=np.repeat([str(episode.id) for episode, _, _ in self._parts], lengths),
            policy_versions=told["policies"],
            ages_s=np.maximum(0.0, np.concatenate(ages)),
        )
        self._columns, self._parts, self._count, self.described = [], [], 0, None
        return batch


def _alike(one: Described, other: Described) -> bool:
    """Whether transitions of both can be in one batch."""
    descriptions = one.recorded.description, other.recorded.description
    return one is other or (
        descriptions[0].observation_space == descriptions[1].observation_space
        and descriptions[0].action_space == descriptions[1].action_space
    )
