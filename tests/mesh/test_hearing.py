"""Clients of one login on one event loop share what they hear of the registry, all but the first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.keeper import Keeper
from meshrl.client.registry import Registry
from meshrl.errors import MeshUnreachable
from meshrl.wire.messages import Renew, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Counter


def registry_of(m: Mesh) -> Registry:
    return context_of(m).registry


async def test_the_first_mesh_hears_by_itself_and_all_others_share(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url), AsyncExitStack() as stack:
        first, *others = [await stack.enter_async_context(Mesh(url)) for _ in range(4)]
        assert len({id(registry_of(m)) for m in others}) == 1
        assert registry_of(first) is not registry_of(others[0])
        for m in (first, *others):
            assert [said.name for said in await m.envs()] == ["counter"]


async def test_meshes_of_other_namespaces_hear_nothing_of_each_other(url: str) -> None:
    async with (
        EnvWorker({"counter": Counter}, url, namespace="one"),
        Mesh(url, namespace="one") as first,
        Mesh(url, namespace="one") as second,
        Mesh(url, namespace="two") as third,
        Mesh(url, namespace="two") as fourth,
    ):
        assert [len(await m.envs()) for m in (first, second, third, fourth)] == [1, 1, 0, 0]


async def test_what_is_shared_goes_on_without_the_meshes_that_leave_and_ends_with_the_last(url: str) -> None:
    async with AsyncExitStack() as first, AsyncExitStack() as second, AsyncExitStack() as third:
        await first.enter_async_context(Mesh(url))
        await second.enter_async_context(Mesh(url))
        m = await third.enter_async_context(Mesh(url))
        await first.aclose()
        await second.aclose()
        shared = registry_of(m)
        async with EnvWorker({"counter": Counter}, url), await m.env("counter") as env:
            await env.reset()
        assert not shared._connection.closed
        await third.aclose()
        assert shared._connection.closed


async def test_a_watch_ends_with_its_own_mesh_alone(url: str) -> None:
    async with Mesh(url), Mesh(url) as staying, AsyncExitStack() as stack:
        leaving = await stack.enter_async_context(Mesh(url))
        assert registry_of(staying) is registry_of(leaving)
        ending, going_on = leaving.watch(), staying.watch()
        end = asyncio.ensure_future(anext(ending))
        event = asyncio.ensure_future(anext(going_on))
        await asyncio.sleep(0)  # both wait
        await stack.aclose()
        with pytest.raises(StopAsyncIteration):
            await end
        async with EnvWorker({"counter": Counter}, url):
            assert (await event).kind == "joined"


async def test_a_mesh_that_is_cancelled_while_the_shared_one_is_made_spoils_it_for_nobody(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url), Mesh(url):

        async def use() -> int:
            async with Mesh(url) as m:
                return len(await m.envs())

        for turns in range(12):
            using = [asyncio.create_task(use()) for _ in range(3)]
            for _ in range(turns):
                await asyncio.sleep(0)
            using[0].cancel()
            outcomes = await asyncio.gather(*using, return_exceptions=True)
            assert isinstance(outcomes[0], (asyncio.CancelledError, int))
            assert outcomes[1:] == [1, 1]


async def test_a_server_that_is_away_is_told_to_each_and_one_that_is_back_is_heard(server: EmbeddedServer) -> None:
    async with Mesh(server.url) as first, Mesh(server.url) as second:
        async with EnvWorker({"counter": Counter}, server.url):
            server.restart()
            for m in (first, second):
                await until(lambda m=m: context_of(m).connection.connected, "it is back")  # type: ignore[misc]
                async with await m.env("counter", wait=30.0) as env:
                    await env.reset()
        server.stop()
        with pytest.raises(MeshUnreachable):
            await Mesh(server.url, timeout=0.5).__aenter__()


async def test_the_keeper_renews_by_itself_what_its_holder_does_not(url: str) -> None:
    async with connect(url) as peer:
        renewed: list[Renew] = []
        await peer.subscribe(
            Subjects().at_worker("w1", "renew"), lambda _s, _r, body: renewed.append(parse(Renew, body))
        )
        keeper = Keeper(url, None, Subjects(), lambda _session, _reason: None)
        keeper.hold("w1", "first", 1, 600.0)
        await until(lambda: bool(renewed), "the keeper is there")
        keeper.hold("w1", "silent", 1, 600.0)
        keeper.hold("w1", "renewed", 1, 600.0)
        keeper.renewed([("w1", "renewed")])
        await until(lambda: len(renewed) > 1, "it does not wait until all are due")
        assert renewed[1].sessions == [("silent", 1)]
        await keeper.stop()
