"""Recordings: what a session did is read again as it was, run again, and gone on with from the middle."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from meshrl import EnvWorker, Mesh
from meshrl.client import recordings
from meshrl.errors import EpisodeUnknown, InvalidName, UsageError
from meshrl.wire.codec import pack
from tests.mesh.conftest import until
from tests.mesh.envs import Counter, Nested
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.recordings import Told, copied, drive, drive_pool, drive_vector, listed, listed_in_the_end

NAMES = ["CartPole-v1", "FrozenLake-v1", "Pendulum-v1", "Blackjack-v1", TAXI]


def same_as(told: Told, episode: Any) -> None:
    """Equal to the bit to what its learner saw."""
    assert len(episode) == len(told.rewards)
    assert episode.rewards.tolist() == told.rewards
    assert episode.terminations.tolist() == told.terminations
    assert episode.truncations.tolist() == told.truncations
    for at, transition in enumerate(episode.transitions()):
        assert alike(transition.observation, told.obs[at])
        assert alike(transition.next_observation, told.obs[at + 1])
        assert alike(transition.action, told.actions[at])
        assert pack(transition.info) == pack(told.infos[at + 1])


def alike(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in other)
    if isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(other, np.ndarray):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    return bool(one == other)


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize("name", NAMES)
async def test_an_episode_is_read_as_it_was_told(url: str, name: str, level: Any) -> None:
    served = f"{name}-{level}".replace("/", "-")
    async with EnvWorker({served: name}, url) as worker, Mesh(url) as m:
        async with await m.env(served, record=level) as env:
            told = await drive(env, 3, 7, max_steps=60)
            session = env.session_id
        found = await listed(m, served, 3)
        assert [one.episode_id for one in found] == [f"{session}.0.{n}" for n in range(3)]
        assert [one.steps for one in found] == [len(one.rewards) for one in told]
        for one, summary in zip(told, found, strict=True):
            episode = await m.episode(summary.episode_id)
            same_as(one, episode)
            assert episode.remade == (level == "actions")
            assert summary.episode_return == pytest.approx(sum(one.rewards))
            assert (await m.verify(summary.episode_id)).status == "exact"
        assert worker.recorded.lost == 0


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_a_nested_env_is_read_as_it_was_told(url: str, level: Any) -> None:
    served = f"nested-{level}"
    async with EnvWorker({served: Nested}, url), Mesh(url) as m:
        async with await m.env(served, record=level) as env:
            told = await drive(env, 2, 3, max_steps=40)
        for one, summary in zip(told, await listed(m, served, 2), strict=True):
            same_as(one, await m.episode(summary.episode_id))
            assert await m.verify(summary.episode_id)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("level", ["actions", "full"])
async def test_episodes_of_a_vector_are_all_there_and_can_be_run_again(
    url: str, mode: AutoresetMode, level: Any
) -> None:
    served = f"vector-{mode.value}-{level}"
    async with EnvWorker({served: "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.vector(served, 8, autoreset_mode=mode, record=level) as envs:
            told = await drive_vector(envs, 150, 5)
        found = await listed_in_the_end(m, served, len(told))
        ended = {(one.env_id, int(one.episode_id.split(".")[-1])): one for one in found if one.reason != "closed"}
        assert ended.keys() == told.keys()
        for key, rewards in told.items():
            assert (ended[key].steps, ended[key].episode_return) == (len(rewards), sum(rewards))
        for one in found[::7]:
            assert (await m.verify(one.episode_id)).status == "exact"
            episode = await m.episode(one.episode_id)
            assert episode.observations.shape == (one.steps + 1, 4)


async def test_episodes_of_a_pool_are_all_there_and_can_be_run_again(url: str) -> None:
    async with EnvWorker({"pooled": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.pool("pooled", 8, record="actions") as pool:
            told = await drive_pool(pool, 1200, 5)
        found = await listed_in_the_end(m, "pooled", len(told))
        ended = {(one.env_id, int(one.episode_id.split(".")[-1])): one for one in found if one.reason != "closed"}
        assert ended.keys() >= told.keys()
        for key, rewards in told.items():
            assert (ended[key].steps, ended[key].episode_return) == (len(rewards), sum(rewards))
        for one in found[::7]:
            assert (await m.verify(one.episode_id)).status == "exact"


@pytest.mark.parametrize("step", [0, 1, 5, None])
async def test_a_fork_goes_on_as_the_episode_did(url: str, step: int | None) -> None:
    served = f"forked-{step}"
    async with EnvWorker({served: "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env(served, record="actions") as env:
            told = (await drive(env, 2, 11))[1]
        found = (await listed(m, served, 2))[1]
        at = len(told.rewards) if step is None else step
        async with await m.fork(found.episode_id, step) as env:
            for n in range(at, len(told.rewards)):
                obs, reward, terminated, truncated, _ = await env.step(told.actions[n])
                assert alike(obs, told.obs[n + 1])
                assert (reward, terminated, truncated) == (told.rewards[n], told.terminations[n], told.truncations[n])


async def test_it_can_be_said_what_is_recorded(url: str) -> None:
    async with EnvWorker({"silent": "CartPole-v1"}, url, record="off") as worker, Mesh(url) as m:
        async with await m.env("silent") as env:
            await drive(env, 1, 1)
        async with await m.env("silent", record="actions", labels={"run": "a"}, policy="mine", record_every=2) as env:
            await drive(env, 3, 1)
        found = await listed(m, "silent", 2)
        assert [one.episode_id.rsplit(".", 1)[1] for one in found] == ["0", "2"]
        assert all(one.labels == {"run": "a"} and one.policy == "mine" for one in found)
        assert await listed(m, "silent", 2, labels={"run": "a"})
        assert not await listed(m, "silent", 0, labels={"run": "b"})
        assert not await listed(m, "silent", 0, policy="another")
        best = max(one.episode_return for one in found)
        assert best in [one.episode_return for one in await listed(m, "silent", 1, min_return=best)]
        assert worker.recorded.recorded


async def test_what_is_not_there_is_said_so(url: str) -> None:
    async with EnvWorker({"gone": "CartPole-v1"}, url), Mesh(url) as m:
        with pytest.raises(InvalidName, match="9f3a"):
            await m.episode("no id")
        with pytest.raises(EpisodeUnknown, match="meshrl episodes"):
            await m.episode("abcd.0.1")
        with pytest.raises(UsageError, match="record is one of"):
            await m.env("gone", record="everything")  # type: ignore[arg-type]


async def test_another_env_under_the_name_is_found_out(url: str) -> None:
    class Heavier(gymnasium.Wrapper[Any, Any, Any, Any]):
        pass

    async with Mesh(url) as m:
        async with EnvWorker({"changed": "CartPole-v1"}, url), await m.env("changed", record="full") as env:
            await drive(env, 1, 2)
        (found,) = await listed(m, "changed", 1)

        def heavier() -> gymnasium.Env[Any, Any]:
            env = gymnasium.make("CartPole-v1")
            env.unwrapped.gravity = 9.9  # type: ignore[attr-defined]
            return env

        async with EnvWorker({"changed": heavier}, url):
            verdict = await m.verify(found.episode_id)
        assert verdict.status in {"diverged", "close"}
        assert verdict.field == "observation"
        assert verdict.step in {1, 2}


class Forgetful(Counter):
    """It says that a reset makes it a fresh one, which is true until somebody sets its start."""

    metadata = {**Counter.metadata, "outlives_reset": "nothing"}


async def test_an_attribute_that_was_set_long_ago_is_a_reason(url: str) -> None:
    async with EnvWorker({"of": Forgetful}, url, allow=("start",)) as worker, Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            await drive(env, 1, 1, max_steps=2)
            await env.set_attr("start", 5)
            await until(lambda: worker.recorded.recorded == 3, "a chunk holds it")
            for seed in (2, 3):
                await drive(env, 1, seed, max_steps=2)
                await asyncio.sleep(1.1)
        found = await listed(m, "of", 3)
        verdicts = [await m.verify(one.episode_id) for one in found]
    assert [verdict.status for verdict in verdicts] == ["exact", "unverifiable", "unverifiable"]
    assert [verdict.reasons for verdict in verdicts[1:]] == [("warm",), ("warm",)]


class TakesOut(Counter):
    """Takes what it uses out of its options, and puts something else into them."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.start = 0 if options is None else options.pop("start", 0)
        if options is not None:
            options["nested"].append(self.start)
        return super().reset(seed=seed)


