"""Experience: transitions of others' episodes, in batches, from where their consumer was."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Factory, Mesh
from meshrl.client.experience import Experience
from meshrl.errors import UsageError
from tests.mesh.conftest import until
from tests.mesh.envs import Counter, Nested
from tests.mesh.recordings import Told, drive, listed
from tests.mesh.test_recordings import alike


def by_episode(batches: list[Experience]) -> dict[str, list[int]]:
    """The steps of each episode, in the order in which they came."""
    steps: dict[str, list[int]] = defaultdict(list)
    for batch in batches:
        for id_, step in zip(batch.episode_ids.tolist(), batch.steps.tolist(), strict=True):
            steps[id_].append(step)
    return steps


def same_as(told: dict[str, Told], batches: list[Experience]) -> None:
    """Every transition of these episodes, once, equal to the bit."""
    seen = dict.fromkeys(told, 0)
    for batch in batches:
        for k, id_ in enumerate(batch.episode_ids.tolist()):
            one, t = told[id_], int(batch.steps[k])
            assert t == seen[id_], "in order, and once"
            seen[id_] += 1
            assert alike(row(batch.observations, k), one.obs[t])
            assert alike(row(batch.next_observations, k), one.obs[t + 1])
            assert alike(row(batch.actions, k), one.actions[t])
            assert (batch.rewards[k], batch.terminations[k]) == (one.rewards[t], one.terminations[t])
            assert batch.truncations[k] == one.truncations[t]
    assert seen == {id_: len(one.rewards) for id_, one in told.items()}


def row(batch: Any, k: int) -> Any:
    if isinstance(batch, dict):
        return {key: row(part, k) for key, part in batch.items()}
    return tuple(row(part, k) for part in batch) if isinstance(batch, tuple) else batch[k]


async def recorded(m: Mesh, env: str, level: Any, episodes: int, seed: int = 1, **wish: Any) -> dict[str, Told]:
    async with await m.env(env, record=level, **wish) as remote:
        session = remote.session_id
        told = await drive(remote, episodes, seed, max_steps=30)
    return {f"{session}.0.{n}": one for n, one in enumerate(told)}


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize("served", ["CartPole-v1", "Nested"])
async def test_every_transition_comes_once(url: str, level: Any, served: str) -> None:
    async with EnvWorker({"of": Nested if served == "Nested" else served}, url), Mesh(url) as m:
        told = await recorded(m, "of", level, 4)
        await listed(m, "of", 4)
        batches = [batch async for batch in m.experience("of", follow=False, batch_size=7)]
        assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
        same_as(told, batches)
        assert all((batch.ages_s >= 0).all() and (batch.ages_s < 60).all() for batch in batches)


async def test_who_comes_back_goes_on_where_it_was_and_each_name_by_itself(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = await recorded(m, "of", "full", 6)
        await listed(m, "of", 6)
        feed = m.experience("of", name="first", follow=False, batch_size=10)
        taken = [await anext(feed) for _ in range(3)]
        again = m.experience("of", name="first", follow=False, batch_size=10)
        third = await anext(again)
        assert third.episode_ids.tolist() == taken[2].episode_ids.tolist(), "it was not taken yet"
        assert third.steps.tolist() == taken[2].steps.tolist()
        await again.commit()
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        rest = [batch async for batch in m.experience("of", name="first", follow=False, batch_size=64)]
        same_as(told, [*taken, *rest])
        assert not [batch async for batch in m.experience("of", name="first", follow=False)]
        other = [batch async for batch in m.experience("of", name="second", follow=False)]
        same_as(told, other)


async def test_a_step_of_a_pool_is_of_the_policy_that_chose_it_however_late_it_is_answered(url: str) -> None:
    async with EnvWorker({"of": Factory(Counter, {"slow_s": -1.0})}, url) as worker, Mesh(url) as m:
        async with await m.pool("of", 3, record="full") as pool:
            await pool.reset(seed=1)
            await pool.recv(min=3, timeout=10)
            pool.policy_version = 1
            await pool.send(np.array([400]), np.array([0]))  # milliseconds
            pool.policy_version = 2
            await pool.send(np.array([1]), np.array([1]))
            assert (await pool.recv(min=1, max=1, timeout=10)).env_ids.tolist() == [1]
            pool.policy_version = 3
            await pool.send(np.array([500, 1]), np.array([2, 1]))
            await pool.recv(min=3, timeout=10)
            await until(lambda: worker.recorded.recorded == 7, "all of it is stored")
        episodes = [await m.episode(one.episode_id) for one in await listed(m, "of", 3)]
        assert {one.env_id: one.policy_versions.tolist() for one in episodes} == {0: [1], 1: [2, 3], 2: [3]}


async def test_a_feed_that_follows_gets_what_is_recorded_later(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        got: list[Experience] = []

        async def follow() -> None:
            async for batch in m.experience("of", batch_size=1000):
                got.append(batch)

        following = asyncio.create_task(follow())
        told = await recorded(m, "of", "full", 2)
        told |= await recorded(m, "of", "full", 2, seed=5)
        wanted = sum(len(one.rewards) for one in told.values())
        await until(lambda: sum(map(len, got)) >= wanted, "all of it was given")
        following.cancel()
        await asyncio.wait({following})
        same_as(told, got)


async def test_a_feed_has_what_was_asked_for_and_whose_policy_it_was(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        await recorded(m, "of", "full", 2)
        async with await m.env("of", record="full", policy="mine", labels={"run": "a"}) as env:
            await env.reset(seed=1)
            for version in (3, 3, 4):
                env.policy_version = version
                await env.step(1)
        async with await m.vector("of", 2, record="full", policy="ours") as envs:
            await envs.reset(seed=1)
            await envs.step(np.ones(2, np.int64))
            envs.policy_version = 9
            await envs.step(np.ones(2, np.int64))
        async with await m.pool("of", 2, record="full", policy="theirs") as pool:
            await pool.reset(seed=1)
            await pool.recv(min=2)
            pool.policy_version = 5
            await pool.send(np.ones(2, np.int64), [0, 1])
            await pool.recv(min=2)
        await listed(m, "of", 2 + 1 + 2 + 2)
        (mine,) = [one async for one in m.experience("of", follow=False, policy="mine")]
        assert mine.policy_versions.tolist() == [3, 3, 4]
        (same,) = [one async for one in m.experience("of", follow=False, labels={"run": "a"})]
        assert same.episode_ids.tolist() == mine.episode_ids.tolist()
        (ours,) = [one async for one in m.experience("of", follow=False, policy="ours")]
        assert ours.policy_versions.tolist() == [-1, 9, -1, 9]
        (theirs,) = [one async for one in m.experience("of", follow=False, policy="theirs")]
        assert theirs.policy_versions.tolist() == [5, 5]
        with pytest.raises(UsageError, match="batch_size"):
            m.experience("of", batch_size=0)
