"""Calls: where the methods of what a session holds may run.

A coroutine function is awaited on the event loop. Anything else may take its time, so it runs on a thread; if what it
gives there can be awaited (a wrapper around a coroutine env), that is done on the loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from meshrl.worker.threads import Threads


def is_coroutine(call: object) -> bool:
    """Whether calling it gives a coroutine: a coroutine function, bound or partial, or an object whose call is one."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


class Calls:
    """Makes the calls of one session, one after another."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._on_thread: asyncio.Future[Any] | None = None

    async def __call__(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What ``call`` gives.

        Cancelling reaches a coroutine; of what runs on a thread it stops the waiting alone (see :meth:`close`).
        """
        if is_coroutine(call):
            return await call(*args, **kwargs)
        self._on_thread = self._threads.start(partial(call, *args, **kwargs))
        value, exc = await asyncio.shield(self._on_thread)
        if exc is not None:
            raise exc
        return await value if inspect.isawaitable(value) else value

    async def close(self, call: Callable[[], Any], seconds: float) -> None:
        """The last call, once no thread runs another any more.

        Raises:
            TimeoutError: a coroutine took longer than ``seconds``. A thread may take as long as it wants.
        """
        if self._on_thread is not None:
            await asyncio.wait({self._on_thread})
        if not is_coroutine(call):
            value, exc = await self._threads.start(call)
            if exc is not None:
                raise exc
            if not inspect.isawaitable(value):
                return
        else:
            value = call()
        async with asyncio.timeout(seconds):
            await value
