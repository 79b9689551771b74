"""What it costs that episodes outlive their workers, and how long one that is lost stays away.

python benchmarks/losses.py                 both, about 14 minutes; written to results/losses/latest.json
python benchmarks/losses.py --pairs 100 --kills 100

Processor time is summed over client, worker and nats-server, and compared in pairs with ``on_loss="raise"``. Each pair
has envs of its own, since where two of them lie in memory makes as much of a difference as what is compared, and that
would be the same in every turn. Within it they take turns of some hundredths of a second, since the machine itself gets
slower and faster within tenths; the first step of each turn does not count.

A kill is SIGKILL for the worker with a step in flight while another is there to take its session; what is counted is
the time from the kill to the answer, with the replay of up to a hundred steps in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import estimates, measuring
from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer

RESULTS = Path(__file__).resolve().parent / "results" / "losses" / "latest.json"
CPUCLOCK_SCHED = 2  # of a whole process, in linux/posix-timers.h
SERVE = ("-m", "meshrl", "serve", "CartPole-v1", "--slots", "512")
VECTOR = 64
# Of batches; single envs take as many times more as they are faster.
WARM_UP_STEPS = 300
TURN_STEPS = 16
SINGLE_TIMES = 8
REPLAYED_STEPS = 100

Step = Callable[[int], Awaitable[Any]]
# Leases envs with an ``on_loss``; gives them and what steps them.
Make = Callable[[Mesh, Any], Awaitable[tuple[Any, Step]]]


class Worker:
    """A worker's process; it does not outlive this one for long, since its server ends with it."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *SERVE, *arguments, "--url", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def cpu_s(pid: int) -> float:
    """Seconds of processor time of a process so far, all its threads together, those that have ended too.

    By the kernel's own account in nanoseconds (``clock_getcpuclockid(3)``): /proc counts ticks of 10 ms.
    """
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def children(pid: int) -> list[int]:
    """All processes below one."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, told) for one in (child, *children(child))]


def used_by(others: Sequence[int]) -> float:
    """Processor time of this process and those, in seconds."""
    return time.process_time() + sum(map(cpu_s, others))


# --------------------------------------------------------------------------- what it costs


async def costs(url: str, pairs: int, turns: int) -> dict[str, Any]:
    async with Mesh(url) as m:
        told = {}
        for name, make in {"single": single, f"vector{VECTOR}": vector, f"pool{VECTOR}": pool}.items():
            numbers = track(range(pairs), description=name, console=Console(stderr=True))
            times = SINGLE_TIMES if make is single else 1
            rows = [await pair(m, make, turns, times, first=n % 2) for n in numbers]
            told[name] = {
                "us_raise": [1e6 * row[0] for row in rows],
                "us_resume": [1e6 * row[1] for row in rows],
                "ratio": estimates.ratio([row[1] for row in rows], [row[0] for row in rows]).as_dict(),
            }
        return told


async def pair(m: Mesh, make: Make, turns: int, times: int, *, first: int) -> tuple[float, float]:
    """Processor time of a step in seconds, with ``raise`` and with ``resume``."""
    works = [await make(m, on_loss) for on_loss in ("raise", "resume")]
    try:
        for _, step in works:
            for n in range(WARM_UP_STEPS * times):
                await step(n)
        used, others = [0.0, 0.0], children(os.getpid())
        for turn in range(turns):
            for which in (0, 1) if turn % 2 == first else (1, 0):
                used[which] += await turn_of(works[which][1], TURN_STEPS * times, others)
    finally:
        for envs, _ in works:
            await envs.close()
    count = turns * TURN_STEPS * times
    return used[0] / count, used[1] / count


async def turn_of(step: Step, count: int, others: Sequence[int]) -> float:
    """Processor time of so many steps, in seconds, of this process and those."""
    await step(0)
    before = used_by(others)
    for n in range(1, 1 + count):
        await step(n)
    return used_by(others) - before


async def single(m: Mesh, on_loss: Any) -> tuple[Any, Step]:
    env = await m.env("cartpole", on_loss=on_loss)
    await env.reset(seed=1)

    async def step(n: int) -> None:
        _, _, terminated, truncated, _ = await env.step(n & 1)
        if terminated or truncated:
            await env.reset()

    return env, step


async def vector(m: Mesh, on_loss: Any) -> tuple[Any, Step]:
    envs = await m.vector("cartpole", VECTOR, shards=1, on_loss=on_loss)
    await envs.reset(seed=1)
    actions = [np.full(VECTOR, n, np.int64) for n in range(2)]
    return envs, lambda n: envs.step(actions[n & 1])


async def pool(m: Mesh, on_loss: Any) -> tuple[Any, Step]:
    envs = await m.pool("cartpole", VECTOR, shards=1, on_loss=on_loss)
    await envs.reset(seed=1)
    actions = [np.full(VECTOR, n, np.int64) for n in range(2)]

    async def step(n: int) -> None:
        batch = await envs.recv(VECTOR)
        await envs.send(actions[n & 1], batch.env_ids)

    return envs, step


# --------------------------------------------------------------------------- how long it takes


async def recoveries(url: str, kills: int) -> dict[str, Any]:
    """From the kill to the answer, less what the replay's steps take by themselves."""
    workers: dict[str, Worker] = {}
    known: set[str] = set()

    async def start(m: Mesh) -> None:
        worker = Worker(url, "--capability", "victim=true")
        async for event in m.watch():
            id_ = event.advertisement.worker
            if event.advertisement.name == "CartPole-v1" and id_ not in known and event.kind != "left":
                known.add(id_)
                workers[id_] = worker
                return

    taken = []
    async with Mesh(url) as m:
        known |= {advertisement.worker for advertisement in await m.envs()}
        for _ in range(2):
            await start(m)
        env = await m.env("cartpole", where={"victim": True}, on_loss="resume")
        for _ in track(range(kills), description="kills", console=Console(stderr=True)):
            await env.reset(seed=1)
            for n in range(REPLAYED_STEPS):
                _, _, terminated, truncated, _ = await env.step(n & 1)
                if terminated or truncated:
                    await env.reset(seed=1)
            stepping = asyncio.ensure_future(env.step(0))
            await asyncio.sleep(0)
            began, killed = time.perf_counter(), env.worker
            workers.pop(killed).process.kill()
            await stepping
            if env.worker != killed:  # else its answer was under way already
                taken.append(time.perf_counter() - began)
            else:
                await env.step(1)
            await start(m)
    for worker in workers.values():
        worker.kill()
    percentiles = statistics.quantiles(taken, n=100)
    return {"seconds": taken, "p50_s": percentiles[49], "p99_s": percentiles[98], "replayed_steps": REPLAYED_STEPS}


