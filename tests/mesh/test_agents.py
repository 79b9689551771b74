"""Agents over a real server (R12)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.client.context import context_of
from meshrl.errors import AgentError, SpacesDiffer, UnknownName, UsageError
from meshrl.worker.policies import random_policy
from tests.mesh.conftest import until
from tests.mesh.envs import Counter, Picture


class Remembers:
    """A stateful agent: its action is how often it acted in this episode, plus its first."""

    action_space = spaces.Discrete(1000)

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.acted = 0
        self.heard: list[Any] = []

    def reset(self, seed: int | None = None) -> None:
        self.acted = 0

    def act(self, obs: Any) -> int:
        self.acted += 1
        return self.first + self.acted

    def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
        self.heard.append((reward, terminated, truncated))


class Batches:
    """Answers in batches, and counts them; the first waits until it is told to go on."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()

    def act(self, obs: int) -> int:
        raise AssertionError("requests are answered by act_batch")

    def act_batch(self, observations: list[int], offered: list[dict[str, Any]]) -> list[int]:
        self.sizes.append(len(observations))
        self.go.wait(10.0)
        return [obs + 1 for obs in observations]


def raises(obs: Any) -> int:
    raise RuntimeError("the network is nan")


def masked(obs: Any, *, info: dict[str, Any] | None) -> int:
    assert info is not None
    return int(np.flatnonzero(info["action_mask"])[-1])


class Declares:
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def act(self, obs: Any) -> int:
        return 0


async def test_a_random_agent_reproduces_by_seed_env_id_and_step(url: str) -> None:
    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, url),
        AgentWorker({"random": random_policy}, url),
        AgentWorker({"random": random_policy}, url),
        Mesh(url) as m,
        await m.env("cartpole") as env,
    ):
        agent = await m.agent("random", env=env)
        obs, _ = await env.reset(seed=0)
        once = [await agent.act(obs, seed=1, env_id=e, step=s) for e in range(4) for s in range(8)]
        again = [await agent.act(obs, seed=1, env_id=e, step=s) for e in range(4) for s in range(8)]
        assert once == again
        assert {int(action) for action in once} == {0, 1}
        assert all(isinstance(action, np.int64) for action in once)
        with pytest.raises(UsageError, match="env=env"):
            await (await m.agent("random")).act(obs)


async def test_legal_actions_travel_in_info(url: str) -> None:
    async with (
        AgentWorker({"masked": masked, "random": random_policy}, url),
        EnvWorker({"taxi": "Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3"}, url),
        Mesh(url) as m,
        await m.env("taxi") as env,
    ):
        obs, info = await env.reset(seed=3)
        legal = set(np.flatnonzero(info["action_mask"]).tolist())
        assert await (await m.agent("masked")).act(obs, info) == max(legal)
        rnd = await m.agent("random", env=env)
        drawn = {int(await rnd.act(obs, info, seed=1, step=step)) for step in range(60)}
        assert drawn <= legal
        assert len(drawn) > 1


async def test_an_agent_that_raises_gives_its_traceback_and_its_worker_goes_on(url: str) -> None:
    async with AgentWorker({"bad": raises, "good": lambda obs: obs}, url), Mesh(url) as m:
        with pytest.raises(AgentError, match="the network is nan") as caught:
            await (await m.agent("bad")).act(1)
        assert caught.value.details["type"] == "RuntimeError"
        assert await (await m.agent("good")).act((1, 2.5)) == (1, 2.5)


async def test_requests_that_arrive_together_are_answered_as_one_batch(url: str) -> None:
    policy = Batches()
    async with AgentWorker({"batch": policy}, url), Mesh(url) as m:
        agent = await m.agent("batch")
        first = asyncio.create_task(agent.act(0))
        await until(lambda: policy.sizes == [1], "the first is under way")
        rest = asyncio.gather(*(agent.act(i) for i in range(1, 33)))
        await asyncio.sleep(0)
        await context_of(m).connection.flush()
        policy.go.set()
        assert await first == 1
        assert await rest == [i + 1 for i in range(1, 33)]
        assert sum(policy.sizes) == 33
        assert len(policy.sizes) < 33 / 4


