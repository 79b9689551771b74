"""The thin path: messages from the socket to their handler in one call, and back in one write a loop turn.

nats-py gives each subscription a queue and a task, each request a future under a timer, and each publish a kick of a
flusher task. On the step path that is most of the time (design, section 6). Here nats-py keeps all it is good at
(connecting, logins, TLS, reconnecting, keeping subscriptions), and two things are taken over:

1. *In.* The stream reader below the connection looks at what arrives: a ``MSG`` or ``HMSG`` of a subscription made
   here goes straight to its handler, everything else on to nats-py, in order.
2. *Out.* The first message of a turn of the event loop leaves at once, the others in one ``write`` at its end.

Private attributes used, held by ``tests/unit/bus/test_contract.py`` against the locked version; where they are
missing, :mod:`meshrl.bus.plain` does the same over the public API: ``Client._transport``, ``_connect_to_server``,
``_process_err``, ``_process_op_err``, ``_process_pong``, ``_pongs``, ``_pending``, ``_pending_data_size``;
``Subscription._id``;
``TcpTransport._io_reader``, ``_io_writer``, ``_bare_io_reader``, ``_bare_io_writer``.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex, cast
from urllib.parse import ParseResult

import nats.aio.client
import nats.aio.transport
import nats.errors

from meshrl.bus.client import Client
from meshrl.bus.headers import header_block

# A body, and its parts, which nobody writes to.
Large = tuple[bytes, tuple[bytes | memoryview, ...]]

# A handler gets subject, reply subject, body and the raw header block (empty without headers).
RawHandler = Callable[[str, str, bytes, bytes], None]

# One read of a stream may carry hundreds of messages; what they publish is written once this many have been served,
# so that those who wait for the first work on while the last are served. With 16 envs of one client, 8 are 15 to 24 %
# faster than 16, and no slower than 4.
MESSAGES_A_WRITE = 8

# A turn of the event loop may be as long as a thousand tasks that begin to open their envs: so many messages of it do
# not wait for the others.
MESSAGES_A_TURN = 64

# What took longer than this to make leaves as soon as it is there: so much work is worth a write of its own. Of two
# batches that were read together the first would else leave with the second, and be read with it again at the other
# side, for ever: nobody would work while the other does.
LONG_S = 0.0002

# What is published while there is no connection waits for one, up to this; requests are sent again anyway (R9).
MAX_HELD_BYTES = 8 * 1024 * 1024

# A subscription that a connected server has not taken by then is an error.
SUBSCRIBE_S = 10.0

_CRLF = b"\r\n"
_PING = b"PING\r\n"
# What a flush waits for becomes this when the connection is lost.
_LOST = object()
# A message of so many bytes that comes in several reads is put together without its head.
LARGE_BYTES = 64 * 1024


class _Reader(asyncio.StreamReader):
    """A stream reader that hands messages to handlers and leaves the rest of the protocol to nats-py."""

    def __init__(self, path: ThinPath, limit: int) -> None:
        super().__init__(limit=limit)
        self._path = path
        self._chunks: list[bytes] = []  # of an incomplete message, joined once when its last byte is there
        self._have = 0
        self._need = 0

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Take what was read; the loop calls this."""
        if type(data) is not bytes:
            data = bytes(data)
        if self._chunks:
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            chunks, self._chunks = self._chunks, []
        else:
            chunks = [data]
        path = self._path
        path.reading = True
        path.began = time.monotonic()
        served = 0
        try:
            if self._have >= LARGE_BYTES and len(chunks) > 2:
                served, data = self._large(chunks)
            elif len(chunks) > 1:
                data = b"".join(chunks)
            served += self._scan(data)
        finally:
            path.read(served)

    def _large(self, chunks: list[bytes]) -> tuple[int, bytes]:
        """Dispatch the large message that ``chunks`` begin with; gives how many that were, and what is behind it.

        Its body is joined once: not with its head and out of that again, which for a megabyte is as much as all the
        rest of its way through here.
        """
        first = chunks[0]
        eol = first.find(_CRLF)
        words = first[4:eol].split() if eol > 0 and first.startswith(b"MSG ") else []
        handler = self._path.handlers.get(words[1]) if len(words) > 2 else None
        if handler is None or self._need != eol + int(words[-1]) + 2 * len(_CRLF):
            return 0, b"".join(chunks)
        behind = self._have - self._need  # of the bytes of the last chunk
        last = memoryview(chunks[-1])
        end = len(last) - behind - len(_CRLF)
        if end < 0:  # the last chunk begins within the CRLF
            return 0, b"".join(chunks)
        parts: tuple[bytes | memoryview, ...] = (memoryview(first)[eol + len(_CRLF) :], *chunks[1:-1], last[:end])
        # Writable, so that an array can be made of it where it is; nobody else has it, and to all others it is bytes.
        body = cast("bytes", bytearray().join(parts))
        self._path.large = body, parts
        try:
            handler(words[0].decode(), words[2].decode() if len(words) == 4 else "", body, b"")
        except Exception as exc:  # noqa: BLE001  # as in _scan
            self._path.failed(exc)
        finally:
            self._path.large = None
        return 1, chunks[-1][len(last) - behind :] if behind else b""

    def _scan(self, data: bytes) -> int:
        """Dispatch every complete message of ``data``, and say how many; keep an incomplete one for the next read."""
        handlers = self._path.handlers
        at, end = 0, len(data)
        served = 0
        while at < end:
            is_msg = data.startswith(b"MSG ", at)
            if not is_msg and not data.startswith(b"HMSG ", at):
                eol = data.find(_CRLF, at)
                if eol < 0:
                    self._keep(data[at:], 1)
                    return served
                super().feed_data(data[at : eol + 2])
                at = eol + 2
                continue
            eol = data.find(_CRLF, at)
            if eol < 0:
                self._keep(data[at:], 1)
                return served
            words = data[at + (4 if is_msg else 5) : eol].split()
            size = int(words[-1])
            stop = eol + 2 + size
            if stop + 2 > end:
                self._keep(data[at:], stop + 2 - at)
                return served
            handler = handlers.get(words[1])
            if handler is None:
                super().feed_data(data[at : stop + 2])
            else:
                head = 0 if is_msg else int(words[-2])
                reply = words[2].decode() if len(words) == (4 if is_msg else 5) else ""
                try:
                    handler(
                        words[0].decode(),
                        reply,
                        data[eol + 2 + head : stop],
                        data[eol + 2 : eol + 2 + head] if head else b"",
                    )
                except Exception as exc:  # noqa: BLE001  # an exception here would end nats-py's read loop
                    self._path.failed(exc)
                served += 1
                if served % MESSAGES_A_WRITE == 0:
                    self._path.write_out()
            at = stop + 2
        return served

    def _keep(self, rest: bytes, need: int) -> None:
        self._chunks = [rest]
        self._have = len(rest)
        self._need = max(need, self._have + 1)


