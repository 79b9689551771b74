"""Simulators whose generator is all that outlives a reset: they go on elsewhere, to the bit (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import gymnasium
import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.losing import same
from tests.mesh.worker_process import WorkerProcess
from tests.unit.worker.origin_checks import check_goes_on

# Box2D is made by SWIG, and ends the interpreter where its warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

SIMULATED = ["LunarLander-v3", "Hopper-v5", "HalfCheetah-v5", "Ant-v5", "InvertedPendulum-v5"]


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as started:
        yield started


@pytest.mark.parametrize("name", SIMULATED)
def test_a_fresh_simulator_goes_on_from_the_generators_state(name: str) -> None:
    check_goes_on(name, steps=1200)


@pytest.mark.parametrize("name", ["LunarLander-v3", "Hopper-v5"])
async def test_simulators_outlive_their_workers(server: EmbeddedServer, name: str) -> None:
    local = gymnasium.make(name)
    local.action_space.seed(5)
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(server.url, {name: name}, wait=False)) for _ in range(3)]
        by_id = {worker.wait_advertised(): worker for worker in workers}
        async with Mesh(server.url) as m, await m.env(name) as env:
            same(await env.reset(seed=5), local.reset(seed=5))
            for n in range(400):
                if n in {150, 300}:
                    await asyncio.to_thread(by_id[env.worker].kill)
                same(await env.step(action := local.action_space.sample()), theirs := local.step(action))
                if theirs[2] or theirs[3]:
                    same(await env.reset(), local.reset())
    local.close()
