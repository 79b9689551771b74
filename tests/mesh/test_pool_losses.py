"""Pools over a real server when messages, servers, workers, envs or their users are lost (R1, R3, R9)."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.pool import RemotePool
from meshrl.errors import (
    ConcurrentStep,
    EnvError,
    MeshError,
    MeshUnreachable,
    SessionClosed,
    SessionLost,
)
from meshrl.wire.messages import MAX_BATCH
from tests.mesh.conftest import until
from tests.mesh.envs import Picture
from tests.mesh.pool_envs import (
    BOTH,
    RAISES,
    Gated,
    GatedCoroutine,
    Lossy,
    ids,
    pooled,
    soon,
    workers,
)
from tests.mesh.worker_process import WorkerProcess

# --------------------------------------------------------------------------- messages that are lost


@BOTH
async def test_an_answer_that_is_lost_is_asked_for_and_nothing_runs_twice(url: str, make: Any) -> None:
    async with pooled(url, make, 3) as (pool, gates, worker, _m):
        gates.shut(1)
        worker.loses = 1
        await pool.send([0, 1], [0, 1])
        await pool.send([0], [2])
        batch = await soon(pool.recv(min=2))
        assert ids(batch) == [0, 2]
        assert batch.observations.tolist() == [1, 1]
        gates.open()
        batch = await soon(pool.recv())
        assert (ids(batch), batch.observations.tolist()) == ([1], [1])
        assert gates.at == {0: 2, 1: 1}


async def test_a_request_that_is_lost_is_sent_again_as_it_was(url: str) -> None:
    """Whatever its sender did with the array meanwhile."""
    async with pooled(url, Gated, 3) as (pool, gates, worker, _m):
        worker.misses = 1
        actions = np.array([5, 6, 7])
        await pool.send(actions, [0, 1, 2])
        actions[:] = 9
        batch = await soon(pool.recv(min=3))
        assert dict(zip(batch.env_ids.tolist(), batch.rewards.tolist(), strict=True)) == {0: 5.0, 1: 6.0, 2: 7.0}
        assert gates.at == {5: 1, 6: 1, 7: 1}


async def test_only_lanes_without_an_answer_are_asked_for_again(url: str) -> None:
    async with pooled(url, GatedCoroutine, 4) as (pool, gates, worker, _m):
        gates.shut(1, 2, 3)
        worker.heard.clear()
        await pool.send([0, 1, 2, 3], range(4))
        await soon(pool.recv())
        worker.loses = 1
        gates.open(2)
        assert ids(await soon(pool.recv())) == [2]
        assert worker.heard == [[0, 1, 2, 3], [1, 2, 3]]
        gates.open()
        assert ids(await soon(pool.recv(min=2))) == [1, 3]
        assert gates.at == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_lost_every_step_is_received_once_and_in_order(url: str, seed: int) -> None:
    chance = random.Random(seed)
    async with pooled(url, Gated, 6) as (pool, gates, worker, _m):
        counts = [0] * 6
        await pool.send(np.zeros(6, np.int64), range(6))
        while sum(counts) < 150:
            if chance.random() < 0.2:
                worker.misses += 1
            if chance.random() < 0.2:
                worker.loses += 1
            batch = await soon(pool.recv(min=chance.randrange(1, 7), timeout=5.0))
            for env_id, obs in zip(batch.env_ids.tolist(), batch.observations.tolist(), strict=True):
                counts[env_id] += 1
                assert obs == counts[env_id]
            await pool.send(np.zeros(len(batch), np.int64), batch.env_ids)
        worker.misses = worker.loses = 0
        await soon(pool.recv(min=6))
        assert gates.at[0] >= sum(counts)


async def test_a_server_that_restarts_costs_a_pause_and_no_step(server: EmbeddedServer) -> None:
    async with pooled(server.url, Gated, 4) as (pool, gates, _, _m):
        gates.shut(1)
        for n in range(1, 4):
            await pool.send([1, 1, 0, 0], range(4))
            await asyncio.to_thread(server.restart)
            gates.open()
            batch = await soon(pool.recv(min=4))
            assert batch.observations.tolist() == [n] * 4
            gates.shut(1)
        assert gates.at == {0: 6, 1: 6}


@asynccontextmanager
async def cut_off(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, num_envs: int) -> AsyncIterator[RemotePool]:
    """A pool that was reset and received, and whose server is gone since."""
    monkeypatch.setattr("meshrl.protocol.doubt.DISCONNECTED_S", 0.3)
    async with Mesh(server.url, timeout=0.3) as m, workers(server.url, 1):
        async with await m.pool("cartpole", num_envs) as pool:
            await pool.reset(seed=0)
            await soon(pool.recv(min=num_envs))
            await asyncio.to_thread(server.kill)
            yield pool


async def test_a_server_that_is_away_for_too_long_is_told_once_and_then_nothing_is_lost(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cut_off(server, monkeypatch, 3) as pool:
        await pool.send([0, 1], [0, 1])
        await pool.send([0], [2])
        with pytest.raises(MeshUnreachable):
            await pool.recv(min=3)
        with pytest.raises(ConcurrentStep, match="under way"):
            await pool.send([0], [2])
        await asyncio.to_thread(server.restart)
        got: list[int] = []
        async with asyncio.timeout(60.0):
            while len(got) < 3:
                try:
                    batch = await pool.recv()
                except MeshUnreachable:
                    continue
                assert batch.steps.tolist() == [1] * len(batch)
                got += batch.env_ids.tolist()
        assert sorted(got) == [0, 1, 2]
        await pool.reset(seed=1)
        assert (await soon(pool.recv(min=3))).first.all()


async def test_answers_larger_than_a_message_may_be_arrive_and_are_repeated_in_parts(url: str) -> None:
    async with Lossy({"picture": Picture}, url) as worker, Mesh(url) as m, await m.pool("picture", 12) as pool:
        await pool.reset()
        await soon(pool.recv(min=12))
        for n in range(1, 4):
            await pool.send(np.zeros(12, np.int64), range(12))
            worker.loses = n
            got: list[int] = []
            while len(got) < 12:
                batch = await soon(pool.recv(max=5))
                assert batch.observations.shape[1:] == (300, 300, 3)
                assert (batch.observations == n).all()
                got += batch.env_ids.tolist()
            assert sorted(got) == list(range(12))


async def test_polling_goes_on_with_what_was_under_way_when_the_server_was_away_for_too_long(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cut_off(server, monkeypatch, 2) as pool:
        await pool.send([0, 1], [0, 1])
        with pytest.raises(MeshUnreachable):
            await pool.reset()
        await asyncio.to_thread(server.restart)

        async def polled() -> bool:
            try:
                batch = await pool.recv(min=2, timeout=0)
            except (TimeoutError, MeshUnreachable):
                return False
            return bool((batch.steps == 1).all())

        await until(polled, "the steps are there")


async def test_reset_says_that_the_server_is_away_where_that_was_found_while_nobody_waited(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cut_off(server, monkeypatch, 2) as pool:
        await pool.send([0, 1], [0, 1])
        await until(lambda: bool(pool._under_way.errors), "it was given up")
        for _ in range(2):  # the second takes it up again, and is told the same
            with pytest.raises(MeshUnreachable):
                await soon(pool.reset())
        await asyncio.to_thread(server.restart)

        async def reset() -> bool:
            try:
                await pool.reset(seed=1)
            except MeshUnreachable:
                return False
            return True

        await until(reset, "the server is back")
        assert (await soon(pool.recv(min=2))).first.all()


# --------------------------------------------------------------------------- sessions that are lost


async def test_a_worker_that_is_killed_loses_its_lanes_and_what_was_ready_is_given_first(
    url: str, tmp_path: Path
) -> None:
    pipes = {"entered": str(tmp_path / "entered"), "gate": str(tmp_path / "gate")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    serves = {"gated": "tests.mesh.made_envs:Gated"}
    with WorkerProcess(url, serves, wait=False) as one, WorkerProcess(url, serves, wait=False) as two:
        processes = {process.wait_advertised(): process for process in (one, two)}
        async with Mesh(url) as m, await m.pool("gated", 6, shards=2, on_loss="raise") as pool:
            await pool.reset(options=pipes)
            await soon(pool.recv(min=6))
            await pool.send([1, 0, 0, 0, 0, 0], range(6))
            await asyncio.to_thread(Path(pipes["entered"]).read_text)
            await until(lambda: pool.ready == 5, "the others are ready")
            receiving = asyncio.create_task(pool.recv(min=6))
            dead, _ = pool.shards[0]
            await asyncio.to_thread(processes[dead].kill)
            assert ids(await soon(receiving)) == [1, 2, 3, 4, 5]
            for call in (pool.recv(), pool.recv(timeout=0), pool.send([0], [5]), pool.reset(), pool.reset(env_ids=[5])):
                with pytest.raises(SessionLost, match=dead) as caught:
                    await call
                assert caught.value.details["worker"] == dead


@BOTH
async def test_an_env_that_raises_is_told_by_its_env_id_and_traceback_and_then_its_session_is_lost(
    url: str, make: Any
) -> None:
    async with pooled(url, make, 4) as (pool, gates, worker, _m):
        gates.shut(1)
        await pool.send([1, 1, RAISES, 0], range(4))
        told: list[MeshError] = []
        while not told or not isinstance(told[-1], SessionLost):
            try:
                await soon(pool.recv())
            except MeshError as exc:
                told.append(exc)
        assert [type(exc) for exc in told] == [EnvError, SessionLost]
        assert told[0].details["env_id"] == 2
        assert "the simulator diverged" in told[0].message
        assert "pool_envs.py" in str(told[0].remote_traceback)
        with pytest.raises(SessionLost):
            await pool.send([0], [3])
        with pytest.raises(SessionLost):
            await pool.reset()
        gates.open()
        await until(lambda: worker.table.free == worker.table.slots, "its slots are free")
        assert worker.table.cached_bytes == 0
        if make is Gated:  # on threads the others finished their steps all the same
            await until(lambda: pool.ready == 2, "their results are there")
            assert ids(await pool.recv()) == [0, 1]
        with pytest.raises(SessionLost):
            await pool.recv()


async def test_an_error_whose_answer_is_lost_is_had_again_after_the_session_has_gone(url: str) -> None:
    async with pooled(url, Gated, 3) as (pool, _, worker, _m):
        worker.loses = 1
        await pool.send([RAISES], [1])
        await until(lambda: worker.table.free == worker.table.slots, "the session is gone")
        with pytest.raises(EnvError, match="diverged") as caught:
            await soon(pool.recv())
        assert caught.value.details["env_id"] == 1
        with pytest.raises(SessionLost):
            await pool.recv()


# --------------------------------------------------------------------------- the end, and leases


@BOTH
async def test_closing_a_pool_with_steps_under_way_frees_all_slots(url: str, make: Any) -> None:
    async with pooled(url, make, 8) as (pool, gates, worker, _m):
        gates.shut(1)
        await pool.send(np.ones(8, np.int64), range(8))
        await until(lambda: gates.at.get(1) == 8, "all are at the gate")
        receiving = asyncio.create_task(pool.recv())
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(SessionClosed):
            await receiving
        if make is Gated:
            gates.open()  # threads cannot be stopped; coroutines were
        await until(lambda: worker.table.free == worker.table.slots, "all slots are free")
        assert worker.table.cached_bytes == 0
        for call in (pool.recv(), pool.send([0], [0]), pool.reset()):
            with pytest.raises(SessionClosed):
                await call


@BOTH
async def test_closing_a_pool_right_behind_a_step_frees_all_slots(url: str, make: Any) -> None:
    """Both arrive at once, so that the step's coroutines have not begun when they are cancelled."""
    async with pooled(url, make, 8) as (pool, _, worker, _m):
        await pool.send(np.zeros(8, np.int64), range(8))
        await pool.close()
        await until(lambda: worker.table.free == worker.table.slots, "all slots are free", 10.0)


