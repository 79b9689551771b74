"""A worker in a process of its own, for tests: start it, wait until it is advertised, freeze it, kill it, stop it.

::

    with WorkerProcess(server.url, {"cartpole": "CartPole-v1"}, slots=2) as worker:
        ...
        worker.kill()

Factories are texts that the process can import: Gymnasium ids, or ``tests.mesh.some_module:Class``. The process ends
with the one that started it: their pipe says so.

Each is forked from one process that has imported everything and done nothing else, which spares the suite more than a
second of processor time a worker.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.freezing import freeze

ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 15.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.mesh.worker_preload"])


class WorkerProcess:
    """A running ``EnvWorker`` (or ``AgentWorker``); it is advertised when the constructor returns.

    Args:
        url: of the NATS server.
        names: what it serves, by name; factories as texts.
        kind: ``env`` or ``agent``.
        wait: wait until it is advertised; otherwise call :meth:`wait_advertised` later, so that several start at once.
        drain_s: how long its sessions have, once it is terminated, to move to others.
        kwargs: the worker's own: ``slots``, ``capabilities``, ``allow``, ``allow_kwargs``, ``lease_s``, ...

    Attributes:
        id: the worker's id, once it is advertised.
        pid: of its process.
    """

    def __init__(
        self,
        url: str,
        names: Mapping[str, str] | None = None,
        *,
        kind: str = "env",
        wait: bool = True,
        drain_s: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        given = (theirs, kind, dict(names or {}), {"url": url, **kwargs}, drain_s)
        self._process = CONTEXT.Process(target=_main, args=given, daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.id = ""
        if wait:
            self.wait_advertised()

    def wait_advertised(self) -> str:
        """Block until it advertises what it serves; gives its id.

        Raises:
            RuntimeError: it ended before, or did not within 30 s; its stderr is the tests' own.
        """
        if not self.id:
            try:
                self.id = self._pipe.recv() if self._pipe.poll(START_S) else ""
            except EOFError:
                self.id = ""
            if not self.id:
                self.kill()
                raise RuntimeError("the worker process did not start")
        return self.id

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.is_alive()

    def freeze(self) -> None:
        """Stop it from running, as a hung machine would; :meth:`thaw` lets it go on."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to go (SIGTERM), without waiting."""
        self._process.terminate()

    def kill(self) -> None:
        """End it without a goodbye, as a crash would; returns when it is gone."""
        self._process.kill()
        self._end()

    def stop(self) -> int:
        """End it in good order; gives its exit code. Safe to call twice."""
        if self.running:
            self.thaw()
            os.kill(self.pid, signal.SIGINT)
        try:
            return self._end()
        except TimeoutError:
            self.kill()
            raise

    def ended(self) -> int:
        """Wait for its end; gives its exit code."""
        return self._end()

    def _end(self) -> int:
        self._process.join(STOP_S)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError(f"worker process {self.pid} has not ended within {STOP_S:g} s")
        self._pipe.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _main(pipe: Connection, kind: str, names: dict[str, str], kwargs: dict[str, Any], drain_s: float) -> None:
    os.setsid()  # Ctrl-C in a terminal is the tests' alone
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    from meshrl.worker.running import run

    run(_serve(pipe, kind, names, kwargs, drain_s))


async def _serve(pipe: Connection, kind: str, names: dict[str, str], kwargs: dict[str, Any], drain_s: float) -> None:
    from meshrl import AgentWorker, EnvWorker

    async with (EnvWorker if kind == "env" else AgentWorker)(names, **kwargs) as worker:
        leave = partial(worker.leave, drain_s) if drain_s else worker.stop
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, leave)
        loop.add_signal_handler(signal.SIGINT, worker.stop)
        pipe.send(worker.id)
        await worker.serve_forever()


def _end_with_parent(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        os._exit(1)
