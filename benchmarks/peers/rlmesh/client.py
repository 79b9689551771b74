"""RLMesh by its numpy clients, over TCP and, for images, over a Unix socket too."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import driver

os.environ.setdefault("RLMESH_WORKFLOW_EDITION", "2026.06")  # the one that 0.1.0 speaks; it warns where none is said

import numpy as np
from rlmesh.numpy import RemoteEnv, RemoteVectorEnv

LOOPBACK = "tcp://127.0.0.1:0"
VECTOR = 64


@cache
def addresses(what: str, *listen: str) -> list[str]:
    return driver.Server(Path(__file__).with_name("server.py"), what, *listen).address.split()


@cache
def remote(address: str) -> Any:
    """A connected env. It is kept: a server refuses the next client for a moment after the last one left."""
    env = RemoteEnv(address)
    env.reset(seed=1)
    return env


@cache
def remote_vector(address: str) -> Any:
    env = RemoteVectorEnv(address)
    env.reset(seed=1)
    return env


def client(address: str) -> tuple[Callable[[], bool], Callable[[], Any]]:
    env, count = remote(address), 0
    env.reset()

    def step() -> bool:
        nonlocal count
        _, _, terminated, truncated, _ = env.step(driver.action(count))
        count += 1
        return bool(terminated or truncated)

    return step, env.reset


def single(what: str, listen: str) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        (address,) = addresses(what, listen)
        return driver.timed(*client(address), command["seconds"])

    return work


def clients16(command: Mapping[str, Any]) -> driver.Answer:
    many = addresses("cartpole", *[LOOPBACK] * driver.CLIENTS)
    return driver.counted([client(address) for address in many], command["seconds"])


def vector64(command: Mapping[str, Any]) -> driver.Answer:
    (address,) = addresses("vector", LOOPBACK)
    envs = remote_vector(address)
    actions = [np.full(VECTOR, driver.action(number), np.int64) for number in range(2)]
    return driver.counted_batches(lambda number: envs.step(actions[number & 1]), VECTOR, command["seconds"])


def main() -> None:
    addresses("cartpole", LOOPBACK)
    driver.obey(
        {
            "single": single("cartpole", LOOPBACK),
            "clients16": clients16,
            "image": single("image", LOOPBACK),
            "image_unix": single("image", f"unix://{Path.cwd()}/image.sock"),
            "vector64": vector64,
        },
        versions=driver.versions_of("rlmesh", "gymnasium", "numpy"),
        notes="gRPC; a server takes one client, so 16 clients are 16 servers in one process, somewhat faster than "
        "16 processes, and 16 threads; vector64 is a SyncVectorEnv behind its own vector server; images over TCP, and "
        "over a Unix socket as image_unix",
    )


if __name__ == "__main__":
    main()
