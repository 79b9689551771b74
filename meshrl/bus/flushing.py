"""Flushes: waiting until the server has taken what was sent, by a PING and its PONG.

The rule of this file: *nats-py's future of a PING is never cancelled while its PONG may come*. nats-py sets the result
of a future that is done already then, and its read loop ends of the exception, while the client believes itself
connected. So each flush runs in a task of its own, without a deadline, and who waits for it may leave. Nor would
nats-py leave at each cancellation: it waits by ``asyncio.wait_for``, which before Python 3.12 forgets one that comes
in the same turn of the loop as the PONG.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import nats.errors

# nats-py wants a deadline. The loss of the connection ends what waits for a PONG; this never does.
NEVER_S = 86_400.0


class Flushes:
    """The flushes of one client of nats-py."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._tasks: set[asyncio.Task[Any]] = set()

    async def one(self, timeout: float) -> bool:
        """Wait for the PONG of a PING that is sent now. Safe to cancel.

        Returns:
            False when there is no connection, or it was lost meanwhile: nobody knows what arrived.

        Raises:
            nats.errors.FlushTimeoutError: no PONG within ``timeout`` seconds.
            nats.errors.ConnectionClosedError: the client is closed.
        """
        if self._client.is_closed:
            raise nats.errors.ConnectionClosedError
        if not self._client.is_connected:
            return False
        task = self._begun(self._flush())
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if not done:
            raise nats.errors.FlushTimeoutError
        return not task.cancelled() and task.result()

    async def drain(self, subscription: Any) -> None:
        """End a subscription of nats-py when what is under way has come. Safe to cancel.

        Raises:
            nats.errors.Error: the client is closed or draining, or no PONG came within nats-py's own 10 s.
        """
        task = self._begun(subscription.drain())
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    def _begun(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def _flush(self) -> bool:
        try:
            await self._client.flush(NEVER_S)
        except (OSError, RuntimeError):  # the socket was reset, which nats-py has yet to notice; uvloop's is the second
            return False
        return True

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # who waits is told; when nobody does any more, there is nothing to log

    def lost(self) -> None:
        """The connection is gone, and every PONG with it: those who wait go on."""
        for task in self._tasks:
            task.cancel()
