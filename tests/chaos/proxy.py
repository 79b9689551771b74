"""A TCP proxy that can be told to be a bad network: it cuts, delays, holds back and loses, link by link.

::

    with Proxy(server.port) as proxy:
        async with Mesh(proxy.url(server.url)) as m:
            for link in proxy.links(named="meshrl client"):
                link.lose(DOWN)  # what the server says is thrown away from now on
            proxy.cut()

A *link* is one connection through the proxy. Its two directions are told apart: ``UP`` to the server, ``DOWN`` from it.

    word            what becomes of bytes in that direction                 afterwards
    flow            they go on, each ``delay_s`` after it came              (as at first)
    hold            they are kept                                           ``flow`` sends them on, nothing is missing
    lose            they are thrown away, and :meth:`Link.lost` has them    something is missing: cut it

``cut`` resets a link at both ends. Of new connections, ``accepting`` says what becomes: they are linked, refused (taken
and reset at once) or left in the dark (taken, and nothing ever said).

It runs in a thread of its own, so that it works while a test's event loop does not, and each method may be called from
any thread: what it says holds when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Self, TypeVar

from tests.chaos.flow import BOTH, DOWN, UP, Direction, Flow

__all__ = ["BOTH", "DOWN", "UP", "Accepting", "Direction", "Link", "Proxy"]

T = TypeVar("T")

START_S = 10.0
# Of what a client says first: its name is in it, as nats-server's monitoring shows it.
GREETING_BYTES = 4096


class Accepting(Enum):
    """What becomes of new connections."""

    LINKED = "linked"
    REFUSED = "refused"
    DARK = "dark"


class _End(asyncio.Protocol):
    """One end of a link: what comes here flows to the other, and what comes there flows back."""

    def __init__(self, link: Link, flow: Flow, back: Flow) -> None:
        self._link = link
        self._flow = flow
        self._back = back

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._flow.source = self._back.sink = transport
        self._link.made(transport)
        self._back.go_on()

    def data_received(self, data: bytes) -> None:
        self._link.heard(self._flow, data)

    def pause_writing(self) -> None:
        self._back.full(True)

    def resume_writing(self) -> None:
        self._back.full(False)

    def eof_received(self) -> bool:
        self._flow.end()
        return True  # what flows back may still do so

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._flow.losing:
            self._link.reset()
        else:
            self._back.close()
            self._flow.end()
            self._link.closed()


class Link:
    """One connection through the proxy.

    Attributes:
        number: counts them, from 0.
        at: when it was taken, on the clock of ``time.monotonic``.
    """

    def __init__(self, proxy: Proxy, number: int, at: float) -> None:
        self.number = number
        self.at = at
        self._proxy = proxy
        self._flows = {way: Flow(proxy.loop) for way in BOTH}
        self._transports: list[asyncio.Transport] = []
        self._greeting = b""
        self._gone = False

    def __repr__(self) -> str:
        return f"<Link {self.number} {self.name!r}{' gone' if self._gone else ''}>"

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._gone

    @property
    def name(self) -> str:
        """What a NATS client called itself when it connected; empty before, and for others."""
        _, _, after = self._greeting.partition(b'"name": "')
        return after.partition(b'"')[0].decode(errors="replace")

    def passed_bytes(self, way: Direction) -> int:
        """How many bytes went on in that direction."""
        return self._flows[way].passed_bytes

    def lost(self, way: Direction) -> bytes:
        """What :meth:`lose` has thrown away in that direction, up to 1 MiB of it."""
        return self._flows[way].lost

    # ---------------------------------------------------------------- told by tests, from any thread

    def flow(self, *ways: Direction, delay_s: float | None = None) -> None:
        """Let bytes go on, those that were held first; with ``delay_s``, so much later from now on."""

        def do() -> None:
            for way in ways or BOTH:
                flow = self._flows[way]
                flow.holding = False
                if delay_s is not None:
                    flow.delay_s = delay_s
                flow.go_on()

        self._proxy.do(do)

    def hold(self, *ways: Direction) -> None:
        """Keep what comes until :meth:`flow`."""

        def do() -> None:
            for way in ways or BOTH:
                self._flows[way].holding = True

        self._proxy.do(do)

    def lose(self, *ways: Direction) -> None:
        """Throw away what comes and what is kept; a cable that was pulled, of which neither end hears."""

        def do() -> None:
            for way in ways or BOTH:
                self._flows[way].lose()

        self._proxy.do(do)

    def cut(self) -> None:
        """Reset it at both ends; what is kept is lost."""
        self._proxy.do(self.reset)

    # ---------------------------------------------------------------- on the proxy's loop

    def made(self, transport: asyncio.Transport) -> None:
        self._transports.append(transport)
        if self._gone:
            transport.abort()

    def heard(self, flow: Flow, data: bytes) -> None:
        if flow is self._flows[UP] and len(self._greeting) < GREETING_BYTES:
            self._greeting += data[:GREETING_BYTES]
        flow.came(data)

    def reset(self) -> None:
        for flow in self._flows.values():
            flow.close()
        for transport in self._transports:
            transport.abort()
        self._ended()

    def closed(self) -> None:
        if all(transport.is_closing() for transport in self._transports):
            self._ended()

    def _ended(self) -> None:
        self._gone = True
        self._proxy.ended(self)

    def end(self, way: Direction) -> _End:
        """Where bytes of that direction come in."""
        return _End(self, self._flows[way], self._flows[DOWN if way is UP else UP])


class _Door(asyncio.Protocol):
    """A connection that has just been taken."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._proxy.taken(transport)


