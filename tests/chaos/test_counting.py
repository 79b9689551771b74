"""What the suite counts has happened: a resume with a step in flight or without one, a lost replay, a lost answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.chaos.faults import executed
from tests.chaos.resumes import Resumes
from tests.mesh.conftest import until
from tests.mesh.losing import Workers


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as running:
        yield running


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


async def test_a_resume_with_a_step_in_flight_is_told_with_its_facts(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    resumes = Resumes(lambda _: True)
    async with Mesh(server.url) as m:
        with resumes.heard():
            env = await m.env("Tuned")
            pool = await m.pool("Tuned", 2, shards=1)
            await env.reset(seed=1)
            await pool.reset(seed=1)
            await pool.recv(min=2)
            await env.step(1)
            for held in (env.worker, pool.shards[0][0]):
                if held in workers.running:
                    await workers.kill(held)
                    await asyncio.to_thread(workers.start)
            stepping = asyncio.ensure_future(env.step(1))
            await pool.send([1, 1], [0, 1])
            await pool.recv(min=2)
            assert (await stepping)[0] == 2
    assert (resumes.in_flight, resumes.idle) == (2, 0)
    assert resumes.reasons == {"worker_lost": 2}
    assert len(resumes.seconds) == 2


async def test_a_resume_for_something_else_than_a_step_is_none_in_flight(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    resumes = Resumes(lambda _: False)
    async with Mesh(server.url) as m:
        with resumes.heard():
            env = await m.env("Tuned")
            await env.reset(seed=1)
            await workers.kill(env.worker)
            assert await env.get_attr("gain") == 1
    assert (resumes.in_flight, resumes.idle) == (0, 1)


async def test_a_session_that_begins_anew_is_not_resumed(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    resumes = Resumes(lambda _: True)
    async with Mesh(server.url) as m:
        with resumes.heard():
            env = await m.env("Random")
            await env.reset(seed=1)
            await env.step(1)
            await workers.kill(env.worker)
            assert (await env.step(1))[3], "its episode is over"
            await env.reset(seed=1)
            await env.step(1)
    assert (resumes.in_flight, resumes.idle) == (0, 0)


async def test_a_replay_that_is_lost_is_told_with_its_worker(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    resumes = Resumes(lambda _: True)
    async with Mesh(server.url) as m:
        with resumes.heard():
            env = await m.env("Slow")
            await env.reset(seed=1)
            for _ in range(30):
                await env.step(1)
            first = env.worker
            await workers.kill(first)
            stepping = asyncio.ensure_future(env.step(1))
            await until(lambda: env.worker != first, "it is opened elsewhere")
            second = env.worker
            await workers.kill(second)
            await asyncio.to_thread(workers.start)
            obs, *_, info = await stepping
            assert obs == 31, info
            assert resumes.replays_lost == {(env.session_id, second)}
    assert resumes.in_flight == 1


def test_answers_of_steps_that_were_executed_are_found_in_what_a_server_said() -> None:
    step, error, closed = b"\x83\xa6reward\xcb", b"\x81\xa5error\xa4gone", b"\x80"
    said = (
        b"half of the one before\r\n"
        b"MSG _INBOX.anon.0af3.17 1 %d\r\n%s\r\n"
        b"PING\r\n"
        b"MSG _INBOX.anon.0af3.18 1 %d\r\n%s\r\n"
        b"HMSG _INBOX.anon.0af3.19 1 16 24\r\nNATS/1.0 503\r\n\r\nrewarded\r\n"
        b"MSG _INBOX.anon.0af3.20 1 %d\r\n%s\r\n"
        b"MSG meshrl.v1.default.registry.env.x 2 6\r\nreward\r\n"
        b"MSG _INBOX.anon.0af3.21 1 900\r\n\x83\xa7rewards"
    ) % (len(step), step, len(error), error, len(closed), closed)
    assert executed(said) == {17, 21}
