"""What a mesh has recorded, for its users: episodes, listed and read.

Nothing here is on the step path: workers write recordings, and whoever reads them reads streams.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from meshrl.client.env import RemoteEnv
from meshrl.client.episode import Episode, Transition, episode_of
from meshrl.client.experience import ExperienceFeed
from meshrl.client.manifest import Experiment
from meshrl.client.recorded_forks import fork_of
from meshrl.client.recovery import OnLoss
from meshrl.client.rendered import EpisodeFrame, rendered
from meshrl.client.rerunning import rerun
from meshrl.client.tap import Tapped, tapped
from meshrl.client.verifying import Verdict, diverged, judge, unverifiable
from meshrl.errors import UsageError
from meshrl.recording.episodes import EpisodeSummary
from meshrl.wire.record import RECORD_LEVELS, Record

if TYPE_CHECKING:
    from meshrl.client.context import Context

RecordWish = Literal["off", "actions", "full", "strict"]


def record_of(
    level: RecordWish | None,
    every: int = 1,
    labels: Mapping[str, str] | None = None,
    policy: str | None = None,
    experiment: Experiment | None = None,
) -> Record | None:
    """What an open says of its recording; None where its user said nothing, and it is done for no experiment.

    Raises:
        UsageError: there is no such level, or a label that is too long or no text.
    """
    if level is not None and level not in RECORD_LEVELS:
        raise UsageError(f"record is one of {', '.join(RECORD_LEVELS)}, not {level!r}")
    if level is None and every == 1 and not labels and policy is None and experiment is None:
        return None
    manifest = None
    if experiment is not None:
        manifest, labels = experiment.hash, {**(labels or {}), **experiment.labels}
        level, policy = level or experiment.manifest.record, policy or experiment.manifest.agent
    try:
        return Record(level=level, every=every, labels=dict(labels or {}), policy=policy, manifest=manifest)
    except ValueError as exc:
        raise UsageError(
            "record_every is a number from 1, labels are at most 32 short texts by name, and policy is a short text"
        ) from exc


class Recordings(ABC):
    """The part of a mesh that reads what was recorded."""

    @abstractmethod
    def _open(self) -> Context:
        """The context of the mesh, which is open."""

    async def episodes(
        self,
        env: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        min_return: float | None = None,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
        manifest: str | None = None,
    ) -> AsyncIterator[EpisodeSummary]:
        """The recorded episodes that have ended, the oldest first.

        Args:
            env: the name under which it was served, exactly; None for all.
            since: those that ended from then on, on the server's clock; naive times are local ones.
            until: those that ended up to then.
            min_return: those whose rewards add up to as much.
            labels: those of sessions with all of these.
            policy: those with actions of that policy.
            manifest: those of the experiment whose manifest has that hash, or one that begins so.

        Raises:
            MeshUnreachable, RequestTimeout: the server is away, or does not answer.
            SubjectNotPermitted: the login may not read recordings.
        """
        context = self._open()
        library = await context.library()
        wanted = dict(labels or {}).items()
        async for summary, _, _ in library.located(env, since=since, until=until):
            if (
                (min_return is None or summary.episode_return >= min_return)
                and wanted <= summary.labels.items()
                and policy in {None, summary.policy}
                and (manifest is None or (summary.manifest or "").startswith(manifest.lower()))
            ):
                yield summary

    async def episode(self, episode_id: str, *, wait: float = 30.0) -> Episode:
        """A recorded episode, whole.

        Where only actions were recorded, it is run again in an env of the mesh, which gives observations and infos;
        everything that was recorded has to come out equal.

        Args:
            episode_id: of :meth:`episodes`.
            wait: seconds to wait for a worker and a slot, if it is run again.

        Raises:
            InvalidName: it is no id.
            EpisodeUnknown: it has not ended, was not recorded, or is kept no more.
            EpisodeTorn: a part of it is kept no more, or cannot be read.
            EpisodeDiverged: it was run again and went another way.
            MeshError: as of :meth:`meshrl.Mesh.env`, where it is run again.
        """
        context = self._open()
        read = await (await context.library()).episode(episode_id)
        if read.observations is not None:
            return episode_of(read, None)
        again = await rerun(context, read, wait=wait)
        verdict = judge(read, again)
        if not verdict:
            raise diverged(verdict)
        return episode_of(read, again)

    async def replay(
        self, episode_id: str, start: int = 0, speed: float | None = None, *, wait: float = 30.0
    ) -> AsyncIterator[Transition]:
        """A recorded episode, step by step; made of the same as :meth:`episode`, and raises the same.

        Args:
            episode_id: of :meth:`episodes`.
            start: the first step, counted from 0.
            speed: how many times as fast as it went; None for as fast as it is read.
            wait: seconds to wait for a worker and a slot, if it is run again.
        """
        if start < 0 or (speed is not None and not speed > 0):
            raise UsageError("start is a step, counted from 0, and speed a number above 0, or None")
        episode = await self.episode(episode_id, wait=wait)
        began, at = time.monotonic(), None
        for transition in episode.transitions(start):
            if speed is not None:
                told = float(episode.at_s[transition.step])
                at = told if at is None else at
                await asyncio.sleep(max(0.0, began + (told - at) / speed - time.monotonic()))
            yield transition

    async def frames(
        self, episode_id: str, *, wait: float = 30.0, where: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[EpisodeFrame, None]:
        """What a recorded episode looked like: after its reset, and after each step.

        It is run again in an env that is opened with ``render_mode="rgb_array"``, however it was opened when it was
        recorded. Each frame comes when it is proved that the episode went as it was recorded up to there; some
        megabytes of them are held at once.

        Args:
            episode_id: of :meth:`episodes`.
            wait: seconds to wait for a worker and a slot.
            where: capabilities that the worker must have.

        Raises:
            EpisodeNotRendered: its env gives no such pictures, said before anything is run where its metadata says
                so; or the worker is of a version that renders nothing of what it runs again.
            EpisodeDiverged: it went another way, as that of an env does whose ``render`` changes what comes next.
            InvalidName, EpisodeUnknown, EpisodeTorn: as of :meth:`episode`.
            MeshError: as of :meth:`meshrl.Mesh.env`.
        """
        context = self._open()
        read = await (await context.library()).episode(episode_id)
        async with aclosing(rendered(context, read, wait=wait, where=where)) as shown:
            async for frame in shown:
                yield frame

    async def verify(self, episode_id: str, *, wait: float = 30.0, where: Mapping[str, Any] | None = None) -> Verdict:
        """Run a recorded episode again in a fresh env of the mesh, and say whether it is the same.

        Args:
            episode_id: of :meth:`episodes`.
            wait: seconds to wait for a worker and a slot.
            where: capabilities that the worker must have.

        Raises:
            InvalidName, EpisodeUnknown, EpisodeTorn: as of :meth:`episode`.
            MeshError: as of :meth:`meshrl.Mesh.env`.
        """
        context = self._open()
        read = await (await context.library()).episode(episode_id)
        known = unverifiable(read)
        return judge(read, await rerun(context, read, wait=wait, where=where)) if known is None else known

    async def fork(
        self,
        episode_id: str,
        step: int | None = None,
        *,
        wait: float = 30.0,
        where: Mapping[str, Any] | None = None,
        on_loss: OnLoss = "resume",
    ) -> RemoteEnv:
        """A live env in the state in which a recorded episode was after so many steps.

        ``env.last()`` gives what was told there: the observation to go on from.

        Args:
            episode_id: of :meth:`episodes`.
            step: after how many steps; 0 is right after the reset, None the end.
            wait: seconds to wait for a worker and a slot.
            where: capabilities that the worker must have.
            on_loss: as of :meth:`meshrl.Mesh.env`.

        Raises:
            UsageError: the episode has fewer steps.
            InvalidName, EpisodeUnknown, EpisodeTorn, EpisodeDiverged: as of :meth:`episode`.
            MeshError: as of :meth:`meshrl.Mesh.env`.
        """
        context = self._open()
        read = await (await context.library()).episode(episode_id)
        return (await fork_of(context, read, step, wait=wait, where=where, on_loss=on_loss)).env

    def tap(self, env: str | None = None, session: str | None = None) -> AsyncGenerator[Tapped, None]:
        """The transitions of episodes that are under way, as they are recorded, without touching them.

        What is recorded with ``actions`` has observations and infos here too. Nothing waits for a viewer: one that does
        not keep up is cut off. Ends when the mesh is closed; leave it early with ``contextlib.aclosing``.

        Args:
            env: the name under which it is served, exactly; None for all.
            session: of one alone, as in ``env.session_id``.

        Raises:
            ViewerCut: it was not taken in time.
            SubjectNotPermitted: the login may not watch.
            MeshError: the server is away.
        """
        return tapped(self._open(), env, session)

    def experience(
        self,
        env: str,
        *,
        name: str | None = None,
        from_: datetime | str | None = None,
        batch_size: int = 1024,
        multiple_of: int = 1,
        follow: bool = True,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
        min_return: float | None = None,
        min_version: int | None = None,
        max_age_s: float | None = None,
        wait: float = 30.0,
    ) -> ExperienceFeed:
        """The transitions of recorded episodes, in batches, for off-policy learners and long-term stores.

        Episodes come when they have ended, the oldest first. Where observations were not recorded, they are made by
        running the episode again, as :meth:`episode` does.

        Args:
            env: the name under which it was served, exactly.
            name: makes the feed durable: who asks for the same name again goes on behind what was taken.
            from_: those that ended from then on, on the server's clock; or what is behind the ``position`` that another
                feed had; None for all. A durable feed goes by it once.
            batch_size: transitions a batch; fewer where there are no more at the moment.
            multiple_of: each batch has a multiple of so many transitions, and what is over waits for more; fewer only
                where the env is served with other spaces from then on.
            follow: wait for more, for ever; else the feed ends with what there is.
            labels: those of sessions with all of these.
            policy: those with actions of that policy.
            min_return: those whose rewards add up to as much.
            min_version: transitions of policies of at least this version.
            max_age_s: transitions that happened, when they are read, no longer ago than so many seconds.
            wait: seconds to wait for a worker and a slot, where an episode is run again.

        Raises:
            UsageError: ``batch_size`` or ``multiple_of`` is no number from 1, or ``from_`` no position.
        """
        return ExperienceFeed(
            self._open(),
            env,
            name=name,
            from_=from_,
            batch_size=batch_size,
            multiple_of=multiple_of,
            follow=follow,
            labels=labels or {},
            policy=policy,
            min_return=min_return,
            min_version=min_version,
            max_age_s=max_age_s,
            wait=wait,
        )
