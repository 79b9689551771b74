"""The plain path: the same as :mod:`meshrl.bus.thin` over nats-py's public API alone.

Slower by a factor of two to three, and right with any nats-py: it is used where the thin path's contract does not
hold, over WebSocket, and with ``MESHRL_BUS=plain``.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import nats.errors

from meshrl.bus.client import Client
from meshrl.bus.flushing import Flushes
from meshrl.bus.headers import header_block
from meshrl.bus.thin import MAX_HELD_BYTES, SUBSCRIBE_S, Large, RawHandler

# What may wait for handlers before nats-py calls this connection a slow consumer.
MAX_PENDING_BYTES = 512 * 1024 * 1024


class PlainPath:
    """Subscribes and publishes through nats-py's public API, with handlers called in order of arrival."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.client = Client()
        self.failed = failed
        self.dropped = 0
        self.large: Large | None = None  # there, large messages are joined before they come here
        self._out: deque[tuple[str, str, bytes, dict[str, str] | None]] = deque()
        self._out_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._flushes = Flushes(self.client)

    async def subscribe(self, subject: str, queue: str, handler: RawHandler, *, confirm: bool = True) -> Any:
        """Subscribe; the server knows it when this returns, or else before whatever is published from now on."""

        async def deliver(message: Any) -> None:
            try:
                handler(
                    message.subject,
                    message.reply,
                    message.data,
                    header_block(message.headers) if message.headers else b"",
                )
            except Exception as exc:  # noqa: BLE001  # nats-py would only log it
                self.failed(exc)

        subscription = await self.client.subscribe(
            subject, queue=queue, cb=deliver, pending_bytes_limit=MAX_PENDING_BYTES
        )
        if confirm:
            await self.flush(SUBSCRIBE_S)
        return subscription

    async def unsubscribe(self, subscription: Any, *, drain: bool = False) -> None:
        """End a subscription; with ``drain``, when what is under way has come."""
        await (self._flushes.drain(subscription) if drain else subscription.unsubscribe())

    def publish(self, subject: str, reply: str, body: bytes) -> None:
        """Send soon, in order."""
        self._append(subject, reply, body, None)

    def publish_headed(self, subject: str, reply: str, headers: Mapping[str, str], body: bytes) -> None:
        """The same of a message with headers."""
        self._append(subject, reply, body, dict(headers))

    def _append(self, subject: str, reply: str, body: bytes, headers: dict[str, str] | None) -> None:
        self._out.append((subject, reply, body, headers))
        self._out_bytes += len(body)
        self.write_out()

    def write_out(self) -> None:
        """See that what was published is being sent; while disconnected, hold it."""
        if not self.client.is_connected:
            if self._out_bytes > MAX_HELD_BYTES:
                self.dropped += len(self._out)
                self._out.clear()
                self._out_bytes = 0
            return
        if self._out and (self._writer is None or self._writer.done()):
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def flush(self, timeout: float) -> bool:
        """Wait until the server has taken everything published before; see :meth:`Flushes.one`."""
        deadline = time.monotonic() + timeout
        if self._writer is not None and not self._writer.done():
            await asyncio.wait({self._writer}, timeout=timeout)
        # The first only gets it written: nats-py's PING overtakes what is pending.
        await self._flushes.one(deadline - time.monotonic())
        return await self._flushes.one(deadline - time.monotonic())

    def lost(self) -> None:
        """The connection is gone: no PONG comes any more."""
        self._flushes.lost()

    def abort(self) -> None:
        """Nothing: over its public API, nats-py drops no socket."""

    async def _write(self) -> None:
        while self._out and self.client.is_connected:
            subject, reply, body, headers = self._out.popleft()
            self._out_bytes -= len(body)
            try:
                await self.client.publish(subject, body, reply=reply, headers=headers)
            except nats.errors.Error as exc:
                self.failed(exc)
