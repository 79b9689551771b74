"""Many at once: sessions of one client, and clients of one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.errors import MeshFull
from meshrl.wire.messages import Renew, parse
from tests.mesh.conftest import until
from tests.mesh.envs import Coroutine, Counter

SESSIONS = 500
MESHES = 100


async def visit(m: Mesh, together: Callable[[], Awaitable[object]]) -> str:
    """Open a session, use it while all others have theirs, and close it; gives its id."""
    async with await m.env("talk", wait=60.0) as env:
        await env.reset()
        await together()
        observation, _, _, _, info = await env.step("hello")
        assert (observation, info) == ("HELLO", {"turns": 1})
        return env.session_id


def keepers() -> int:
    return sum(thread.name == "meshrl-keeper" for thread in threading.enumerate())


async def test_five_hundred_sessions_of_one_mesh_are_open_at_once_and_all_slots_are_free_afterwards(url: str) -> None:
    barrier = asyncio.Barrier(SESSIONS)
    async with EnvWorker({"talk": Coroutine}, url, slots=SESSIONS) as worker, Mesh(url) as m:
        ids = await asyncio.gather(*(visit(m, barrier.wait) for _ in range(SESSIONS)))
        assert len(set(ids)) == SESSIONS
        await until(lambda: worker.table.free == SESSIONS, "all slots are free")


async def test_a_hundred_meshes_at_once_have_a_session_each_and_share_one_keeper(url: str) -> None:
    barrier, seen = asyncio.Barrier(MESHES), set[int]()

    async def together() -> None:
        await barrier.wait()
        seen.add(keepers())

    async def client() -> str:
        async with Mesh(url) as m:
            return await visit(m, together)

    before = keepers()
    async with EnvWorker({"talk": Coroutine}, url, slots=MESHES) as worker:
        ids = await asyncio.gather(*(client() for _ in range(MESHES)))
        assert len(set(ids)) == MESHES
        assert seen == {before + 1}
        assert keepers() == before
        await until(lambda: worker.table.free == MESHES, "all slots are free")


async def test_many_more_opens_than_slots_are_all_served_in_the_end(url: str) -> None:
    async with EnvWorker({"talk": Coroutine}, url, slots=16) as worker, Mesh(url) as m:
        ids = await asyncio.gather(*(visit(m, lambda: asyncio.sleep(0)) for _ in range(200)))
        assert len(set(ids)) == 200
        await until(lambda: worker.table.free == 16, "all slots are free")


async def test_a_mesh_that_ends_takes_its_leases_with_it_and_leaves_those_of_others(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, lease_s=0.6) as worker, AsyncExitStack() as stack:
        staying = await stack.enter_async_context(Mesh(url))
        env = await staying.env("counter")
        await env.reset()
        async with Mesh(url) as leaving:
            other = await leaving.env("counter")
            await other.reset()
        await until(lambda: worker.table.free == 63, "one session is left")
        await asyncio.sleep(2.0)  # the scenario: three leases of doing nothing
        assert (await env.step(1))[0] == 1
        assert worker.table.free == 63


async def test_what_is_granted_in_one_turn_is_renewed_by_one_message(url: str) -> None:
    async with EnvWorker({"talk": Coroutine}, url) as worker, connect(url) as ear, Mesh(url) as m:
        renewed: list[Renew] = []
        await ear.subscribe(
            f"meshrl.v1.default.worker.{worker.id}.renew.*", lambda _s, _r, body: renewed.append(parse(Renew, body))
        )
        envs = await asyncio.gather(*(m.env("talk") for _ in range(64)))
        await until(lambda: sum(len(each.sessions) for each in renewed) >= 64, "all are renewed")
        assert len(renewed) <= 32, "many in a message"
        await asyncio.gather(*(env.close() for env in envs))


@pytest.mark.parametrize("slots", [1, 3])
async def test_those_who_find_no_slot_in_time_are_told_so_and_the_others_are_served(url: str, slots: int) -> None:
    async with EnvWorker({"talk": Coroutine}, url, slots=slots) as worker, Mesh(url) as m:
        outcomes = await asyncio.gather(*(m.env("talk", wait=1.0) for _ in range(50)), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, MeshFull)]
        assert len(refused) == 50 - slots
        await asyncio.gather(*(env.close() for env in outcomes if not isinstance(env, BaseException)))
        await until(lambda: worker.table.free == slots, "all slots are free")
