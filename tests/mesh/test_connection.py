"""Connections: messages over the payload limit on both paths through nats-py (D4), handlers that fail, proxies."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Factory, Mesh
from meshrl.bus.connection import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.plain import PlainPath
from meshrl.bus.thin import ThinPath
from meshrl.errors import MessageTooLarge, RequestTimeout
from meshrl.wire.codec import pack
from tests.mesh.conftest import until
from tests.mesh.envs import Picture


@pytest.fixture(params=["thin", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The same tests over the thin path and over nats-py's public API."""
    monkeypatch.setenv("MESHRL_BUS", request.param)
    return {"thin": ThinPath, "plain": PlainPath}[request.param]


async def test_pictures_and_batches_over_the_limit_arrive_whole(url: str, path: type[Any]) -> None:
    served: dict[str, Any] = {"picture": Picture, "huge": Factory(Picture, {"shape": (2000, 10_000)})}
    async with EnvWorker(served, url) as worker, Mesh(url) as m:
        assert type(m.connection.path) is path
        assert type(worker._connection.path) is path
        async with await m.env("picture") as picture, await m.env("huge") as huge:
            for env, shape in ((picture, (300, 300, 3)), (huge, (2000, 10_000))):
                obs, _ = await env.reset(seed=0)
                assert obs.shape == shape
                for step in range(1, 4):
                    obs, *_ = await env.step(0)
                    assert obs.dtype == np.uint8
                    assert (obs == step).all()
                    assert obs.flags.writeable
                    assert obs.flags.owndata
            await asyncio.gather(*(picture.step(1), huge.step(1)))


async def test_a_request_over_the_limit_is_split_too(url: str, path: type[Any]) -> None:
    async with EnvWorker({"picture": Picture}, url, allow=("*",)), Mesh(url) as m, await m.env("picture") as env:
        await env.reset()
        big = np.arange(1_500_000, dtype=np.int64)
        await env.set_attr("big", big)
        assert (await env.get_attr("big") == big).all()


async def test_both_paths_do_request_reply_and_no_responders(url: str, path: type[Any]) -> None:
    async with connect(url) as one, connect(url) as two:
        assert type(one.path) is path
        await two.subscribe("echo", lambda _s, reply, body: two.publish(reply, pack([body])))
        assert await asyncio.gather(*(one.ask("echo", bytes([i]), 5.0) for i in range(100))) == [
            pack([bytes([i])]) for i in range(100)
        ]
        assert await one.ask("nobody", b"x", 5.0) is None
        await two.subscribe("silent", lambda _s, _r, _b: None)
        with pytest.raises(RequestTimeout):
            await one.ask("silent", b"x", 0.05)
        with pytest.raises(MessageTooLarge, match="max_payload"):
            one.publish("echo", bytes(one.max_payload + 1))


async def test_an_exception_in_a_handler_is_reported_and_harms_nobody_else(url: str, path: type[Any]) -> None:
    reported: list[Exception] = []
    async with connect(url, on_error=reported.append) as bus, connect(url) as peer:

        def deliver(_subject: str, reply: str, body: bytes) -> None:
            if body == b"bad":
                raise RuntimeError("handler")
            bus.publish(reply, body)

        await bus.subscribe("work", deliver)
        for body in (b"bad", b"good", b"bad", b"fine"):
            if body == b"bad":
                peer.publish("work", body, "nowhere")
            else:
                assert await peer.ask("work", body, 5.0) == body
        assert [str(exc) for exc in reported] == ["handler", "handler"]


async def test_messages_cut_at_every_byte_by_the_network_arrive(url: str) -> None:
    """The thin path's reader keeps incomplete messages; here each arrives in pieces of one read each."""
    async with connect(url) as bus:
        assert isinstance(bus.path, ThinPath)
        got: list[tuple[str, bytes]] = []
        await bus.subscribe("cut.*", lambda subject, _r, body: got.append((subject, body)))
        sid = next(reversed(bus.path.handlers)).decode()
        reader = bus.raw._transport._io_reader
        stream = (
            b"".join(b"MSG cut.%d %s %d\r\n%s\r\n" % (n, sid.encode(), n, bytes([65 + n]) * n) for n in range(12))
            + b"PING\r\n"
        )
        for size in (1, 2, 3, 7, 1000):
            got.clear()
            for at in range(0, len(stream), size):
                reader.feed_data(stream[at : at + size])
            assert got == [(f"cut.{n}", bytes([65 + n]) * n) for n in range(12)]


async def test_attempts_that_are_accepted_and_dropped_leave_nothing_open(server: EmbeddedServer) -> None:
    """As behind a proxy whose server is away: every attempt to reconnect connects and is cut off."""
    upstream_port = server.port
    cut = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []
    dropped = 0

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dropped
        if cut.is_set() and dropped < 3:
            dropped += 1
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream_port)
        writers.extend((writer, up_writer))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)

        async with asyncio.TaskGroup() as group:
            group.create_task(pump(reader, up_writer))
            group.create_task(pump(up_reader, writer))

    listener = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    address = server.url.rpartition(":")[0] + f":{port}"
    async with listener, connect(address) as bus, connect(server.url) as peer:
        await peer.subscribe("echo", lambda _s, reply, body: peer.publish(reply, body))
        assert await bus.ask("echo", b"1", 5.0) == b"1"
        cut.set()
        for writer in writers:
            writer.close()
        await until(lambda: dropped == 3 and bus.connected, "it is back after three attempts that were dropped")
        assert await bus.ask("echo", b"2", 5.0) == b"2"
        gc.collect()  # an unclosed transport would warn now, and a warning is an error
    for writer in writers:
        writer.close()
