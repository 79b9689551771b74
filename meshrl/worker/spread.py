"""Spreading: the sub-environments of one message on as many threads as they need (R10).

Fast ones would only fight for the interpreter, so they run one after another on one thread; slow ones wait for
something (a simulator, a sleep, code that lets go of the interpreter), so each gets a thread, up to a width at once.
Which they are shows while they run: a message that is not known to be slow begins on one thread, and is joined by
others as soon as one of its sub-environments takes long. Where as many as the width allows are under way and none of
them finishes for a while, those that have not begun get threads as well, up to a bound.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from meshrl.protocol.pace import FAST_S
from meshrl.worker.threads import Threads

# No more threads than this at once for one message: what an operating system takes well, and more sleep at once than
# any interpreter can wake in time.
MAX_WIDTH = 256
# Nothing finished for so long: the threads hang rather than work, and hold up the jobs that have none.
STUCK_S = FAST_S * 50
# So many in all may hang of one message.
MAX_THREADS = 1024


class Finished(NamedTuple):
    """One job that finished.

    Attributes:
        number: of the job.
        outcome: what came of it; an exception is an outcome as well, ``CancelledError`` that of a job that had not
            begun when the spread was stopped.
        seconds: how long it ran.
    """

    number: int
    outcome: Any
    seconds: float


class Spread:
    """Runs the jobs ``0 .. count - 1`` of one message; to be made on the event loop.

    Args:
        threads: where they run.
        count: how many.
        job: runs one of them, on any thread, and gives what comes of it.
        collect: called on the event loop with the jobs that have finished since the last call; those that finish
            together come together.
        together: whether to call ``collect`` once, when all have finished.
        wide: whether to begin on a thread each.
        narrow: whether to stay on one thread, however long it takes.
    """

    __slots__ = (
        "_collect",
        "_count",
        "_done",
        "_job",
        "_looked_at",
        "_loop",
        "_numbers",
        "_scheduled",
        "_seen",
        "_stopped",
        "_threads",
        "_together",
        "_width",
    )

    def __init__(
        self,
        threads: Threads,
        count: int,
        job: Callable[[int], Any],
        collect: Callable[[list[Finished]], None],
        *,
        together: bool = False,
        wide: bool,
        narrow: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._count = count
        self._job = job
        self._collect = collect
        self._together = together
        self._numbers = itertools.count()  # to take the next one is atomic
        self._done: list[Finished] = []  # and so is an append
        self._scheduled = False
        self._seen = 0
        self._looked_at = 0
        self._width = 0
        self._stopped = False
        if wide and not narrow:
            self._widen()
        else:
            self._add(1)
            if count > 1 and not narrow:
                self._loop.call_later(FAST_S, self._look)

    def stop(self) -> None:
        """Begin no more jobs; those that have begun go on, and every one is collected all the same."""
        self._stopped = True

    def _work(self) -> None:
        """Run jobs until none is left; on a thread."""
        while (number := next(self._numbers)) < self._count:
            began = time.monotonic()
            try:
                if self._stopped:
                    raise asyncio.CancelledError("its session was over before it began")
                outcome = self._job(number)
            except BaseException as exc:  # noqa: BLE001  # it goes to whoever waits for the job
                outcome = exc
            self._done.append(Finished(number, outcome, time.monotonic() - began))
            if self._scheduled or (self._together and len(self._done) < self._count):
                continue
            self._scheduled = True  # two threads at once cost a second call, which finds nothing new
            self._threads.back(self._take)

    def _take(self) -> None:
        self._scheduled = False  # before looking: what is appended from now on is told again
        fresh = self._done[self._seen :]
        self._seen += len(fresh)
        if fresh:
            self._collect(fresh)

    def _look(self) -> None:
        """A moment has passed: if it passed without any job's end, the jobs are slow."""
        done = len(self._done)
        if done == self._looked_at:
            self._widen()
        elif done < self._count:
            self._looked_at = done
            self._loop.call_later(FAST_S, self._look)

    def _widen(self) -> None:
        self._add(min(self._count - len(self._done), MAX_WIDTH))
        self._look_again()

    def _look_again(self) -> None:
        """Look at the threads later, as long as some jobs may have none."""
        self._looked_at = len(self._done)
        if self._waiting() and self._width < MAX_THREADS:
            self._loop.call_later(STUCK_S, self._unstick)

    def _unstick(self) -> None:
        if self._stopped:
            return
        if len(self._done) == self._looked_at:
            self._add(min(self._waiting(), MAX_WIDTH, MAX_THREADS - self._width))
        self._look_again()

    def _waiting(self) -> int:
        """How many jobs have not begun, where every thread is at one."""
        return max(0, self._count - len(self._done) - self._width)

    def _add(self, threads: int) -> None:
        self._width += threads
        for _ in range(threads):
            self._threads.submit(self._work)
