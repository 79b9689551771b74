"""An env worker and an agent worker in a process of their own, which tells what it had to complain of.

Each line on standard input is a question; the answer is how the process does, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NamedTuple, Self

from meshrl import AgentWorker, EnvWorker
from meshrl.worker.running import run
from tests.mesh.envs import Nested
from tests.mesh.resumed_envs import Awaited

SLOTS = 256
# Public names of the envs that clients may call and set: sessions get strange values from there.
ALLOW = ("gravity", "wind", "gust", "double")
START_S = 60.0
ANSWER_S = 60.0
STOP_S = 30.0


def still(obs: Any, deterministic: bool = False, action_space: Any = None) -> int:
    """Acts alike whatever it sees."""
    return 0


class Counting:
    """An agent that remembers."""

    def __init__(self) -> None:
        self._acts = 0

    def act(self, obs: Any, action_space: Any = None) -> int:
        self._acts += 1
        return self._acts


class Report(NamedTuple):
    """How the process does.

    Attributes:
        complaints: of every warning or worse that was logged, every exception that nobody caught.
        free: slots, of the env worker and of the agent worker.
        cached_bytes: of answers that are kept, at both.
        waiting: opens that are parked, at both.
        threads: that run.
    """

    complaints: list[str]
    free: list[int]
    cached_bytes: list[int]
    waiting: list[int]
    threads: int


class FuzzedWorkers:
    """The process as a test sees it: an async context manager.

    Attributes:
        env: the env worker's id.
        agent: the agent worker's id.
    """

    env: str
    agent: str

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fuzz.fuzzed_workers", self._url, stdin=pipe, stdout=pipe, limit=1 << 26
        )
        async with asyncio.timeout(START_S):
            self.env, self.agent = json.loads(await self._line())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends it
        try:
            async with asyncio.timeout(STOP_S):
                code = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise
        assert code == 0 or kind is not None, f"the workers ended with code {code}"

    async def report(self) -> Report:
        """How it does now.

        Raises:
            AssertionError: it has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(b"?\n")
        async with asyncio.timeout(ANSWER_S):
            return Report(*json.loads(await self._line()))

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, f"the workers have ended, with code {await self._process.wait()}"
        return line


# --------------------------------------------------------------------------- in the process


class _Complaints(logging.Handler):
    """Keeps what was complained of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(self.format(record))

    def uncaught(self, kind: type[BaseException], value: BaseException | None, trace: TracebackType | None) -> None:
        self.all.append("".join(traceback.format_exception(kind, value, trace)))


async def _serve(url: str, complaints: _Complaints) -> None:
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    envs: dict[str, Any] = {"cartpole": "CartPole-v1", "nested": Nested, "awaited": Awaited}
    agents: dict[str, Any] = {"still": still, "still too": still, "counting": Counting}
    async with (
        EnvWorker(envs, url, slots=SLOTS, allow=ALLOW) as env,
        AgentWorker(agents, url, slots=SLOTS) as agent,
    ):
        both = (env, agent)
        _say([worker.id for worker in both])
        while await stdin.readline():
            report = Report(
                complaints.all,
                [worker.table.free for worker in both],
                [worker.table.cached_bytes for worker in both],
                [worker.waiting_count() for worker in both],
                threading.active_count(),
            )
            _say(report)


def _say(what: Any) -> None:
    line = json.dumps(what).encode() + b"\n"
    while line:
        line = line[os.write(1, line) :]


if __name__ == "__main__":
    handler = _Complaints()
    logging.getLogger().addHandler(handler)
    sys.unraisablehook = lambda args: handler.uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    threading.excepthook = lambda args: handler.uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    run(_serve(sys.argv[1], handler))  # as `meshrl serve` does: on uvloop where there is one
