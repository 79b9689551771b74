"""Recordings under logins of least permissions: workers write, operators make the streams, and others read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.storing import Reader
from meshrl.cli import main
from meshrl.cli.audit import CONFIG, STREAM
from meshrl.errors import StreamMissing, SubjectNotPermitted
from meshrl.recording.streams import EPISODES
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.recordings import drive, listed
from tests.mesh.secured_server import init, secured_server

AT = Subjects()


async def test_what_workers_record_is_read_by_those_who_may(tmp_path: Path) -> None:
    home = tmp_path / "d"
    init(home, "--team", "red", "--learner", "ann", "--learner", "bob")
    init(home, "--team", "blue")
    async with secured_server(home) as server:
        operator = ["--url", server.url, "--credentials", str(server.login("operator"))]
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
                with pytest.raises(SubjectNotPermitted):
                    await anext(mesh.episodes())
            assert [one async for one in blue.episodes()] == [], "another team has nothing of it"
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
