"""The proxy does what it is told, and nothing else: otherwise what is shown with it would be shown of nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import BOTH, DOWN, UP, Accepting, Direction, Proxy
from tests.mesh.conftest import until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that says back what it is told.

    Attributes:
        heard: everything, of all connections.
        open: how many connections it has.
    """

    def __init__(self) -> None:
        self.heard = b""
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Echo, Proxy]]:
    echo = Echo()
    listener = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    try:
        with Proxy(listener.sockets[0].getsockname()[1]) as proxy:
            yield echo, proxy
    finally:
        listener.close()
        await until(lambda: echo.open == 0, "all have gone")


@asynccontextmanager
async def dialled(proxy: Proxy, greeting: bytes = b"x") -> AsyncIterator[Streams]:
    """A connection through the proxy that has said something and heard it back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(greeting)
        assert await reader.readexactly(len(greeting)) == greeting
        yield reader, writer
    finally:
        writer.close()


async def test_what_is_said_arrives_whole_in_both_directions() -> None:
    async with proxied() as (echo, proxy), dialled(proxy) as (reader, writer):
        whole = bytes(range(256)) * 40_000
        writer.write(whole)
        assert await reader.readexactly(len(whole)) == whole
        (link,) = proxy.links()
        assert [link.passed_bytes(way) for way in BOTH] == [len(whole) + 1] * 2
        assert len(echo.heard) == len(whole) + 1


@pytest.mark.parametrize("way", BOTH)
async def test_what_is_held_comes_later_and_nothing_is_missing(way: Direction) -> None:
    async with proxied() as (echo, proxy), dialled(proxy) as (reader, writer), dialled(proxy) as (other, says):
        link, _ = proxy.links()
        link.hold(way)
        writer.write(b"abc")
        says.write(b"def")
        assert await other.readexactly(3) == b"def", "another link is not held"
        if way is DOWN:
            await until(lambda: b"abc" in echo.heard, "it went up")
        else:
            assert b"abc" not in echo.heard
        assert not reader._buffer  # type: ignore[attr-defined]
        link.flow()
        assert await reader.readexactly(3) == b"abc"


@pytest.mark.parametrize("way", BOTH)
async def test_what_is_lost_never_comes_and_neither_end_hears_of_it(way: Direction) -> None:
    async with proxied() as (echo, proxy), dialled(proxy) as (reader, writer):
        (link,) = proxy.links()
        link.lose(way)
        writer.write(b"abc")
        if way is DOWN:
            await until(lambda: b"abc" in echo.heard, "it went up")
        async with dialled(proxy):  # whatever came meanwhile has been dealt with
            assert echo.open == 2
        assert not reader.at_eof()
        assert (b"abc" in echo.heard) is (way is DOWN)
        assert {each: link.lost(each) for each in BOTH} == {UP: b"", DOWN: b"", way: b"abc"}
        link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        assert link.gone


async def test_a_delay_holds_each_piece_back_and_keeps_the_order() -> None:
    async with proxied() as (_, proxy), dialled(proxy) as (reader, writer):
        (link,) = proxy.links()
        link.flow(delay_s=0.05)
        began = asyncio.get_running_loop().time()
        for n in range(20):
            writer.write(bytes([n]))
            await asyncio.sleep(0)
        assert await reader.readexactly(20) == bytes(range(20))
        assert asyncio.get_running_loop().time() - began >= 0.1, "once up and once down"


async def test_links_are_found_by_the_name_of_a_nats_client_and_cut_alone() -> None:
    def hello(name: str) -> bytes:
        return b'CONNECT {"lang": "python3", "name": "%s"}\r\n' % name.encode()

    async with (
        proxied() as (_, proxy),
        dialled(proxy, hello("pulse of e1")) as (pulse, _w1),
        dialled(proxy, hello("env worker e1")) as (worker, says),
    ):
        assert [link.name for link in proxy.links()] == ["pulse of e1", "env worker e1"]
        assert proxy.cut("pulse") == 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await pulse.readexactly(1)
        says.write(b"still here")
        assert await worker.readexactly(10) == b"still here"
        assert proxy.link("worker").number == 1


async def test_the_goodbye_of_one_end_reaches_the_other() -> None:
    async with proxied() as (echo, proxy):
        async with dialled(proxy):
            assert echo.open == 1
        await until(lambda: echo.open == 0 and proxy.links() == [], "it is heard")


async def test_new_connections_are_refused_or_left_in_the_dark_when_told_so() -> None:
    async with proxied() as (echo, proxy), dialled(proxy) as (reader, writer):
        proxy.accepting = Accepting.REFUSED
        refused, _says = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await refused.readexactly(1)
        _says.close()
        proxy.accepting = Accepting.DARK
        dark, says = await asyncio.open_connection("127.0.0.1", proxy.port)
        says.write(b"hello?")
        await until(lambda: len(proxy.taken_at) == 3, "it is taken")
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y", "the others go on"
        assert not dark.at_eof()
        assert echo.heard == b"xy"
        assert proxy.cut() == 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await dark.readexactly(1)
        says.close()


async def test_a_server_that_is_away_resets_whoever_dials() -> None:
    with Proxy(1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
