"""Experience: the transitions of recorded episodes, one batch after another, for learners that come later.

A feed follows the index of episodes, so that it needs nothing of whoever made them. One with a name is durable: it says
in a stream how far it has come, and whoever asks for it again under that name goes on from there. Each name has a
position of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.storing import Stored
from meshrl.client.following import Following, Place
from meshrl.client.gathering import Experience, Gathered, Part, ages_of
from meshrl.client.rerunning import NEVER_AGAIN, rerun
from meshrl.client.verifying import judge
from meshrl.errors import EpisodeTorn, MalformedMessage, StreamMissing, UsageError, WrongSequence
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import batched
from meshrl.recording.episodes import RecordedEpisode
from meshrl.recording.library import Located
from meshrl.recording.streams import POSITIONS

if TYPE_CHECKING:
    from meshrl.client.context import Context

log = logging.getLogger("meshrl.client")

# Between looks whether more has been recorded; chunks come once a second.
LOOK_S = 0.25
COMMIT_S = 10.0


class ExperienceFeed:
    """Batches of experience; made by :meth:`meshrl.Mesh.experience`, used with ``async for``.

    What was given with a batch counts as taken once the next one is asked for, or :meth:`commit` is called. Whoever is
    killed before is given it again.

    Attributes:
        skipped: episodes that could not be read, or that did not go as they were recorded when they were run again.
        min_version: transitions of older policies, or of which nobody said which, are left out from now on; None for
            all. A learner may raise it as it goes.
        max_age_s: transitions that happened longer ago than that are left out; None for all.
        stale: transitions that were left out by these two.
    """

    def __init__(
        self,
        context: Context,
        env: str,
        *,
        name: str | None,
        from_: datetime | str | None,
        batch_size: int,
        multiple_of: int,
        follow: bool,
        labels: Mapping[str, str],
        policy: str | None,
        min_return: float | None,
        min_version: int | None,
        max_age_s: float | None,
        wait: float,
    ) -> None:
        for what, count in (("batch_size", batch_size), ("multiple_of", multiple_of)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UsageError(f"{what} is a number from 1, not {count!r}")
        if batch_size < multiple_of:
            raise UsageError(f"batches of at most {batch_size} are no multiple_of {multiple_of}; raise batch_size")
        self.skipped = 0
        self.stale = 0
        self.min_version = min_version
        self.max_age_s = max_age_s
        self._context = context
        self._env = env
        self._name = name
        self._begin, self._since = _beginning(from_)
        self._multiple = multiple_of
        self._batch_size = batch_size - batch_size % multiple_of
        self._follow = follow
        self._labels = dict(labels).items()
        self._policy = policy
        self._min_return = min_return
        self._wait = wait
        self._mark = f"{secrets.token_hex(8)}:"  # of what it commits
        self._numbers = itertools.count(1)
        self._stored = 0  # the number of the last commit under its name
        self._given = self._begin  # behind what the last batch had
        self._committed: Place | None = None
        self._batches: AsyncIterator[tuple[Experience, Place]] | None = None

    def __repr__(self) -> str:
        named = f" {self._name!r}" if self._name else ""
        return f"<ExperienceFeed{named} of {self._env}>"

    def __aiter__(self) -> Self:
        return self

    @property
    def multiple_of(self) -> int:
        """Batches have a multiple of so many transitions."""
        return self._multiple

    @property
    def position(self) -> str:
        """Behind the last batch that it gave; ``from_`` of another feed, which goes on there.

        Who keeps what was learned from, or the buffer it is in, keeps this with it, and both go on together.
        """
        return str(self._given)

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
            UsageError: another feed has committed under its name since.
            MeshError: it cannot be stored.
        """
        place = self._given
        if self._name is None or place == self._committed:
            self._committed = place
            return
        try:
            await self._store(place)
        except WrongSequence as exc:
            last = await self._last()
            if last is not None and not last.message_id.startswith(self._mark):
                raise UsageError(
                    f"another feed of {self._env} goes by the name {self._name!r}, and has come further; each consumer "
                    "has a name of its own, and who comes back makes a new feed"
                ) from exc
            # It was this one, and the answer was lost; or there is nothing any more.
            self._stored = 0 if last is None else last.seq
            await self._store(place)
        self._committed = place

    def rewind(self) -> None:
        """What was given and is not taken yet is given again."""
        if self._committed is not None:
            self._given, self._batches = self._committed, None

    async def _store(self, place: Place) -> None:
        assert self._name is not None, "it is durable"
        reader, message_id = await self._context.reader(), f"{self._mark}{next(self._numbers)}"
        self._stored = await reader.keep(
            self._env, self._name, str(place), COMMIT_S, message_id=message_id, after=self._stored
        )

    async def _position(self) -> Place:
        last = None if self._name is None else await self._last()
        if last is None:
            return self._begin
        self._stored = last.seq
        return Place.parse(last.body.decode("ascii", "replace"))

    async def _last(self) -> Stored | None:
        """What its name has committed."""
        try:
            return await (await self._context.reader()).last(POSITIONS, self._subject)
        except StreamMissing:
            return None

    @property
    def _subject(self) -> str:
        assert self._name is not None, "it is durable"
        return self._context.subjects.position(self._context.connection.user, self._env, self._name)

    # ---------------------------------------------------------------- batches

    async def _all(self) -> AsyncIterator[tuple[Experience, Place]]:
        gathered = Gathered(self._given)
        async for part in self._parts():
            if part is None:  # nothing more at the moment
                if whole := len(gathered) - len(gathered) % self._multiple:
                    yield gathered.taken(whole), gathered.place
                continue
            if not gathered.fits(part.episode):
                yield gathered.taken(len(gathered)), gathered.place
            gathered.add(part)
            while len(gathered) >= self._batch_size:
                yield gathered.taken(self._batch_size), gathered.place

    async def _parts(self) -> AsyncIterator[Part | None]:
        """What is wanted of each episode; None when there is nothing more at the moment."""
        library = await self._context.library()
        since = self._since if self._given == Place() else None
        following = Following(library, self._env, self._given, since)
        while True:
            async for place, located in following.look():
                episode = await self._read(located) if self._wanted(located) else None
                if episode is not None:
                    following.passed(located)
                    part = Part.of(episode, place, self._fresh(episode))
                    self.stale += len(episode.rewards) - place.step - len(part.steps)
                    yield part
            yield None
            if not self._follow:
                return
            await asyncio.sleep(LOOK_S)

    def _fresh(self, episode: RecordedEpisode) -> NDArray[np.bool_]:
        fresh = np.ones(len(episode.rewards), np.bool_)
        if self.min_version is not None:
            fresh &= episode.policies >= self.min_version
        if self.max_age_s is not None:
            fresh &= ages_of(episode, datetime.now(UTC).timestamp()) <= self.max_age_s
        return fresh

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
                episode.observations = Column("items", again.obs)
        except NEVER_AGAIN as exc:
            self.skipped += 1
            log.info("%r skips an episode: %s", self, exc.message)
            return None
        assert episode.observations is not None, "they were recorded, or it was run again"
        episode.observations = batched(episode.described.observations, episode.observations)
        episode.actions = batched(episode.described.actions, episode.actions)
        return episode


def _beginning(from_: datetime | str | None) -> tuple[Place, datetime | None]:
    if from_ is None or isinstance(from_, datetime):
        return Place(), from_
    try:
        return Place.parse(from_), None
    except MalformedMessage:
        raise UsageError(f"from_ is a datetime, or the position of a feed, not {from_!r}") from None