class Proxy:
    """Stands before one server; a context manager that starts and stops its thread.

    Args:
        port: of the server, on the loopback address; it may be away.

    Attributes:
        port: where the proxy listens.
        accepting: what becomes of new connections; set it from any thread.
        taken_at: when each connection was taken, refused ones too, on the clock of ``time.monotonic``.
    """

    port: int
    loop: asyncio.AbstractEventLoop

    def __init__(self, port: int) -> None:
        self.accepting = Accepting.LINKED
        self.taken_at: list[float] = []
        self._to = port
        self._links: list[Link] = []
        self._dark: list[asyncio.Transport] = []
        self._dials: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_S), "the proxy does not listen"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def url(self, url: str) -> str:
        """The server's address by way of the proxy, with its login."""
        return f"{url.rpartition(':')[0]}:{self.port}"

    def links(self, named: str = "") -> list[Link]:
        """Those that have not ended, by number; of clients whose name has ``named`` in it."""
        return self.do(lambda: [link for link in self._links if named in link.name])

    def link(self, named: str) -> Link:
        """The one whose client's name has ``named`` in it."""
        (only,) = self.links(named)
        return only

    def cut(self, named: str = "") -> int:
        """Cut all links, or those that are named, and what is in the dark; gives how many links."""
        links = self.links(named)

        def do() -> None:
            for link in links:
                link.reset()
            self._leave_the_dark()

        self.do(do)
        return len(links)

    def do(self, what: Callable[[], T]) -> T:
        """Do something on the proxy's loop, and wait until it is done."""

        async def done() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(done(), self.loop).result(START_S)

    # ---------------------------------------------------------------- on its loop

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        listener = await self.loop.create_server(lambda: _Door(self), "127.0.0.1", 0, backlog=4096)
        self.port = listener.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        listener.close()
        for task in self._dials:
            task.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for link in list(self._links):
            link.reset()
        self._leave_the_dark()
        await asyncio.sleep(0)  # their ends hear of it

    def _leave_the_dark(self) -> None:
        for transport in self._dark:
            transport.abort()
        self._dark.clear()

    def taken(self, transport: asyncio.Transport) -> None:
        now = self.loop.time()
        self.taken_at.append(now)
        if self.accepting is Accepting.REFUSED:
            transport.abort()
        elif self.accepting is Accepting.DARK:
            transport.pause_reading()
            self._dark.append(transport)
        else:
            link = Link(self, len(self.taken_at) - 1, now)
            self._links.append(link)
            end = link.end(UP)
            transport.set_protocol(end)
            end.connection_made(transport)
            task = self.loop.create_task(self._dial(link))
            self._dials.add(task)
            task.add_done_callback(self._dials.discard)

    async def _dial(self, link: Link) -> None:
        try:
            await self.loop.create_connection(lambda: link.end(DOWN), "127.0.0.1", self._to)
        except OSError:  # the server is away: so is this
            link.reset()

    def ended(self, link: Link) -> None:
        with contextlib.suppress(ValueError):  # both ends say so
            self._links.remove(link)
