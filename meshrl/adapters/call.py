"""One call from a thread that waits to an event loop that works, and what became of it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from meshrl.errors import SessionClosed

T = TypeVar("T")

# A signal that comes in the moment before a thread begins to wait for a lock does not end that waiting: its handler
# runs when the lock is looked at again (seen on a busy machine: a Ctrl-C that was never heard).
SIGNAL_S = 0.5


class Call(Generic[T]):
    """One coroutine function's run on a portal's loop, awaited by a thread.

    Attributes:
        op: what it is called in errors.
        over: whether it has ended.
        cancelled: whether it ended by :meth:`cancel`, without value and error.
        value: what it gave.
        error: what it raised.
    """

    __slots__ = ("_args", "_began", "_lock", "_made", "_task", "cancelled", "error", "op", "over", "value")

    value: T

    def __init__(self, op: str, made: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> None:
        self.op = op
        self.over = False
        self.cancelled = False
        self.error: BaseException | None = None
        self._made = made
        self._args = args
        self._began = False
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled else "over" if self.over else "under way"
        return f"<Call {self.op}: {state}>"

    @property
    def ran(self) -> bool:
        """Whether it has ended, and gave a value."""
        return self.over and not self.cancelled and self.error is None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is over, or for so many seconds; gives whether it is over.

        Any exception of a signal handler ends the waiting alone.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self.over:
            left = SIGNAL_S if timeout is None else min(SIGNAL_S, until - time.monotonic())
            if left <= 0:
                return False
            self._lock.acquire(timeout=left)
        return True

    def result(self) -> T:
        """What it gave.

        Raises:
            BaseException: what it raised.
            SessionClosed: it was cancelled: the portal ended.
        """
        if self.error is not None:
            raise self.error
        if self.cancelled:
            raise SessionClosed(f"{self.op}: the connection to the mesh was closed meanwhile")
        return self.value

    # ---------------------------------------------------------------- on the loop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run it, unless it was cancelled before."""
        if not self.over:
            self._task = loop.create_task(self._run())

    def refuse(self) -> None:
        """It will not run, or no further."""
        if not self.over:
            self.cancelled = True
            self._end()

    def cancel(self) -> None:
        """Cancel it, unless it is over."""
        if self._task is not None:
            self._task.cancel()
        if not self._began:  # a task that never ran runs no line of _run either
            self.refuse()

    async def ended(self) -> None:
        """Wait until it is over, on the loop."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        self._began = True
        try:
            self.value = await self._made(*self._args)
        except asyncio.CancelledError:
            self.cancelled = True
        except BaseException as exc:  # noqa: BLE001  # handed to the thread that waits
            self.error = exc
        finally:
            self._end()

    def _end(self) -> None:
        self.over = True
        self._lock.release()
