"""Worker processes that are killed in tests, and the comparison of what their sessions tell with local envs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.test_vector_parity import different
from tests.mesh.worker_process import WorkerProcess

ENVS = "tests.mesh.resumed_envs"
SERVED = {
    **{name: name for name in ("CartPole-v1", "FrozenLake-v1", "Pendulum-v1", "Blackjack-v1", TAXI)},
    **{
        name: f"{ENVS}:{name}"
        for name in (
            "Tuned",
            "Random",
            "Slow",
            "Awaited",
            "Breaks",
            "Draws",
            "Unresumable",
            "Reused",
            "SlowReset",
            "Pictures",
            "Mural",
        )
    },
}


class Workers:
    """Worker processes of one server, by id; those that were killed can be replaced."""

    def __init__(self, url: str, stack: ExitStack, **kwargs: Any) -> None:
        self._url = url
        self._stack = stack
        self._kwargs = {"allow": ["*"], "allow_kwargs": ["*"], **kwargs}
        self.running: dict[str, WorkerProcess] = {}

    def start(self, count: int = 1, **kwargs: Any) -> list[WorkerProcess]:
        new = [WorkerProcess(self._url, SERVED, wait=False, **{**self._kwargs, **kwargs}) for _ in range(count)]
        for worker in new:
            self._stack.enter_context(worker)
            self.running[worker.wait_advertised()] = worker
        return new

    async def drain(self, id_: str) -> int:
        """Have it leave; gives its exit code when it has."""
        worker = self.running.pop(id_)
        worker.terminate()
        return await asyncio.to_thread(worker.ended)

    async def kill(self, id_: str) -> None:
        await asyncio.to_thread(self.running.pop(id_).kill)


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Equal to the bit; infos too."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert not different(one, other)
