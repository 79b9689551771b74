"""What tests of recordings share: sessions that are driven, with what they told kept beside, and the wait for them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshrl import Mesh, RemoteEnv, RemotePool, RemoteVectorEnv
from meshrl.recording.episodes import EpisodeSummary

WAIT_S = 20.0


@dataclass
class Told:
    """An episode as its learner saw it."""

    obs: list[Any]
    infos: list[Any]
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminations: list[bool] = field(default_factory=list)
    truncations: list[bool] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.terminations) and (self.terminations[-1] or self.truncations[-1])


def copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


async def drive(env: RemoteEnv, episodes: int, seed: int | None, *, max_steps: int = 10_000) -> list[Told]:
    """Episodes of a single env, with actions of its space; the first reset has the seed."""
    env.action_space.seed(seed or 0)
    all_: list[Told] = []
    for n in range(episodes):
        obs, info = await env.reset(seed=seed if n == 0 else None)
        told = Told([copied(obs)], [copied(info)])
        all_.append(told)
        while not told.ended and len(told.actions) < max_steps:
            action = env.action_space.sample()
            obs, reward, terminated, truncated, info = await env.step(action)
            told.actions.append(copied(action))
            told.rewards.append(float(reward))
            told.terminations.append(bool(terminated))
            told.truncations.append(bool(truncated))
            told.obs.append(copied(obs))
            told.infos.append(copied(info))
    return all_


async def drive_vector(envs: RemoteVectorEnv, steps: int, seed: int) -> dict[tuple[int, int], list[float]]:
    """Steps of a vector; gives the rewards of the episodes that ended, by env_id and number."""
    envs.action_space.seed(seed)
    await envs.reset(seed=seed)
    over = [False] * envs.num_envs
    number = [0] * envs.num_envs
    rewards: dict[tuple[int, int], list[float]] = defaultdict(list)
    ended = {}
    for _ in range(steps):
        _, told, terminations, truncations, _ = await envs.step(envs.action_space.sample())
        for i in range(envs.num_envs):
            if over[i]:  # NEXT_STEP: that was a reset
                over[i] = False
                number[i] += 1
                continue
            rewards[i, number[i]].append(float(told[i]))
            if terminations[i] or truncations[i]:
                ended[i, number[i]] = rewards[i, number[i]]
                if envs.metadata["autoreset_mode"].value == "NextStep":
                    over[i] = True
                else:
                    number[i] += 1
    return ended


async def drive_pool(pool: RemotePool, results: int, seed: int) -> dict[tuple[int, int], list[float]]:
    """The same of a pool."""
    pool.single_action_space.seed(seed)
    await pool.reset(seed=seed)
    rewards: dict[tuple[int, int], list[float]] = defaultdict(list)
    ended = {}
    got = 0
    while got < results:
        batch = await pool.recv(min=1, max=None, timeout=10)
        got += len(batch.env_ids)
        for k, i in enumerate(batch.env_ids.tolist()):
            if not batch.first[k]:
                key = (i, int(batch.episodes[k]) - 1)
                rewards[key].append(float(batch.rewards[k]))
                if batch.terminations[k] or batch.truncations[k]:
                    ended[key] = rewards[key]
        actions = np.array([pool.single_action_space.sample() for _ in batch.env_ids])
        await pool.send(actions, batch.env_ids)
    return ended


async def listed(m: Mesh, env: str, count: int, **wanted: Any) -> list[EpisodeSummary]:
    """The episodes of an env, once there are so many."""
    deadline = time.monotonic() + WAIT_S
    while True:
        found = [summary async for summary in m.episodes(env, **wanted)]
        if len(found) >= count or time.monotonic() > deadline:
            assert len(found) == count, f"{len(found)} episodes, not {count}"
            return found
        await asyncio.sleep(0.05)


async def listed_in_the_end(m: Mesh, env: str, least: int) -> list[EpisodeSummary]:
    """The episodes of an env that nobody steps any more: at least so many, once no more come."""
    deadline, before = time.monotonic() + WAIT_S, -1
    while True:
        found = [summary async for summary in m.episodes(env)]
        if (len(found) >= least and len(found) == before) or time.monotonic() > deadline:
            assert len(found) >= least, f"{len(found)} episodes, not {least}"
            return found
        before = len(found)
        await asyncio.sleep(0.5)
