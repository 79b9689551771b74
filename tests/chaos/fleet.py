"""The fleet: four workers, each replaced when it is killed; two have their envs in processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from tests.chaos import policies
from tests.mesh.worker_process import WorkerProcess

LEASE_S = 2.0
# Of an env that hangs; any other is far from it, if its worker runs.
STEP_DEADLINE_S = 4.0
SLOTS = 24
DANGEROUS = "dangerous"
ISOLATED = {"isolated": True}
SERVED = {**policies.SERVED, DANGEROUS: "tests.mesh.dangerous_envs:Dangerous"}
# What a worker's sessions have to move, once it is told to leave.
DRAIN_S = 6.0
COMMON: dict[str, Any] = {"drain_s": DRAIN_S, "slots": SLOTS, "lease_s": LEASE_S, "step_deadline_s": STEP_DEADLINE_S}
THREADS: dict[str, Any] = COMMON
PROCESSES: dict[str, Any] = {**COMMON, "isolation": "process", "capabilities": ISOLATED}
# By place: who takes the place of a worker that was killed is like it.
PLACES = (THREADS, PROCESSES, THREADS, PROCESSES)
# While the server is away, none comes up.
ATTEMPTS = 5


class Fleet:
    """The workers; made by :func:`fleet`.

    Attributes:
        awake: those that serve at this moment, by id.
        started: how many there were in all.
        over: whether nobody is replaced any more.
    """

    def __init__(self, url: str, stack: ExitStack, starting: asyncio.TaskGroup) -> None:
        self.awake: dict[str, WorkerProcess] = {}
        self.started = 0
        self.over = False
        self._url = url
        self._stack = stack
        self._starting = starting
        self._places: dict[str, int] = {}
        self._changed = asyncio.Event()

    async def start(self, place: int) -> None:
        """Start one in that place.

        Raises:
            RuntimeError: it does not come up, time and again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            worker = WorkerProcess(self._url, SERVED, wait=False, **PLACES[place])
            self._stack.callback(worker.kill)
            self.started += 1
            try:
                id_ = await asyncio.to_thread(worker.wait_advertised)
            except RuntimeError:
                if attempt == ATTEMPTS:
                    raise
                continue
            self._places[id_] = place
            self._wakes(id_, worker)
            return

    async def enough(self, count: int) -> None:
        """Wait until so many are awake."""
        while len(self.awake) < count:
            self._changed.clear()
            await self._changed.wait()

    def _wakes(self, id_: str, worker: WorkerProcess) -> None:
        self.awake[id_] = worker
        self._changed.set()

    def kill(self, id_: str) -> bool:
        """Kill one without a moment's delay, and start another; whether it was awake."""
        worker = self.awake.pop(id_, None)
        if worker is None:
            return False
        os.kill(worker.pid, signal.SIGKILL)
        self._starting.create_task(self._replace(id_, worker))
        return True

    async def leave(self, id_: str) -> bool:
        """Have one leave, and start another when it has; whether it did."""
        worker = self.awake.pop(id_, None)
        if worker is None:
            return False
        worker.terminate()
        code = await asyncio.to_thread(worker.ended)
        self._starting.create_task(self._replace(id_, worker))
        return code == 0

    async def _replace(self, id_: str, worker: WorkerProcess) -> None:
        await asyncio.to_thread(worker.kill)  # returns when it is gone
        if not self.over:
            await self.start(self._places[id_])

    async def freeze(self, id_: str, seconds: float) -> bool:
        """Stop one for so long; whether it lived before and after."""
        worker = self.awake.pop(id_, None)
        if worker is None:
            return False
        try:
            await asyncio.to_thread(worker.freeze)
            await asyncio.sleep(seconds)
        finally:
            worker.thaw()
        self._wakes(id_, worker)
        return worker.running


@asynccontextmanager
async def fleet(url: str) -> AsyncIterator[Fleet]:
    """Workers of the server at ``url``; within it all of them are there."""
    with ExitStack() as stack:
        async with asyncio.TaskGroup() as starting:
            workers = Fleet(url, stack, starting)
            try:
                for place in range(len(PLACES)):
                    starting.create_task(workers.start(place))
                await workers.enough(len(PLACES))
                yield workers
            finally:
                workers.over = True
