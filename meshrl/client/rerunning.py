"""Running a recorded episode again: in a fresh env of the mesh, from its reset, with the same actions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshrl.client.session import RemoteSession
from meshrl.client.shielded import shielded
from meshrl.errors import EnvError, MalformedMessage, NotAllowed, RecordingError, UnencodableValue
from meshrl.protocol.chunks import Column
from meshrl.recording.episodes import RecordedEpisode
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Description
from meshrl.wire.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.client.context import Context

# What comes of an episode that cannot be run again, whoever tries, and whenever; anything else may be another time.
NEVER_AGAIN = (RecordingError, EnvError, NotAllowed, MalformedMessage, UnencodableValue)
# A request has so many steps at first; then about as many as take this long, and no more than that.
FIRST_STEPS = 32
REQUEST_S = 0.25
MAX_STEPS = 4096
# Of an env that goes on with what outlived a reset, the last seed is nobody's any more; it is said to have been this.
LAST_SEED = 0


@dataclass(slots=True)
class Rerun:
    """What an env told when an episode was run again, by its own values.

    Attributes:
        description: of the env that it was run in.
        obs: of the reset and of each step.
        infos: the same.
        rewards: of each step.
        terminated: the same.
        truncated: the same.
    """

    description: Description
    obs: list[Any] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    terminated: list[Any] = field(default_factory=list)
    truncated: list[Any] = field(default_factory=list)

    def add(self, frame: Frame) -> None:
        """It told that, too."""
        self.obs += frame["obs"]
        self.infos += frame["infos"]
        self.rewards += frame["rewards"]
        self.terminated += frame["terminated"]
        self.truncated += frame["truncated"]


async def rerun(
    context: Context, episode: RecordedEpisode, *, wait: float, where: Mapping[str, Any] | None = None
) -> Rerun:
    """Run it again, whole, in an env that is opened for it.

    Raises:
        MeshError: as of :meth:`meshrl.Mesh.env`, or what the env's code raised.
    """
    session = await opened(context, episode, wait=wait, where=where)
    told = Rerun(session.grant.description)
    try:
        async for part, frame in chained(context, session, episode):
            if part.id == episode.id:
                told.add(frame)
        return told
    finally:
        await shielded(session.close())


async def chained(
    context: Context, session: RemoteSession, episode: RecordedEpisode, *, render: bool = False
) -> AsyncIterator[tuple[RecordedEpisode, Frame]]:
    """What a fresh env tells of the episodes that have to be run before it, and then of it, each with whose it is.

    What outlived a reset may be sealed for other workers, or unknown to these: then they go back to one with a seed.

    Args:
        context: of the client.
        session: with the fresh env.
        episode: the last of them.
        render: have the frames of that one, too.

    Raises:
        MalformedMessage: the worker's answer is none.
        MeshError: the session's, or as of :meth:`~meshrl.recording.library.Library.chain`.
    """
    library = await context.library()
    chain = await library.chain(episode)
    begun = False
    try:
        for part in chain:
            async for frame in frames(session, part, render=render and part.id == episode.id):
                begun = True
                yield part, frame
    except MalformedMessage:
        if begun or chain[0].state is None:
            raise
        for part in await library.chain(episode, seeded=True):
            async for frame in frames(session, part, render=render and part.id == episode.id):
                yield part, frame


async def opened(
    context: Context,
    episode: RecordedEpisode,
    *,
    wait: float,
    where: Mapping[str, Any] | None,
    render_mode: str | None = None,
) -> RemoteSession:
    """A session of the same env, which is not recorded; in another render mode, if one is given."""
    recorded = episode.recorded
    return await context.open(
        "env",
        recorded.name,
        recorded.kwargs,
        where,
        wait,
        render_mode=render_mode or recorded.render_mode,
        digests="large",  # so that what outlived a reset can be put there
        record=Record(level="off"),
    )


async def frames(session: RemoteSession, episode: RecordedEpisode, *, render: bool = False) -> AsyncIterator[Frame]:
    """What a fresh env tells of the episode, some steps at a time; ends with it.

    Args:
        session: of the env, of which nothing was asked but what came before the episode.
        episode: to be run again.
        render: render the env after the reset and each step, too. A worker that knows nothing of that sends no
            ``frames``.

    Raises:
        MalformedMessage: its worker's answer is none.
        MeshError: the session's.
    """
    begin: Frame | None = reset_of(episode)
    batches = episode.described.actions
    left, count = episode.actions, FIRST_STEPS
    size = len(episode.rewards)
    at = 0
    while begin is not None or at < size:
        until = min(size, at + count)
        part = _cut(batches, left, at, until)
        began = time.monotonic()
        asked: Frame = {"actions": [part.form, part.values]}
        asked |= {} if begin is None else {"reset": begin}
        asked |= {"render": True} if render else {}
        frame = await session.request("rerun", asked)
        told = _check(frame, until - at, reset=begin is not None)
        took = max(1e-4, time.monotonic() - began)
        yield frame
        if told and (frame["terminated"][-1] or frame["truncated"][-1]):
            return
        if told < until - at and not render:
            return
        if not told and begin is None:
            raise MalformedMessage("the answer to a rerun has no step of those that were asked for")
        count = max(1, min(MAX_STEPS, 2 * count, int(max(1, told) * REQUEST_S / took)))
        begin, at = None, at + told


def actions_of(episode: RecordedEpisode, start: int, stop: int) -> list[Any]:
    """Some of its actions, one by one."""
    batches = episode.described.actions
    part = _cut(batches, episode.actions, start, stop)
    return part.values if part.form == "items" else list(batches.rows(part.values, stop - start))


def reset_of(episode: RecordedEpisode) -> Frame:
    """The request with which the episode begins."""
    fields: Frame = {}
    if episode.seed is not None:
        fields["seed"] = episode.seed
    elif episode.state is not None:
        fields |= {"state": episode.state, "last_seed": LAST_SEED}
    if episode.options is not None:
        fields["options"] = episode.options
    return fields


def _cut(batches: Any, column: Column, start: int, stop: int) -> Column:
    if column.form == "items" or start == stop:
        return Column("items", list(column.values[start:stop]) if column.form == "items" else [])
    return Column("batch", batches.cut(column.values, start, stop))


def _check(frame: Frame, steps: int, *, reset: bool) -> int:
    """How many steps an answer tells of."""
    names = ("rewards", "terminated", "truncated")
    lists = [frame.get(name) for name in ("obs", "infos", *names)]
    if not all(type(one) is list for one in lists):
        raise MalformedMessage("the answer to a rerun has lists of what was told")
    told = len(frame["rewards"])
    if told > steps or [len(one) for one in lists if one is not None] != [told + reset, told + reset, told, told, told]:
        raise MalformedMessage("the answer to a rerun has as many values as steps")
    return told