@pytest.mark.parametrize("under_way", [False, True])
async def test_an_abandoned_pool_is_collected_with_a_warning_and_frees_its_slots(url: str, under_way: bool) -> None:
    async with workers(url, 2) as both, Mesh(url) as m:
        pool = await m.pool("cartpole", 6, shards=2)
        await pool.reset(seed=0)
        if not under_way:
            await soon(pool.recv(min=6))
        left = [pool]
        del pool

        def collected() -> bool:
            left.clear()
            gc.collect()
            return all(worker.table.free == worker.table.slots for worker in both)

        with pytest.warns(ResourceWarning, match="unclosed <RemotePool of 6 cartpole"):
            await until(collected, "its slots are free")


async def test_a_pool_whose_loop_is_blocked_for_three_leases_keeps_its_envs(url: str) -> None:
    with WorkerProcess(url, {"cartpole": "CartPole-v1"}, lease_s=1.0):
        async with Mesh(url) as m, await m.pool("cartpole", 4) as pool:
            await pool.reset(seed=0)
            await soon(pool.recv(min=4))
            await pool.send(np.zeros(2, np.int64), [0, 1])
            time.sleep(3.3)  # noqa: ASYNC251  # a trainer that computes
            assert ids(await soon(pool.recv(min=2))) == [0, 1]
            await pool.send(np.zeros(4, np.int64), range(4))
            assert (await soon(pool.recv(min=4))).episodes.tolist() == [1] * 4


