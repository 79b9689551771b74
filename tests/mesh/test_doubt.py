"""Requests under way over a real server: what a client does about those that stay quiet (R9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.flights import Entry, Flight, Flights
from meshrl.errors import BusClosed, MeshUnreachable, SubjectNotPermitted
from meshrl.protocol import doubt
from meshrl.wire.messages import MAX_BATCH, Probe, Probed, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.own_server import own_server

SUBJECTS = Subjects()
DEADLINE_S = 300.0


class Launcher:
    """A client's flights to the worker w1."""

    def __init__(self, connection: Connection, silence_s: float) -> None:
        self.connection = connection
        self.flights = Flights(connection, SUBJECTS, silence_s)

    def launch(self, n: int = 0, body: bytes = b"\x80") -> Flight:
        subject = SUBJECTS.session("w1", self.connection.user, f"s{n}", "step")
        return self.flights.launch("w1", Entry(f"s{n}", 1, 0, 1), subject, body, DEADLINE_S)


@asynccontextmanager
async def launcher(url: str, silence_s: float = 10.0) -> AsyncIterator[Launcher]:
    async with connect(url) as connection:
        yield Launcher(connection, silence_s)


Answer = Callable[[str, list[Any]], None]


async def probed_by(worker: Connection, answer: Answer) -> None:
    """The worker answers probes by ``answer``, which gets the reply subject and what is awaited."""
    await worker.subscribe(
        SUBJECTS.at_worker("w1", "probe"), lambda _s, reply, body: answer(reply, parse(Probe, body).awaited)
    )


async def test_probes_whose_answers_take_longer_than_a_tick_are_all_heard(url: str) -> None:
    """Each answer is held back until two more probes have come: as over a network of a long round trip."""
    held: list[tuple[str, int]] = []
    async with connect(url) as worker, launcher(url, silence_s=2.0) as client:

        def answer(reply: str, awaited: list[Any]) -> None:
            held.append((reply, len(awaited)))
            if len(held) > 2:
                to, count = held.pop(0)
                worker.publish(to, Probed(states=["running"] * count).to_wire())

        await probed_by(worker, answer)
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda *_: None)
        flights: list[Flight] = []
        while len(flights) < 60:  # one a tick, so that at every tick another becomes quiet
            flights.append(client.launch(len(flights)))
            await asyncio.sleep(0.05)
        assert [flight for flight in flights if flight.landed] == []
        assert {flight.state for flight in flights[:40]} == {"running"}


async def test_more_quiet_requests_than_one_probe_may_name_are_all_asked_about(url: str) -> None:
    """Nothing is answered, so that all stay due: those beyond the first probe are not left out."""
    asked: set[str] = set()
    async with connect(url) as worker, launcher(url) as client:
        await probed_by(worker, lambda _reply, awaited: asked.update(session for session, *_ in awaited))
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda *_: None)
        flights = [client.launch(n) for n in range(MAX_BATCH + 5)]
        for flight in flights:
            flight.sent_at = flights[-1].sent_at  # so that one tick finds them all quiet
        await until(lambda: len(asked) == len(flights), "each was asked about")
        assert [flight for flight in flights if flight.landed] == []


async def test_a_request_that_nobody_hears_is_sent_again_until_the_worker_is_back(server: EmbeddedServer) -> None:
    async with connect(server.url) as worker, launcher(server.url) as client:
        await asyncio.to_thread(server.restart)  # from here on, both know that others may come back late
        await until(lambda: client.connection.connected and worker.connected, "both are back")
        flight = client.launch()
        await until(lambda: flight.doubt is not None and flight.attempt > 0, "nobody listens, and it is tried again")
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda _s, reply, _b: worker.publish(reply, b"there"))
        assert await asyncio.wait_for(flight.future, 30.0) == b"there"


async def test_a_request_without_a_server_fails_in_the_end_and_can_be_taken_up_again(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubt, "DISCONNECTED_S", 0.3)
    async with connect(server.url) as worker, launcher(server.url, silence_s=0.1) as client:
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda _s, reply, _b: worker.publish(reply, b"late"))
        await asyncio.to_thread(server.kill)
        await until(lambda: not client.connection.connected, "the server is gone")
        flight = client.launch()
        with pytest.raises(MeshUnreachable, match="NATS server") as caught:
            await asyncio.wait_for(flight.future, 30.0)
        assert caught.value.details["disconnected_s"] == 0.3
        assert flight.landed
        assert len(client.flights) == 0
        await asyncio.to_thread(server.restart)
        await until(lambda: client.connection.connected and worker.connected, "it is back")
        flight.rearm()
        assert await asyncio.wait_for(flight.future, 30.0) == b"late"


async def test_requests_under_way_fail_at_once_when_the_connection_is_closed(url: str) -> None:
    async with connect(url) as worker, launcher(url) as client:
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda *_: None)
        flight = client.launch()
        await client.connection.close()
        with pytest.raises(BusClosed):
            await flight.future
        flight.rearm()
        with pytest.raises(BusClosed):
            await flight.future
        with pytest.raises(BusClosed):
            client.launch()


@pytest.mark.parametrize("denied", ["meshrl.v1.default.session.>", "meshrl.v1.default.worker.>"])
async def test_a_request_or_a_probe_that_is_not_permitted_fails_and_is_not_taken_for_silence(
    tmp_path: Path, denied: str
) -> None:
    users = [
        {"user": "svc", "password": "p"},
        {"user": "Bob", "password": "p", "permissions": {"publish": {"deny": [denied]}}},
    ]
    async with (
        own_server(tmp_path, {"authorization": {"users": users}}) as server,
        connect(server.url("svc:p")) as worker,
        launcher(server.url("Bob:p"), silence_s=60.0) as client,
    ):
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda *_: None)
        await probed_by(worker, lambda _reply, _awaited: None)
        flight = client.launch()
        with pytest.raises(SubjectNotPermitted, match="Bob"):
            await asyncio.wait_for(flight.future, 30.0)
        assert len(client.flights) == 0


async def test_a_large_request_is_not_sent_twice_while_its_first_sending_is_under_way(url: str) -> None:
    """The way to the server is held shut in its middle; the client asks, and would send again, meanwhile."""
    body = b"\x80" + bytes(6_000_000)
    opened, up_bytes = asyncio.Event(), 0

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal up_bytes
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))

        async def up() -> None:
            nonlocal up_bytes
            while data := await reader.read(65536):
                if up_bytes > 1_000_000:
                    await opened.wait()
                up_bytes += len(data)
                up_writer.write(data)
                await up_writer.drain()
            up_writer.close()

        async def down() -> None:
            while data := await up_reader.read(65536):
                writer.write(data)
            writer.close()

        await asyncio.gather(up(), down())

    listener = await asyncio.start_server(proxy, "127.0.0.1", 0)
    address = url.rpartition(":")[0] + f":{listener.sockets[0].getsockname()[1]}"
    async with listener, connect(url) as worker, launcher(address) as client:
        await worker.subscribe(SUBJECTS.sessions("w1"), lambda _s, reply, _b: worker.publish(reply, b"got"))
        flight = client.launch(body=body)
        await until(lambda: up_bytes > 1_000_000, "it is half-way")
        assert client.connection.sending(flight.rid)
        for attempt in range(1, 4):
            client.connection.again(flight.rid, flight.subject, body, mark=(0, 1, attempt))
        opened.set()
        assert await asyncio.wait_for(flight.future, 30.0) == b"got"
        assert up_bytes < 1.5 * len(body)
        await until(lambda: not client.connection.sending(flight.rid), "the server has taken it")
