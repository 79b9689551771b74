"""Fair shares over a real server: what one user may have of a worker, and that nobody else waits for it (R5)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.errors import MeshFull, UsageError
from meshrl.wire.messages import Full
from tests.mesh.conftest import until
from tests.mesh.envs import Counter
from tests.mesh.own_server import OwnServer, own_server

ENVS = {"counter": Counter}


@asynccontextmanager
async def server_of_two(home: Path) -> AsyncIterator[OwnServer]:
    """A server with the users ann and bob."""
    users = [{"user": name, "password": "p"} for name in ("ann", "bob")]
    async with own_server(home, {"authorization": {"users": users}}) as server:
        yield server


async def test_who_has_its_share_waits_and_is_told_so_while_others_get_slots_at_once(tmp_path: Path) -> None:
    async with (
        server_of_two(tmp_path) as server,
        EnvWorker(ENVS, server.url("ann:p"), slots=4, max_slots_per_user=2) as worker,
        Mesh(server.url("ann:p")) as ann,
        Mesh(server.url("bob:p")) as bob,
    ):
        mine = [await ann.env("counter") for _ in range(2)]
        with pytest.raises(
            MeshFull, match="gives one user 2 of its slots, of which you have 2; close sessions"
        ) as full:
            await ann.env("counter", wait=0.3)
        assert full.value.details["shares"] == {worker.id: {"share": 2, "held": 2}}
        third = asyncio.create_task(ann.env("counter", wait=60.0))
        await until(lambda: any(worker.is_parked("ann", key[1]) for key in worker._admission._parked), "it is parked")
        for _ in range(2):
            mine.append(await bob.env("counter", wait=5.0))
        assert not third.done()
        assert worker.table.free == 0
        await mine[0].close()
        env = await third
        assert (await env.reset())[0] == 0


async def test_a_vector_larger_than_a_share_is_spread_over_workers(tmp_path: Path) -> None:
    async with (
        server_of_two(tmp_path) as server,
        EnvWorker(ENVS, server.url("ann:p"), slots=8, max_slots_per_user=2) as one,
        EnvWorker(ENVS, server.url("ann:p"), slots=8, max_slots_per_user=2) as two,
        Mesh(server.url("ann:p")) as ann,
    ):
        vector = await ann.vector("counter", 4)
        await vector.reset(seed=1)
        assert (one.table.held("ann"), two.table.held("ann")) == (2, 2)
        await vector.close()


async def test_more_than_any_share_is_refused_at_once(tmp_path: Path) -> None:
    async with (
        server_of_two(tmp_path) as server,
        EnvWorker(ENVS, server.url("ann:p"), slots=8, max_slots_per_user=2),
        Mesh(server.url("ann:p")) as ann,
    ):
        with pytest.raises(UsageError, match=r"one user at most 2 of its slots, not 3.*--max-slots-per-user"):
            await ann.vector("counter", 3, shards=1, wait=60.0)


async def test_the_command_line_bounds_what_a_user_may_have(tmp_path: Path) -> None:
    async with server_of_two(tmp_path) as server:
        line = ["serve", "cartpole", "--slots=4", "--max-slots-per-user=1", f"--url={server.url('ann:p')}"]
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "meshrl", *line], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60.0):
                told = await asyncio.to_thread(process.stdout.readline)
            assert b"serving CartPole-v1" in told
            async with Mesh(server.url("bob:p")) as bob, await bob.env("cartpole"):
                with pytest.raises(MeshFull, match="gives one user 1 of its slots"):
                    await bob.env("cartpole", wait=0.3)
        finally:
            process.terminate()
            await asyncio.to_thread(process.communicate)


@pytest.mark.parametrize("share", [0, -1])
def test_a_share_is_at_least_one_slot(share: int) -> None:
    with pytest.raises(UsageError, match="a user's share is at least one slot"):
        EnvWorker(ENVS, max_slots_per_user=share)


def test_an_answer_full_of_an_older_worker_says_nothing_of_shares() -> None:
    full = Full.model_validate({"load": {"slots": 1, "free": 0}})
    assert (full.share, full.held) == (None, None)
