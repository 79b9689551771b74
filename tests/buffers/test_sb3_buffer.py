"""Stable-Baselines3's replay buffers, filled from recorded episodes: every transition, once, in order, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer, RolloutBuffer

from meshrl import EnvWorker, Mesh
from meshrl.adapters.buffers import fill, put
from meshrl.client.gathering import Experience
from meshrl.errors import UsageError
from tests.buffers.made import Counts, Parts, Pictures, batch_of, columns_of
from tests.mesh.recordings import Told, drive, listed
from tests.sb3.envs import Goals, arrays

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "vectors": (BOX, spaces.Discrete(4)),
    "numbers": (spaces.Discrete(9), spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "flags": (spaces.MultiBinary(3), spaces.MultiDiscrete([3, 5])),
    "pictures": (spaces.Box(0, 255, (3, 8, 8), np.uint8), spaces.MultiBinary(2)),
    "dicts": (spaces.Dict(arrays()), spaces.Discrete(2)),
}


class OwnAdd(ReplayBuffer):  # type: ignore[misc,unused-ignore]
    def add(self, *args: Any) -> None:
        super().add(*args)


class OwnDictAdd(DictReplayBuffer):  # type: ignore[misc,unused-ignore]
    def add(self, *args: Any) -> None:
        super().add(*args)


def parts_of(buffer: Any) -> list[Any]:
    arrays_ = [buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.timeouts]
    return [
        *(part for one in arrays_ for part in (one.values() if isinstance(one, dict) else [one])),
        buffer.dones * (1 - buffer.timeouts),  # what a learner is given of the two
        np.array([buffer.pos, buffer.full]),
    ]


@pytest.mark.parametrize("envs", [1, 4])
@pytest.mark.parametrize("kind", SPACES)
def test_it_holds_what_its_own_add_would_have_put_there(kind: str, envs: int) -> None:
    observations, actions = SPACES[kind]
    own: type[Any] = OwnAdd
    plain: type[Any] = ReplayBuffer
    if kind == "dicts":
        own, plain = OwnDictAdd, DictReplayBuffer
    at_once, by_add = (one(10 * envs, observations, actions, device="cpu", n_envs=envs) for one in (plain, own))
    for n, rows in enumerate((3, 4, 6, 10, 13, 1)):  # some of them over its end, one of more than there is room for
        batch = batch_of(observations, actions, rows * envs, seed=n)
        for buffer in (at_once, by_add):
            assert put(buffer, batch) == rows * envs
        for one, other in zip(parts_of(at_once), parts_of(by_add), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def holds(buffer: Any, told: list[Told], count: int) -> None:
    """The first transitions of a buffer of one env are those of the episodes."""
    wanted = columns_of(told)
    assert (buffer.pos, len(wanted["rewards"])) == (count, count)
    for name, part in (("obs", buffer.observations), ("next_obs", buffer.next_observations)):
        for key, values in wanted[name].items() if isinstance(part, dict) else [(None, wanted[name])]:
            rows = (part if key is None else part[key])[:count, 0]
            assert rows.dtype == values.dtype
            np.testing.assert_array_equal(rows, values.reshape(rows.shape))
    np.testing.assert_array_equal(buffer.actions[:count, 0], wanted["actions"].reshape(count, -1))
    np.testing.assert_array_equal(buffer.rewards[:count, 0], wanted["rewards"].astype(np.float32))
    ended = wanted["terminations"] | wanted["truncations"]
    np.testing.assert_array_equal(buffer.dones[:count, 0], ended)
    cut_off = wanted["last"] & ~wanted["terminations"]  # by a time limit, or with the session
    np.testing.assert_array_equal(buffer.timeouts[:count, 0], cut_off)


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize(("served", "kind"), [(Counts, ReplayBuffer), (Parts, DictReplayBuffer)])
async def test_values_are_the_episodes_own_in_order(url: str, served: Any, kind: Any, level: Any) -> None:
    async with EnvWorker({"of": served}, url), Mesh(url) as m:
        async with await m.env("of", record=level) as env:
            told = await drive(env, 9, 1)
            buffer = kind(500, env.observation_space, env.action_space, device="cpu")
            await env.reset()
            await env.step(0)  # of the last episode one step is kept, without a flag
        await listed(m, "of", 10)
        (last,) = [one async for one in m.episodes("of") if one.reason == "closed"]
        assert last.steps == 1
        counts = [n async for n in fill(buffer, m.experience("of", name="sb3", follow=False, batch_size=16))]
        assert set(counts[:-1]) == {16}
        episode = await m.episode(last.episode_id)
        rows = [one.next_observation for one in episode.transitions()]
        first = next(episode.transitions()).observation
        flags = [False]
        told.append(Told([first, *rows], [], list(episode.actions), episode.rewards.tolist(), flags, flags))
        holds(buffer, told, sum(counts))
        assert not [n async for n in fill(buffer, m.experience("of", name="sb3", follow=False))]


async def test_pictures_stand_as_the_buffer_has_them(url: str) -> None:
    async with EnvWorker({"of": Pictures}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 5, 1)
            as_is = ReplayBuffer(100, env.observation_space, env.action_space, device="cpu")
        turned = ReplayBuffer(100, spaces.Box(0, 255, (3, 40, 36), np.uint8), env.action_space, device="cpu")
        await listed(m, "of", 5)
        for buffer in (as_is, turned):
            (count,) = [n async for n in fill(buffer, m.experience("of", follow=False))]
        holds(as_is, told, count)
        np.testing.assert_array_equal(turned.observations, as_is.observations.transpose(0, 1, 4, 2, 3))
        np.testing.assert_array_equal(turned.next_observations, as_is.next_observations.transpose(0, 1, 4, 2, 3))


async def test_a_buffer_for_several_envs_holds_each_transition_once_and_runs_of_them(url: str) -> None:
    async with EnvWorker({"of": Counts}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 30, 1)
            buffer = ReplayBuffer(1000, env.observation_space, env.action_space, device="cpu", n_envs=4)
        await listed(m, "of", 30)
        with pytest.raises(UsageError, match="multiple_of=4"):
            await anext(fill(buffer, m.experience("of", follow=False)))
        feed = m.experience("of", name="wide", follow=False, batch_size=40, multiple_of=4)
        count = sum([n async for n in fill(buffer, feed)])
        wanted = columns_of(told)["obs"]
        assert 0 < len(wanted) - count < 4
        rest = [one.observations async for one in m.experience("of", name="wide", follow=False)]
        held = buffer.observations[: buffer.pos]
        np.testing.assert_array_equal(
            sorted([*held.reshape(-1, 2).tolist(), *rest[0].tolist()]), sorted(wanted.tolist())
        )
        for column in range(4):
            obs, following = held[:-1, column], buffer.next_observations[: buffer.pos - 1, column]
            joined = (following == held[1:, column]).all(-1)
            marked = (buffer.dones + buffer.timeouts)[: buffer.pos - 1, column] > 0
            np.testing.assert_array_equal(joined, ~marked)
            assert joined.sum() > len(obs) // 2


async def test_sums_over_steps_stay_within_an_episode(url: str) -> None:
    async with EnvWorker({"of": Counts}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 40, 1)
            one, four = (
                NStepReplayBuffer(
                    1000, env.observation_space, env.action_space, device="cpu", n_envs=n, n_steps=3, gamma=0.5
                )
                for n in (1, 4)
            )
        await listed(m, "of", 40)
        for buffer in (one, four):
            async for _ in fill(buffer, m.experience("of", follow=False, batch_size=52, multiple_of=4)):
                pass
    rewards = {tuple(obs): r for e in told for obs, r in zip(e.obs[:-1], e.rewards, strict=True)}
    for buffer in (one, four):
        got = buffer.sample(500)
        whole = 0
        for k in range(500):
            begin, end = got.observations[k].tolist(), got.next_observations[k].tolist()
            steps = [rewards[begin[0], step] for step in np.arange(begin[1], end[1])]
            assert begin[0] == end[0], "of one episode"
            assert 1 <= len(steps) <= 3
            whole += len(steps) == 3
            assert float(got.rewards[k]) == pytest.approx(sum(r * 0.5**n for n, r in enumerate(steps)), rel=1e-5)
            assert float(got.discounts[k]) == pytest.approx(0.5 ** len(steps))
        assert whole > 100


def test_hindsight_buffers_know_their_episodes() -> None:
    env = Goals()
    batch = batch_of(env.observation_space, env.action_space, 60)

    class Asked:
        num_envs = 1

        def env_method(self, name: str, achieved: Any, *_: Any, indices: Any) -> list[Any]:
            del name, indices
            return [np.zeros(len(achieved), np.float32)]

    buffer = HerReplayBuffer(100, env.observation_space, env.action_space, Asked(), device="cpu")
    put(buffer, batch)
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], batch.ends])))
    begins = np.flatnonzero(np.concatenate([[True], batch.ends[:-1]]))
    np.testing.assert_array_equal(buffer.ep_length[begins[: len(lengths)], 0], lengths)
    assert len(buffer.sample(32).rewards) == 32


def test_actions_of_a_box_are_scaled_as_its_policies_have_them() -> None:
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 5.0], np.float32))
    buffer = ReplayBuffer(50, BOX, space, device="cpu")
    batch = batch_of(BOX, space, 20)
    put(buffer, batch)
    policy = SAC("MlpPolicy", Asked(BOX, space)).policy
    np.testing.assert_array_equal(buffer.actions[:20, 0], policy.scale_action(batch.actions))


class Asked(Counts):
    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space


def test_what_a_buffer_cannot_hold_is_refused_and_nothing_written() -> None:
    discrete = spaces.Discrete(4)
    batch = batch_of(BOX, discrete, 40)
    small = spaces.Box(-1.0, 1.0, (2,), np.float32)
    whole = spaces.Box(0, 255, (3,), np.uint8)
    listing = Experience(**{name: getattr(batch, name) for name in batch.__slots__} | {"observations": ["a"] * 40})
    refused: list[tuple[Any, Experience, str]] = [
        (ReplayBuffer(50, small, discrete, device="cpu"), batch, r"of shape \(2,\)"),
        (ReplayBuffer(50, whole, discrete, device="cpu"), batch, "uint8"),
        (ReplayBuffer(50, BOX, small, device="cpu"), batch, "actions of Box"),
        (DictReplayBuffer(50, spaces.Dict({"a": BOX}), discrete, device="cpu"), batch, r"of \['a'\]"),
        (ReplayBuffer(50, BOX, discrete, device="cpu", n_envs=3), batch, "do not fill rows of 3"),
        (ReplayBuffer(50, BOX, discrete, device="cpu"), listing, "a list of the env's values"),
        (OwnAdd(50, BOX, discrete, device="cpu", handle_timeout_termination=False), batch, "cut off only with"),
        (
            ReplayBuffer(50, BOX, discrete, "cpu", optimize_memory_usage=True, handle_timeout_termination=False),
            batch,
            "optimize_memory_usage",
        ),
    ]
    for buffer, one, why in refused:
        with pytest.raises(UsageError, match=why):
            put(buffer, one)
        assert (buffer.pos, buffer.full, buffer.rewards.any()) == (0, False, False)
    with pytest.raises(UsageError, match="no replay buffer"):
        put(RolloutBuffer(50, BOX, discrete, device="cpu"), batch)
    with pytest.raises(UsageError, match="no replay buffer of Stable"):
        put([], batch)


def test_a_buffer_that_knows_no_time_limits_knows_where_episodes_were_cut() -> None:
    batch = batch_of(BOX, spaces.Discrete(4), 40)
    buffer = ReplayBuffer(50, BOX, spaces.Discrete(4), device="cpu", handle_timeout_termination=False)
    put(buffer, batch)
    flagged = batch.terminations | batch.truncations
    np.testing.assert_array_equal(buffer.dones[:40, 0], flagged)
    np.testing.assert_array_equal(buffer.timeouts[:40, 0], batch.ends & ~flagged)
