"""The audit on a real server: workers say it, JetStream keeps it, an operator reads it back, and nobody deletes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.streams import make_stream
from meshrl.cli.audit import CONFIG, STREAM, entries
from meshrl.errors import EnvError, KwargsNotAllowed, SubjectNotPermitted, UsageError
from meshrl.wire.codec import pack
from meshrl.wire.messages import Open
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Breaks, Counter
from tests.mesh.own_server import own_server
from tests.mesh.secured_server import cli, init, run_cli, secured_server

AT = Subjects()


async def test_who_opened_what_with_which_kwargs_and_how_it_ended_is_read_back(tmp_path: Path) -> None:
    home = tmp_path / "d"
    init(home, "--team", "red", "--learner", "ann", "--learner", "bob")
    async with secured_server(home) as server:
        assert "is kept in the stream MESHRL_AUDIT\n" in await cli(server, "operator", "audit", "--create")
        envs: dict[str, Any] = {"counter": Counter, "breaks": Breaks}
        given: dict[str, Any] = {"url": server.url, "credentials": server.login("env-worker"), "lease_s": 1.0}
        async with (  # the worker is the first to go
            Mesh(server.url, credentials=server.login("ann")) as ann,
            connect(server.url, credentials=server.login("bob")) as bob,
            EnvWorker(envs, allow_kwargs=("start", "at"), **given) as worker,
        ):
            await (await ann.env("counter", {"start": 5})).close()
            broken = await ann.env("breaks", {"at": "step"})
            await broken.reset()
            with pytest.raises(EnvError):
                await broken.step(0)
            with pytest.raises(EnvError):
                await ann.env("breaks", {"at": "constructor"})
            with pytest.raises(KwargsNotAllowed):
                await ann.env("counter", {"shell": "\x1b[2J"})
            vector = await ann.vector("counter", 3)
            # Bob opens, and is not heard of again.
            body = Open(session="gone", name="counter").to_wire()
            assert await bob.ask(AT.worker(worker.id, "open", bob.user), body, 30.0) is not None
            await until(lambda: worker.table.held(bob.user) == 0, "its lease runs out")
            assert vector.num_envs == 3  # still there when its worker stops
        told = await cli(server, "operator", "audit", "--json", "--names", str(home))
        lines = [json.loads(line) for line in told.splitlines()]
        assert [line["said"]["n"] for line in lines] == list(range(1, len(lines) + 1)), "none is missing"
        assert {line["said"]["worker"] for line in lines} == {worker.id}
        said = [
            (line["login"], *(line["said"].get(fact) for fact in ("event", "name", "kwargs", "reason", "code", "type")))
            for line in lines
        ]
        assert said == [
            ("red/ann", "opened", "counter", {"start": 5}, None, None, None),
            ("red/ann", "ended", "counter", None, "closed", None, None),
            ("red/ann", "opened", "breaks", {"at": "step"}, None, None, None),
            ("red/ann", "ended", "breaks", None, "ended", "env_error", "RuntimeError"),
            ("red/ann", "opened", "breaks", {"at": "constructor"}, None, None, None),
            ("red/ann", "ended", "breaks", None, "not_constructed", "env_error", "RuntimeError"),
            ("red/ann", "refused", "counter", {"shell": "\x1b[2J"}, None, "kwargs_not_allowed", None),
            ("red/ann", "opened", "counter", None, None, None, None),
            ("red/bob", "opened", "counter", None, None, None, None),
            ("red/bob", "ended", "counter", None, "session_expired", None, None),
            ("red/ann", "ended", "counter", None, "worker_stopped", None, None),
        ]
        (opened,) = [line["said"] for line in lines if line["said"].get("form") and line["said"]["event"] == "opened"]
        assert (opened["form"], opened["num_envs"]) == ("vector", 3)
        assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
        await _nobody_takes_it_away(server, len(lines))


async def _nobody_takes_it_away(server: Any, count: int) -> None:
    for name in ("operator", "env-worker", "ann", "observer"):
        async with connect(server.url, credentials=server.login(name), on_error=lambda _: None) as bus:
            for api in ("PURGE", "DELETE", "UPDATE"):
                with pytest.raises(SubjectNotPermitted):
                    await bus.ask(f"$JS.API.STREAM.{api}.MESHRL_AUDIT", b"{}", 30.0)
            if name != "operator":
                with pytest.raises(SubjectNotPermitted):
                    await entries(bus, "default", last=0, user=None, known={})
    async with connect(server.url, credentials=server.login("operator")) as operator:
        assert len((await entries(operator, "default", last=0, user=None, known={})).entries) == count


async def test_entries_wait_while_the_server_is_away_and_one_that_is_lost_shows(server: EmbeddedServer) -> None:
    async with connect(server.url) as bus:
        with pytest.raises(UsageError, match=r"no audit is kept at .*; make it with meshrl audit --create"):
            await entries(bus, "default", last=0, user=None, known={})
        assert [await make_stream(bus, STREAM, CONFIG) for _ in range(2)] == [True, False]
    async with EnvWorker({"counter": Counter}, server.url, lease_s=60.0) as worker, Mesh(server.url) as mesh:
        env = await mesh.env("counter")
        await env.reset()
        async with connect(server.url) as bus:
            await until(lambda: _count(bus, 1), "the first is kept")
        server.kill()
        (session,) = worker.table
        worker._execution.end(session, "closed")
        await until(lambda: len(worker.table) == 0, "it has ended, with nobody to tell")
        server.restart()
        async with connect(server.url) as bus:
            await until(lambda: _count(bus, 2), "the second is kept")
            # Another's entry, and what is none.
            bus.publish(AT.audit("e1"), b"nonsense")
            other = {"v": 1, "event": "opened", "worker": "e1", "user": "u", "session": "s", "epoch": 1, "kind": "env"}
            for n in (7, 9):
                bus.publish(AT.audit("e1"), pack({**other, "name": "x", "n": n}))
            await bus.flush()
            found = await entries(bus, "default", last=0, user=None, known={})
            assert [(entry.said.worker, entry.said.n) for entry in found.entries] == [
                *((worker.id, n) for n in (1, 2)),
                *(("e1", n) for n in (7, 9)),
            ]
            assert found.lost == {"e1": 1}
            assert (await entries(bus, "other", last=0, user=None, known={})).entries == []
            newest = await entries(bus, "default", last=2, user="u", known={})
            assert [entry.said.n for entry in newest.entries] == [7, 9]
        await env.close()
    shown = await run_cli({"MESHRL_URL": server.url}, "audit")
    assert "counter: closed after" in shown
    assert "1 entries of worker e1 between these were lost" in shown


async def _count(bus: Any, count: int) -> bool:
    return len((await entries(bus, "default", last=0, user=None, known={})).entries) == count


async def test_a_server_without_jetstream_says_so(tmp_path: Path) -> None:
    async with own_server(tmp_path, {}) as server, connect(server.url()) as bus:
        with pytest.raises(UsageError, match=r"has no JetStream.*--jetstream"):
            await entries(bus, "default", last=0, user=None, known={})


async def test_a_worker_serves_where_nobody_keeps_the_audit_and_says_it_to_who_listens(tmp_path: Path) -> None:
    heard: list[str] = []
    async with own_server(tmp_path, {}) as server, connect(server.url()) as ear:
        await ear.subscribe(f"{AT.prefix}audit.*", lambda subject, *_: heard.append(subject))
        async with EnvWorker({"counter": Counter}, server.url()) as worker, Mesh(server.url()) as mesh:
            async with await mesh.env("counter") as env:
                assert (await env.reset())[0] == 0
            await until(lambda: len(heard) == 2, "both are said")
        assert heard == [AT.audit(worker.id)] * 2
