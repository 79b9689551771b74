"""One client with a session of each form, all of which are stepped together and account for every step.

What is counted is counted at the worker, by the envs and the agent themselves: an observation is the number of steps
that were executed since the reset. A step that ran twice, or not at all, shows in the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from meshrl import AgentWorker, EnvWorker, Mesh, RemoteEnv
from meshrl.client.agent import RemoteAgent
from meshrl.client.pool import RemotePool
from meshrl.client.vector import RemoteVectorEnv
from tests.mesh.worker_process import WorkerProcess

HERE = "tests.mesh.everybody"
NUM_ENVS = 4
ROUND_S = 60.0


class Counted(gymnasium.Env[Any, Any]):
    """Observes how many steps it executed in this episode; the reward is the action, of which each is another.

    Attributes:
        executed: steps of all episodes.
        resets: how many.
    """

    observation_space = spaces.Discrete(1 << 40)
    action_space = spaces.Discrete(1 << 40)

    def __init__(self) -> None:
        self.executed = self.resets = self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self.resets += 1
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.executed += 1
        self._steps += 1
        return self._steps, float(action), False, False, {}


class Counting:
    """A stateful agent: its action is how often it acted since its reset."""

    action_space = spaces.Discrete(1 << 40)

    def __init__(self) -> None:
        self._acted = 0

    def reset(self, seed: int | None = None) -> None:
        self._acted = 0

    def act(self, obs: Any) -> int:
        self._acted += 1
        return self._acted


def twice(obs: int) -> int:
    """A stateless agent."""
    return 2 * obs


@contextmanager
def served(url: str, *, workers: int = 2, **kwargs: Any) -> Iterator[list[WorkerProcess]]:
    """Env workers, and an agent worker, each in a process of its own."""
    with ExitStack() as stack:
        envs = [WorkerProcess(url, {"counted": f"{HERE}:Counted"}, wait=False, **kwargs) for _ in range(workers)]
        names = {"counting": f"{HERE}:Counting", "twice": f"{HERE}:twice"}
        both = [*envs, WorkerProcess(url, names, kind="agent", wait=False)]
        for worker in both:
            stack.enter_context(worker)
        for worker in both:
            worker.wait_advertised()
        yield both


@asynccontextmanager
async def served_here(url: str, agents_url: str | None = None, **kwargs: Any) -> AsyncIterator[EnvWorker]:
    """An env worker and an agent worker in this process, where its connections are what matters."""
    agents = AgentWorker({"counting": Counting, "twice": twice}, agents_url or url)
    async with EnvWorker({"counted": Counted}, url, **kwargs) as worker, agents:
        yield worker


class Everybody:
    """A single env, a vector and a pool over two workers where there are two, and agents of both kinds.

    Attributes:
        rounds: how many steps each has taken.
        env: the single one.
        envs: the vector.
        pool: of as many sub-environments as the vector.
        agent: the stateful one.
        stateless: the other.
    """

    def __init__(self, env: RemoteEnv, envs: RemoteVectorEnv, pool: RemotePool, agents: list[RemoteAgent]) -> None:
        self.rounds = 0
        self.env = env
        self.envs = envs
        self.pool = pool
        self.agent, self.stateless = agents

    async def round(self) -> None:
        """One step of each, all at once; every answer is the one that is due, whatever happens to the network."""
        self.rounds += 1
        n = self.rounds
        async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as group:
            for stepping in (self._single(n), self._vector(n), self._pooled(n), self._acts(n)):
                group.create_task(stepping)

    async def _single(self, n: int) -> None:
        assert await self.env.step(n) == (n, float(n), False, False, {})

    async def _vector(self, n: int) -> None:
        actions = np.arange(NUM_ENVS) * 1000 + n
        observations, rewards, terminations, truncations, infos = await self.envs.step(actions)
        assert observations.tolist() == [n] * NUM_ENVS
        assert rewards.tolist() == actions.tolist()
        assert not terminations.any()
        assert not truncations.any()
        assert infos == {}

    async def _pooled(self, n: int) -> None:
        actions = np.arange(NUM_ENVS) * 1000 + n
        await self.pool.send(actions, range(NUM_ENVS))
        batch = await self.pool.recv(min=NUM_ENVS)
        assert batch.observations.tolist() == batch.steps.tolist() == [n] * NUM_ENVS
        assert batch.rewards.tolist() == actions[batch.env_ids].tolist()
        assert not batch.first.any()

    async def _acts(self, n: int) -> None:
        assert await self.agent.act(n) == n
        assert await self.stateless.act(n) == 2 * n

    async def keep_on(self, until: asyncio.Event | asyncio.Task[Any]) -> None:
        """Rounds, one after another, until that is set or done."""
        over = until.is_set if isinstance(until, asyncio.Event) else until.done
        while not over():
            await self.round()
        if isinstance(until, asyncio.Task):
            await until

    async def counts(self) -> None:
        """What was executed at the workers is what was asked for, to the step; nobody was reset meanwhile."""
        async with asyncio.timeout(ROUND_S):
            assert await self.env.get_attr("executed") == self.rounds
            assert await self.env.get_attr("resets") == 1
            assert (await self.env.state()).total_steps == self.rounds
            assert await self.envs.get_attr("executed") == (self.rounds,) * NUM_ENVS
            assert await self.envs.get_attr("resets") == (1,) * NUM_ENVS


@asynccontextmanager
async def everybody(url: str, *, shards: int = 2) -> AsyncIterator[Everybody]:
    """Opened, reset and stepped once; closed at the end."""
    async with Mesh(url) as m:
        env = await m.env("counted", on_loss="raise")
        envs = await m.vector("counted", NUM_ENVS, shards=shards)
        pool = await m.pool("counted", NUM_ENVS, shards=shards)
        agents = [await m.agent("counting", stateful=True), await m.agent("twice")]
        await env.reset(seed=1)
        await envs.reset(seed=1)
        await pool.reset(seed=1)
        assert (await pool.recv(min=NUM_ENVS)).first.all()
        all_ = Everybody(env, envs, pool, agents)
        await all_.round()
        yield all_
        await all_.counts()
        await asyncio.gather(env.close(), envs.close(), pool.close(), *(agent.close() for agent in agents))
