"""A connection to the bus: subscribe, publish, request, with reconnection for ever and a deadline for everything.

Handlers and callbacks are plain functions called on the connection's event loop, in order of arrival; an exception
in one is reported to ``on_error`` and harms nobody else. Messages over the server's payload limit are split and
joined here (directed subjects only).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import nats.errors

from meshrl.bus.awaited import Awaited, OnFail, OnReply
from meshrl.bus.dialling import few_at_once, first_connection
from meshrl.bus.events import Events
from meshrl.bus.login import Login
from meshrl.bus.plain import PlainPath
from meshrl.bus.polling import Polling, may_poll
from meshrl.bus.splitting import Joining, Window, whole
from meshrl.bus.subscription import Subscription
from meshrl.bus.thin import MAX_HELD_BYTES, RawHandler, ThinPath, thin_supported
from meshrl.errors import (
    BusClosed,
    MeshError,
    MeshUnreachable,
    MessageTooLarge,
    RequestTimeout,
    SubjectNotPermitted,
    TransportError,
)
from meshrl.wire.kept import Reads

# subject, reply subject, body
Handler = Callable[[str, str, bytes], None]

# Room for the headers of one message.
HEADER_BYTES = 1024

# A connection that is closed waits this long for the server to take what is left.
CLOSE_S = 1.0


class Connection:
    """One connection to NATS; made by :mod:`~meshrl.bus.connect`, used from its own event loop alone.

    Attributes:
        user: the token of this login in subjects.
        url: the server's address, without a password.
    """

    def __init__(
        self, login_: Login, name: str, on_error: Callable[[Exception], None] | None, *, polls: bool = False
    ) -> None:
        self.user = login_.user
        self.url = login_.url
        self.closed = False
        self._events = Events(self, login_, name, on_error)
        self.on_disconnect = self._events.on_disconnect
        self.on_reconnect = self._events.on_reconnect
        self.on_close = self._events.on_close
        self._login = login_
        self._name = name
        scheme = login_.servers[0].split("://")[0]
        path = ThinPath if thin_supported() and scheme in {"nats", "tls"} else PlainPath
        self.path: ThinPath | PlainPath = path(self._events.failed)
        self._client = self.path.client
        self._client.tls_only = "tls" in login_.options
        self._client.has_certificate = login_.has_certificate
        self._awaited = Awaited(f"_INBOX.{login_.user}.{secrets.token_hex(8)}", self._events.tell)
        self._polling = Polling(self._awaited) if polls and may_poll() else None
        self._subscriptions: list[Any] = []
        self._unconfirmed = contextlib.ExitStack()  # holds the inbox's subscription, until the server agreed to it
        self._refused: list[SubjectNotPermitted] = []
        self._joining = Joining(self.publish)
        self._window = Window(self.path.publish, self._taken, self._events.failed)
        self._why: MeshError | None = None
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "up" if self._client.is_connected else "reconnecting"
        return f"<Connection {self._name!r} to {self.url} as {self.user}: {state}, {len(self._awaited)} awaited>"

    # ---------------------------------------------------------------- life

    async def open(self, timeout: float, *, confirm: bool = True, in_turn: bool = True) -> None:
        """Reach the server, once; see :func:`~meshrl.bus.connect.dial`. After an error it is closed."""
        try:
            async with few_at_once() if in_turn else contextlib.nullcontext():
                await self._dial(timeout, confirm=confirm)
        except BaseException:
            await self.close()
            raise

    async def _dial(self, timeout: float, *, confirm: bool) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        await first_connection(self._client, self._login, self._events, self._name, timeout)
        inbox = f"{self._awaited.inbox}.*"
        self._refused = self._unconfirmed.enter_context(self._awaited.subscribing(inbox))
        with self._events.translated():
            deliver = self._joining.handler(self._awaited.answered)
            self._subscriptions.append(await self.path.subscribe(inbox, "", deliver, confirm=False))
        if confirm:
            try:
                async with asyncio.timeout_at(deadline), self._confirming():
                    await self.path.flush(timeout)
            except (TimeoutError, nats.errors.TimeoutError) as exc:
                raise MeshUnreachable(
                    f"the server at {self.url} took the login and then fell silent", url=self.url
                ) from exc

    @contextlib.asynccontextmanager
    async def _confirming(self) -> AsyncIterator[None]:
        """While the server is waited for: what it has to say against the inbox comes before its answer."""
        yield
        self._unconfirmed.close()
        refused, self._refused = self._refused, []
        if refused:
            raise refused[0]

    async def close(self) -> None:
        """Send what is still held, then close. Awaited replies fail at once.

        Safe to cancel, and to call twice: closing goes on, and another call waits for its end.
        """
        await asyncio.shield(self._begin_close(BusClosed(f"the connection to {self.url} was closed")))

    def _begin_close(self, why: MeshError) -> asyncio.Task[None]:
        if self._closing is None:
            self._end(why)
            self._closing = asyncio.get_running_loop().create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        try:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it is being closed
                async with asyncio.timeout(CLOSE_S):
                    await self._window.close()
                    # First no interest any more, then the end: what the server would still route here meanwhile is
                    # lost in silence, where "no responders" tells its sender at once.
                    if self._client.is_connected:
                        for raw in self._subscriptions:
                            await self.path.unsubscribe(raw)
                        await self.path.flush(CLOSE_S)
                        if not isinstance(self.path, ThinPath):  # there, the first only gets it all written
                            await self.path.flush(CLOSE_S)
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await self._client.close()
            with contextlib.suppress(Exception):
                self.path.abort()  # nothing is left of it but in a socket that a frozen server does not read
            self.path.lost()

    def _end(self, why: MeshError) -> None:
        """From now on nothing can be sent, and no answer comes."""
        self.closed = True
        self._why = why
        self._events.up_since = None
        self._joining.close()
        self.path.lost()
        self._awaited.fail(why)
        self._events.tell(self.on_close, why)

    def _gone(self) -> MeshError:
        why = self._why or BusClosed(f"the connection to {self.url} is closed")
        return type(why)(why.message, **why.details)

    # ---------------------------------------------------------------- state

    @property
    def connected(self) -> bool:
        """Whether the server is there at this moment."""
        return self._events.up_since is not None

    def up_for(self, now: float) -> float:
        """Seconds since the last reconnect, infinite before the first; 0 while disconnected."""
        return 0.0 if self._events.up_since is None else now - self._events.up_since

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have on this server."""
        return int(self._client.max_payload)

    @property
    def max_headed(self) -> int:
        """The largest body of a message with headers, in bytes."""
        return self.max_payload - HEADER_BYTES

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
            SubjectNotPermitted: the server does not allow it to this login.
            BusClosed: the connection is closed, or was while this waited.
        """
        if self.closed:
            raise self._gone()
        deliver = self._joining.handler(handler) if join else whole(handler)
        with self._events.translated(), self._awaited.subscribing(subject) as refused:
            async with self._confirming():
                raw = await self.path.subscribe(subject, queue, deliver)
        return await self._subscribed(raw, refused)

    async def _subscribed(self, raw: Any, refused: list[SubjectNotPermitted]) -> Subscription:
        if refused:
            await self.path.unsubscribe(raw)
            raise refused[0]
        self._subscriptions.append(raw)
        return Subscription(self, raw)

    def ended(self, raw: Any) -> None:
        """A subscription was closed by its owner."""
        self._subscriptions.remove(raw)

    def publish(self, subject: str, body: bytes, reply: str = "", *, mark: tuple[int, int, int] | None = None) -> None:
        """Send ``body`` at the end of this turn of the event loop; while disconnected it is held.

        Args:
            subject: where to.
            body: over ``max_payload`` it is split, if ``mark`` says of which (lane, seq, attempt) it is. What is split
                is not held while disconnected, and not sent while the same (subject, reply, lane, seq) is under way.
            reply: where answers go.
            mark: given for directed subjects only: the parts of one message must reach one peer.

        Raises:
            MessageTooLarge: over ``max_payload`` on a subject that cannot carry parts.
            BusClosed: the connection was closed.
        """
        if self.closed:
            raise self._gone()
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
        if self._client.is_connected:
            self._window.send(subject, reply, body, self.max_payload, mark)

    def request(
        self,
        subject: str,
        body: bytes,
        on_reply: OnReply,
        *,
        mark: tuple[int, int, int] | None = None,
        on_fail: OnFail | None = None,
    ) -> int:
        """Send a request; every answer goes to ``on_reply`` until :meth:`forget`. There is no deadline here.

        Args:
            subject: where to.
            body: of the request.
            on_reply: gets each answer.
            mark: as in :meth:`publish`.
            on_fail: is told that no answer can come: the subject is not permitted, or the connection has ended.

        Returns:
            the request's id, for :meth:`again` and :meth:`forget`.
        """
        rid = self._awaited.add(subject, on_reply, on_fail)
        try:
            self.publish(subject, body, f"{self._awaited.inbox}.{rid}", mark=mark)
        except BaseException:
            self._awaited.forget(rid)
            raise
        if self._polling is not None:
            self._polling.asked(rid)
        return rid

    def request_headed(
        self, subject: str, headers: Mapping[str, str], body: bytes, on_reply: OnReply, *, on_fail: OnFail | None = None
    ) -> int:
        """The same with headers; the body is at most what one message may have.

        Raises:
            MessageTooLarge: it is larger.
            BusClosed: the connection was closed.
        """
        if self.closed:
            raise self._gone()
        if len(body) > self.max_headed:
            raise MessageTooLarge(
                f"a message of {len(body)} bytes is over the server's limit of {self.max_payload} with its headers",
                size_bytes=len(body),
                limit_bytes=self.max_headed,
            )
        rid = self._awaited.add(subject, on_reply, on_fail)
        self.path.publish_headed(subject, f"{self._awaited.inbox}.{rid}", headers, body)
        return rid

    def watch(self, subject: str, on_fail: OnFail) -> int:
        """Be told if a message that is published on ``subject`` is not permitted, or the connection ends.

        Returns:
            what :meth:`forget` ends it with.
        """
        return self._awaited.add(subject, lambda _reply: None, on_fail)

    async def subscribe_headed(self, subject: str, handler: RawHandler) -> Subscription:
        """As :meth:`subscribe`, for whoever reads the headers of messages: those come as a block, empty without any."""
        if self.closed:
            raise self._gone()
        with self._events.translated(), self._awaited.subscribing(subject) as refused:
            async with self._confirming():
                raw = await self.path.subscribe(subject, "", handler)
        return await self._subscribed(raw, refused)

    def again(self, rid: int, subject: str, body: bytes, *, mark: tuple[int, int, int] | None = None) -> None:
        """Send the request ``rid`` once more; an answer to either sending will do."""
        self.publish(subject, body, f"{self._awaited.inbox}.{rid}", mark=mark)

    def sending(self, rid: int) -> bool:
        """Whether the server has yet to take the request ``rid``, which was split: it cannot have been answered."""
        return self._window.busy and self._window.sending(f"{self._awaited.inbox}.{rid}")

    def reads_of(self, body: bytes) -> Reads | None:
        """What a large message was joined of, for whom it is given to at this moment; None where that is not known.

        The message itself may be written to by whom it goes on to.
        """
        large = self.path.large
        return Reads(large[1]) if large is not None and large[0] is body else None

    def forget(self, rid: int) -> None:
        """Expect no more answers to ``rid``."""
        self._awaited.forget(rid)

    async def ask(self, subject: str, body: bytes, timeout: float) -> bytes | None:
        """One request, one answer; None when nobody listens. For what is not on the step path.

        Raises:
            RequestTimeout: no answer within ``timeout`` seconds.
            SubjectNotPermitted: the server does not allow it to this login.
            BusClosed: the connection was closed meanwhile.
        """
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def answered(reply: bytes | None) -> None:
            if not future.done():
                future.set_result(reply)

        def failed(exc: MeshError) -> None:
            if not future.done():
                future.set_exception(exc)

        rid = self.request(subject, body, answered, on_fail=failed)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise RequestTimeout(f"no answer on {subject} within {timeout:g} s", timeout_s=timeout) from None
        finally:
            self.forget(rid)

    async def flush(self, timeout: float = 10.0) -> None:
        """Wait until the server has taken everything published before, or the connection to it is lost.

        Raises:
            RequestTimeout: it did not within ``timeout`` seconds.
            SubjectNotPermitted: the server does not allow this login its inbox.
            BusClosed: the connection was closed meanwhile.
        """
        async with self._confirming():
            await self._taken(timeout)

    async def _taken(self, timeout: float) -> bool:
        with self._events.translated():
            try:
                taken = await self.path.flush(timeout)
            except nats.errors.TimeoutError:
                raise RequestTimeout(f"{self.url} did not take what was sent", timeout_s=timeout) from None
        if self.closed:
            raise self._gone()
        return taken

    # ---------------------------------------------------------------- what becomes of the connection

    def denied(self, publish: bool, subject: str, exc: SubjectNotPermitted) -> bool:
        """The server refused ``subject`` (in small letters); gives whether somebody who waits was told."""
        return self._awaited.denied(publish, subject, exc)

    def cut(self) -> None:
        """The connection is lost: no PONG comes any more."""
        self.path.lost()

    def back(self) -> None:
        """The connection is back: what was held leaves."""
        self.path.write_out()
        dropped, self.path.dropped = self.path.dropped, 0
        if dropped:
            self._events.failed(
                TransportError(
                    f"{dropped} messages to {self.url} were dropped: while disconnected, {MAX_HELD_BYTES >> 20} MiB "
                    "are held; requests among them are sent again",
                    dropped=dropped,
                )
            )

    def give_up(self, why: MeshError) -> None:
        """The connection does not come back."""
        self._begin_close(why)