class _Transport(nats.aio.transport.TcpTransport):  # type: ignore[misc]
    """nats-py's TCP transport with our reader below it, before and after an upgrade to TLS."""

    def __init__(self, path: ThinPath) -> None:
        super().__init__()
        self._path = path

    def __bool__(self) -> bool:
        return True  # nats-py replaces a transport that is false before it is connected

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: float) -> None:
        assert uri.hostname is not None
        loop = asyncio.get_running_loop()
        reader = _Reader(self._path, buffer_size)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        async with asyncio.timeout(connect_timeout):
            transport, _ = await loop.create_connection(lambda: protocol, uri.hostname, uri.port or 4222)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = writer

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: float
    ) -> None:
        loop = asyncio.get_running_loop()
        reader = _Reader(self._path, buffer_size)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        hostname = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            transport = await loop.start_tls(self._io_writer.transport, protocol, ssl_context, server_hostname=hostname)
        assert transport is not None
        self._io_reader = reader
        self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)


def thin_supported() -> bool:
    """Whether the installed nats-py has what the thin path takes over, and the operator did not ask for the plain."""
    if os.environ.get("MESHRL_BUS") == "plain":
        return False
    wanted = ("_connect_to_server", "_process_err", "_process_op_err", "_process_pong")
    return all(callable(getattr(nats.aio.client.Client, name, None)) for name in wanted)


class _Client(Client):
    """nats-py's client on our transport; no word of the server ends it for good."""

    def __init__(self, path: ThinPath) -> None:
        super().__init__()
        self._path = path

    async def _connect_to_server(self, s: Any) -> None:
        if s.uri.scheme in {"nats", "tls", ""}:
            if self._transport is not None:
                self._transport.close()  # of an attempt that was accepted and dropped; nats-py forgets it
            self._transport = _Transport(self._path)
        await super()._connect_to_server(s)

    async def _process_err(self, err_msg: str) -> None:
        # nats-py closes the client on every -ERR but a permission's: a slow consumer's, a full server's, one of a login
        # that ran out. Those come back instead; a login that is refused again and again is given up by our owner.
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        else:
            error = nats.errors.Error(f"nats: {err_msg}")
            await self._error_cb(error)
            await self._process_op_err(error)

    async def _process_pong(self) -> None:
        # Who waited for it has left (nats-py's own deadlines cancel): to set its result would end the read loop.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


