"""A connection to the bus: subscribe, publish, request, with reconnection for ever and a deadline for everything.

Handlers and callbacks are plain functions called on the connection's event loop, in order of arrival; an exception
in one is reported to ``on_error`` and harms nobody else. Messages over the server's payload limit are split and
joined here (directed subjects only).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats.errors

from meshrl.bus.login import Credentials, Login, login
from meshrl.bus.plain import PlainPath
from meshrl.bus.splitting import Joining, Window, whole
from meshrl.bus.thin import ThinPath
from meshrl.errors import (
    BusClosed,
    LoginRefused,
    MeshError,
    MeshUnreachable,
    MessageTooLarge,
    RequestTimeout,
    SubjectNotPermitted,
)
from meshrl.wire.parts import split

log = logging.getLogger("meshrl.bus")

# subject, reply subject, body
Handler = Callable[[str, str, bytes], None]
# the body of a reply; None when NATS says that nobody listens on the subject
OnReply = Callable[[bytes | None], None]

CONNECT_TIMEOUT_S = 5.0
# A client comes back within half a second of its server; the spread keeps a thousand from doing so at once.
RECONNECT_WAIT_S = (0.1, 0.5)
# A connection that is closed waits this long for the server to take what is left.
CLOSE_S = 1.0
# A server that froze is noticed in two missed pings.
PING_INTERVAL_S = 10


def thin_supported() -> bool:
    """Whether the installed nats-py has what the thin path takes over, and the operator did not ask for the plain."""
    if os.environ.get("MESHRL_BUS") == "plain":
        return False
    from nats.aio import client, transport  # noqa: PLC0415  # looked at, not used

    wanted = ("_connect_to_server", "_process_err", "_process_op_err")
    return all(callable(getattr(client.Client, name, None)) for name in wanted) and hasattr(transport, "TcpTransport")


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


class Connection:
    """One connection to NATS; make it with :func:`connect`, use it from its own event loop alone.

    Attributes:
        user: the token of this login in subjects.
        url: the server's address, without a password.
    """

    def __init__(self, login_: Login, name: str, on_error: Callable[[Exception], None] | None) -> None:
        self.user = login_.user
        self.url = login_.url
        self.closed = False
        self.on_disconnect: list[Callable[[], None]] = []
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_close: list[Callable[[MeshError], None]] = []
        self._login = login_
        self._name = name
        self._on_error = on_error
        scheme = login_.servers[0].split("://")[0]
        thin = thin_supported() and scheme in {"nats", "tls"}
        self.path: ThinPath | PlainPath = ThinPath(self._failed) if thin else PlainPath(self._failed)
        self._client = self.path.client
        self._inbox = f"_INBOX.{login_.user}.{secrets.token_hex(8)}"
        self._inbox_cut = len(self._inbox) + 1
        self._subscriptions: list[Any] = []
        self._ids = itertools.count(1)
        self._waiting: dict[int, OnReply] = {}
        self._joining = Joining(self.publish)
        self._window = Window(self.path.publish, self.flush)
        self._tasks: set[asyncio.Task[None]] = set()
        self._up_since: float | None = None
        self._refused: asyncio.Future[MeshError] | None = None
        self._fatal: MeshError | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "up" if self._client.is_connected else "reconnecting"
        return f"<Connection {self._name!r} to {self.url} as {self.user}: {state}, {len(self._waiting)} awaited>"

    # ---------------------------------------------------------------- life

    async def _open(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self._refused = loop.create_future()
        dial = loop.create_task(
            self._client.connect(
                self._login.servers,
                name=self._name,
                error_cb=self._error_cb,
                disconnected_cb=self._disconnected_cb,
                reconnected_cb=self._reconnected_cb,
                closed_cb=self._closed_cb,
                inbox_prefix=f"_INBOX.{self.user}",
                connect_timeout=timeout,
                max_reconnect_attempts=-1,
                reconnect_time_wait=random.uniform(*RECONNECT_WAIT_S),  # noqa: S311  # jitter
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=2,
                **self._login.options,
            )
        )
        try:
            await asyncio.wait({dial, self._refused}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not dial.done():
                dial.cancel()
                await asyncio.gather(dial, return_exceptions=True)
                await self._drop()
        if self._refused.done():
            await self._drop()
            raise self._refused.result()
        if dial.cancelled() or dial.exception() is not None:
            cause = None if dial.cancelled() else dial.exception()
            raise MeshUnreachable(
                f"no NATS server answers at {self.url}; start one (meshrl up, docker compose up) or give its address "
                "(url=, MESHRL_URL)",
                url=self.url,
            ) from cause
        # Nobody this connection knows of is known from before it: word that nobody listens is to be believed at once.
        self._up_since = -math.inf
        await self.subscribe(f"{self._inbox}.*", self._on_inbox)

    async def _drop(self) -> None:
        self.closed = True
        with contextlib.suppress(Exception):
            await self._client.close()

    async def close(self) -> None:
        """Send what is still held, then close. Safe to cancel, and to call twice; awaited replies fail."""
        if self.closed:
            return
        self.closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is being closed
            async with asyncio.timeout(CLOSE_S):
                if self._client.is_connected:
                    # First no interest any more, then the end: what the server would still route here meanwhile is lost
                    # in silence, where "no responders" tells its sender at once.
                    for raw in self._subscriptions:
                        await self.path.unsubscribe(raw)
                    await self.path.flush()
                    await self.path.flush()
        with contextlib.suppress(Exception):
            await self._client.close()
        self._end(BusClosed("the connection was closed"))

    def _end(self, why: MeshError) -> None:
        self.closed = True
        self._waiting.clear()
        self._joining.close()
        for told in list(self.on_close):
            told(why)

    # ---------------------------------------------------------------- state

    @property
    def connected(self) -> bool:
        """Whether the server is there at this moment."""
        return self._up_since is not None

    def up_for(self, now: float) -> float:
        """Seconds since the last reconnect, infinite before the first; 0 while disconnected."""
        return 0.0 if self._up_since is None else now - self._up_since

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have on this server."""
        return int(self._client.max_payload)

    @property
    def server_version(self) -> str:
        """The version of nats-server, as it says."""
        return str(self._client.connected_server_version)

    @property
    def raw(self) -> Any:
        """The nats-py client below, for what has no place here (JetStream, micro services)."""
        return self._client

    # ---------------------------------------------------------------- messages

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "", join: bool = True) -> Subscription:
        """Hand every message on ``subject`` to ``handler``; the server knows of it when this returns.

        Args:
            subject: may hold wildcards.
            handler: called with subject, reply subject (or ``""``) and body.
            queue: of all subscribers with one queue name, each message reaches one.
            join: put split messages together first.

        Raises:
            BusClosed: the connection is closed, or was while this waited.
        """
        deliver = self._joining.handler(handler) if join else whole(handler)
        with self._translated():
            raw = await self.path.subscribe(subject, queue, deliver)
        self._subscriptions.append(raw)
        return Subscription(self, raw)

    def ended(self, raw: Any) -> None:
        """A subscription was closed by its owner."""
        self._subscriptions.remove(raw)

    def publish(self, subject: str, body: bytes, reply: str = "", *, mark: tuple[int, int, int] | None = None) -> None:
        """Send ``body`` at the end of this turn of the event loop; while disconnected it is held.

        Args:
            subject: where to.
            body: over ``max_payload`` it is split, if ``mark`` says of which (lane, seq, attempt) it is.
            reply: where answers go.
            mark: given for directed subjects only: the parts of one message must reach one peer.

        Raises:
            MessageTooLarge: over ``max_payload`` on a subject that cannot carry parts.
            BusClosed: the connection was closed.
        """
        if self.closed:
            raise self._fatal or BusClosed(f"the connection to {self.url} is closed")
        if len(body) <= self._client.max_payload:
            self.path.publish(subject, reply, body)
            return
        if mark is None:
            raise MessageTooLarge(
                f"a message of {len(body)} bytes is over the server's limit of {self.max_payload}, and its subject "
                "cannot carry parts; raise max_payload in the server's configuration",
                size_bytes=len(body),
                limit_bytes=self.max_payload,
            )
        lane, seq, attempt = mark
        parts = split(body, self.max_payload, lane=lane, seq=seq, attempt=attempt)
        task = asyncio.get_running_loop().create_task(self._window.send(subject, reply, parts))
        self._tasks.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None and isinstance(exc, Exception):
            self._failed(exc)

    def request(self, subject: str, body: bytes, on_reply: OnReply, *, mark: tuple[int, int, int] | None = None) -> int:
        """Send a request; every answer goes to ``on_reply`` until :meth:`forget`. There is no deadline here.

        Returns:
            the request's id, for :meth:`again` and :meth:`forget`.
        """
        rid = next(self._ids)
        self._waiting[rid] = on_reply
        try:
            self.publish(subject, body, f"{self._inbox}.{rid}", mark=mark)
        except MeshError:
            del self._waiting[rid]
            raise
        return rid

    def again(self, rid: int, subject: str, body: bytes, *, mark: tuple[int, int, int] | None = None) -> None:
        """Send the request ``rid`` once more; an answer to either sending will do."""
        self.publish(subject, body, f"{self._inbox}.{rid}", mark=mark)

    def forget(self, rid: int) -> None:
        """Expect no more answers to ``rid``."""
        self._waiting.pop(rid, None)

    async def ask(self, subject: str, body: bytes, timeout: float) -> bytes | None:
        """One request, one answer; None when nobody listens. For what is not on the step path.

        Raises:
            RequestTimeout: no answer within ``timeout`` seconds.
        """
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def answered(reply: bytes | None) -> None:
            if not future.done():
                future.set_result(reply)

        rid = self.request(subject, body, answered)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise RequestTimeout(f"no answer on {subject} within {timeout:g} s", timeout_s=timeout) from None
        finally:
            self.forget(rid)

    async def flush(self, timeout: float = 10.0) -> None:
        """Wait until the server has taken everything published before.

        Raises:
            RequestTimeout: it did not within ``timeout`` seconds.
            BusClosed: the connection was closed meanwhile.
        """
        with self._translated():
            try:
                async with asyncio.timeout(timeout):
                    await self.path.flush()
            except (TimeoutError, nats.errors.TimeoutError):
                if self._client.is_connected:
                    raise RequestTimeout(f"{self.url} did not take what was sent", timeout_s=timeout) from None

    def _on_inbox(self, subject: str, _reply: str, body: bytes) -> None:
        waiting = self._waiting.get(int(subject[self._inbox_cut :]))
        if waiting is not None:
            waiting(body or None)  # every reply of ours has a body; an empty one is the server's 503

    # ---------------------------------------------------------------- what nats-py tells

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError) as exc:
            raise self._fatal or BusClosed(f"the connection to {self.url} is closed") from exc
        except nats.errors.Error as exc:
            raise MeshUnreachable(f"{self.url}: {exc}", url=self.url) from exc

    def _failed(self, exc: Exception) -> None:
        """Something went wrong that no caller waits for; it is never swallowed."""
        if self._on_error is not None:
            self._on_error(exc)
        else:
            log.warning("%s: %s: %s", self._name, type(exc).__name__, exc, exc_info=log.isEnabledFor(logging.DEBUG))

    async def _error_cb(self, exc: Exception) -> None:
        text = str(exc).lower()
        if "permissions violation" in text:
            self._failed(SubjectNotPermitted(f"{self.url} does not permit this to {self.user}: {exc}"))
        elif "authorization" in text or "authentication" in text:
            refused = LoginRefused(
                f"{self.url} refuses the login of {self.user}; check user and password in the URL or credentials=",
                url=self.url,
                user=self.user,
            )
            if self._refused is not None and not self._refused.done():
                self._refused.set_result(refused)
            self._fatal = refused
        elif isinstance(exc, (OSError, nats.errors.UnexpectedEOF, nats.errors.StaleConnectionError)):
            log.debug("%s: %s", self._name, exc)  # the reconnection that follows is told of by _disconnected_cb
        elif self._up_since is not None:
            self._failed(exc)

    async def _disconnected_cb(self) -> None:
        if self._up_since is not None and not self.closed:
            self._up_since = None
            log.info("%s: lost %s; reconnecting", self._name, self.url)
            for told in list(self.on_disconnect):
                told()

    async def _reconnected_cb(self) -> None:
        self._up_since = time.monotonic()
        log.info("%s: back at %s", self._name, self.url)
        self.path.write_out()
        for told in list(self.on_reconnect):
            told()

    async def _closed_cb(self) -> None:
        if not self.closed:
            self._up_since = None
            self._end(self._fatal or BusClosed(f"the connection to {self.url} was closed by the server"))


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    name: str = "meshrl",
    credentials: str | Path | Credentials | None = None,
    timeout: float = CONNECT_TIMEOUT_S,
    on_error: Callable[[Exception], None] | None = None,
) -> AsyncIterator[Connection]:
    """Connect to NATS for the length of an ``async with``.

    Args:
        url: ``nats://host:port``, several separated by commas; ``tls://``, ``ws://`` and ``wss://`` too.
        name: what the server's monitoring shows.
        credentials: a file (credentials or NKEY seed) or a :class:`~meshrl.bus.login.Credentials`.
        timeout: seconds to wait for a server at first; later the connection comes back for ever.
        on_error: is told of errors that no caller waits for; they are logged otherwise.

    Raises:
        MeshUnreachable: no server answers.
        LoginRefused: a server answers and refuses the login.
    """
    connection = await dial(url, name=name, credentials=credentials, timeout=timeout, on_error=on_error)
    try:
        yield connection
    finally:
        await connection.close()


async def dial(
    url: str,
    *,
    name: str = "meshrl",
    credentials: str | Path | Credentials | None = None,
    timeout: float = CONNECT_TIMEOUT_S,
    on_error: Callable[[Exception], None] | None = None,
) -> Connection:
    """The same as :func:`connect`, closed by the caller."""
    connection = Connection(login(url, credentials), name, on_error)
    await connection._open(timeout)  # noqa: SLF001
    return connection
