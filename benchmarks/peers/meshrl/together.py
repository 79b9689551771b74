"""Works of several clients or processes: sessions at once, learners that share a worker, threads without the bus."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from typing import Any

import driver
from envs import Sleeping
from hosts import Hosts, asked
from messages import warmed

from meshrl import Mesh
from meshrl.wire.messages import Open
from meshrl.worker.hosted_vector import HostedVector
from meshrl.worker.threads import Threads

PATIENCE_S = 100.0
SESSIONS_A_LEARNER = 16
PROCESSES, ENVS_A_PROCESS = 4, 16
PACE = 0.5
"""The paced learner asks for this much of what the worker serves: its own half."""


async def sessions(hosts: Hosts, count: int, *, one_mesh: bool) -> driver.Answer:
    """Each session opens, resets, makes one step of a second and closes; all begin at the same time."""
    await hosts.mesh("sessions")
    errors, taken = Counter[str](), []

    def mesh() -> Mesh:
        return Mesh(hosts.url, namespace="sessions", timeout=PATIENCE_S)

    async def session(of: Mesh) -> None:
        env = await of.env("waiting", wait=PATIENCE_S)
        await env.reset()
        await env.step(0)
        await env.close()

    async def one(of: Mesh | None) -> None:
        began = time.perf_counter()
        try:
            if of is not None:
                await session(of)
            else:
                async with mesh() as own:
                    await session(own)
        except Exception as error:  # noqa: BLE001  counted by what it says
            errors[f"{type(error).__name__}: {error}"[:120]] += 1
        else:
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    if one_mesh:
        async with mesh() as shared:
            await asyncio.gather(*(one(shared) for _ in range(count)))
    else:
        await asyncio.gather(*(one(None) for _ in range(count)))
    seconds = time.perf_counter() - began
    percentiles = statistics.quantiles(taken, n=100) if len(taken) > 1 else [seconds] * 99
    return {
        "n": count,
        "ok": len(taken),
        "seconds": seconds,
        "p50_s": percentiles[49],
        "p99_s": percentiles[98],
        "errors": dict(errors.most_common(5)),
    }


async def fair(hosts: Hosts, seconds: float) -> driver.Answer:
    """What a learner that asks for its half loses to one that asks as fast as it can; two processes, one worker."""
    await hosts.mesh("shared")
    paced, greedy = [
        await asyncio.to_thread(hosts.role, name, "learner", hosts.url) for name in ("paced learner", "greedy learner")
    ]

    def rate(answer: driver.Answer) -> float:
        return float(answer["count"] / answer["seconds"])

    capacity = rate(await asked(greedy, "step", seconds=seconds))
    alone = rate(await asked(paced, "step", seconds=seconds, rate=PACE * capacity))
    # The greedy one begins before the paced one is measured and ends after it.
    flood = asyncio.ensure_future(asked(greedy, "step", seconds=seconds + 0.4))
    await asyncio.sleep(0.2)
    beside = rate(await asked(paced, "step", seconds=seconds, rate=PACE * capacity))
    flooded = rate(await flood)
    return {"capacity": capacity, "alone": alone, "beside": beside, "kept": beside / alone, "greedy": flooded}


class Learner:
    """Its own process: 16 sessions of one mesh, stepped as fast as they go or at a given rate together."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.envs: list[Any] = []

    async def open(self) -> None:
        self.mesh = await Mesh(self.url, namespace="shared").__aenter__()
        self.envs = [await self.mesh.env("busy") for _ in range(SESSIONS_A_LEARNER)]
        for env in self.envs:
            await env.reset(seed=1)
            await warmed(env)

    async def step(self, seconds: float, rate: float | None) -> driver.Answer:
        if not self.envs:
            await self.open()
        clock = time.perf_counter
        interval = SESSIONS_A_LEARNER / rate if rate else 0.0
        began = clock()
        end = began + seconds

        async def repeat(number: int, env: Any) -> int:
            due, count = began + interval * number / SESSIONS_A_LEARNER, 0
            while (now := clock()) < end:
                if now < due:  # one that is late asks at once, until it has caught up
                    await asyncio.sleep(due - now)
                await env.step(driver.action(count))
                due += interval
                count += 1
            return count

        counts = await asyncio.gather(*(repeat(number, env) for number, env in enumerate(self.envs)))
        return {"count": sum(counts), "seconds": clock() - began}


async def threads(hosts: Hosts, seconds: float) -> driver.Answer:
    """What 4 workers' threads do with 16 slow envs each where there is no bus: processes that only step."""
    processes = [await asyncio.to_thread(hosts.role, f"threads {number}", "threads") for number in range(PROCESSES)]
    answers = await asyncio.gather(*(asked(process, "step", seconds=seconds) for process in processes))
    rate = sum(answer["count"] / answer["seconds"] for answer in answers)
    return {"count": rate * seconds, "seconds": seconds}


class Stepping:
    """Its own process: 16 sleeping envs, hosted as a worker hosts them, stepped in lockstep again and again."""

    def __init__(self) -> None:
        self.vector: HostedVector | None = None

    async def step(self, seconds: float) -> driver.Answer:
        from batches import actions_of, counted_batches  # noqa: PLC0415  # for this role alone

        if self.vector is None:
            pool = Threads("env")
            pool.loop = asyncio.get_running_loop()
            asked_for = Open(session="threads", name="sleeping", form="vector", num_envs=ENVS_A_PROCESS)
            envs = [Sleeping() for _ in range(ENVS_A_PROCESS)]
            self.vector = HostedVector(envs, asked_for, allow=(), threads=pool)
            self.vector.run("reset", {})
        vector, actions = self.vector, actions_of(ENVS_A_PROCESS)
        create_future = asyncio.get_running_loop().create_future

        async def step(number: int) -> None:
            future: asyncio.Future[Any] = create_future()
            vector.spread("step", {"actions": actions[number & 1]}, future.set_result)
            what = await future
            if isinstance(what, BaseException):
                raise what

        return await counted_batches(step, ENVS_A_PROCESS, seconds)
