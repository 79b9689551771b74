"""Recordings of sessions whose workers are lost: one recording, without a gap, and no second writer's chunk in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any

import pytest

from meshrl import EnvWorker, Mesh, RemoteEnv
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.storing import Reader
from meshrl.client.context import context_of
from meshrl.errors import StreamMissing
from meshrl.protocol.chunks import Chunk, read_chunk
from meshrl.recording.messages import Messages, is_description
from meshrl.recording.streams import stream_of
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.learners import Learned, of_all, play_one, play_pool, play_vector
from tests.mesh.losing import Workers
from tests.mesh.recordings import Told, copied, listed, listed_in_the_end
from tests.mesh.test_recordings import same_as


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


async def chunks_of(server: EmbeddedServer, env: str, session: str) -> list[Chunk]:
    subjects = Subjects()
    async with connect(server.url) as connection, Reader(connection, 5.0) as reader:
        stored = [one async for one in reader.get(stream_of(subjects, env), subjects.recording(env, session))]
    epochs = [int(one.message_id.split(":")[1]) for one in stored]
    assert epochs == sorted(epochs), "what an earlier worker had left was stored behind a later one's"
    return [read_chunk(one.body) for one in stored if not is_description(one)]


async def more_is_stored(server: EmbeddedServer, env: str) -> None:
    """Wait until some of what was done just now is stored."""
    subjects = Subjects()
    async with connect(server.url) as connection, Reader(connection, 5.0) as reader:

        async def chunks() -> int:
            try:
                stored = [one async for one in reader.get(stream_of(subjects, env), subjects.recording(env, "*"))]
            except StreamMissing:
                return 0
            return sum(not is_description(one) for one in stored)

        before = await chunks()

        async def has_grown() -> bool:
            return await chunks() > before

        await until(has_grown, "more is stored")


def check_gapless(chunks: list[Chunk]) -> None:
    """Numbered one after another, and each goes on where the one before it ended, with digests and all."""
    assert [chunk.n for chunk in chunks] == list(range(1, len(chunks) + 1))
    at: dict[int, tuple[int, int]] = {}
    for chunk in chunks:
        assert not chunk.lost
        started = iter(chunk.started.numbers.tolist())
        for i in range(len(chunk.numbers)):
            assert at.get(i, (-1, 0)) == (chunk.numbers[i], chunk.steps[i])
        for lane, reset in zip(chunk.lanes.tolist(), chunk.resets.tolist(), strict=True):
            number, steps = at.get(lane, (-1, 0))
            at[lane] = (next(started), 0) if reset else (number, steps + 1)
            assert at[lane][0] == number + reset


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_an_episode_that_outlives_its_workers_is_one_recording(
    server: EmbeddedServer, workers: Workers, level: Any
) -> None:
    name = "Pendulum-v1"
    workers.start(3)
    episodes: list[Told] = []
    async with Mesh(server.url) as m, await m.env(name, record=level) as env:
        session = env.session_id
        env.action_space.seed(3)
        for episode in range(3):
            obs, info = await env.reset(seed=3 if not episode else None)
            told = Told([copied(obs)], [copied(info)])
            episodes.append(told)
            for n in range(200):
                action = env.action_space.sample()
                obs, reward, terminated, truncated, info = await env.step(action)
                told.actions.append(action)
                told.rewards.append(float(reward))
                told.terminations.append(bool(terminated))
                told.truncations.append(bool(truncated))
                told.obs.append(copied(obs))
                told.infos.append(copied(info))
                if n == 60:
                    await more_is_stored(server, name)
                if n == 120 and episode < 2:
                    await workers.kill(env.worker)
                    workers.start()
        await env.close()
        found = await listed(m, name, 3)
        check_gapless(await chunks_of(server, name, session))
        for told, summary in zip(episodes, found, strict=True):
            same_as(told, await m.episode(summary.episode_id))
            assert await m.verify(summary.episode_id)


async def one_recording(m: Mesh, server: EmbeddedServer, name: str, told: Learned) -> None:
    """All that was told of one session is one recording, and nothing else is in it."""
    found = await listed_in_the_end(m, name, len(told.episodes))
    assert sorted(one.episode_id for one in found) == sorted(told.episodes)
    (session,) = {id_.split(".")[0] for id_ in told.episodes}
    check_gapless(await chunks_of(server, name, session))
    told.check(await of_all(m.episode, told.episodes))
    for verdict in (await of_all(m.verify, told.episodes)).values():
        assert verdict.status == "exact", verdict


def worker_of(envs: Any) -> str:
    return str(envs.worker if isinstance(envs, RemoteEnv) else envs.shards[0][0])


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize("form", [play_vector, play_pool])
async def test_a_shard_that_outlives_its_workers_is_one_recording(
    server: EmbeddedServer, workers: Workers, form: Any, level: Any
) -> None:
    workers.start(2)
    # Some of it is stored, and then some more is not; and again, when the next worker has hardly stored anything.
    happens = iter([(80, "wait"), (90, "kill"), (120, "kill"), (1 << 30, "")])
    at, what = next(happens)

    async def lose(envs: Any, n: int) -> None:
        nonlocal at, what
        if n < at:
            return
        if what == "wait":
            await more_is_stored(server, "CartPole-v1")
        else:
            await workers.kill(worker_of(envs))
            workers.start()
        at, what = next(happens)

    async with Mesh(server.url) as m:
        told = await form(m, "CartPole-v1", level, 200, num_envs=4, shards=1, meanwhile=lose)
        await one_recording(m, server, "CartPole-v1", told)


@pytest.mark.parametrize(
    ("form", "name", "level"),
    [(play_one, "Pendulum-v1", "actions"), (partial(play_vector, shards=1), "CartPole-v1", "full")],
)
async def test_who_comes_late_to_write_pushes_out_nobody_who_came_after(
    server: EmbeddedServer, workers: Workers, monkeypatch: pytest.MonkeyPatch, form: Any, name: str, level: Any
) -> None:
    """A worker goes on with a session, and writes nothing of it until another one has gone on and written."""
    go, place = threading.Event(), Messages.place

    async def late(messages: Messages, *of: Any) -> None:
        await asyncio.to_thread(go.wait, 30)
        await place(messages, *of)

    monkeypatch.setattr(Messages, "place", late)  # of this process alone
    workers.start()
    async with AsyncExitStack() as stack:
        slow = EnvWorker({name: name}, server.url)

        async def meanwhile(envs: Any, n: int) -> None:
            if n in {30, 80}:
                await more_is_stored(server, name)
            if n == 40:
                await stack.enter_async_context(slow)
                await workers.kill(worker_of(envs))
            if n == 60:
                assert worker_of(envs) == slow.id
                workers.start()
                slow.leave(30)
                await until(lambda: worker_of(envs) in workers.running, "it has moved")
            if n == 90:
                go.set()
                await stack.aclose()  # it writes what it has left, if it may

        async with Mesh(server.url) as m:
            told = await form(m, name, level, 120, meanwhile=meanwhile)
            await one_recording(m, server, name, told)


async def test_who_came_after_goes_on_where_an_older_one_writes_at_the_same_moment(
    server: EmbeddedServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, turn, wrote = "Pendulum-v1", threading.Event(), threading.Event()
    place, take_over = Messages.place, Messages._take_over
    wrote_by: list[int] = []

    async def placed(messages: Messages, *of: Any) -> None:
        if messages._epoch == 2:
            await asyncio.to_thread(turn.wait, 30)
        await place(messages, *of)

    async def taken_over(messages: Messages, *of: Any) -> None:
        if messages._epoch == 3:  # it has seen what the first has left
            turn.set()
            await asyncio.to_thread(wrote.wait, 30)
        try:
            await take_over(messages, *of)
        finally:
            wrote_by.append(messages._epoch)
            wrote.set()

    monkeypatch.setattr(Messages, "place", placed)  # of this process alone
    monkeypatch.setattr(Messages, "_take_over", taken_over)
    workers.start()
    async with AsyncExitStack() as stack:
        second, third = (EnvWorker({name: name}, server.url) for _ in range(2))

        async def meanwhile(env: Any, n: int) -> None:
            if n == 30:
                await more_is_stored(server, name)
            if n == 40:
                await stack.enter_async_context(second)
                await workers.kill(env.worker)
            if n == 60:
                assert env.worker == second.id
                await stack.enter_async_context(third)
                second.leave(30)
                await until(lambda: env.worker == third.id, "it has moved")

        async with Mesh(server.url) as m:
            told = await play_one(m, name, "full", 120, meanwhile=meanwhile)
            await until(lambda: len(wrote_by) == 3, "the third has tried again")
            assert wrote_by == [2, 3, 3]
            await one_recording(m, server, name, told)


async def test_of_a_session_that_could_not_be_resumed_what_is_stored_ends_as_lost(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("CartPole-v1", record="actions", on_loss="truncate") as env:
        await env.reset(seed=1)
        for n in range(5):
            await env.step(n % 2)
        await more_is_stored(server, "CartPole-v1")
        await workers.kill(env.worker)
        _, _, _, truncated, _ = await env.step(0)
        assert truncated
        await env.reset(seed=2)
        for n in range(6):
            await env.step(n % 2)
        session = env.session_id
        await env.close()
        found = {one.episode_id: (one.steps, one.reason) for one in await listed(m, "CartPole-v1", 2)}
        assert found == {f"{session}.0.0": (5, "lost"), f"{session}-2.0.0": (6, "closed")}
        for id_ in found:
            assert await m.verify(id_)


async def test_what_was_begun_anew_and_is_then_resumed_is_one_recording(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start()
    name = "CartPole-v1"
    async with Mesh(server.url) as m, await m.env(name, record="full", wait=1.0) as env:
        await env.reset(seed=1)
        for n in range(6):
            await env.step(n % 2)
        await more_is_stored(server, name)
        await workers.kill(env.worker)
        assert (await env.step(0))[3], "nobody could take it in time"
        workers.start(2)
        for seed in (2, None, None):
            await env.reset(seed=seed)
            for n in range(7):
                await env.step(n % 2)
        await more_is_stored(server, name)
        await asyncio.sleep(1.2)  # where that was not all of it
        for n in range(2):
            await env.step(n % 2)
        await workers.kill(env.worker)
        await env.step(0)
        session = env.session_id
        await env.close()
        found = {one.episode_id: (one.steps, one.reason) for one in await listed(m, name, 4)}
        (anew,) = {id_.split(".")[0] for id_ in found} - {session}
        assert anew.startswith(f"{session}-")
        assert found == {
            f"{session}.0.0": (6, "lost"),
            f"{anew}.0.0": (7, "reset"),
            f"{anew}.0.1": (7, "reset"),
            f"{anew}.0.2": (10, "closed"),
        }
        check_gapless(await chunks_of(server, name, anew))
        for id_ in found:
            assert (await m.verify(id_)).status == "exact"


async def test_a_lease_that_runs_out_writes_no_end(server: EmbeddedServer) -> None:
    async with EnvWorker({"left": "CartPole-v1"}, server.url, lease_s=1.0), Mesh(server.url) as m:
        async with Mesh(server.url) as gone:
            env = await gone.env("left", record="actions")
            session = env.session_id
            await env.reset(seed=1)
            for n in range(5):
                await env.step(n % 2)
            context_of(gone).connection.path.abort()
            context_of(gone)._leases.end()
            await asyncio.sleep(3)
        chunks = await chunks_of(server, "left", session)
        assert sum(len(chunk) for chunk in chunks) == 6
        assert not any(chunk.end for chunk in chunks)
        assert not [one async for one in m.episodes("left")]