async def measure(url: str, settings: argparse.Namespace) -> dict[str, Any]:
    worker = Worker(url)
    try:
        cost = await costs(url, settings.pairs, settings.turns)
    finally:
        worker.kill()
    return {"cost": cost, "recovery": await recoveries(url, settings.kills)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--turns", type=int, default=24, help="of each side of a pair")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--json", type=Path, default=RESULTS)
    settings = parser.parse_args()
    begun, load = measuring.now(), measuring.load()
    os.chdir(tempfile.gettempdir())
    with EmbeddedServer.start() as server:
        told = uvloop.run(measure(server.url, settings))
    results = {"begun": begun, "machine": measuring.machine(), "load": load, **told}
    settings.json.write_text(json.dumps(results, indent=1) + "\n")
    console = Console()
    for name, cost in told["cost"].items():
        ratio = cost["ratio"]
        console.print(
            f"{name}: {statistics.median(cost['us_raise']):.0f} µs a step with raise, "
            f"{statistics.median(cost['us_resume']):.0f} with resume: {ratio['value']:.3f} times "
            f"({ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    recovery = told["recovery"]
    console.print(f"a killed worker: answered after {recovery['p50_s']:.2f} s (p50), {recovery['p99_s']:.2f} s (p99)")


if __name__ == "__main__":
    main()
