"""Evaluation: episodes of a served agent in a served env."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from meshrl.client.playing import play
from meshrl.errors import MeshError, MeshFull, UsageError

if TYPE_CHECKING:
    from meshrl.client.mesh import Mesh


class EpisodeReport(BaseModel):
    """One episode of an evaluation.

    Attributes:
        seed: with which it was reset.
        episode_return: sum of its rewards.
        length: its steps.
        truncated: it ended by truncation and not by termination.
        worker: the env worker that ran it.
    """

    model_config = ConfigDict(frozen=True)

    seed: int
    episode_return: float
    length: int
    truncated: bool
    worker: str


class Report(BaseModel):
    """What :meth:`meshrl.Mesh.evaluate` found.

    Attributes:
        mean_return: over the episodes.
        std_return: standard deviation over the episodes (population).
        mean_length: steps, over the episodes.
        episodes: each of them, by seed.
    """

    model_config = ConfigDict(frozen=True)

    env: str
    agent: str
    mean_return: float
    std_return: float
    mean_length: float
    episodes: list[EpisodeReport]


async def evaluate(
    mesh: Mesh,
    env: str,
    agent: str,
    episodes: int,
    seed: int,
    *,
    env_kwargs: Mapping[str, Any] | None,
    deterministic: bool,
    concurrency: int,
    wait: float,
) -> Report:
    """Run the episodes; see :meth:`meshrl.Mesh.evaluate`."""
    if episodes < 1 or concurrency < 1:
        raise UsageError("evaluate runs at least one episode, at least one at once")
    seeds = list(range(seed, seed + episodes))
    seeds.reverse()
    reports: list[EpisodeReport] = []
    starved: list[MeshFull] = []
    opening: set[asyncio.Task[None]] = set()
    description = await mesh.describe(agent, "agent", wait=wait)

    async def run() -> None:
        try:
            async with contextlib.AsyncExitStack() as leased:
                remote = await leased.enter_async_context(await mesh.env(env, env_kwargs, wait=wait))
                policy = await leased.enter_async_context(
                    await mesh.agent(agent, stateful=description.stateful, env=remote, wait=wait)
                )
                opening.discard(_this_task())
                while seeds:
                    reports.append(await _episode(remote, policy, seeds.pop(), deterministic))
        except MeshFull as exc:
            starved.append(exc)  # those that have an env run its episodes too
        if len(reports) == episodes:
            for task in opening:
                task.cancel()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, episodes)):
                opening.add(group.create_task(run()))
    except* MeshError as failures:
        # One is told: several learners of one lost worker say the same.
        first: BaseException = failures
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    if not reports:
        raise starved[0]
    reports.sort(key=lambda episode: episode.seed)
    returns = np.array([episode.episode_return for episode in reports])
    return Report(
        env=env,
        agent=agent,
        mean_return=float(returns.mean()),
        std_return=float(returns.std()),
        mean_length=float(np.mean([episode.length for episode in reports])),
        episodes=reports,
    )


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _episode(env: Any, agent: Any, seed: int, deterministic: bool) -> EpisodeReport:
    obs, info = await env.reset(seed=seed)
    if agent.stateful:
        await agent.reset(seed=seed)
    played = await play(env, agent, obs, info, seed=seed, deterministic=deterministic)
    return EpisodeReport(
        seed=seed,
        episode_return=played.episode_return,
        length=played.steps,
        truncated=played.end != "terminated",
        worker=env.worker,
    )
