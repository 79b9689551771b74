"""A worker that tells how its process does: each line on standard input is a question, each answer three numbers.

The question ``now`` is answered with the bytes of memory that Python has given out and that are in use, the tasks of
the event loop, and the threads. ``bare`` is answered with the bytes of one CartPole made by Gymnasium alone, and zeros.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import tracemalloc
from types import TracebackType
from typing import NamedTuple, Self

import gymnasium

from meshrl import EnvWorker
from meshrl.protocol import session

SLOTS = 1100
BARE = 200
# So many ended sessions are remembered for those who ask why, and thousands would look like a leak for a while.
REMEMBERED = 50


class Standing(NamedTuple):
    """How a process does."""

    memory_bytes: int
    tasks: int
    threads: int


def standing() -> Standing:
    """How this process does; ``tracemalloc`` has been started, and a loop is running."""
    gc.collect()
    return Standing(tracemalloc.get_traced_memory()[0], len(asyncio.all_tasks()), threading.active_count())


class MeasuredWorker:
    """The worker's process as a test sees it: an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.mesh.measured_worker", self._url, stdin=pipe, stdout=pipe
        )
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"ready\n"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends it
        await self._process.wait()

    async def ask(self, question: str = "now") -> Standing:
        """What it answers to ``now`` or ``bare``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question.encode() + b"\n")
        return Standing(*map(int, (await self._process.stdout.readline()).split()))


def bare() -> Standing:
    gymnasium.make("CartPole-v1").close()
    before = standing()
    envs = [gymnasium.make("CartPole-v1") for _ in range(BARE)]
    return Standing((standing().memory_bytes - before.memory_bytes) // len(envs), 0, 0)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def main(url: str) -> None:
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    tracemalloc.start()
    async with EnvWorker({"cartpole": "CartPole-v1"}, url, slots=SLOTS):
        say("ready")
        while question := await stdin.readline():
            say(*(bare() if question.strip() == b"bare" else standing()))


if __name__ == "__main__":
    session.MAX_REMEMBERED = REMEMBERED  # in this process alone: tests import this file too
    asyncio.run(main(sys.argv[1]))
