"""Connections: messages over the payload limit on both paths through nats-py (D4), handlers that fail, proxies."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Factory, Mesh
from meshrl.bus import thin
from meshrl.bus.connect import connect, dial
from meshrl.bus.connection import Connection
from meshrl.bus.dialling import RECONNECT_WAIT_S
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.plain import PlainPath
from meshrl.bus.thin import MAX_HELD_BYTES, MESSAGES_A_TURN, ThinPath
from meshrl.client.context import context_of
from meshrl.errors import (
    BusClosed,
    LoginRefused,
    MeshError,
    MeshUnreachable,
    MessageTooLarge,
    RequestTimeout,
    SubjectNotPermitted,
    TransportError,
)
from meshrl.wire.codec import pack
from tests.freezing import freeze, frozen
from tests.mesh.conftest import until
from tests.mesh.envs import Picture
from tests.mesh.own_server import own_server


@pytest.fixture(params=["thin", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The same tests over the thin path and over nats-py's public API."""
    monkeypatch.setenv("MESHRL_BUS", request.param)
    return {"thin": ThinPath, "plain": PlainPath}[request.param]


async def test_pictures_and_batches_over_the_limit_arrive_whole(url: str, path: type[Any]) -> None:
    served: dict[str, Any] = {"picture": Picture, "huge": Factory(Picture, {"shape": (2000, 10_000)})}
    async with EnvWorker(served, url) as worker, Mesh(url) as m:
        assert type(context_of(m).connection.path) is path
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