@pytest.mark.parametrize("kind", ["single", "vector", "pool"])
async def test_options_are_recorded_as_they_were_given(url: str, kind: str) -> None:
    given = {"start": 5, "nested": [1, 2]}
    async with EnvWorker({"of": TakesOut}, url), Mesh(url) as m:
        remote: Any = await (
            m.env("of", record="actions") if kind == "single" else getattr(m, kind)("of", 1, record="actions")
        )
        async with remote:
            await remote.reset(seed=1, options=copied(given))
            if kind == "pool":
                await remote.recv()
                await remote.send(np.ones(1, np.int64), [0])
                assert (await remote.recv()).observations.tolist() == [6]
            else:
                obs, *_ = await remote.step(1 if kind == "single" else np.ones(1, np.int64))
                assert obs == 6
        (found,) = await listed(m, "of", 1)
        episode = await m.episode(found.episode_id)
        assert episode.options == given
        assert episode.observations.tolist() == [5, 6]


@pytest.mark.parametrize("kind", ["single", "vector"])
async def test_a_reset_that_nothing_followed_keeps_the_next_episodes_from_nothing(url: str, kind: str) -> None:
    async with EnvWorker({"nested": Nested}, url), Mesh(url) as m:
        remote: Any = await (
            m.env("nested", record="actions") if kind == "single" else m.vector("nested", 2, record="actions")
        )
        async with remote:
            await remote.reset(seed=4)
            await asyncio.sleep(1.1)  # it is in a chunk of its own
            await remote.reset()
            await remote.reset()
            remote.action_space.seed(1)
            for _ in range(60):
                *_, over, cut, _ = await remote.step(remote.action_space.sample())
                if kind == "single" and (over or cut):
                    await remote.reset()
        found = await listed_in_the_end(m, "nested", 2)
        assert {int(one.episode_id.split(".")[2]) for one in found} >= {2, 3}
        for one in found:
            assert (await m.verify(one.episode_id)).status == "exact"
        async with await m.fork(found[0].episode_id, 1):
            pass


async def test_a_replay_goes_as_many_times_as_fast_as_is_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async with EnvWorker({"of": "CartPole-v1"}, url, record="full"), Mesh(url) as m:
        async with await m.env("of") as env:
            await drive(env, 1, 1)
        (one,) = await listed(m, "of", 1)
        at_s = (await m.episode(one.episode_id)).at_s
        monkeypatch.setattr(recordings, "asyncio", SimpleNamespace(sleep=sleep))
        for speed in (1e-6, 2e-6):  # so slow that what it takes to read counts nothing
            pauses.clear()
            steps = [step.step async for step in m.replay(one.episode_id, 2, speed)]
            assert steps == list(range(2, one.steps))
            wanted = (at_s[2:] - at_s[2]) / speed
            assert np.allclose(pauses, np.maximum(wanted, 0.0), atol=30.0)
        assert wanted[-1] > 100.0
