"""Recordings of sessions whose workers are lost: one recording, without a gap, and no second writer's chunk in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.storing import Reader
from meshrl.client.context import context_of
from meshrl.protocol.chunks import Chunk, read_chunk
from meshrl.recording.streams import stream_of
from meshrl.recording.writing import is_description
from meshrl.wire.subjects import Subjects
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
                    await asyncio.sleep(1.5)  # until some of it is stored, and then some more
                if n == 120 and episode < 2:
                    await workers.kill(env.worker)
                    workers.start()
        await env.close()
        found = await listed(m, name, 3)
        check_gapless(await chunks_of(server, name, session))
        for told, summary in zip(episodes, found, strict=True):
            same_as(told, await m.episode(summary.episode_id))
            assert await m.verify(summary.episode_id)


@pytest.mark.parametrize("kind", ["vector", "pool"])
async def test_a_shard_that_outlives_its_worker_is_one_recording(
    server: EmbeddedServer, workers: Workers, kind: str
) -> None:
    name, ended = "CartPole-v1", 0
    workers.start(2)
    rng = np.random.default_rng(1)
    async with Mesh(server.url) as m:
        open_: Any = m.vector if kind == "vector" else m.pool
        async with await open_(name, 4, record="full", shards=1) as envs:
            (remote,) = envs._sessions
            await envs.reset(seed=5)
            for n in range(250):
                if kind == "vector":
                    _, _, terminations, truncations, _ = await envs.step(rng.integers(0, 2, 4))
                else:
                    batch = await envs.recv(min=4, timeout=20)
                    terminations, truncations = batch.terminations, batch.truncations
                    await envs.send(rng.integers(0, 2, len(batch.env_ids)), batch.env_ids)
                ended += int((terminations | truncations).sum())
                if n in {80, 160}:
                    await asyncio.sleep(1.3)  # until some of it is stored, and then some more
                if n in {90, 170}:
                    await workers.kill(remote.grant.worker)
                    workers.start()
            session = remote.grant.session
        found = await listed_in_the_end(m, name, ended)
        check_gapless(await chunks_of(server, name, session))
        whole = [one for one in found if one.reason in {"terminated", "truncated"}]
        assert len(whole) in range(ended, ended + 5), "and those that nobody has received any more"
        assert {one.reason for one in found} <= {"terminated", "truncated", "closed"}
        for one in found[::5]:
            assert (await m.verify(one.episode_id)).status == "exact"


async def test_of_a_session_that_could_not_be_resumed_what_is_stored_ends_as_lost(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("CartPole-v1", record="actions", on_loss="truncate") as env:
        await env.reset(seed=1)
        for n in range(5):
            await env.step(n % 2)
        await asyncio.sleep(1.5)
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
        await asyncio.sleep(1.5)
        await workers.kill(env.worker)
        assert (await env.step(0))[3], "nobody could take it in time"
        workers.start(2)
        for seed in (2, None, None):
            await env.reset(seed=seed)
            for n in range(7):
                await env.step(n % 2)
        await asyncio.sleep(1.5)
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
