"""Strict recordings: what was answered is stored, at that very moment; what cannot be stored is never answered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.storing import Reader
from meshrl.bus.streams import make_stream
from meshrl.errors import NotRecorded, StreamMissing
from meshrl.protocol.chunks import read_chunk
from meshrl.recording.messages import is_description
from meshrl.recording.streams import stream_of
from meshrl.wire.subjects import Subjects
from meshrl.worker import strict
from tests.mesh.own_server import own_server
from tests.mesh.recordings import drive, listed
from tests.mesh.test_recordings import same_as

AT = Subjects()


async def rows(reader: Reader, name: str) -> list[int]:
    """Of each chunk that is stored of an env at this moment how many rows it has."""
    found = []
    try:
        async for stored in reader.get(stream_of(AT, name), AT.recording(name, "*")):
            if not is_description(stored):
                found.append(len(read_chunk(stored.body)))
    except StreamMissing:
        return []
    return found


async def test_each_answer_is_stored_before_it_is_told(url: str) -> None:
    served = dict.fromkeys(("one", "many", "pool"), "CartPole-v1")
    async with EnvWorker(served, url), Mesh(url) as m, connect(url) as other, Reader(other, 10.0) as reader:
        async with await m.env("one", record="strict") as env:
            await env.reset(seed=1)
            assert await rows(reader, "one") == [1]
            for n in range(1, 6):
                await env.step(n % 2)
                assert await rows(reader, "one") == [1] * (n + 1)
            await env.get_attr("gravity")  # which tells nothing that is recorded
            assert await rows(reader, "one") == [1] * 6
        async with await m.vector("many", 4, record="strict", shards=1) as envs:
            await envs.reset(seed=1)
            for n in range(1, 40):
                await envs.step(np.full(4, n % 2))
                assert await rows(reader, "many") == [4] * (n + 1)
        async with await m.pool("pool", 4, record="strict", shards=1) as pool:
            told = 0
            await pool.reset(seed=1)
            for n in range(40):
                batch = await pool.recv(min=1, timeout=10.0)
                told += len(batch.env_ids)
                assert sum(await rows(reader, "pool")) >= told
                await pool.send(np.full(len(batch.env_ids), n % 2), batch.env_ids)


async def test_a_strict_recording_has_observations_and_is_read_like_any(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url, record="strict") as worker, Mesh(url) as m:
        async with await m.env("of") as env:
            told = await drive(env, 3, 1)
        for one, summary in zip(told, await listed(m, "of", 3), strict=True):
            episode = await m.episode(summary.episode_id)
            assert not episode.remade
            same_as(one, episode)
        assert worker.recorded.lost == 0


@pytest.mark.parametrize("form", ["env", "vector", "pool"])
async def test_what_cannot_be_stored_is_not_answered_and_ends_its_session_alone(url: str, form: str) -> None:
    async with connect(url) as connection:
        small = {"subjects": [AT.recording("of", "*")], "max_msgs": 6, "discard": "new", "allow_direct": True}
        await make_stream(connection, stream_of(AT, "of"), small)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        opened = await one_of(m, form, record="strict")
        loose = await m.env("of", record="actions")
        with pytest.raises(NotRecorded) as raised:
            await steps(opened, form, 20)
        assert "maximum messages" in raised.value.message
        assert raised.value.details["why"] in raised.value.message
        await drive(loose, 1, 1)  # whose steps nobody fails
        assert worker.recorded.lost > 0
        await loose.close()


async def one_of(m: Mesh, form: str, **kwargs: Any) -> Any:
    if form == "env":
        return await m.env("of", **kwargs)
    return await (m.vector if form == "vector" else m.pool)("of", 2, shards=1, **kwargs)


async def steps(opened: Any, form: str, count: int) -> None:
    await opened.reset(seed=1)
    for _ in range(count):
        if form == "env":
            await opened.step(0)
        elif form == "vector":
            await opened.step(np.zeros(2, np.int64))
        else:
            batch = await opened.recv(min=2, timeout=10.0)
            await opened.send(np.zeros(len(batch.env_ids), np.int64), batch.env_ids)


async def test_without_jetstream_the_first_answer_says_so(tmp_path: Path) -> None:
    async with own_server(tmp_path, {}) as server:
        url = server.url()
        async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
            env = await m.env("of", record="strict")
            with pytest.raises(NotRecorded, match="JetStream"):
                await env.reset(seed=1)


async def test_where_nobody_says_that_it_is_stored_the_session_ends_after_a_while(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict, "STORED_S", 1.0)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        env = await m.env("of", record="strict")
        await env.reset(seed=1)
        recorder = worker._records._recorder
        assert recorder is not None
        loop = recorder._loop
        assert loop is not None
        on = threading.Event()
        loop.call_soon_threadsafe(on.wait)  # its thread hangs
        with pytest.raises(NotRecorded, match="within 1 s"):
            await env.step(0)
        on.set()


async def test_vector_implementations_are_recorded_as_strictly(url: str) -> None:
    async with (
        EnvWorker({"of": "CartPole-v1"}, url, vectors="gymnasium"),
        Mesh(url) as m,
        connect(url) as other,
        Reader(other, 10.0) as reader,
    ):
        async with await m.vector("of", 4, shards=1, record="strict", seeding="implementation") as envs:
            await envs.reset(seed=1)
            for n in range(1, 20):
                await envs.step(np.full(4, n % 2))
                assert await rows(reader, "of") == [4] * (n + 1)


async def test_a_withheld_answer_is_no_step_over_its_deadline(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    condemned: list[str] = []
    monkeypatch.setattr(EnvWorker, "condemn", lambda *_: condemned.append("condemned"))
    async with (
        EnvWorker({"of": "CartPole-v1"}, url, step_deadline_s=0.3, last_resort=lambda: None) as worker,
        Mesh(url) as m,
        await m.env("of", record="strict") as env,
    ):
        await env.reset(seed=1)
        recorder = worker._records._recorder
        assert recorder is not None
        loop = recorder._loop
        assert loop is not None
        on = threading.Event()
        loop.call_soon_threadsafe(on.wait)  # its thread hangs
        threading.Timer(2.5, on.set).start()
        _, reward, *_ = await env.step(0)
        assert reward == 1.0
        assert condemned == []