async def test_what_a_long_turn_of_the_loop_publishes_does_not_all_wait_for_its_end(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin, "LONG_S", math.inf)  # by number alone
    written: list[int] = []
    heard: list[bytes] = []
    async with connect(url) as bus:
        await bus.subscribe("turn", lambda _subject, _reply, body: heard.append(body))
        assert isinstance(bus.path, ThinPath)
        count = 3 * MESSAGES_A_TURN
        for number in range(count):
            bus.publish("turn", str(number).encode())
            written.append(number + 1 - len(bus.path._out) // 3)
        await until(lambda: len(heard) == count, "all are there")
    assert heard == [str(number).encode() for number in range(count)]
    # The first at once, and then whenever so many have come together.
    assert written[0] == 1
    assert written[-1] >= 2 * MESSAGES_A_TURN
    assert len(set(written)) <= 5


@pytest.mark.parametrize(("long_s", "held"), [(0.0002, [0, 0, 0]), (math.inf, [0, 1, 2])])
async def test_what_took_long_to_make_does_not_wait_for_what_was_read_with_it(
    url: str, monkeypatch: pytest.MonkeyPatch, long_s: float, held: list[int]
) -> None:
    """Two batches that arrive together: the first one's answer leaves before the second is worked at."""
    monkeypatch.setattr(thin, "LONG_S", long_s)
    held_then: list[int] = []
    async with connect(url) as bus:
        assert isinstance(bus.path, ThinPath)
        path = bus.path

        def work(_subject: str, reply: str, body: bytes) -> None:
            held_then.append(len(path._out) // 3)
            time.sleep(0.001)
            bus.publish(reply, body)

        await bus.subscribe("work", work)
        sid = next(reversed(path.handlers))
        bus.raw._transport._io_reader.feed_data(b"MSG work %s done 4\r\nbody\r\n" % sid * 3)
    assert held_then == held


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


# --------------------------------------------------------------------------- flushes


@pytest.mark.skipif(sys.platform == "win32", reason="stops the server by signal")
async def test_a_flush_that_was_given_up_leaves_the_connection_whole(server: EmbeddedServer, path: type[Any]) -> None:
    async with connect(server.url) as bus, connect(server.url) as peer:
        await peer.subscribe("echo", lambda _s, reply, body: peer.publish(reply, body))
        with frozen(server.pid):
            with pytest.raises(RequestTimeout):
                await bus.flush(0.05)
            waiting = asyncio.create_task(bus.flush())
            await until(lambda: len(bus.raw._pongs) >= 2, "two pings are on their way")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert await bus.ask("echo", b"x", 30.0) == b"x"
        await bus.flush()
        assert not bus.raw._reading_task.done(), "nats-py still reads"


async def test_a_drain_that_is_cancelled_at_its_very_end_is_cancelled(
    url: str, path: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's ``wait_for`` forgets a cancellation in the turn of the loop that brings its result."""
    async with connect(url) as bus, connect(url) as other:
        subscription = await bus.subscribe("x", lambda *_: None)
        answered = bus.path.client._process_pong

        async def and_cancel() -> None:
            await answered()
            task.cancel()

        monkeypatch.setattr(bus.path.client, "_process_pong", and_cancel)
        task = asyncio.create_task(subscription.drain())
        await asyncio.wait({task}, timeout=10.0)
        assert task.cancelled()
        monkeypatch.undo()
        await bus.flush(10.0)
        assert await other.ask("x", b"", 10.0) is None


async def test_what_was_sent_before_a_drain_still_arrives(url: str, path: type[Any]) -> None:
    async with connect(url) as bus, connect(url) as other:
        seen: list[bytes] = []
        subscription = await bus.subscribe("x", lambda _s, _r, body: seen.append(body))
        for n in range(100):
            other.publish("x", bytes([n]))
        await other.flush(10.0)  # the server has them, and whether they were read here is open
        await subscription.drain()
        assert seen == [bytes([n]) for n in range(100)]
        await subscription.drain()
        other.publish("x", b"more")
        await other.flush(10.0)
        await bus.flush(10.0)
        assert len(seen) == 100


@pytest.mark.skipif(sys.platform == "win32", reason="stops the server by signal")
async def test_deadlines_of_nats_py_itself_leave_the_thin_path_whole(server: EmbeddedServer) -> None:
    async with connect(server.url) as bus:
        assert isinstance(bus.path, ThinPath)
        with frozen(server.pid), pytest.raises(TimeoutError):
            await bus.raw.flush(0.05)
        await bus.flush()
        assert not bus.raw._reading_task.done()


async def test_a_flush_ends_when_the_connection_is_lost(server: EmbeddedServer, path: type[Any]) -> None:
    async with connect(server.url) as bus:
        freeze(server.pid)
        waiting = asyncio.create_task(bus.flush(1000.0))
        await until(lambda: len(bus.raw._pongs) > 0, "a ping is on its way")
        await asyncio.to_thread(server.restart)
        await asyncio.wait_for(waiting, 30.0)
        await until(lambda: bus.connected, "it is back")
        await bus.flush()


# --------------------------------------------------------------------------- closing and opening


async def test_close_that_is_cancelled_goes_on_and_a_second_one_waits_for_its_end(url: str, path: type[Any]) -> None:
    for turns in range(12):
        bus = await dial(url)
        closing = asyncio.create_task(bus.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await bus.close()
        assert bus.raw.is_closed
        assert bus.raw._transport._io_writer.is_closing()


async def test_closing_and_the_end_of_the_server_fail_awaited_replies_at_once(url: str, path: type[Any]) -> None:
    async with connect(url) as peer, connect(url) as bus:
        await peer.subscribe("silent", lambda *_: None)
        asking = asyncio.create_task(bus.ask("silent", b"x", 1000.0))
        await until(lambda: len(bus._awaited) == 1, "it is asked")
        told: list[MeshError] = []
        bus.on_close.append(told.append)
        await bus.close()
        with pytest.raises(BusClosed):
            await asyncio.wait_for(asking, 30.0)
        with pytest.raises(BusClosed):
            await bus.ask("silent", b"x", 1.0)
        with pytest.raises(BusClosed):
            await bus.subscribe("silent", lambda *_: None)
        assert [type(why) for why in told] == [BusClosed]


async def test_dial_that_is_cancelled_at_any_moment_leaves_nothing_open(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Connection] = []
    init = Connection.__init__

    def noted(self: Connection, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Connection, "__init__", noted)
    turns, opened = 0, False
    while not opened:
        task = asyncio.create_task(dial(url))
        for _ in range(turns):
            await asyncio.sleep(0)
        opened = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        turns += 1
    last = made.pop()
    assert last.connected
    await last.close()
    assert len(made) > 10
    assert all(bus.raw.is_closed and bus.closed for bus in made)
    gc.collect()  # an unclosed transport would warn now, and a warning is an error


async def test_a_server_that_takes_the_login_and_falls_silent_is_unreachable() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.11.0","max_payload":1048576,"headers":true,"proto":1}\r\n')
        while b"PING" not in await reader.readline():
            pass
        writer.write(b"PONG\r\n")
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        with pytest.raises(MeshUnreachable, match="silent"):
            await dial(f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}", timeout=0.5)


# --------------------------------------------------------------------------- lost and back


async def test_a_login_that_is_withdrawn_ends_the_connection_and_tells_everybody(
    tmp_path: Path, path: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def config(password: str) -> dict[str, Any]:
        return {"authorization": {"users": [{"user": "ann", "password": password}, {"user": "svc", "password": "p"}]}}

    async with own_server(tmp_path, config("p")) as server, connect(server.url("svc:p")) as peer:
        await peer.subscribe("silent", lambda *_: None)
        async with connect(server.url("ann:p")) as bus:
            ended: asyncio.Future[MeshError] = asyncio.get_running_loop().create_future()
            bus.on_close.append(ended.set_result)
            asking = asyncio.create_task(bus.ask("silent", b"x", 1000.0))
            await until(lambda: len(bus._awaited) == 1, "it is asked")
            with caplog.at_level(logging.WARNING, "meshrl.bus"):
                server.reload(config("other"))
                assert isinstance(await asyncio.wait_for(ended, 30.0), LoginRefused)
            with pytest.raises(LoginRefused, match="ann"):
                await asking
            with pytest.raises(LoginRefused):
                bus.publish("x", b"")
            assert path is PlainPath or "refuses the login of ann" in caplog.text


async def test_a_login_that_is_refused_once_and_then_taken_comes_back(tmp_path: Path) -> None:
    def config(password: str) -> dict[str, Any]:
        return {"authorization": {"users": [{"user": "ann", "password": password}]}}

    async with own_server(tmp_path, config("p")) as server, connect(server.url("ann:p")) as bus:
        for _ in range(4):  # never three in a row
            refusals = bus._events._refusals
            assert refusals == 0
            server.reload(config("other"))
            await until(lambda: bus._events._refusals > 0, "it is refused")
            server.reload(config("p"))
            await until(lambda: bus.connected and bus._events._refusals == 0, "it is back")
        await bus.flush()
        assert not bus.closed


async def test_an_exception_in_a_callback_is_reported_and_the_connection_comes_back(
    server: EmbeddedServer, path: type[Any]
) -> None:
    reported: list[Exception] = []
    told: list[str] = []

    def broken(*_args: object) -> None:
        raise RuntimeError("callback")

    async with connect(server.url, on_error=reported.append) as bus:
        for callbacks in (bus.on_disconnect, bus.on_reconnect, bus.on_close):
            callbacks.append(broken)
        bus.on_disconnect.append(lambda: told.append("lost"))
        bus.on_reconnect.append(lambda: told.append("back"))
        bus.on_close.append(lambda _why: told.append("closed"))
        for _ in range(2):
            told.clear()
            await asyncio.to_thread(server.restart)
            await until(lambda: told == ["lost", "back"], "it was told of both")
            await bus.flush()
    assert told == ["lost", "back", "closed"]
    assert [str(exc) for exc in reported] == ["callback"] * 5


async def test_what_was_dropped_while_disconnected_is_reported_when_it_is_back(
    server: EmbeddedServer, path: type[Any]
) -> None:
    reported: list[Exception] = []
    async with connect(server.url, on_error=reported.append) as bus:
        for _ in range(2):
            reported.clear()
            await asyncio.to_thread(server.kill)
            await until(lambda: not bus.connected, "the server is gone")
            for _ in range(MAX_HELD_BYTES // 1_000_000 + 2):
                bus.publish("x", bytes(1_000_000))
                await asyncio.sleep(0)
            assert reported == []
            await asyncio.to_thread(server.restart)
            await until(lambda: bus.connected, "it is back")
            assert [type(exc) for exc in reported] == [TransportError]
            assert "dropped" in str(reported[0])


async def test_no_two_connections_come_back_at_the_same_moment(url: str, path: type[Any]) -> None:
    async with connect(url) as one, connect(url) as two:
        waits = [bus.raw.options["reconnect_time_wait"] for bus in (one, two)]
        assert waits[0] != waits[1]
        assert all(RECONNECT_WAIT_S[0] <= wait <= RECONNECT_WAIT_S[1] for wait in waits)


@pytest.mark.parametrize("size", [5, 70_000])
def test_what_is_published_on_a_socket_that_was_reset_is_held_and_sent_later(url: str, size: int) -> None:
    """On uvloop, whose transports raise where asyncio's only warn."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with connect(url) as peer, connect(url) as bus:
            await peer.subscribe("echo", lambda _s, reply, body: peer.publish(reply, body))
            bus.raw._transport._io_writer.transport.abort()
            assert bus.raw.is_connected, "nats-py has not noticed"
            asking = [asyncio.create_task(bus.ask("echo", bytes([n]) * size, 30.0)) for n in range(4)]
            assert await asyncio.gather(*asking) == [bytes([n]) * size for n in range(4)]
            assert len(bus._awaited) == 0

    uvloop.run(main())


# --------------------------------------------------------------------------- permissions

# What a client needs, and no more: its own user token in every subject it publishes to, its own inbox, the registry.
LEAST_PUBLISH = [
    "meshrl.v1.default.registry.ask",
    "meshrl.v1.default.worker.*.*.ann",
    "meshrl.v1.default.session.*.ann.>",
    "meshrl.v1.default.env.*.open.ann",
    "meshrl.v1.default.agent.*.act.ann",
]
LEAST_SUBSCRIBE = ["_INBOX.ann.>", "meshrl.v1.default.registry.>"]
USERS = [
    {"user": "svc", "password": "p"},
    {
        "user": "ann",
        "password": "p",
        "permissions": {"publish": {"allow": LEAST_PUBLISH}, "subscribe": {"allow": LEAST_SUBSCRIBE}},
    },
]


async def test_with_the_least_permissions_a_client_can_lease_and_step(tmp_path: Path, path: type[Any]) -> None:
    reported: list[Exception] = []
    async with own_server(tmp_path, {"authorization": {"users": USERS}}) as server:
        ann = server.url("ann:p")
        async with EnvWorker({"cartpole": "CartPole-v1"}, server.url("svc:p")), Mesh(ann) as m:
            async with await m.env("cartpole") as env:
                await env.reset(seed=1)
                await env.step(0)
            async with connect(ann, on_error=reported.append) as bus:
                for subject in ("_INBOX.bob.>", "_INBOX.>", ">", "meshrl.v1.default.session.>"):
                    with pytest.raises(SubjectNotPermitted, match="subscribe"):
                        await bus.subscribe(subject, lambda *_: None)
                for subject in ("meshrl.v1.default.session.w.Bob.s.step", "_INBOX.bob.x.1"):
                    with pytest.raises(SubjectNotPermitted, match="publish") as caught:
                        await asyncio.wait_for(bus.ask(subject, b"x", 1000.0), 30.0)
                    assert caught.value.details["user"] == "ann"
                assert reported == [], "whoever waited was told"
                bus.publish("meshrl.v1.default.session.w.Bob.s.step", b"x")
                await bus.flush()
                assert [type(exc) for exc in reported] == [SubjectNotPermitted]
                assert await bus.ask("meshrl.v1.default.worker.none.open.ann", b"x", 30.0) is None
