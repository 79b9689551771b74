"""Env code on the event loop alone, for ``isolation="inline"``: what would run on a thread runs there, at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from meshrl.worker.threads import Job, Threads

T = TypeVar("T")


class OnLoop(Threads):
    """Takes jobs as :class:`~meshrl.worker.threads.Threads` does, and has none."""

    def submit(self, job: Job) -> None:
        """Run ``job`` on the event loop: now, where this is its thread, or else in its next turn."""
        assert self.loop is not None, "the loop is set before the first job"
        if _running() is self.loop:
            job()
        else:
            self.loop.call_soon_threadsafe(job)

    def wait(self, call: Callable[[], T]) -> T:
        """Make ``call`` on the event loop and wait for what it gives or raises."""
        assert self.loop is not None, "the loop is set before the first job"
        if _running() is self.loop:
            return call()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def job() -> None:
            try:
                future.set_result(call())
            except BaseException as exc:  # noqa: BLE001  # raised where it is waited for
                future.set_exception(exc)

        self.loop.call_soon_threadsafe(job)
        return future.result()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