async def test_declared_spaces_are_checked_against_the_envs_before_the_first_episode(url: str) -> None:
    async with AgentWorker({"declares": Declares()}, url), EnvWorker({"cartpole": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("cartpole") as env:
            with pytest.raises(SpacesDiffer, match="observation space"):
                await m.agent("declares", env=env)
            agent = await m.agent("declares")
            with pytest.raises(SpacesDiffer):
                agent.check(env)
            assert agent.action_space == env.action_space
        with pytest.raises(SpacesDiffer):
            await m.evaluate("cartpole", "declares", episodes=2)


async def test_a_stateful_agent_is_leased_and_remembers_for_its_client_alone(url: str) -> None:
    async with AgentWorker({"remembers": Remembers}, url, allow_kwargs=("first",), slots=2) as worker, Mesh(url) as m:
        one = await m.agent("remembers", {"first": 100}, stateful=True)
        two = await m.agent("remembers", stateful=True)
        for agent in (one, two):
            await agent.reset(seed=1)
        assert [await one.act(0) for _ in range(3)] == [101, 102, 103]
        assert await two.act(0) == 1
        await one.observe(1.0, False, False)
        await one.observe(2.5, True, False)
        state = await one.state()
        assert (state.steps, state.episode_return, state.phase) == (3, 3.5, "ended")
        await one.reset()
        assert await one.act(0) == 101
        assert worker.table.free == 0
        await one.close()
        await two.close()
        await until(lambda: worker.table.free == 2, "the slots are free")
        with pytest.raises(UsageError, match="stateful=True"):
            await m.agent("remembers")


async def test_an_observation_over_the_payload_limit_reaches_a_stateless_agent(url: str) -> None:
    async with AgentWorker({"mean": lambda obs: float(obs.mean())}, url), Mesh(url) as m:
        agent = await m.agent("mean")
        big = [np.full((1500, 1000), value, np.uint8) for value in range(4)]
        assert await asyncio.gather(*(agent.act(obs) for obs in big)) == [0.0, 1.0, 2.0, 3.0]


async def test_an_agent_that_nobody_serves_any_more_is_unknown(url: str) -> None:
    async with Mesh(url, timeout=1.0) as m:
        async with AgentWorker({"good": lambda obs: obs}, url):
            agent = await m.agent("good")
            assert await agent.act(1) == 1
        with pytest.raises(UnknownName, match="any more"):
            await agent.act(1)
        with pytest.raises(UnknownName):
            await m.agent("good", wait=0.1)


async def test_evaluate_reports_the_same_for_the_same_seed(url: str) -> None:
    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, url),
        AgentWorker({"random": random_policy}, url),
        Mesh(url) as m,
    ):
        first = await m.evaluate("cartpole", "random", episodes=12, seed=5, concurrency=4)
        second = await m.evaluate("cartpole", "random", episodes=12, seed=5, concurrency=3)
        assert [e.episode_return for e in first.episodes] == [e.episode_return for e in second.episodes]
        assert [e.seed for e in first.episodes] == list(range(5, 17))
        assert first.mean_return == pytest.approx(np.mean([e.episode_return for e in first.episodes]))


async def test_an_agent_worker_and_an_env_worker_may_serve_the_same_name(url: str) -> None:
    async with EnvWorker({"both": Counter}, url), AgentWorker({"both": lambda obs: 7}, url), Mesh(url) as m:
        async with await m.env("both") as env:
            assert (await env.reset())[0] == 0
        assert await (await m.agent("both")).act(0) == 7
        assert [ad.kind for ad in await m.envs() + await m.agents()] == ["env", "agent"]


async def test_pictures_go_from_an_env_to_an_agent(url: str) -> None:
    async with (
        EnvWorker({"p": Picture}, url),
        AgentWorker({"a": lambda obs: int(obs[0, 0, 0] % 2)}, url),
        Mesh(url) as m,
        await m.env("p") as env,
    ):
        agent = await m.agent("a", env=env)
        obs, _ = await env.reset()
        for step in range(5):
            action = await agent.act(obs)
            assert action == step % 2
            obs, *_ = await env.step(action)