# --------------------------------------------------------------------------- many lanes


async def test_more_lanes_than_one_probe_may_name_are_all_looked_after(url: str) -> None:
    """The answer of the last ones is lost while all those before them, more than a probe names, are running."""
    many = MAX_BATCH + 100
    async with pooled(url, GatedCoroutine, many, slots=many) as (pool, gates, worker, _m):
        gates.shut(1)
        actions = np.ones(many, np.int64)
        actions[-20:] = 0
        worker.loses = 1
        await pool.send(actions, range(many))
        batch = await soon(pool.recv(min=20))
        assert ids(batch) == list(range(many - 20, many))
        assert (pool.under_way, pool.ready) == (many - 20, 0)
        gates.open()
        assert ids(await soon(pool.recv(min=many - 20))) == list(range(many - 20))
        assert gates.at == {1: many - 20, 0: 20}


async def test_hundreds_of_lanes_in_messages_of_one_are_asked_about_together(url: str) -> None:
    async with pooled(url, GatedCoroutine, 300, slots=300) as (pool, gates, worker, _m):
        gates.shut(1)
        worker.misses = 100
        for env_id in range(300):
            await pool.send([1], [env_id])
        await until(lambda: gates.at.get(1) == 300, "those that were lost were sent again")
        gates.open()
        assert ids(await soon(pool.recv(min=300))) == list(range(300))
        assert gates.at == {1: 300}


@BOTH
async def test_nothing_is_kept_of_what_was_received(url: str, make: Any) -> None:
    async with pooled(url, make, 16) as (pool, _, worker, m):
        await pool.send(np.zeros(16, np.int64), range(16))
        seen: list[weakref.ref[Any]] = []
        for n in range(300):
            if n % 50 == 0:
                worker.loses += 1
            batch = await soon(pool.recv(min=4, max=8))
            seen.append(weakref.ref(batch.observations))
            await pool.send(np.zeros(len(batch), np.int64), batch.env_ids)
        del batch
        while pool.under_way or pool.ready:
            await soon(pool.recv())
        gc.collect()
        assert [ref for ref in seen if ref() is not None] == []
        assert len(context_of(m).flights) == pool.under_way == len(pool._results._ready) == 0
        assert worker.table.cached_bytes < 16 * 1000, "an answer a lane at most"
