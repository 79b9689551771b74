"""Recordings under logins of least permissions: workers write, operators make the streams, and others read."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus import answering
from meshrl.bus.connect import connect
from meshrl.bus.storing import Reader
from meshrl.cli import main
from meshrl.cli.audit import CONFIG, STREAM
from meshrl.client.context import context_of
from meshrl.errors import NotAllowed, StreamMissing, SubjectNotPermitted
from meshrl.recording.serving import Serving
from meshrl.recording.streams import EPISODES
from meshrl.wire.codec import unpack
from meshrl.wire.frames import check_reply
from meshrl.wire.of_recordings import Read
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.recordings import drive, listed
from tests.mesh.secured_server import init, secured_server

AT = Subjects()


async def taken_and_gone_on_with(learner: Mesh, steps: int) -> None:
    """A durable feed of who may not publish where positions are kept."""
    feed = learner.experience("of", name="dqn", follow=False, batch_size=7)
    first = await anext(feed)
    await feed.commit()
    rest = [batch async for batch in learner.experience("of", name="dqn", follow=False, batch_size=1000)]
    assert len(first) + sum(map(len, rest)) == steps
    assert rest[0].steps[0] == 7


async def only_what_is_on_record_and_only_to_its_own_inbox(url: str, login: Path, other: Mesh) -> None:
    theirs = context_of(other).connection
    got: list[bytes] = []
    async with connect(url, credentials=login, on_error=lambda _: None) as connection:
        await theirs.subscribe(f"_INBOX.{theirs.user}.x", lambda _subject, _reply, body: got.append(body))
        ask = AT.recordings("read", connection.user)
        for stream in (STREAM, "MESHRL_REC_other~of", "KV_secrets"):
            answer = await connection.ask(ask, Read(stream=stream, subject=">").to_wire(), 10.0)
            with pytest.raises(NotAllowed):
                check_reply(unpack(answer or b""), 0)
        # Everything of the index, which has other namespaces, too; and with an answer to somebody else.
        answers: asyncio.Queue[Any] = asyncio.Queue()
        rid = connection.request(ask, Read(stream=EPISODES, subject=">").to_wire(), answers.put_nowait)
        while "end" not in (body := unpack(await asyncio.wait_for(answers.get(), 10.0))):
            assert body["stored"][2].startswith(AT.prefix)
        connection.forget(rid)
        last = Read(stream=EPISODES, which="last", subject=">").to_wire()
        connection.publish(ask, last, f"_INBOX.{theirs.user}.x")
        answer = await connection.ask(ask, Read(stream=EPISODES, which="last", subject="x").to_wire(), 10.0)
        assert unpack(answer or b"") == {"end": True}
        await theirs.flush()
        assert got == []


async def test_an_answer_goes_to_nobody_elses_inbox(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering._Refused, "said_at", -math.inf)
    sent: list[str] = []

    class Connection:
        def publish(self, subject: str, body: bytes, **_: object) -> None:
            sent.append(subject)

    serving = Serving(Connection(), None, AT)  # type: ignore[arg-type]
    for reply in ("_INBOX.bob.1", "meshrl.v1.default.registry.ask", "", "_INBOX.annabel.1", "$JS.API.STREAM.DELETE.X"):
        serving._on_request(Read, serving._read, AT.recordings("read", "ann"), reply, b"")
        assert not serving._tasks
    serving._on_request(Read, serving._read, AT.recordings("read", "ann"), "_INBOX.ann.1", b"")
    assert sent == ["_INBOX.ann.1"], "an error, since it asks for nothing"
    (said,) = caplog.records  # who may ask does not fill a log
    assert "'_INBOX.bob.1', by ann" in said.getMessage()


async def test_what_workers_record_is_read_by_those_who_may(tmp_path: Path) -> None:
    home = tmp_path / "d"
    init(home, "--team", "red", "--learner", "ann", "--learner", "bob")
    init(home, "--team", "blue")
    async with secured_server(home) as server:
        operator = ["--url", server.url, "--credentials", str(server.login("operator"))]
        async with Mesh(server.url, credentials=server.login("ann")) as early:
            for refused in (anext(early.episodes()), anext(early.experience("of", name="mine"))):
                with pytest.raises(SubjectNotPermitted, match="no env worker"):  # and not that there is nothing
                    await refused
        async with (
            EnvWorker({"of": "CartPole-v1"}, server.url, credentials=server.login("env-worker")) as worker,
            Mesh(server.url, credentials=server.login("ann")) as ann,
            Mesh(server.url, credentials=server.login("operator")) as reader_,
            Mesh(server.url, credentials=server.login("observer")) as observer,
            Mesh(server.url, credentials=server.login("operator", "blue")) as blue,
        ):
            async with await ann.env("of", record="full") as env:
                await drive(env, 2, 1)
            await until(lambda: worker.recorded.lost > 0, "there is nowhere to record to")
            assert "meshrl recordings" in worker.recorded.why
            assert await asyncio.to_thread(main, ["recordings", "of", *operator]) == 0
            assert await asyncio.to_thread(main, ["audit", "--create", *operator]) == 0
            async with await ann.env("of", record="full") as env:
                told = await drive(env, 2, 1)
            found = await listed(reader_, "of", 2)
            assert [one.steps for one in found] == [len(one.rewards) for one in told]
            assert len(await reader_.episode(found[0].episode_id)) == len(told[0].rewards)
            assert await reader_.verify(found[0].episode_id), "an operator may run it again"
            feed = reader_.experience("of", name="mine", follow=False, batch_size=5)
            await anext(feed)
            await feed.commit()
            for mesh in (ann, observer):
                assert [one.steps async for one in mesh.episodes("of", since=found[0].ended_at)] == [
                    one.steps for one in found
                ]
                assert len(await mesh.episode(found[1].episode_id)) == len(told[1].rewards)
            assert await ann.verify(found[0].episode_id), "a learner may run it again"
            await taken_and_gone_on_with(ann, sum(one.steps for one in found))
            async with await ann.fork(found[0].episode_id, step=3) as fork:
                await fork.step(0)
            assert [one async for one in blue.episodes()] == [], "another team has nothing of it"
            await only_what_is_on_record_and_only_to_its_own_inbox(server.url, server.login("ann"), observer)
        async with (
            connect(server.url, credentials=server.login("operator"), on_error=lambda _: None) as operates,
            connect(server.url, credentials=server.login("agent-worker"), on_error=lambda _: None) as agents,
            Reader(operates, 5.0) as reader,
            Reader(agents, 5.0) as of_agents,
        ):
            assert CONFIG.get("allow_direct") is None
            with pytest.raises(StreamMissing):  # the audit is not read so
                await reader.at(STREAM, 1)
            with pytest.raises(SubjectNotPermitted):
                await of_agents.last(EPISODES, AT.episodes("of", "*"))
