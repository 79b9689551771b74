"""A subscription of a connection, and its end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import nats.errors

if TYPE_CHECKING:
    from meshrl.bus.connection import Connection


class Subscription:
    """A subscription, until it is closed."""

    def __init__(self, connection: Connection, raw: Any) -> None:
        self._connection = connection
        self._raw = raw

    async def close(self) -> None:
        """End it. Safe to cancel, and to call twice."""
        raw, self._raw = self._raw, None
        if raw is not None and not self._connection.closed:
            self._connection.ended(raw)
            with contextlib.suppress(nats.errors.Error):
                await self._connection.path.unsubscribe(raw)

    async def drain(self) -> None:
        """End it; what the server sends before it knows of that still comes to the handler. Safe to call twice."""
        raw, self._raw = self._raw, None
        if raw is not None and not self._connection.closed:
            self._connection.ended(raw)
            with contextlib.suppress(nats.errors.Error):
                await self._connection.path.unsubscribe(raw, drain=True)
