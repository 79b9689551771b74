"""tianshou's replay buffers, prioritised ones too, filled from recorded episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer as Sb3Buffer
from tianshou.data import PrioritizedReplayBuffer, PrioritizedVectorReplayBuffer, ReplayBuffer, VectorReplayBuffer

from meshrl import EnvWorker, Mesh
from meshrl.adapters.buffers import fill, put
from meshrl.errors import UsageError
from tests.buffers.made import Counts, Parts, Pictures, batch_of, columns_of
from tests.mesh.recordings import drive, listed

pytestmark = pytest.mark.timeout(300)  # numba compiles for tianshou, once a process
SPACES = (spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(4))


def prioritised(size: int) -> Any:
    return PrioritizedReplayBuffer(size, alpha=0.6, beta=0.4)


@pytest.mark.parametrize("served", [Counts, Parts, Pictures])
async def test_values_are_the_episodes_own_in_order(url: str, served: Any) -> None:
    async with EnvWorker({"of": served}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 9, 1)
        await listed(m, "of", 9)
        buffer = prioritised(500)
        count = sum([n async for n in fill(buffer, m.experience("of", follow=False, batch_size=16))])
        wanted = columns_of(told)
        assert len(buffer) == count == len(wanted["rewards"])
        for name, key in (("obs", "obs"), ("next_obs", "obs_next")):
            held = buffer[:][key]
            for part, values in wanted[name].items() if isinstance(wanted[name], dict) else [(None, wanted[name])]:
                rows = held if part is None else held[part]
                assert rows.dtype == values.dtype
                np.testing.assert_array_equal(rows, values)
        for name, key in (("actions", "act"), ("rewards", "rew"), ("terminations", "terminated"), ("last", "done")):
            np.testing.assert_array_equal(buffer[:][key], wanted[name])
        np.testing.assert_array_equal(buffer[:].truncated, wanted["truncations"])


async def test_two_consumers_have_positions_of_their_own(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            await drive(env, 6, 1)
            buffers = {"one": prioritised(500), "other": Sb3Buffer(500, env.observation_space, env.action_space, "cpu")}
        steps = sum(one.steps for one in await listed(m, "of", 6))
        early = fill(buffers["one"], m.experience("of", name="one", follow=False, batch_size=20))
        assert [await anext(early), await anext(early)] == [20, 20]
        await early.aclose()
        for name, buffer in buffers.items():
            async for _ in fill(buffer, m.experience("of", name=name, follow=False, batch_size=32)):
                pass
        assert len(buffers["one"]) == buffers["other"].pos == steps
        np.testing.assert_array_equal(buffers["one"][:].obs, buffers["other"].observations[:steps, 0])


def test_what_is_likely_to_teach_is_sampled_more_often() -> None:
    buffer = prioritised(300)
    put(buffer, batch_of(*SPACES, 100))
    buffer.update_weight(np.arange(100), np.full(100, 0.01))
    buffer.update_weight(np.array([7]), np.array([10.0]))
    sampled, indices = buffer.sample(400)
    assert (indices == 7).mean() > 0.3
    assert sampled.weight[indices == 7].max() < sampled.weight[indices != 7].min(), "and counts less each time"
    put(buffer, batch_of(*SPACES, 50, seed=1))
    _, indices = buffer.sample(400)
    assert (indices >= 100).mean() > 0.5, "what is new has the highest priority that there was"


def test_what_does_not_fit_any_more_leaves_the_oldest_out() -> None:
    for buffer in (ReplayBuffer(64), prioritised(64)):
        batches = [batch_of(*SPACES, count, seed=count) for count in (40, 30, 150, 7)]
        for batch in batches:
            put(buffer, batch)
        rewards = np.concatenate([batch.rewards for batch in batches])
        assert len(buffer) == 64
        np.testing.assert_array_equal(buffer[:].rew, rewards[-64:])


def test_buffers_of_several_envs_hold_runs_side_by_side() -> None:
    for buffer in (VectorReplayBuffer(400, 4), PrioritizedVectorReplayBuffer(400, 4, alpha=0.6, beta=0.4)):
        first, second = batch_of(*SPACES, 80), batch_of(*SPACES, 40, seed=1)
        put(buffer, first)
        put(buffer, second)
        rewards = np.concatenate([first.rewards.reshape(4, 20), second.rewards.reshape(4, 10)], 1)
        np.testing.assert_array_equal(buffer[:].rew, rewards.ravel())
        ends = buffer[:].done.reshape(4, 30)
        assert ends[:, [19, 29]].all(), "runs are cut there"
        np.testing.assert_array_equal(np.delete(ends[:, :20], 19, 1), np.delete(first.ends.reshape(4, 20), 19, 1))
        assert not buffer[:].terminated.reshape(4, 30)[:, 19][~first.terminations.reshape(4, 20)[:, 19]].any()
        with pytest.raises(UsageError, match="rows of 4"):
            put(buffer, batch_of(*SPACES, 6))


def test_what_a_buffer_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="ignore_obs_next"):
        put(ReplayBuffer(20, ignore_obs_next=True), batch_of(*SPACES, 4))
