"""Threads for env code: as many as are busy at once, and none that keeps the process alive.

Not ``concurrent.futures``: its threads are joined when the interpreter exits, so one hung env would hang the worker's
shutdown for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

# A thread that had nothing to do for this long ends.
IDLE_S = 30.0

Job = Callable[[], None]
T = TypeVar("T")
# what a call gave, or what it raised
Outcome = tuple[T | None, BaseException | None]


class Threads:
    """Runs jobs on daemon threads, each at once; a job must not raise.

    Attributes:
        loop: the event loop to which jobs bring their results :meth:`back`.
        count: how many threads there are.
    """

    def __init__(self, name: str) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._name = name
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        # One entry for each thread that waits and to which no job is promised. Its append and pop are atomic: a lock
        # around a count was held by threads that had lost the interpreter, and every other then queued for both.
        self._idle: list[None] = []
        self._owed: list[None] = []  # one for each job for which no thread could be started
        self._lock = threading.Lock()  # of what threads do when they begin and end: their count, and what is owed then
        self._results: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._told = False  # the loop knows that there are results
        self.count = 0

    def submit(self, job: Job) -> None:
        """Run ``job`` on an idle thread, or on a new one."""
        try:
            self._idle.pop()
        except IndexError:
            with self._lock:
                self.count += 1
                name = f"{self._name}-{self.count}"
            try:
                threading.Thread(target=self._work, name=name, daemon=True).start()
            except RuntimeError:  # the system has no more of them: whoever is free next runs it
                with self._lock:
                    self.count -= 1
                    if not self.count:
                        raise
                    self._owed.append(None)
        self._jobs.put(job)

    def start(self, call: Callable[[], T]) -> asyncio.Future[Outcome[T]]:
        """Make ``call`` on a thread; gives the future of what comes of it, on the running event loop.

        What was raised is a result as well: a future cannot hold every exception (``StopIteration``), and must not hold
        those that end the loop. Cancelling the future stops the waiting, not the call.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome[T]] = loop.create_future()

        def told(outcome: Outcome[T]) -> None:
            if not future.done():
                future.set_result(outcome)

        def job() -> None:
            outcome: Outcome[T]
            try:
                outcome = call(), None
            except BaseException as exc:  # noqa: BLE001  # raised where the future is awaited
                outcome = None, exc
            if loop is self.loop:
                self.back(told, outcome)
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited
                loop.call_soon_threadsafe(told, outcome)

        self.submit(job)
        return future

    async def call(self, call: Callable[[], T]) -> T:
        """Make ``call`` on a thread and wait for what it gives or raises. Cancelling stops the waiting alone."""
        value, exc = await self.start(call)
        if exc is not None:
            raise exc
        return value  # type: ignore[return-value]  # without an exception it is what the call gave

    def wait(self, call: Callable[[], T]) -> T:
        """Make ``call`` where jobs may run; to be called on a thread that may wait: here it is that one."""
        return call()

    def back(self, call: Callable[..., object], *args: object) -> None:
        """Call on the event loop, from any thread and in this order; a loop that has ended needs nothing any more."""
        assert self.loop is not None, "the loop is set before the first job"
        self._results.append((call, args))
        if not self._told:  # waking a loop is a system call, of which one will do for all that come until it wakes
            self._told = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._come_back)

    def _come_back(self) -> None:
        assert self.loop is not None
        self._told = False  # before looking: what is brought from here on tells the loop again
        for _ in range(len(self._results)):
            call, args = self._results.popleft()
            try:
                call(*args)
            except Exception as exc:  # noqa: BLE001  # as of any callback of the loop: it keeps no other from its turn
                self.loop.call_exception_handler({"message": f"{call} failed", "exception": exc})

    def _work(self) -> None:
        while True:  # a job is promised to this thread, or to another that waits like it
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                try:
                    self._idle.pop()
                except IndexError:  # one was promised meanwhile
                    continue
                with self._lock:
                    try:
                        self._owed.pop()  # there may be nobody else to run it
                    except IndexError:
                        self.count -= 1
                        return
                continue
            job()
            del job
            try:
                self._owed.pop()
            except IndexError:
                self._idle.append(None)
