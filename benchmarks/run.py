"""The step path against a bare echo on the same connection, interleaved in one run.

A server, one worker process with CartPole and one responder process; this process is the client. Everything runs on
uvloop where it exists.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from rich.console import Console
from rich.progress import track
from rich.table import Table

from meshrl import EnvWorker, Mesh
from meshrl.bus.connection import Connection, connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.guard import Guarded
from meshrl.client.context import context_of
from meshrl.worker.running import run

AIM_US = 60.0
CLIENTS = 16
ECHO = "bench.echo"
BODY = bytes(64)


@dataclass
class Series:
    """One figure, a value a round."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def middle(self) -> tuple[float, float]:
        """The range of the middle half of the rounds."""
        low, _, high = statistics.quantiles(self.values, n=4)
        return low, high


async def respond(url: str) -> None:
    """The fixed responder."""
    async with connect(url, name="echo") as connection:
        await connection.subscribe(ECHO, lambda _s, reply, body: connection.publish(reply, body))
        await asyncio.Event().wait()


class Nothing(gymnasium.Env[Any, Any]):
    """An env whose step does nothing: what is left is the path."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.observation = np.zeros(4, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation, 0.0, False, False, {}


async def serve(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1", "nothing": Nothing}, url) as worker:
        await worker.serve_forever()


async def echo(connection: Connection) -> None:
    """One request-reply on the client's own connection, by the means the step path has."""
    future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    rid = connection.request(ECHO, BODY, future.set_result)
    try:
        await future
    finally:
        connection.forget(rid)


async def latency(call: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """The median duration of one call at a time, in microseconds."""
    clock, taken = time.perf_counter, []
    end = clock() + seconds
    while (began := clock()) < end:
        await call()
        taken.append(clock() - began)
    return statistics.median(taken) * 1e6


async def throughput(calls: list[Callable[[], Awaitable[Any]]], seconds: float) -> float:
    """Calls a second, each of ``calls`` repeated by a task of its own."""
    clock = time.perf_counter
    began = clock()
    end = began + seconds

    async def repeat(call: Callable[[], Awaitable[Any]]) -> int:
        count = 0
        while clock() < end:
            await call()
            count += 1
        return count

    counts = await asyncio.gather(*(repeat(call) for call in calls))
    return sum(counts) / (clock() - began)


async def measure(url: str, rounds: int, seconds: float) -> list[Series]:
    async with contextlib.AsyncExitStack() as stack:
        # Each client is a mesh of its own: a connection, a directory, a keeper.
        meshes = [await stack.enter_async_context(Mesh(url)) for _ in range(CLIENTS)]
        envs = [await stack.enter_async_context(await mesh.env("cartpole")) for mesh in meshes]
        nothing = await stack.enter_async_context(await meshes[0].env("nothing"))
        for env in [*envs, nothing]:
            await env.reset(seed=1)

        def stepper(env: Any) -> Callable[[], Awaitable[None]]:
            async def step() -> None:
                _, _, terminated, truncated, _ = await env.step(0)
                if terminated or truncated:
                    await env.reset()

            return step

        steps = [stepper(env) for env in envs]
        echoes = [partial(echo, context_of(mesh).connection) for mesh in meshes]
        figures = [
            (Series("echo p50", "µs"), lambda: latency(echoes[0], seconds)),
            (Series("step p50, an env that does nothing", "µs"), lambda: latency(stepper(nothing), seconds)),
            (Series("step p50, CartPole", "µs"), lambda: latency(steps[0], seconds)),
            (Series("echo/s, 1 client", "/s"), lambda: throughput(echoes[:1], seconds)),
            (Series("steps/s, 1 client", "/s"), lambda: throughput(steps[:1], seconds)),
            (Series(f"echo/s, {CLIENTS} clients", "/s"), lambda: throughput(echoes, seconds)),
            (Series(f"steps/s, {CLIENTS} clients", "/s"), lambda: throughput(steps, seconds)),
        ]
        await throughput([*steps, stepper(nothing)], 1.0)  # past the hundred steps after which an env is stepped inline
        for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
            for series, run in figures:
                series.values.append(await run())
        return [series for series, _ in figures]


def report(series: list[Series]) -> dict[str, Any]:
    by = {one.name: one for one in series}

    def over_echo(name: str) -> float:
        pairs = zip(by[name].values, by["echo p50"].values, strict=True)
        return statistics.median(step - bare for step, bare in pairs)

    over, path = over_echo("step p50, CartPole"), over_echo("step p50, an env that does nothing")
    table = Table(title="the step path and a bare echo, one run")
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("middle half", justify="right")
    for one in series:
        low, high = one.middle()
        table.add_row(one.name, f"{one.median:,.0f} {one.unit}", f"{low:,.0f} to {high:,.0f}")
    Console().print(table)
    verdict = "met" if over <= AIM_US else "missed"
    Console().print(f"step p50 over echo p50: {over:+.0f} µs (aim: at most +{AIM_US:.0f} µs): {verdict}")
    Console().print(f"of which the path alone, with an env that does nothing: {path:+.0f} µs")
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "rounds": len(series[0].values),
        "figures": [{"name": s.name, "unit": s.unit, "median": s.median, "values": s.values} for s in series],
        "step_over_echo_us": over,
        "path_over_echo_us": path,
        "aim_us": AIM_US,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement in each round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--role", choices=["serve", "respond"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.role:
        run({"serve": serve, "respond": respond}[settings.role](settings.url))
        return
    with EmbeddedServer.start() as server:
        argv = [sys.executable, __file__, "--url", server.url, "--role"]
        roles = [Guarded.spawn([*argv, role]) for role in ("serve", "respond")]
        try:
            series = run(measure(server.url, settings.rounds, settings.seconds))
        finally:
            for role in roles:
                role.stop(timeout_s=5.0)
    result = report(series)
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(f"error: {error}")
