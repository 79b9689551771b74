"""Hearing: which connection a client hears the registry on, its own or one that it shares (R5).

Every advertisement goes to everyone who listens, each second. A process with thousands of clients would do little else
than read the same a thousand times. So on each event loop the first client of a login hears the registry on its own
connection, and all others share one more, which is there for as long as one of them is. What they see is the same, and
each counts what the others opened.
"""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path

from meshrl.bus.connect import dial
from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.client.registry import Registry
from meshrl.errors import MeshError
from meshrl.wire.subjects import Subjects

# Address, login, its user and the mesh.
Login = tuple[str, object, str, Subjects]


class _Shared:
    """The registry that the clients of one login share; used from one event loop alone."""

    def __init__(self, url: str, credentials: str | Path | Credentials | None, subjects: Subjects) -> None:
        self.clients = 0
        self.dead = False
        self.starting = asyncio.get_running_loop().create_task(self._start(url, credentials, subjects))

    async def _start(self, url: str, credentials: str | Path | Credentials | None, subjects: Subjects) -> Registry:
        try:
            connection = await dial(url, name="meshrl registry", credentials=credentials, confirm=False, in_turn=False)
            try:
                registry = Registry(connection, subjects)
                connection.on_close.append(self._end)
                connection.on_close.append(registry.end)
                await registry.listen()
            except BaseException:
                await connection.close()
                raise
        except BaseException:
            self.dead = True
            raise
        self._connection = connection
        return registry

    def _end(self, _why: MeshError) -> None:
        self.dead = True

    async def stop(self) -> None:
        """Close the connection, also one that is being made."""
        self.starting.cancel()
        await asyncio.wait({self.starting})
        if not self.starting.cancelled() and self.starting.exception() is None:
            self.starting.result().end()
            await self._connection.close()


class _Loop:
    """What the clients of one event loop have in common, by login."""

    def __init__(self) -> None:
        self.alone: set[Login] = set()  # those of which a client hears by itself
        self.shared: dict[Login, _Shared] = {}


_LOOPS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()


class Hearing:
    """One client's part in it.

    Args:
        connection: the client's own.
        url: of the server.
        credentials: of the login.
        subjects: of the mesh.

    Attributes:
        registry: what is heard; the client's own until :meth:`begin` finds one to share.
    """

    def __init__(
        self, connection: Connection, url: str, credentials: str | Path | Credentials | None, subjects: Subjects
    ) -> None:
        self.registry = Registry(connection, subjects)
        self._connection = connection
        self._url = url
        self._credentials = credentials
        self._subjects = subjects
        self._login: Login = (url, credentials, connection.user, subjects)
        self._loop = _LOOPS.setdefault(asyncio.get_running_loop(), _Loop())
        self._alone = False
        self._ended = False
        self._shared: _Shared | None = None
        self._last: _Shared | None = None  # to be stopped by this client

    async def begin(self) -> None:
        """Begin to listen; returns when those who are there have had time to say so. Safe to cancel.

        Raises:
            MeshError: the server is away, or does not permit it.
        """
        if self._login not in self._loop.alone:
            self._alone = True
            self._loop.alone.add(self._login)
            await self.registry.listen()
            return
        shared = self._loop.shared.get(self._login)
        if shared is None or shared.dead:
            shared = self._loop.shared[self._login] = _Shared(self._url, self._credentials, self._subjects)
        shared.clients += 1
        self._shared = shared
        self.registry = await asyncio.shield(shared.starting)
        await self._connection.flush()  # the server agrees to what this client subscribed to

    def end(self, why: MeshError | None = None) -> None:
        """This client hears nothing any more: tell everyone of it who waits for a change."""
        if self._ended:
            return
        self._ended = True
        if self._alone:
            self._loop.alone.discard(self._login)
        if self._shared is None:
            self.registry.end(why)
            return
        self.registry.end_of(self, why)
        self._shared.clients -= 1
        if not self._shared.clients:
            if self._loop.shared.get(self._login) is self._shared:
                del self._loop.shared[self._login]
            self._last = self._shared

    async def stop(self) -> None:
        """Close what was shared, where this was the last client."""
        self.end()
        if self._last is not None:
            await self._last.stop()
