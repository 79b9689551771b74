"""The server, a node of a cluster or the network between is lost and comes back: all go on, and nothing runs twice.

Sessions here are opened with ``on_loss="raise"``: none is resumed by a replay, all are still there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect, dial
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from tests.chaos.proxy import BOTH, DOWN, UP, Accepting, Direction, Link, Proxy
from tests.freezing import frozen
from tests.mesh.cluster import three_nodes
from tests.mesh.conftest import until
from tests.mesh.everybody import Counted, Everybody, everybody, served, served_here

# --------------------------------------------------------------------------- the one server


async def has_state(server: EmbeddedServer) -> bool:
    client = await nats.connect(server.url)
    names = [info.config.name for info in await client.jetstream().streams_info()]
    await client.close()
    return "state" in names  # beside those of recordings, which workers make again


async def test_a_server_that_is_killed_and_comes_back_with_its_state_or_empty_costs_a_pause_and_no_step(
    server: EmbeddedServer,
) -> None:
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(name="state", subjects=["state"])
    await client.close()
    with served(server.url):
        async with everybody(server.url) as all_:
            for empty in (False, False, True, True):
                await all_.keep_on(asyncio.create_task(asyncio.to_thread(lose, server, empty=empty)))
                await all_.round()
                assert await has_state(server) == (not empty)


def lose(server: EmbeddedServer, *, empty: bool) -> None:
    server.kill()
    server.restart(empty=empty)


@pytest.mark.skipif(sys.platform == "win32", reason="stops the server by signal")
async def test_a_server_that_stands_still_for_a_while_costs_a_pause_and_no_step(server: EmbeddedServer) -> None:
    async with served_here(server.url), everybody(server.url, shards=1) as all_:
        with frozen(server.pid):
            stepping = asyncio.create_task(all_.round())
            await asyncio.sleep(1.0)  # the scenario: longer than any request is left in quiet
            assert not stepping.done()
        await stepping
        await all_.round()


async def test_a_server_that_is_away_for_longer_than_a_lease_costs_no_session(server: EmbeddedServer) -> None:
    """Nobody can renew meanwhile: the worker lets no lease run out that it could not have heard of."""
    async with served_here(server.url, lease_s=1.0) as worker, everybody(server.url, shards=1) as all_:
        taken = worker.table.slots - worker.table.free
        await asyncio.to_thread(server.kill)
        stepping = asyncio.create_task(all_.round())
        await asyncio.sleep(2.5)  # the scenario
        assert not stepping.done()
        await asyncio.to_thread(server.restart)
        await stepping
        await all_.round()
        assert worker.table.slots - worker.table.free == taken


async def test_opens_and_closes_that_are_under_way_when_the_server_is_lost_take_and_free_their_slots_once(
    server: EmbeddedServer,
) -> None:
    async with served_here(server.url, slots=32, lease_s=2.0) as worker, Mesh(server.url) as m:
        for _ in range(2):
            opening = [asyncio.create_task(m.env("counted")) for _ in range(20)]
            vector = asyncio.create_task(m.vector("counted", 12))
            await asyncio.sleep(0.005)  # some are granted by now, and some are not
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            envs, whole = await asyncio.gather(*opening), await vector
            assert worker.table.free == 0
            assert len({env.session_id for env in envs}) == 20
            closing = [asyncio.create_task(held.close()) for held in (*envs, whole)]
            await asyncio.sleep(0)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            await asyncio.gather(*closing)  # of one whose word was lost, the lease ends it
            await until(lambda: worker.table.free == 32, "all slots are free")


# --------------------------------------------------------------------------- a cluster


async def test_a_cluster_that_loses_its_leader_and_then_another_node_loses_no_step(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as cluster:
        with served(cluster.url):
            async with everybody(cluster.url) as all_:
                leader = cluster.leader()
                another = next(name for name in cluster.nodes if name != leader)
                for lost in (cluster.nodes[leader], cluster.nodes[another]):
                    await all_.keep_on(asyncio.create_task(lost.kill()))
                    for _ in range(20):  # over the other two, to which its clients have moved
                        await all_.round()
                    await all_.keep_on(asyncio.create_task(lost.start()))
                    await until(cluster.routed, "it has joined the others again")


async def test_clients_of_every_node_are_served_by_workers_of_every_other(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as cluster, AsyncExitStack() as stack:
        for node in cluster.nodes.values():
            await stack.enter_async_context(EnvWorker({"counted": Counted}, node.url(), slots=1))
        for node in cluster.nodes.values():
            m = await stack.enter_async_context(Mesh(node.url()))
            envs = await m.vector("counted", 3, shards=3)
            assert len({worker for worker, _ in envs.shards}) == 3
            await envs.reset(seed=1)
            assert (await envs.step([1, 2, 3]))[0].tolist() == [1, 1, 1]
            await envs.close()


# --------------------------------------------------------------------------- the network between


@asynccontextmanager
async def through(server: EmbeddedServer) -> AsyncIterator[tuple[Proxy, Everybody, EnvWorker]]:
    """A client and a worker, each on its own connections through one proxy; agents are elsewhere."""
    with Proxy(server.port) as proxy:
        url = proxy.url(server.url)
        async with served_here(url, server.url) as worker, everybody(url, shards=1) as all_:
            yield proxy, all_, worker


WHO: dict[str, Callable[[EnvWorker], str]] = {
    "client": lambda _: "meshrl client",
    "keeper": lambda _: "meshrl keeper",
    "worker": lambda worker: f"env worker {worker.id}",
    "pulse": lambda worker: f"pulse of {worker.id}",
}


@pytest.mark.parametrize("who", WHO)
async def test_a_connection_that_is_cut_in_mid_step_comes_back_and_no_step_is_lost(
    server: EmbeddedServer, who: str
) -> None:
    async with through(server) as (proxy, all_, worker):
        name = WHO[who](worker)
        for _ in range(5):
            stepping = asyncio.create_task(all_.round())
            await asyncio.sleep(0)
            assert proxy.cut(name) == 1
            await stepping
            await until(lambda: len(proxy.links(name)) == 1, "it is back")


@pytest.mark.parametrize("ways", [(DOWN,), (UP,), BOTH], ids=["hears nothing", "is not heard", "neither"])
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_a_connection_that_is_half_open_is_given_up_before_the_worker_is(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, who: str, ways: tuple[Direction, ...]
) -> None:
    monkeypatch.setattr("meshrl.bus.dialling.PING_INTERVAL_S", 0.3)
    async with through(server) as (proxy, all_, worker):
        link = proxy.link(WHO[who](worker))
        before = len(proxy.taken_at)
        link.lose(*ways)
        await all_.round()
        assert len(proxy.taken_at) > before, "it came back"
        link.cut()  # where the server has not noticed, it still has the old one


async def test_replies_that_are_lost_after_their_steps_ran_are_had_again_and_nothing_runs_twice(
    server: EmbeddedServer,
) -> None:
    async with through(server) as (proxy, all_, worker):
        for _ in range(10):
            client = proxy.link("meshrl client")
            hears = proxy.link(WHO["worker"](worker))
            before = hears.passed_bytes(DOWN)
            client.lose(DOWN)
            stepping = asyncio.create_task(all_.round())
            await until(lambda: hears.passed_bytes(DOWN) > before, "the steps have reached the worker")  # noqa: B023
            await asyncio.sleep(0.01)  # and most of them have run
            client.cut()
            await stepping


async def test_a_slow_network_makes_steps_slow_and_changes_nothing_else(server: EmbeddedServer) -> None:
    async with through(server) as (proxy, all_, _):
        for link in proxy.links():
            link.flow(delay_s=0.15)  # a round trip is longer than a request may be quiet
        for _ in range(3):
            await all_.round()
        for link in proxy.links():
            link.flow(delay_s=0.0)


async def test_a_network_that_stands_still_and_goes_on_loses_nothing(server: EmbeddedServer) -> None:
    async with through(server) as (proxy, all_, _):
        held: list[Link] = proxy.links()
        for link in held:
            link.hold()
        stepping = asyncio.create_task(all_.round())
        await asyncio.sleep(0.6)  # the scenario
        assert not stepping.done()
        for link in held:
            link.flow()
        await stepping
        await all_.round()


# --------------------------------------------------------------------------- all at once

MANY = 120
# A machine that stands still meanwhile lets all come together after all: one good round shows that they are spread.
ROUNDS = 3


def crowded(moments: list[float], within_s: float) -> int:
    """How many there are at most within so many seconds."""
    moments = sorted(moments)
    return max(sum(first <= moment < first + within_s for moment in moments) for first in moments)


async def test_connections_that_are_lost_in_one_moment_do_not_come_back_in_one(server: EmbeddedServer) -> None:
    """As where a node of a cluster is lost, and the others are there at once."""
    shares = []
    with Proxy(server.port) as proxy:
        url = proxy.url(server.url)
        many: list[Connection] = [await dial(url) for _ in range(MANY)]
        try:
            for _ in range(ROUNDS):
                await asyncio.sleep(0.6)  # the scenario: they have been there for longer than any of their waits
                before = len(proxy.taken_at)
                proxy.cut()
                await until(lambda: len(proxy.taken_at) >= before + MANY, "all dial again")  # noqa: B023
                await until(lambda: all(bus.connected for bus in many), "all are back")
                shares.append(crowded(proxy.taken_at[before : before + MANY], 0.05) / MANY)
        finally:
            await asyncio.gather(*(bus.close() for bus in many))
    assert min(shares) < 0.4, f"in each round so many came within 50 ms: {shares}"


async def test_a_server_that_takes_connections_and_says_nothing_is_left_for_the_next(server: EmbeddedServer) -> None:
    with Proxy(server.port) as dark, Proxy(server.port) as light:
        servers = f"{dark.url(server.url)},{light.url(server.url)}"
        async with connect(servers, timeout=30.0) as bus, connect(server.url) as peer:
            await peer.subscribe("echo", lambda _s, reply, body: peer.publish(reply, body))
            dark.accepting = Accepting.DARK
            for _ in range(3):  # whichever it tries first
                began = time.monotonic()
                dark.cut()
                light.cut()
                await until(lambda: not bus.connected, "it is lost")
                await until(lambda: bus.connected, "it is back")
                assert await bus.ask("echo", b"x", 10.0) == b"x"
                assert time.monotonic() - began < 20.0, "the dial's own 30 s are not waited for"
