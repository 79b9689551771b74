"""What a session costs in memory, on either side, and that nothing of it stays.

Measured with ``tracemalloc``: exact bytes that Python, NumPy among it, has given out and not got back.
``MESHRL_SOAK_S`` makes the soak longer (``make soak``: five minutes).
"""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from meshrl import Mesh
from tests.mesh.measured_worker import MeasuredWorker, Standing, standing

SESSIONS = 1000
MAX_SESSION_BYTES = 20_000
SOAK_S = float(os.environ.get("MESHRL_SOAK_S", "10"))
# At once in the soak: single envs, and sub-environments of the vector and of the pool.
SIZE = 8
# What a process may have more of after the soak than before: caches and tables are a little fuller or emptier at each
# moment, dead timers wait to be cleared away. A thousand sessions that leave 100 bytes each behind are over it.
MAX_GROWTH_BYTES = 100_000


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


async def single(m: Mesh) -> None:
    async with await m.env("cartpole") as env:
        await env.reset(seed=1)
        for action in (0, 1):
            await env.step(action)


async def vector(m: Mesh) -> None:
    envs = await m.vector("cartpole", num_envs=SIZE)
    await envs.reset(seed=1)
    for _ in range(2):
        await envs.step(np.zeros(SIZE, np.int64))
    await envs.close()


async def pool(m: Mesh) -> None:
    envs = await m.pool("cartpole", num_envs=SIZE)
    await envs.reset(seed=1)
    for _ in range(2):
        batch = await envs.recv(min=SIZE)
        await envs.send(np.zeros(SIZE, np.int64), batch.env_ids)
    await envs.recv(min=SIZE)
    await envs.close()


async def turn(m: Mesh) -> None:
    """Everything once one after another, and once at the same time."""
    await asyncio.gather(*(single(m) for _ in range(SIZE)))
    await vector(m)
    await pool(m)
    await asyncio.gather(*(single(m) for _ in range(SIZE)), vector(m), pool(m))


async def test_a_thousand_open_sessions_cost_at_most_20_kb_each_beyond_the_env_on_either_side(url: str) -> None:
    async with MeasuredWorker(url) as worker, Mesh(url) as m:
        bare = await worker.ask("bare")
        await single(m)
        before, worker_before = standing(), await worker.ask()
        envs = await asyncio.gather(*(m.env("cartpole", wait=60.0) for _ in range(SESSIONS)))
        for env in envs:
            await env.reset(seed=1)
            await env.step(0)
        held, worker_held = standing(), await worker.ask()
        at_client = (held.memory_bytes - before.memory_bytes) / SESSIONS
        at_worker = (worker_held.memory_bytes - worker_before.memory_bytes) / SESSIONS - bare.memory_bytes
        assert 0 < at_client <= MAX_SESSION_BYTES
        assert 0 < at_worker <= MAX_SESSION_BYTES
        assert held.threads <= before.threads + 1, "the keeper's, and none a session"
        await asyncio.gather(*(env.close() for env in envs))


def grown(before: Standing, after: Standing) -> int:
    return after.memory_bytes - before.memory_bytes


async def test_sessions_that_come_and_go_leave_nothing_behind(url: str) -> None:
    async with MeasuredWorker(url) as worker, Mesh(url) as m:
        idle = await worker.ask()
        for _ in range(10):  # what is made once is there, and every table has had its say
            await turn(m)
        before, worker_before = standing(), await worker.ask()
        until = time.monotonic() + SOAK_S
        while time.monotonic() < until:
            await turn(m)
        after, worker_after = standing(), await worker.ask()
        assert grown(before, after) <= MAX_GROWTH_BYTES
        assert grown(worker_before, worker_after) <= MAX_GROWTH_BYTES
        assert after.tasks <= before.tasks
        assert after.threads <= before.threads
        assert worker_after.tasks <= worker_before.tasks
        # Threads of envs stay for half a minute, as many as were busy at once at some moment: with single envs, a
        # vector and a pool, and with the envs of a pool that was closed just before.
        assert worker_after.threads <= idle.threads + 4 * SIZE
