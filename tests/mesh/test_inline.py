"""``isolation="inline"``: whatever is asked of an env, it never leaves the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.errors import EnvError
from tests.mesh.conftest import until


class Loyal(gymnasium.Env[Any, Any]):
    """Notes on which thread each of its methods runs. The action 1 takes its time, 2 raises."""

    observation_space = spaces.Discrete(4)
    action_space = spaces.Discrete(3)
    metadata = {"render_modes": ["ansi"]}
    seen: list[tuple[str, int]] = []

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.note("constructor")
        time.sleep(0.06)  # as long as would have others made on threads

    def note(self, what: str) -> None:
        self.seen.append((what, threading.get_ident()))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.note("reset")
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.note("step")
        if action == 1:
            time.sleep(0.02)
        if action == 2:
            raise ZeroDivisionError("no way on")
        return 1, 0.0, False, False, {}

    def render(self) -> str:
        self.note("render")
        return "nothing"

    def called(self) -> int:
        self.note("called")
        return 7

    def close(self) -> None:
        self.note("close")


class Courteous(Loyal):
    """Its close is a coroutine function."""

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.note("close")


@pytest.fixture(autouse=True)
def _anew() -> None:
    Loyal.seen = []


def only_here(*expected: str) -> None:
    assert {what for what, _ in Loyal.seen} >= {"constructor", "close", *expected}
    assert {thread for _, thread in Loyal.seen} == {threading.get_ident()}


async def test_single_env_stays_on_the_loop_fast_or_slow(url: str) -> None:
    async with EnvWorker({"loyal": Loyal}, url, isolation="inline", allow=("*",)) as worker, Mesh(url) as m:
        async with await m.env("loyal", render_mode="ansi") as env:
            await env.reset(seed=1)
            for n in range(250):  # long enough to earn the loop on a thread, to be sent back, and to earn it again
                await env.step(1 if n in {0, 120} else 0)
            assert await env.render() == "nothing"
            assert await env.call("called") == 7
            with pytest.raises(EnvError, match="ZeroDivisionError"):
                await env.step(2)
        await until(lambda: worker.table.free == worker.table.slots, "it is closed")
    only_here("reset", "step", "render", "called")


@pytest.mark.parametrize("slow", [0, 1])
async def test_vectors_and_pools_stay_on_the_loop(url: str, slow: int) -> None:
    async with EnvWorker({"loyal": Loyal}, url, isolation="inline") as worker, Mesh(url) as m:
        async with await m.vector("loyal", 4) as envs, await m.pool("loyal", 4) as pool:
            await envs.reset(seed=1)
            await pool.reset(seed=1)
            for _ in range(3):
                obs, *_ = await envs.step(np.full(4, slow))
                assert obs.tolist() == [1, 1, 1, 1]
                batch = await pool.recv(min=4)
                await pool.send(np.full(4, slow), batch.env_ids)
            await pool.recv(min=4)
        await until(lambda: worker.table.free == worker.table.slots, "all are closed")
    only_here("reset", "step")


@pytest.mark.parametrize("made", [Loyal, Courteous])
async def test_env_on_demand_is_described_on_the_loop(url: str, made: type[Loyal]) -> None:
    gymnasium.register("Loyal-v0", entry_point=made, disable_env_checker=True)  # type: ignore[arg-type]
    try:
        async with EnvWorker(url=url, on_demand=True, isolation="inline") as worker, Mesh(url) as m:
            async with await m.env("loyal") as env:
                await env.reset(seed=1)
            await until(lambda: worker.table.free == worker.table.slots, "it is closed")
            await until(lambda: [what for what, _ in Loyal.seen].count("close") == 2, "and the one described")
    finally:
        del gymnasium.registry["Loyal-v0"]
    only_here("reset")
