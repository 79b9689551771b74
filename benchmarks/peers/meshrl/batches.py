"""Works of many sub-environments a message: vectors and pools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import driver
import numpy as np
from hosts import FIRST, SECOND, Hosts

RECV = 16
# After so many fast steps sub-environments are stepped in the worker's event loop.
WARM_UP_STEPS = 120


async def counted_batches(step: Callable[[int], Awaitable[Any]], size: int, seconds: float) -> driver.Answer:
    """As :func:`driver.counted_batches`, for coroutines."""
    clock, count = time.perf_counter, 0
    for number in range(10):
        await step(number)
    began = clock()
    end = began + seconds
    while clock() < end:
        await step(count)
        count += 1
    return {"count": count * size, "seconds": clock() - began}


def actions_of(size: int) -> list[Any]:
    return [np.full(size, driver.action(number), np.int64) for number in range(2)]


async def vector_of(
    hosts: Hosts, name: str, size: int, *, shards: int, key: str = "", where: Any = None, namespace: str = "default"
) -> Any:
    mesh = await hosts.mesh(namespace)
    where = where or (FIRST if shards == 1 else None)
    seeding = "implementation" if name == "fast" else "gymnasium"

    async def opening() -> Any:
        envs = await mesh.vector(name, size, shards=shards, where=where, seeding=seeding)
        await envs.reset(seed=1)
        for number in range(-(-WARM_UP_STEPS // size)):
            await envs.step(actions_of(size)[number & 1])
        return envs

    return await hosts.kept(f"{name} {size} {shards} {key}", opening)


async def vector(hosts: Hosts, name: str, size: int, shards: int, seconds: float) -> driver.Answer:
    envs, actions = await vector_of(hosts, name, size, shards=shards), actions_of(size)
    return await counted_batches(lambda number: envs.step(actions[number & 1]), size, seconds)


async def at_once(vectors: list[Any], size: int, seconds: float) -> driver.Answer:
    """Vectors of ``size`` each, every one stepped by a task of its own: while one is decided, the others step."""
    actions, clock = actions_of(size), time.perf_counter

    async def repeat(envs: Any, until: float) -> int:
        count = 0
        while clock() < until:
            await envs.step(actions[count & 1])
            count += 1
        return count

    await asyncio.gather(*(repeat(envs, clock() + 0.05) for envs in vectors))
    began = clock()
    counts = await asyncio.gather(*(repeat(envs, began + seconds) for envs in vectors))
    return {"count": sum(counts) * size, "seconds": clock() - began}


async def two2048(hosts: Hosts, workers: int, seconds: float) -> driver.Answer:
    wheres = [FIRST, FIRST if workers == 1 else SECOND]
    vectors = [
        await vector_of(hosts, "fast", 2048, shards=1, key=f"{workers} {number}", where=where)
        for number, where in enumerate(wheres)
    ]
    return await at_once(vectors, 2048, seconds)


async def pool_of(hosts: Hosts, name: str, size: int, *, shards: int, namespace: str = "default") -> Any:
    """A pool of which everything was received and nothing is under way."""
    mesh = await hosts.mesh(namespace)

    async def opening() -> Any:
        pool = await mesh.pool(name, size, shards=shards, where=FIRST if shards == 1 else None)
        await pool.reset(seed=1)
        await pool.recv(min=size)
        return pool

    return await hosts.kept(f"pool {name} {size} {shards}", opening)


async def pool(pool: Any, parts: int, recv: tuple[int, int | None], seconds: float) -> driver.Answer:
    """Sends all in ``parts`` messages, then answers what is ready, ``recv`` (min, max) at a time."""
    size, clock, count = pool.num_envs, time.perf_counter, 0
    actions, all_ids = actions_of(size), np.arange(size)
    least, most = recv
    for ids in (all_ids[part::parts] for part in range(parts)):
        await pool.send(actions[0][: len(ids)], ids)
    for number in range(2 * parts):
        batch = await pool.recv(least, most)
        await pool.send(actions[number & 1][: len(batch)], batch.env_ids)
    began = clock()
    end, number = began + seconds, 0
    while clock() < end:
        batch = await pool.recv(least, most)
        count += len(batch)
        number += 1
        await pool.send(actions[number & 1][: len(batch)], batch.env_ids)
    taken = clock() - began
    await pool.recv(min=size)  # the next turn begins with nothing under way; what comes now is not counted
    return {"count": count, "seconds": taken}


async def halves(hosts: Hosts, shards: int, seconds: float) -> driver.Answer:
    """One half of 256 steps while the other's actions are decided."""
    return await pool(await pool_of(hosts, "cartpole", 256, shards=shards), 2, (128, 128), seconds)


async def slow_vector(hosts: Hosts, name: str, seconds: float) -> driver.Answer:
    """64 slow envs in lockstep, 16 a worker."""
    envs = await vector_of(hosts, name, 64, shards=4, namespace="slow")
    actions = actions_of(64)
    return await counted_batches(lambda number: envs.step(actions[number & 1]), 64, seconds)


async def slow_halves(hosts: Hosts, name: str, seconds: float) -> driver.Answer:
    """The same as two vectors in flight, 8 of each a worker."""
    vectors = [await vector_of(hosts, name, 32, shards=4, key=str(n), namespace="slow") for n in range(2)]
    return await at_once(vectors, 32, seconds)


async def slow_apart(hosts: Hosts, name: str, seconds: float) -> driver.Answer:
    """The same as a vector of 16 at each worker, none of which waits for another: as the processes of ``threads``."""
    vectors = [
        await vector_of(
            hosts, name, 16, shards=1, key=f"apart {number}", where={"host": f"slow{number}"}, namespace="slow"
        )
        for number in range(4)
    ]
    return await at_once(vectors, 16, seconds)


async def slow_pool(hosts: Hosts, name: str, seconds: float) -> driver.Answer:
    """The same as a pool, 16 results at a time or more."""
    return await pool(await pool_of(hosts, name, 64, shards=4, namespace="slow"), 1, (RECV, None), seconds)
