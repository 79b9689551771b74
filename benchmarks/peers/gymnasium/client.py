"""Gymnasium's own vectors, in this process: what a trainer has without anything remote."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import driver
import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from peers.served import CARTPOLE, Image, cartpole

NOTES = {
    "sync": "in this process; single is one plain env; NEXT_STEP autoreset",
    "async": "a process a sub-environment, shared memory, this process waits for all; NEXT_STEP autoreset",
    "vector": "CartPole's own vectorised implementation (vector_entry_point), numpy in this process",
}
SIZES = {
    "sync": (1, 4, 16, 64, 256, 1024),
    "async": (1, 4, 16, 64, 256),  # a process each: no more of them
    "vector": (64, 256, 2048, 4096),
}


def cartpole_in_a_worker() -> gymnasium.Env[Any, Any]:
    """A worker of AsyncVectorEnv must not outlive this process, however it ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    return cartpole()


@cache
def vector(kind: str, size: int) -> VectorEnv[Any, Any, Any]:
    if kind == "sync":
        made: VectorEnv[Any, Any, Any] = SyncVectorEnv([cartpole] * size)
    elif kind == "async":
        made = AsyncVectorEnv([cartpole_in_a_worker] * size)
    else:
        made = gymnasium.make_vec(CARTPOLE, size, vectorization_mode="vector_entry_point")
    made.reset(seed=1)
    return made


def batches(kind: str, size: int) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        envs = vector(kind, size)
        actions = [np.full(size, driver.action(number), np.int64) for number in range(2)]
        return driver.counted_batches(lambda number: envs.step(actions[number & 1]), size, command["seconds"])

    return work


def plain(make: Callable[[], gymnasium.Env[Any, Any]]) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        env, count = make(), 0
        env.reset(seed=1)

        def step() -> bool:
            nonlocal count
            _, _, terminated, truncated, _ = env.step(driver.action(count))
            count += 1
            return terminated or truncated

        return driver.timed(step, env.reset, command["seconds"])

    return work


def main() -> None:
    kind = sys.argv[1]
    works = {f"vector{size}": batches(kind, size) for size in SIZES[kind]}
    if kind == "sync":
        works |= {"single": plain(cartpole), "image": plain(Image)}
    driver.obey(works, versions=driver.versions_of("gymnasium", "numpy"), notes=NOTES[kind])


if __name__ == "__main__":
    main()
