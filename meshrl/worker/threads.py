"""Threads for env code: as many as are busy at once, and none that keeps the process alive.

Not ``concurrent.futures``: its threads are joined when the interpreter exits, so one hung env would hang the worker's
shutdown for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable

# A thread that had nothing to do for this long ends.
IDLE_S = 30.0

Job = Callable[[], None]


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
        self._lock = threading.Lock()
        self._idle = 0
        self._waiting = 0
        self.count = 0

    def submit(self, job: Job) -> None:
        """Run ``job`` on an idle thread, or on a new one."""
        with self._lock:
            self._waiting += 1
            start = self._waiting > self._idle
            if start:
                self.count += 1
        self._jobs.put(job)
        if start:
            threading.Thread(target=self._work, name=f"{self._name}-{self.count}", daemon=True).start()

    def back(self, call: Callable[..., object], *args: object) -> None:
        """Call on the event loop, from any thread; a loop that has ended needs nothing any more."""
        assert self.loop is not None, "the loop is set before the first job"
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    self._idle -= 1
                    if self._waiting > self._idle:  # a job was counted on this thread
                        continue
                    self.count -= 1
                return
            with self._lock:
                self._idle -= 1
                self._waiting -= 1
            job()
            del job
