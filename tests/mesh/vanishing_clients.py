"""Clients that open a session and vanish: killed in processes of their own, without a goodbye.

Each line on standard input is how many clients are to come and go: they are opened in a process that was forked for
them, each by a ``Mesh`` of its own, have used and renewed what they hold, and are killed together. The answer is the
moment of the kill, on the clock of ``time.monotonic``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from types import TracebackType
from typing import Any, Self

from meshrl import Mesh

# Of ten clients, one has a vector and one a pool.
NUM_ENVS = 3
# Opened at once in one process.
AT_ONCE = 25
OPEN_S = 120.0


class VanishingClients:
    """The process as a test sees it: an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.mesh.vanishing_clients", self._url, stdin=pipe, stdout=pipe
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends it
        await self._process.wait()

    async def come_and_go(self, count: int) -> float:
        """So many clients; gives when they were killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % count)
        async with asyncio.timeout(2 * OPEN_S):
            return float(await self._process.stdout.readline())


# --------------------------------------------------------------------------- in the process


async def _session(m: Mesh, number: int) -> Any:
    """What a client opens and uses; dropped, it would say goodbye."""
    if number % 10 == 8:
        envs = await m.vector("told", NUM_ENVS, wait=OPEN_S)
        await envs.reset()
        await envs.step([0] * NUM_ENVS)
        return envs
    if number % 10 == 9:
        pool = await m.pool("told", NUM_ENVS, wait=OPEN_S)
        await pool.reset()
        await pool.recv(min=NUM_ENVS)
        await pool.send([0] * NUM_ENVS, range(NUM_ENVS))
        return pool
    env = await m.env("told", wait=OPEN_S)
    await env.reset()
    await env.step(0)
    return env


async def _hold(url: str, count: int, told: int) -> None:
    """Open all, say so, and wait for the end."""
    few = asyncio.Semaphore(AT_ONCE)
    held: list[Any] = []

    async def come(number: int) -> None:
        async with few:
            m = await Mesh(url).__aenter__()
            held.extend((m, await _session(m, number)))

    await asyncio.gather(*(come(number) for number in range(count)))
    os.write(told, b"1")
    await asyncio.Event().wait()


def _come_and_go(url: str, count: int) -> float:
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(heard)
            asyncio.run(_hold(url, count, told))
        finally:
            os._exit(1)
    os.close(told)
    ready = os.read(heard, 1)
    os.kill(child, signal.SIGKILL)
    killed_at = time.monotonic()
    os.waitpid(child, 0)
    os.close(heard)
    assert ready, "not all clients were served"
    return killed_at


if __name__ == "__main__":
    while line := sys.stdin.readline():
        sys.stdout.write(f"{_come_and_go(sys.argv[1], int(line))}\n")
        sys.stdout.flush()
