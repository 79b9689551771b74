"""Learners: each steps its own envs through a proxy of its own, and checks every transition by the model.

Each has a seed of its own; sub-environment i is reset once with ``seed + i``, and goes on without a seed from there.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np

from meshrl import Mesh
from meshrl.client.context import context_of
from meshrl.client.flights import Flight
from tests.chaos.model import Autoreset, Expected, Twin
from tests.chaos.policies import CARTPOLE, FROZENLAKE, HAS_BOX2D, LUNARLANDER, POSTERS, Policy, make
from tests.chaos.proxy import Proxy

# A worker of which nothing at all is heard for this long is given up.
SILENCE_S = 3.0
# For a worker with room to be there again.
WAIT_S = 60.0
# A step that takes longer hangs.
HANGS_S = 90.0
# Of a vector or a pool.
NUM_ENVS = 4
SHARDS = 2
# Of the steps of a single env or a vector, so many are cancelled on their way and settled.
CANCELLED = 0.01


class Told(NamedTuple):
    """Of a learner, in the report."""

    name: str
    form: str
    episodes: int
    transitions: int
    settled: int
    slowest_s: float


@dataclass(eq=False, repr=False)
class Learner(ABC):
    """One of them.

    Args:
        name: of its env.
        seed: of it, and of its actions.
        proxy: between it and the server.
        url: of the server by way of the proxy.
        among: the twins of all learners.

    Attributes:
        stepping: whether a step of it is under way, and nothing but steps.
        settled: steps that were cancelled, and answered all the same.
        slowest_s: the longest that a step took.
        stage: what it is at, for whoever wonders why it hangs.
    """

    form: ClassVar[str]
    num_envs: ClassVar[int]
    autoreset: ClassVar[Autoreset]

    name: str
    seed: int
    proxy: Proxy
    url: str
    among: list[Twin]
    stepping: bool = field(default=False, init=False)
    settled: int = field(default=0, init=False)
    slowest_s: float = field(default=0.0, init=False)
    stage: str = field(default="", init=False)
    _mesh: Mesh | None = field(default=None, init=False)
    _sessions: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.expected = Expected(lambda: make(self.name), self.num_envs, self.autoreset, self.among)
        self.policies = [Policy(self.name, self.seed, i) for i in range(self.num_envs)]
        self._impatience = np.random.default_rng([self.seed, 1 << 20])

    def __repr__(self) -> str:
        return f"<{self.form} of {self.name} at {self.workers}: {self.stage or 'between'}, {self.flights()}>"

    async def run(self, over: Callable[[], bool]) -> None:
        """Play until that says so.

        Raises:
            Mismatch: what it was told is not what is due.
            MeshError: what it should not see at all.
            TimeoutError: a step hangs.
        """
        try:
            async with Mesh(self.url, timeout=SILENCE_S) as m:
                self._mesh = m
                await self._play(m, over)
                self._mesh, self._sessions = None, []
        finally:
            self.expected.close()

    @abstractmethod
    async def _play(self, m: Mesh, over: Callable[[], bool]) -> None:
        """Lease envs, and step them."""

    # ---------------------------------------------------------------- what others may ask

    def told(self) -> Told:
        """For the report."""
        transitions = sum(len(twin.asked) for twin in self.expected.twins)
        return Told(self.name, self.form, self.expected.episodes, transitions, self.settled, self.slowest_s)

    @property
    def workers(self) -> list[str]:
        """Those that hold its sessions, as far as it knows."""
        return [session.grant.worker for session in self._sessions]

    def holds(self, session: str) -> bool:
        """Whether a session is its own."""
        return any(own.grant.session == session for own in self._sessions)

    def flights(self) -> list[Flight]:
        """Its requests under way."""
        if self._mesh is None:
            return []
        flights = context_of(self._mesh).flights
        return [*flights._fresh.values(), *flights._quiet]

    # ---------------------------------------------------------------- for its forms

    @asynccontextmanager
    async def _at(self, stage: str) -> AsyncIterator[None]:
        self.stage, self.stepping, began = stage, stage == "step", time.monotonic()
        async with asyncio.timeout(HANGS_S):
            yield
        if self.stepping:
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.stage, self.stepping = "", False

    async def _step(self, envs: Any, actions: Any) -> Any:
        """A step, which a few times is cancelled and settled: its result comes all the same."""
        async with self._at("step"):
            if self._impatience.random() >= CANCELLED:
                return await envs.step(actions)
            stepping = asyncio.ensure_future(envs.step(actions))
            await asyncio.sleep(0)
            stepping.cancel()
            await asyncio.wait({stepping})
            if not stepping.cancelled():
                return stepping.result()
            self.settled += 1
            return await envs.settle()


class Single(Learner):
    """Of one env."""

    form = "single"
    num_envs = 1
    autoreset = Autoreset.NONE

    async def _play(self, m: Mesh, over: Callable[[], bool]) -> None:
        (twin,), (policy,) = self.expected.twins, self.policies
        async with await m.env(self.name, wait=WAIT_S) as env:
            self._sessions = [env._session]
            seed: int | None = self.seed
            while not over():
                async with self._at("reset"):
                    came = await env.reset(seed=seed)
                twin.reset(seed)
                self.expected.check_reset(came)
                obs, seed = came[0], None
                while not (twin.ended or over()):
                    action = policy(obs)
                    came_step = await self._step(env, action)
                    twin.step(action)
                    self.expected.check_step(came_step)
                    obs = came_step[0]


class Vector(Learner):
    """Of envs in lockstep, over several workers."""

    form = "vector"
    num_envs = NUM_ENVS
    autoreset = Autoreset.NEXT_STEP

    async def _play(self, m: Mesh, over: Callable[[], bool]) -> None:
        twins, ids, none = self.expected.twins, range(NUM_ENVS), np.zeros(NUM_ENVS, np.bool_)
        mode = gymnasium.vector.AutoresetMode[self.autoreset.name]
        async with await m.vector(self.name, NUM_ENVS, shards=SHARDS, autoreset_mode=mode, wait=WAIT_S) as envs:
            self._sessions = list(envs._sessions)
            async with self._at("reset"):
                obs, infos = await envs.reset(seed=self.seed)
            for i, twin in enumerate(twins):
                twin.reset(self.seed + i)
            self.expected.check_batch((obs, np.zeros(NUM_ENVS), none, none, infos), ids)
            while not over():
                actions = np.array([policy(row) for policy, row in zip(self.policies, obs, strict=True)])
                came = await self._step(envs, actions)
                for twin, action in zip(twins, actions.tolist(), strict=True):
                    twin.step(action)
                self.expected.check_batch(came, ids)
                obs = came[0]


class SameStepVector(Vector):
    """Of envs in lockstep that reset at once."""

    autoreset = Autoreset.SAME_STEP


class Pool(Learner):
    """Of envs each at its own pace, over several workers."""

    form = "pool"
    num_envs = NUM_ENVS
    autoreset = Autoreset.SAME_STEP

    async def _play(self, m: Mesh, over: Callable[[], bool]) -> None:
        twins = self.expected.twins
        async with await m.pool(self.name, NUM_ENVS, shards=SHARDS, wait=WAIT_S) as pool:
            self._sessions = list(pool._sessions)
            await pool.reset(seed=self.seed)
            stage = "reset"
            actions: dict[int, int] = {}
            while not over():
                async with self._at(stage):
                    batch = await pool.recv(NUM_ENVS if stage == "reset" else 1)
                ids = batch.env_ids.tolist()
                for k, i in enumerate(ids):
                    assert bool(batch.first[k]) is (i not in actions), f"env_id {i}: what came is of another request"
                    if i in actions:
                        twins[i].step(actions[i])
                    else:
                        twins[i].reset(self.seed + i)
                columns = (batch.observations, batch.rewards, batch.terminations, batch.truncations, batch.infos)
                self.expected.check_batch(columns, ids)
                for k, i in enumerate(ids):
                    place = twins[i].episodes + 1 - twins[i].ended, twins[i].steps
                    assert (batch.episodes[k], batch.steps[k]) == place, f"env_id {i}: its place is {place}"
                chosen = [self.policies[i](row) for i, row in zip(ids, batch.observations, strict=True)]
                actions.update(zip(ids, chosen, strict=True))
                await pool.send(np.array(chosen), ids)
                stage = "step"


_THIRD = LUNARLANDER if HAS_BOX2D else CARTPOLE
LEARNERS: tuple[tuple[str, type[Learner]], ...] = (
    (CARTPOLE, Single),
    (CARTPOLE, Vector),
    (CARTPOLE, Pool),
    (FROZENLAKE, Single),
    (FROZENLAKE, SameStepVector),
    (_THIRD, Single),
    (_THIRD, Vector),
    (_THIRD, Pool),
    (POSTERS, Vector),
    (POSTERS, Pool),
)
