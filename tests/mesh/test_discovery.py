"""Who is there: advertisements, descriptions, watch, names (D2)."""

from __future__ import annotations

import asyncio
import json

import nats

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Counter


async def test_watch_tells_who_joins_is_updated_and_leaves(url: str) -> None:
    async with Mesh(url) as m:
        seen: list[tuple[str, str]] = []

        async def watch() -> None:
            async for event in m.watch():
                seen.append((event.kind, event.advertisement.name))

        watching = asyncio.create_task(watch())
        async with EnvWorker({"counter": Counter}, url, slots=3):
            await until(lambda: ("joined", "counter") in seen, "it joined")
            async with await m.env("counter"):
                await until(lambda: ("updated", "counter") in seen, "its load is told")
        await until(lambda: seen[-1] == ("left", "counter"), "it said goodbye")
        assert await m.envs() == []
    await watching


async def test_watch_begins_with_those_who_are_there(url: str) -> None:
    async with EnvWorker({"a": Counter, "b": Counter}, url), Mesh(url) as m:
        names = set()
        async for event in m.watch():
            assert event.kind == "joined"
            names.add(event.advertisement.name)
            if len(names) == 2:
                break
        assert names == {"a", "b"}


async def test_names_resolve_to_the_newest_version_without_case(url: str) -> None:
    async with EnvWorker({"CartPole-v0": "CartPole-v1", "CartPole-v1": "CartPole-v1"}, url), Mesh(url) as m:
        for asked, found in (("cartpole", "CartPole-v1"), ("CARTPOLE", "CartPole-v1"), ("CartPole-v0", "CartPole-v0")):
            async with await m.env(asked) as env:
                assert env.name == found
                assert env.remote_spec is not None
                assert env.remote_spec.id == "CartPole-v1"


async def test_a_name_with_every_awkward_character_is_served(url: str) -> None:
    name = "ns/pkg.mod:Thing >*%é-v1"
    async with EnvWorker({name: Counter}, url), Mesh(url) as m, await m.env(name) as env:
        assert (await env.reset())[0] == 0


async def test_a_description_tells_spaces_versions_and_what_is_allowed(url: str) -> None:
    async with (
        EnvWorker({"c": Counter}, url, capabilities={"gpu": True}, allow=("add",), allow_kwargs=("start",)),
        Mesh(url) as m,
    ):
        description = await m.describe("c")
        assert description.capabilities == {"gpu": True}
        assert description.allow == ["add"]
        assert description.allow_kwargs == ["start"]
        assert {"python", "meshrl", "gymnasium", "numpy"} <= set(description.versions)
        async with await m.env("c", {"start": 3}, where={"gpu": True}) as env:
            assert env.action_space == Counter().action_space
            assert env.metadata == Counter.metadata


async def test_an_advertisement_is_at_most_one_kilobyte(url: str) -> None:
    sizes = []
    async with connect(url) as ear:
        await ear.subscribe(Subjects().advertisements, lambda _s, _r, body: sizes.append(len(body)))
        async with EnvWorker({"x" * 128: Counter}, url, capabilities={"long": "y" * 5000}):
            await until(lambda: bool(sizes), "it advertises")
    assert max(sizes) <= 1024


async def test_namespaces_do_not_see_each_other(url: str) -> None:
    async with (
        EnvWorker({"a": Counter}, url, namespace="red"),
        EnvWorker({"b": Counter}, url, namespace="blue.team"),
        Mesh(url, namespace="red") as red,
        Mesh(url, namespace="blue.team") as blue,
    ):
        assert [ad.name for ad in await red.envs()] == ["a"]
        assert [ad.name for ad in await blue.envs()] == ["b"]
        async with await blue.env("b") as env:
            assert (await env.reset())[0] == 0


async def test_each_worker_is_a_nats_micro_service(url: str) -> None:
    async with (
        EnvWorker({"counter": Counter}, url) as env_worker,
        AgentWorker({"a": lambda obs: 0}, url) as agent_worker,
    ):
        nc = await nats.connect(url)
        try:
            found = {}
            inbox = nc.new_inbox()
            answers = await nc.subscribe(inbox)
            await nc.publish("$SRV.INFO", b"", reply=inbox)
            for _ in range(2):
                info = json.loads((await answers.next_msg(timeout=5)).data)
                found[info["name"]] = info["metadata"]
            assert found["meshrl-env"]["worker"] == env_worker.id
            assert found["meshrl-agent"]["worker"] == agent_worker.id
            told = json.loads((await nc.request(f"meshrl.describe.{env_worker.id}", timeout=5)).data)
            assert told[0]["name"] == "counter"
        finally:
            await nc.close()


async def test_a_directory_survives_a_server_restart(server: EmbeddedServer) -> None:
    async with EnvWorker({"counter": Counter}, server.url) as worker, Mesh(server.url) as m:
        await asyncio.to_thread(server.restart)
        async with await m.env("counter", wait=10.0) as env:
            assert env.worker == worker.id
            assert (await env.reset())[0] == 0
