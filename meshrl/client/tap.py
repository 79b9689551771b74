"""Taps: transitions of episodes that are under way, as they are recorded, for whoever watches.

A viewer has a connection of its own, so that nothing else waits for it, and what it does not take in time is not kept
for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshrl.bus.connect import connect
from meshrl.client.episode import Transition
from meshrl.errors import MalformedMessage, MeshError, ViewerCut
from meshrl.protocol.chunks import Chunk, Column, read_chunk
from meshrl.protocol.joined import checked
from meshrl.recording.episodes import Described, EpisodeId
from meshrl.wire.batches import Batching
from meshrl.wire.of_recordings import Watch
from meshrl.wire.recorded import Recorded

if TYPE_CHECKING:
    from meshrl.bus.connection import Connection
    from meshrl.client.context import Context

log = logging.getLogger("meshrl.client")

# What waits for a viewer; then it is cut off.
MAX_BEHIND_BYTES = 64 * 1024 * 1024
# Workers are told as often that somebody watches, and believe it for as long.
SAID_S = 2.0
BELIEVED_S = 8.0


@dataclass(frozen=True, slots=True)
class Tapped:
    """A transition of an episode that is under way.

    Attributes:
        session: whose it is.
        env: the served name.
        env_id: which sub-environment's it is, over all shards of its vector or pool.
        episode_id: what the episode will be asked for by, once it has ended.
        transition: the step.
    """

    session: str
    env: str
    env_id: int
    episode_id: str
    transition: Transition


async def tapped(
    context: Context, env: str | None, session: str | None, max_behind_bytes: int = MAX_BEHIND_BYTES
) -> AsyncGenerator[Tapped, None]:
    """What is watched, one by one, for ever.

    Raises:
        ViewerCut: it was not taken in time.
        MeshError: the server is away, or does not permit it.
    """
    subjects, behind = context.subjects, _Behind(max_behind_bytes)
    async with connect(context.url, name="meshrl tap", credentials=context.credentials) as connection:
        connection.on_close.append(behind.end)
        context.connection.on_close.append(behind.end)
        await connection.subscribe(subjects.tapped(env or "*", session or "*", "*"), behind.on_message)
        watch = Watch(env=env, session=session, seconds=BELIEVED_S).to_wire()
        saying = asyncio.create_task(_say(connection, subjects.tapping(connection.user), watch))
        views: dict[str, _View] = {}
        try:
            while True:
                try:
                    subject, data = await behind.first()
                except MeshError:
                    if context.ended:
                        return
                    raise
                watched, what = subject.split(".")[-2:]
                try:
                    if what == "about":
                        described = Described.of(Recorded.from_stream(data))
                        view = views.get(watched)
                        if view is None or view.described.recorded.session != described.recorded.session:
                            views[watched] = _View(described)
                        else:
                            view.described = described
                        continue
                    view = views.get(watched)
                    if view is None:
                        continue
                    for one in view.rows(read_chunk(data)):
                        yield one
                    if view.over:
                        del views[watched]
                except MalformedMessage as exc:
                    log.info("what is shown of session %s cannot be read: %s", watched, exc.message)
        finally:
            saying.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshError):
                await saying


async def _say(connection: Connection, subject: str, watch: bytes) -> None:
    while True:
        connection.publish(subject, watch)
        await asyncio.sleep(SAID_S)


class _Behind:
    """What has come and was not taken."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._why: MeshError | None = None
        self._wake = asyncio.Event()

    def on_message(self, subject: str, _reply: str, data: bytes) -> None:
        if self._why is None:
            self._messages.append((subject, bytes(data)))
            self._bytes += len(data)
            if self._bytes > self._max_bytes:
                self.end(
                    ViewerCut(
                        f"{self._bytes} bytes of what was watched were not taken; watch one session (session=), or "
                        "take them faster",
                        behind_bytes=self._bytes,
                    )
                )
            self._wake.set()

    def end(self, why: MeshError) -> None:
        """Nothing more comes."""
        self._why = self._why or why
        self._messages.clear()
        self._wake.set()

    async def first(self) -> tuple[str, bytes]:
        """The oldest of them.

        Raises:
            MeshError: why there are no more.
        """
        while not self._messages:
            if self._why is not None:
                raise self._why
            self._wake.clear()
            await self._wake.wait()
        subject, data = self._messages.popleft()
        self._bytes -= len(data)
        return subject, data


