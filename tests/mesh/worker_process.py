"""A worker in a process of its own, for tests: start it, wait until it is advertised, freeze it, kill it, stop it.

::

    with WorkerProcess(server.url, {"cartpole": "CartPole-v1"}, slots=2) as worker:
        ...
        worker.kill()

Factories are texts that the process can import: Gymnasium ids, or ``tests.mesh.some_module:Class``. The process ends
with the one that started it: its stdin says so.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.freezing import freeze

ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 15.0


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
        given = {"kind": kind, "names": dict(names or {}), "kwargs": {"url": url, **kwargs}, "drain_s": drain_s}
        told = json.dumps(given)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mesh.worker_process", told],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the tests' alone
        )
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
            assert self._process.stdout is not None
            readable, _, _ = select.select([self._process.stdout], [], [], START_S)
            self.id = self._process.stdout.readline().decode().strip() if readable else ""
            if not self.id:
                self.kill()
                raise RuntimeError("the worker process did not start")
        return self.id

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def freeze(self) -> None:
        """Stop it from running, as a hung machine would; :meth:`thaw` lets it go on."""
        freeze(self._process.pid)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

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
            self.terminate()
        try:
            return self._end()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def ended(self) -> int:
        """Wait for its end; gives its exit code."""
        return self._end()

    def _end(self) -> int:
        code = self._process.wait(STOP_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


async def _serve(kind: str, names: dict[str, str], kwargs: dict[str, Any], drain_s: float) -> None:
    from meshrl import AgentWorker, EnvWorker

    async with (EnvWorker if kind == "env" else AgentWorker)(names, **kwargs) as worker:
        leave = partial(worker.leave, drain_s) if drain_s else worker.stop
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave)
        os.write(1, f"{worker.id}\n".encode())
        await worker.serve_forever()


def _end_with_parent() -> None:
    while os.read(0, 64):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from meshrl.worker.running import run

    run(_serve(**json.loads(sys.argv[1])))
