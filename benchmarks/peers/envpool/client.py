"""EnvPool in this process: CartPole in C++ on a pool of threads."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any

import driver
import numpy as np


@cache
def registration() -> Any:
    """EnvPool with classic control alone: its own ``__init__`` wants 250 MB of assets of other envs to be there."""
    spec = importlib.util.find_spec("envpool")
    assert spec is not None
    package = types.ModuleType("envpool")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["envpool"] = package
    importlib.import_module("envpool.classic_control.registration")
    return importlib.import_module("envpool.registration")


@cache
def pool(size: int) -> Any:
    threads = min(size, os.cpu_count() or 1)
    made = registration().make_gymnasium("CartPole-v1", num_envs=size, num_threads=threads, seed=1)
    made.reset()
    return made


def batches(size: int) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        envs = pool(size)
        actions = [np.full(size, driver.action(number), np.int32) for number in range(2)]
        return driver.counted_batches(lambda number: envs.step(actions[number & 1]), size, command["seconds"])

    return work


def main() -> None:
    registration()
    driver.obey(
        {f"vector{size}": batches(size) for size in (64, 256, 2048, 4096)},
        versions=driver.versions_of("envpool", "gymnasium", "numpy"),
        notes="in this process, its own CartPole in C++ (not Gymnasium's), synchronous step, one thread a core",
    )


if __name__ == "__main__":
    main()
