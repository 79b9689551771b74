"""This system under the driver's protocol, in the repository's own environment.

Every process has a part of its own: this client on uvloop, nats-server, workers, the echo's responder. The same file
in other roles is a learner of ``fair`` and one of the processes of ``threads``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import batches
import driver
import messages
import together
from hosts import Hosts, Loop, many_files

VECTOR_SIZES = (1, 4, 16, 64, 256, 1024)
NOTES = (
    "nats-server, one worker process (two where it says so, four for slow envs), a client on uvloop; one request a "
    "step; clients16 is 16 envs of one Mesh, and of 16; batches are one message a worker"
)


def client() -> None:
    many_files()
    hosts, loop = Hosts(), Loop()
    tempfile.tempdir = str(Path.cwd())  # the benchmark removes it, even if this process has no time to

    def work(main: Callable[..., Coroutine[Any, Any, driver.Answer]], *arguments: Any) -> driver.Work:
        def carry_out(command: Mapping[str, Any]) -> driver.Answer:
            try:
                return loop.run(main(hosts, *arguments, command["seconds"]))
            except Exception:
                hosts.let_go()
                raise

        return carry_out

    def sessions(*, one_mesh: bool) -> driver.Work:
        return lambda command: loop.run(together.sessions(hosts, command["n"], one_mesh=one_mesh))

    works: dict[str, driver.Work] = {
        "echo": work(messages.echo, "bench.echo"),
        "echo_image": work(messages.echo, "bench.image"),
        "echo_image32": work(messages.echo, "bench.image32"),
        "single": work(messages.single, "cartpole"),
        "nothing": work(messages.single, "nothing"),
        "image": work(messages.single, "image"),
        "clients16_one_mesh": work(messages.clients16, 1),
        "clients16_meshes": work(messages.clients16, driver.CLIENTS),
        "image32": work(batches.vector, "image", 32, 1),
        "two2048_1": work(batches.two2048, 1),
        "two2048_2": work(batches.two2048, 2),
        "sleep64_vector": work(batches.slow_vector, "sleeping"),
        "sleep64_halves": work(batches.slow_halves, "sleeping"),
        "sleep64_apart": work(batches.slow_apart, "sleeping"),
        "sleep64_pool": work(batches.slow_pool, "sleeping"),
        "lognormal_vector": work(batches.slow_vector, "lognormal"),
        "lognormal_pool": work(batches.slow_pool, "lognormal"),
        "threads": work(together.threads),
        "fair": work(together.fair),
        "sessions_one_mesh": sessions(one_mesh=True),
        "sessions_meshes": sessions(one_mesh=False),
    }
    for workers in (1, 2):
        works[f"pool256_{workers}"] = work(batches.halves, workers)
        works[f"vector4096_{workers}"] = work(batches.vector, "fast", 4096, workers)
        for size in VECTOR_SIZES:
            if size >= workers:
                works[f"vector{size}_{workers}"] = work(batches.vector, "cartpole", size, workers)
    driver.obey(works, versions=driver.versions_of("meshrl", "nats-py", "gymnasium", "numpy", "uvloop"), notes=NOTES)


def role(step: Callable[..., Coroutine[Any, Any, driver.Answer]], **parameters: Any) -> None:
    """A process with an event loop and one work."""
    loop = Loop()

    def work(command: Mapping[str, Any]) -> driver.Answer:
        given = {name: command.get(name, default) for name, default in parameters.items()}
        return loop.run(step(command["seconds"], **given))

    driver.obey({"step": work}, versions={}, notes="")


def main() -> None:
    match sys.argv[1:]:
        case ["learner", url]:
            role(together.Learner(url).step, rate=None)
        case ["threads"]:
            role(together.Stepping().step)
        case _:
            client()


if __name__ == "__main__":
    main()
