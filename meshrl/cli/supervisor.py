"""The supervisor of ``meshrl up`` and ``serve --processes``: processes are started, watched, replaced, at last stopped.

The rule of this file: *one that dies is replaced, one that cannot live ends everything*, with the reason.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.guard import Guarded
from meshrl.bus.locate import URL_VARIABLE
from meshrl.errors import MeshError, WorkerError

Say = Callable[[str], None]

WATCH_S = 0.1
# Python, Gymnasium and what registers with it, on a slow and busy machine.
READY_S = 60.0
# A worker says goodbye, closes its envs (5 s at most) and ends.
STOP_S = 10.0
# One that lived this long was well; its death begins a new count.
WELL_S = 30.0
# In a row; the waits before them add up to 15 s, which a disk that is full or a server that restarts may need.
MAX_DEATHS = 5
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 8.0


def wait_before_restart_s(deaths: int) -> float | None:
    """Seconds to wait after that many deaths in a row before the next start; None when it is to be given up."""
    return None if deaths > MAX_DEATHS else min(FIRST_WAIT_S * 2 ** (deaths - 1), MAX_WAIT_S)


class Supervised(Protocol):
    """What a supervisor keeps alive."""

    async def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            WorkerError: it cannot start.
        """

    async def watch(self) -> None:
        """Replace it whenever it dies, until cancelled.

        Raises:
            WorkerError: it cannot be kept alive.
        """

    def stop(self) -> None:
        """End it in good order, whether it runs or not; blocks until it has ended."""


class WorkerProcess:
    """One worker process of ``meshrl up``.

    Args:
        number: from 1, for people.
        arguments: of the program :mod:`meshrl.worker.host`.
        url: of the server, password included; it is handed over in the environment.
        home: a directory for its log and its ready file.
        say: tells people what happened.
    """

    def __init__(self, number: int, arguments: Sequence[str], url: str, home: Path, say: Say) -> None:
        self.number = number
        self._arguments = list(arguments)
        self._url = url
        self._home = home
        self._say = say
        self._log = home / f"worker-{number}.log"
        self._ready = home / f"worker-{number}.ready"
        self._guarded: Guarded | None = None
        self._born = 0.0

    async def start(self) -> None:
        """Start it and wait until it is advertised.

        Raises:
            WorkerError: it ended before that, or did not come so far in time.
        """
        self._spawn()
        while not self._ready.exists():
            code = self._code()
            if code is not None:
                raise WorkerError(f"worker process {self.number} ended with code {code}: {self._last_words()}")
            if time.monotonic() - self._born > READY_S:
                raise WorkerError(
                    f"worker process {self.number} was not ready within {READY_S:g} s: {self._last_words()}"
                )
            await asyncio.sleep(WATCH_S / 2)

    async def watch(self) -> None:
        """Replace it whenever it dies, later each time.

        Raises:
            WorkerError: it died too often in a row.
        """
        deaths = 0
        while True:
            while (code := self._code()) is None:  # noqa: ASYNC110  # a guarded process can only be polled
                await asyncio.sleep(WATCH_S)
            if code == 0 and self._ready.exists():
                self._say(f"worker process {self.number} has left, as it was told to; it is started again")
                self._spawn()
                continue
            deaths = 1 if time.monotonic() - self._born > WELL_S else deaths + 1
            wait_s = wait_before_restart_s(deaths)
            what = f"worker process {self.number} ended with code {code} ({self._last_words()})"
            if wait_s is None:
                raise WorkerError(f"{what}, {deaths} times in a row; it is given up")
            self._say(f"{what}; it is started again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            self._spawn()

    def stop(self) -> None:
        """End it in good order; blocks until it has ended."""
        if self._guarded is not None:
            self._guarded.stop(STOP_S)

    def _spawn(self) -> None:
        self._ready.unlink(missing_ok=True)
        env = {**os.environ, URL_VARIABLE: self._url}
        env.pop(EMBEDDED_VARIABLE, None)
        line = [sys.executable, "-m", "meshrl.worker.host", "--replaced", "--ready", str(self._ready), *self._arguments]
        self._born = time.monotonic()
        # On the event loop, although it blocks for some hundredths of a second: a cancelled wait for a thread would
        # leave a process behind that nobody knows.
        self._guarded = Guarded.spawn(line, log=self._log, env=env, remove=self._home)

    def _code(self) -> int | None:
        assert self._guarded is not None
        return self._guarded.poll()

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it left no log")


class Supervisor:
    """Keeps all processes of one command alive, and its own server if it has one.

    Args:
        processes: the worker processes.
        server: brought back under the same address when it dies.
        say: tells people what happened.
    """

    def __init__(self, processes: Sequence[Supervised], server: EmbeddedServer | None, say: Say) -> None:
        self._processes = processes
        self._server = server
        self._say = say

    async def start(self) -> None:
        """Start everybody; returns when all are advertised.

        Raises:
            WorkerError: one of them cannot start; the others may run, and are to be stopped.
        """
        await _all(*(process.start() for process in self._processes))

    async def watch(self) -> None:
        """Go on until cancelled.

        Raises:
            MeshError: somebody could not be kept alive.
        """
        await _all(*(process.watch() for process in self._processes), self._watch_server())

    async def stop(self) -> None:
        """End all workers, at the same time."""
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self._processes))

    async def _watch_server(self) -> None:
        server, deaths, back_at = self._server, 0, time.monotonic()
        while server is not None:
            await asyncio.sleep(WATCH_S)
            if server.running:
                continue
            deaths = 1 if time.monotonic() - back_at > WELL_S else deaths + 1
            wait_s = wait_before_restart_s(deaths)
            if wait_s is None:
                raise WorkerError(f"nats-server died {deaths} times in a row; it is given up")
            self._say(f"nats-server died; it is started again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            try:
                await asyncio.to_thread(server.restart)
            except MeshError as exc:
                self._say(exc.message)
            back_at = time.monotonic()


async def _all(*coroutines: object) -> None:
    """Run them together; the first that fails ends the others, and its error is raised as it is."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]  # type: ignore[call-overload]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
