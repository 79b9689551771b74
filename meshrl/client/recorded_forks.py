"""Forks of recorded episodes: live envs in the state in which one was after some steps (R8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from meshrl.client.env import RemoteEnv
from meshrl.client.recovery import OnLoss, Recovery
from meshrl.client.rerunning import LAST_SEED, Rerun, actions_of, chained, reset_of
from meshrl.client.resumable import ResumableSession
from meshrl.client.shielded import shielded
from meshrl.client.verifying import Verdict, diverged, prefix_differs
from meshrl.errors import UsageError
from meshrl.recording.episodes import RecordedEpisode
from meshrl.wire.codec import pack
from meshrl.wire.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.client.context import Context


class Forked(NamedTuple):
    """A live env in the state of an episode.

    Attributes:
        env: it.
        observation: that it told last.
        info: that came with that.
    """

    env: RemoteEnv
    observation: Any
    info: dict[str, Any]


async def fork_of(
    context: Context,
    episode: RecordedEpisode,
    step: int | None,
    *,
    wait: float,
    where: Mapping[str, Any] | None = None,
    on_loss: OnLoss = "resume",
) -> Forked:
    """A live env in the state of an episode after so many steps (None: all of them).

    Raises:
        UsageError: it has fewer.
        EpisodeDiverged: an env that was asked the same did something else.
        MeshError: as of :meth:`meshrl.Mesh.env`.
    """
    size = len(episode.rewards)
    step = size if step is None else step
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= size:
        raise UsageError(
            f"episode {episode.id} has {size} steps, so that it can be forked after 0 to {size}, not {step!r}"
        )
    recorded = episode.recorded
    session = await context.open(
        "env",
        recorded.name,
        recorded.kwargs,
        where,
        wait,
        on_loss=on_loss,
        render_mode=recorded.render_mode,
        digests="large",  # so that what outlived a reset can be put there
    )
    try:
        recovery = session.recovery if isinstance(session, ResumableSession) else None
        whole = episode.until(step)
        told, of = Rerun(session.grant.description), None
        async for part, frame in chained(context, session, whole):
            if part is not of:
                told, of = Rerun(session.grant.description), part
            if recovery is not None:
                _note(recovery, part, frame, len(told.rewards), begun=bool(told.obs))
            told.add(frame)
        found = prefix_differs(whole, told)
        if found is not None:
            raise diverged(Verdict(str(episode.id), "diverged", *found))
        env = RemoteEnv(session, render_mode=recorded.render_mode, check_actions="normal")
        return Forked(env, told.obs[-1], told.infos[-1])
    except BaseException:
        await shielded(session.close())
        raise


def _note(recovery: Recovery, part: RecordedEpisode, frame: Frame, at: int, *, begun: bool) -> None:
    """Have the session's journal as if each step had been asked for alone."""
    infos, obs = iter(frame["infos"]), iter(frame["obs"])
    digest = {"digest": frame["digest"]} if "digest" in frame else {}
    if not begun:
        answer: Frame = {"obs": next(obs), "info": next(infos)}
        answer |= {name: frame[name] for name in ("seed", "state") if name in frame}
        if "state" in answer and recovery.seed is None:
            recovery.seed = LAST_SEED
        recovery.note("reset", pack(reset_of(part)), pack(answer), {**answer, **digest}, 0.0)
    actions = actions_of(part, at, at + len(frame["rewards"]))
    told = zip(actions, obs, frame["rewards"], frame["terminated"], frame["truncated"], infos, strict=True)
    for action, one, reward, terminated, truncated, info in told:
        answer = {"obs": one, "reward": reward, "terminated": terminated, "truncated": truncated, "info": info}
        recovery.note("step", pack({"action": action}), pack(answer), {**answer, **digest}, 0.0)
