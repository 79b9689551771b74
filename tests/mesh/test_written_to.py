"""Observations are their user's to write to, large ones too, which are not copied: what arrived is what counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from meshrl import Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.protocol.digests import Digests
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack, unpack
from meshrl.wire.kept import Reads, kept, whole
from tests.mesh.conftest import until
from tests.mesh.losing import Workers
from tests.mesh.resumed_envs import Mural, Pictures


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


@pytest.fixture(params=["thin", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MESHRL_BUS", request.param)
    return str(request.param)


def taken(obs: np.ndarray[Any, Any]) -> bytes:
    """What it was; its user uses it for something else now."""
    was = obs.tobytes()
    obs[...] = 7
    return was


@pytest.mark.parametrize("on_loss", ["truncate", "resume"])
async def test_of_a_single_env(server: EmbeddedServer, workers: Workers, path: str, on_loss: Any) -> None:
    workers.start(2)
    local = Mural(950)
    async with Mesh(server.url) as m, await m.env("Mural", kwargs={"size": 950}, on_loss=on_loss) as env:
        assert taken((await env.reset(seed=3))[0]) == taken(local.reset(seed=3)[0])
        for _ in range(4):
            last = local.step(1)[0]
            assert taken((await env.step(1))[0]) == last.tobytes()
        session: Any = env._session
        assert isinstance(session.told, Reads) == (path == "thin")
        await workers.kill(env.worker)
        obs, _, _, truncated, info = await env.step(1)
        assert truncated == ("session_lost" in info) == (on_loss == "truncate")
        assert obs.tobytes() == (last if truncated else local.step(1)[0]).tobytes()


@pytest.mark.parametrize("on_loss", ["truncate", "resume"])
async def test_of_a_vector(server: EmbeddedServer, workers: Workers, path: str, on_loss: Any) -> None:
    workers.start(2)
    local, ones = SyncVectorEnv([lambda: Mural(550)] * 3), np.ones(3, np.int64)
    async with Mesh(server.url) as m, await m.vector("Mural", 3, shards=1, on_loss=on_loss) as envs:
        assert taken((await envs.reset(seed=3))[0]) == taken(local.reset(seed=3)[0])
        for _ in range(4):
            last = local.step(ones)[0]
            assert taken((await envs.step(ones))[0]) == last.tobytes()
        session: Any = envs._sessions[0]
        assert isinstance(session.told, Reads) == (path == "thin")
        await workers.kill(envs.shards[0][0])
        obs, _, _, truncated, infos = await envs.step(ones)
        assert truncated.all() == truncated.any() == ("session_lost" in infos) == (on_loss == "truncate")
        assert obs.tobytes() == (last if truncated.all() else local.step(ones)[0]).tobytes()


@pytest.mark.parametrize("on_loss", ["truncate", "resume"])
@pytest.mark.parametrize(("count", "size"), [(1, 950), (3, 550)])
async def test_of_a_pool(
    server: EmbeddedServer, workers: Workers, path: str, count: int, size: int, on_loss: Any
) -> None:
    workers.start(2)
    local, ones, ids = [Mural(size) for _ in range(count)], np.ones(count, np.int64), np.arange(count)
    async with (
        Mesh(server.url) as m,
        await m.pool("Mural", count, shards=1, kwargs={"size": size}, on_loss=on_loss) as pool,
    ):
        await pool.reset(seed=3)
        last = {i: env.reset(seed=3 + i)[0] for i, env in enumerate(local)}
        for _ in range(4):
            batch = await pool.recv(min=count)
            rows = dict(zip(batch.env_ids.tolist(), batch.observations, strict=True))
            assert {i: row.tobytes() for i, row in rows.items()} == {i: obs.tobytes() for i, obs in last.items()}
            batch.observations[...] = 7
            await pool.send(ones, ids)
            last = {i: env.step(1)[0] for i, env in enumerate(local)}
        (await pool.recv(min=count)).observations[...] = 7
        if count == 1:
            (revival,) = pool._under_way._revivals.values()
            assert isinstance(revival._last[0], Reads) == (path == "thin")
        await workers.kill(pool.shards[0][0])
        await pool.send(ones, ids)
        batch = await pool.recv(min=count)
        if on_loss == "truncate":
            assert batch.truncations.all()
            told = [obs.tobytes() for obs in batch.infos["final_obs"]]
        else:
            last = {i: env.step(1)[0] for i, env in enumerate(local)}
            told = [obs.tobytes() for obs in batch.observations]
        assert dict(zip(batch.env_ids.tolist(), told, strict=True)) == {i: obs.tobytes() for i, obs in last.items()}


async def test_what_a_large_message_was_read_as_is_known_to_its_handler_alone(url: str, path: str) -> None:
    body, heard = np.random.default_rng(0).bytes(900_000), []
    async with connect(url) as bus:

        def deliver(_subject: str, _reply: str, message: Any) -> None:
            reads = bus.reads_of(message)
            assert bus.reads_of(bytes(bytearray(message))) is None
            if path == "thin":
                message[:10] = bytes(10)
            heard.append((message, kept(message, reads), reads is None))

        await bus.subscribe("large", deliver)
        for _ in range(3):
            bus.publish("large", body)
        await until(lambda: len(heard) == 3, "they have arrived")
        for message, told, unknown in heard:
            assert bus.reads_of(message) is None
            assert unknown == (path == "plain")
            assert whole(told) == body


@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_digests_are_of_what_was_sent_also_where_the_next_request_waits_already(
    server: EmbeddedServer, workers: Workers, form: str
) -> None:
    workers.start(1)
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    picture: Any = {"kwargs": {"size": 300}}  # so large that it is not copied: what is hashed is the env's own array
    async with Mesh(server.url) as m:
        envs: Any
        if form == "vector":
            envs = await m.vector("Pictures", 1, **picture)
            await envs.reset(seed=1)
            for _ in range(120):  # it is fast: the worker steps it as it reads
                await envs.step(one)
        else:
            envs = await m.pool("Pictures", 1, **picture)
            await envs.reset(seed=1)
            for _ in range(120):
                await envs.recv()
                await envs.send(one, zero)
            await envs.recv()
        session, heard = envs._sessions[0], []
        async with connect(server.url) as bus:
            await bus.subscribe("_INBOX.answers", lambda _subject, _reply, body: heard.append(unpack(body)))

            def ask(seq: int) -> None:
                which = {"lane": 0, "seq": seq} if form == "vector" else {"lanes": zero, "seqs": np.array([seq])}
                body = {"epoch": session.grant.epoch, **which, "actions": one}
                bus.publish(f"{session._subject}step", pack(body), "_INBOX.answers")

            for seq in range(122, 182, 2):  # each writes its pictures into those of the one before
                ask(seq)
                ask(seq + 1)
                await until(lambda seq=seq: len(heard) == seq - 120, "both are answered")  # type: ignore[misc]
                refused = [frame for frame in heard if "error" in frame]
                if refused:  # the worker was so slow that the first was still running
                    assert [frame["error"]["code"] for frame in refused] == ["lane_busy"]
                    heard[:] = [frame for frame in heard if frame is not refused[0]]
                    ask(seq + 1)
                    await until(lambda seq=seq: len(heard) == seq - 120, "the second is answered")  # type: ignore[misc]
        made = Digests(1, batching(Pictures(300).observation_space))
        made.values[:] = heard[0]["digests"]
        for frame in heard:
            assert made.values.tolist() == frame["digests"].tolist()
            flags = frame["terminations"], frame["truncations"]
            made.add(slice(None), frame["obs"], frame["rewards"], *flags, frame.get("origins", [])[::2])
        await envs.close()