@dataclass(slots=True)
class _Lane:
    """Where a lane is: the episode, its next step, and the observation before that, where that was seen.

    Attributes:
        shown: the episode and the step of the last transition that was. Who goes on with a session does some of it
            again, and knows only of what is stored that it was seen.
    """

    number: int = -1
    step: int = 0
    obs: list[Any] = field(default_factory=list)
    shown: tuple[int, int] = (-1, -1)


class _View:
    """What is seen of one session.

    Attributes:
        described: of what its recording is.
        over: whether nothing more comes.
    """

    def __init__(self, described: Described) -> None:
        self.over = False
        self.described = described
        self._n = -1  # of the last chunk
        self._lanes: list[_Lane] = []

    def rows(self, chunk: Chunk) -> Iterator[Tapped]:
        """The transitions of a chunk, as far as their beginnings were seen.

        Raises:
            MalformedMessage: it is not of this session's spaces.
        """
        observations, actions = self.described.observations, self.described.actions
        if chunk.observations is None:
            raise MalformedMessage("a chunk that is shown has observations", field="observations")
        steps = int((~chunk.resets).sum())
        checked(actions, chunk.actions, steps, "actions")
        checked(observations, chunk.observations, len(chunk), "observations")
        if len(self._lanes) != len(chunk.numbers):
            self._lanes = [_Lane() for _ in chunk.numbers]
        if chunk.n != self._n + 1:  # some were not seen
            for lane in self._lanes:
                lane.obs.clear()
        self._n, self.over = chunk.n, bool(chunk.end)
        for lane, number, step in zip(self._lanes, chunk.numbers.tolist(), chunk.steps.tolist(), strict=True):
            if (lane.number, lane.step) != (number, step):
                lane.obs.clear()
            lane.number, lane.step = number, step
        acted, told = (
            iter(_values(actions, chunk.actions, steps)),
            _values(observations, chunk.observations, len(chunk)),
        )
        return self._transitions(chunk, acted, told)

    def _transitions(self, chunk: Chunk, acted: Iterator[Any], told: list[Any]) -> Iterator[Tapped]:
        recorded, infos = self.described.recorded, dict(chunk.infos or ())
        numbers, versions = iter(chunk.started.numbers.tolist()), dict(chunk.policies)
        columns = (chunk.lanes, chunk.resets, chunk.rewards, chunk.terminations, chunk.truncations)
        version = None
        for row, (i, reset, reward, terminated, truncated) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            lane, obs, version = self._lanes[i], told[row], versions.get(row, version)
            if reset:
                lane.number, lane.step, lane.obs = next(numbers), 0, [obs]
                continue
            action = next(acted)
            if lane.obs and (lane.number, lane.step) > lane.shown:
                lane.shown = lane.number, lane.step
                step = Transition(
                    lane.step, lane.obs[0], action, reward, terminated, truncated, obs, infos.get(row, {}), version
                )
                episode = str(EpisodeId(recorded.session, i, lane.number))
                yield Tapped(recorded.session, recorded.name, recorded.first_env_id + i, episode, step)
            lane.step += 1
            # Whoever steps behind the end of an episode does nothing that is one's.
            lane.obs = [] if terminated or truncated else [obs]


def _values(batches: Batching, column: Column, count: int) -> list[Any]:
    return list(column.values) if column.form == "items" else list(batches.rows(column.values, count))