class ThinPath:
    """Subscribes and publishes over one connection of nats-py, without a queue, task or flush of its own a message.

    Attributes:
        large: the large message that a handler is given at this moment, and the reads that it was joined of.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.client = _Client(self)
        self.failed = failed
        self.handlers: dict[bytes, RawHandler] = {}
        self.dropped = 0
        self.large: Large | None = None
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._scheduled = False
        self._at_once = True
        self.reading = False
        self.began = 0.0  # the making of what is published next
        self._flushing: set[asyncio.Future[Any]] = set()

    async def subscribe(self, subject: str, queue: str, handler: RawHandler, *, confirm: bool = True) -> Any:
        """Subscribe; the server knows it when this returns, or else before whatever is published from now on."""

        async def early(message: Any) -> None:
            handler(message.subject, message.reply, message.data, b"")

        # nats-py keeps the subscription and repeats it after a reconnect; its own callback sees only what arrives
        # before the next line.
        subscription = await self.client.subscribe(subject, queue=queue, cb=early)
        self.handlers[str(subscription._id).encode()] = handler  # noqa: SLF001
        if confirm:
            await self.flush(SUBSCRIBE_S)
        return subscription

    async def unsubscribe(self, subscription: Any, *, drain: bool = False) -> None:
        """End a subscription; messages that are still under way go nowhere, or (``drain``) where all others went."""
        try:
            await subscription.unsubscribe()
            if drain:
                await self.flush(SUBSCRIBE_S)
        finally:
            self.handlers.pop(str(subscription._id).encode(), None)  # noqa: SLF001

    def publish(self, subject: str, reply: str, body: bytes) -> None:
        """Send now if it is the first since a read that brought one message or none, else with others.

        What is published while a read is dispatched leaves together at its end; what else, at the end of this turn of
        the event loop; both earlier where there is much of it, or it took long to make.
        """
        head = f"PUB {subject} {reply} {len(body)}\r\n" if reply else f"PUB {subject} {len(body)}\r\n"
        self._out_bytes += len(body)
        self._out += (head.encode(), body, _CRLF)
        if self.reading or self._scheduled:
            now = time.monotonic()
            if now - self.began > LONG_S or len(self._out) >= 3 * MESSAGES_A_TURN:
                self.write_out()
            self.began = now
            return
        if self._at_once:
            self._at_once = False
            self.write_out()
        else:
            self._write_soon()

    def publish_headed(self, subject: str, reply: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send a message with headers, at the end of this turn of the event loop."""
        block = header_block(headers)
        head = f"HPUB {subject} {reply} {len(block)} {len(block) + len(body)}\r\n"
        self._out_bytes += len(body)
        self._out += (head.encode() + block, body, _CRLF)
        if not (self.reading or self._scheduled):
            self._write_soon()

    def read(self, served: int) -> None:
        """A read was dispatched, with so many messages in it.

        Where several came together, as many requests are likely to follow in this turn of the event loop, from the
        tasks that were waiting: they leave together. A lone one leaves without a turn of its own for that.
        """
        self.reading = False
        self.write_out()
        self._at_once = served < 2
        if not self._at_once and not self._scheduled:
            self._write_soon()

    def _write_soon(self) -> None:
        self._scheduled = True
        self.began = time.monotonic()
        asyncio.get_running_loop().call_soon(self._turn_over)

    def _turn_over(self) -> None:
        self._scheduled = False
        self.write_out()

    async def flush(self, timeout: float) -> bool:
        """Wait until the server has taken everything published before; see :meth:`Flushes.one`."""
        client = self.client
        if client.is_closed:
            raise nats.errors.ConnectionClosedError
        if not self._writable():
            return False
        # nats-py gives the PONG to the first that waits. It is never cancelled, so that one that is set already (after
        # a loss) is of a connection that is no more.
        pong: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        client._pongs.append(pong)  # noqa: SLF001
        self._flushing.add(pong)
        self._out += (_PING, b"", b"")
        self.write_out()
        try:
            done, _ = await asyncio.wait({pong}, timeout=timeout)
        finally:
            self._flushing.discard(pong)
        if not done:
            raise nats.errors.FlushTimeoutError
        return pong.result() is not _LOST

    def _writable(self) -> bool:
        # A socket that was reset is closing for a moment before nats-py notices; uvloop's raises at a write.
        return self.client.is_connected and not self.client._transport._io_writer.is_closing()  # noqa: SLF001

    def _pending(self) -> list[bytes]:
        """What nats-py would write at a next turn (a SUB, say), and our messages and PINGs would overtake."""
        client = self.client
        pending: list[bytes] = client._pending  # noqa: SLF001
        client._pending = []  # noqa: SLF001
        client._pending_data_size = 0  # noqa: SLF001
        return pending

    def lost(self) -> None:
        """The connection is gone: no PONG comes any more."""
        for pong in self._flushing:
            if not pong.done():
                pong.set_result(_LOST)

    def abort(self) -> None:
        """Drop the socket with what is still to be written, of a client that is closed."""
        transport = self.client._transport  # noqa: SLF001
        if transport is not None and transport._io_writer is not None:  # noqa: SLF001
            transport._io_writer.transport.abort()  # noqa: SLF001

    def write_out(self) -> None:
        """Write what was published; while disconnected, hold it."""
        out = self._out
        if not out:
            return
        transport = self.client._transport  # noqa: SLF001
        if not self._writable():
            if self._out_bytes > MAX_HELD_BYTES:
                self.dropped += len(out) // 3
                out.clear()
                self._out_bytes = 0
            return
        self._out = []
        self._out_bytes = 0
        if self.client._pending:  # noqa: SLF001
            out = [*self._pending(), *out]
        # One copy for many small messages in one system call; a large body goes down as it is.
        if len(out) == 3 and len(out[1]) > 65536:
            transport.writelines(out)
        else:
            transport.write(b"".join(out))
