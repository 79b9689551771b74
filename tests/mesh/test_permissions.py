"""Who may do what on a real server, with the very files that ``meshrl secure init`` wrote.

The matrix says it role by role; below, everything that each role is for is done under these permissions.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.errors import LoginRefused, MeshError, MeshUnreachable, SubjectNotPermitted, UnknownName
from meshrl.protocol.roles import ROLES
from meshrl.wire.messages import Open
from meshrl.wire.subjects import Subjects
from meshrl.worker.policies import random_policy
from tests.mesh.conftest import until
from tests.mesh.envs import Counter, Picture
from tests.mesh.secured_server import Secured, cli, init, secured_server
from tests.mesh.test_agents import Remembers

AT = Subjects()
RED = ["--team", "red", "--learner", "ann", "--learner", "bob"]


@asynccontextmanager
async def two_teams(home: Path) -> AsyncIterator[Secured]:
    """A server with the teams red (whose learners are ann and bob) and blue."""
    init(home, *RED)
    init(home, "--team", "blue")
    async with secured_server(home) as server:
        yield server


# --------------------------------------------------------------------------- the matrix

E, A, L, B, O = ROLES  # env worker, agent worker, learner, observer, operator  # noqa: E741
WORKERS, CLIENTS, ALL = {E, A}, {L, O}, set(ROLES)


@dataclass(frozen=True)
class Users:
    """The tokens in subjects: of the login that tries, and of ann, a learner that is another."""

    me: str
    ann: str


Subject = Callable[[Users], str]
# What is tried, whether by publishing or subscribing (with a queue group behind the subject), and who may.
MATRIX: list[tuple[str, str, Subject, set[Any]]] = [
    ("ask who is there", "publish", lambda _: AT.ask, {L, B, O}),
    ("hear who is there", "subscribe", lambda _: AT.advertisements, {L, B, O}),
    ("hear its own replies", "subscribe", lambda u: f"_INBOX.{u.me}.mine.*", ALL),
    ("open at a worker", "publish", lambda u: AT.worker("e1", "open", u.me), CLIENTS),
    ("open at any worker", "publish", lambda u: AT.any_open("counter", u.me), CLIENTS),
    ("renew", "publish", lambda u: AT.worker("e1", "renew", u.me), CLIENTS),
    ("probe", "publish", lambda u: AT.worker("e1", "probe", u.me), {L, B, O}),
    ("have a worker leave", "publish", lambda u: AT.worker("e1", "drain", u.me), {O}),
    ("have it leave as another", "publish", lambda u: AT.worker("e1", "drain", u.ann), set()),
    ("act at any worker", "publish", lambda u: AT.any_act("random", u.me), CLIENTS),
    ("act at a worker", "publish", lambda u: AT.worker("a1", "act", u.me), CLIENTS),
    ("step its own session", "publish", lambda u: AT.session("e1", u.me, "s", "step"), CLIENTS),
    ("close its own session", "publish", lambda u: AT.session("e1", u.me, "s", "close"), CLIENTS),
    # in another's name
    ("hear another's replies", "subscribe", lambda u: f"_INBOX.{u.ann}.>", set()),
    ("hear everybody's replies", "subscribe", lambda _: "_INBOX.>", set()),
    ("hear everything", "subscribe", lambda _: ">", set()),
    ("open as another", "publish", lambda u: AT.worker("e1", "open", u.ann), set()),
    ("open anywhere as another", "publish", lambda u: AT.any_open("counter", u.ann), set()),
    ("renew as another", "publish", lambda u: AT.worker("e1", "renew", u.ann), set()),
    ("probe as another", "publish", lambda u: AT.worker("e1", "probe", u.ann), set()),
    ("act as another", "publish", lambda u: AT.any_act("random", u.ann), set()),
    ("step another's session", "publish", lambda u: AT.session("e1", u.ann, "s", "step"), set()),
    ("close another's session", "publish", lambda u: AT.session("e1", u.ann, "s", "close"), set()),
    # as a worker
    ("advertise an env", "publish", lambda _: AT.advertisement("env", "counter", "e1"), {E}),
    ("advertise an agent", "publish", lambda _: AT.advertisement("agent", "random", "a1"), {A}),
    ("answer as a worker", "publish", lambda u: f"_INBOX.{u.ann}.1.2", WORKERS),
    ("hear opens", "subscribe", lambda _: AT.at_worker("e1", "open"), WORKERS),
    ("hear sessions", "subscribe", lambda _: AT.sessions("e1"), WORKERS),
    ("hear who asks", "subscribe", lambda _: AT.ask, WORKERS),
    ("take opens in turn", "subscribe", lambda _: f"{AT.any_open('counter', '*')} open", {E}),
    ("take acts in turn", "subscribe", lambda _: f"{AT.any_act('random', '*')} act", {A}),
    ("hear opens that others take", "subscribe", lambda _: AT.any_open("counter", "*"), set()),
    ("hear acts that others take", "subscribe", lambda _: AT.any_act("random", "*"), set()),
    # recordings and live views; the audit
    ("record", "publish", lambda _: AT.recording("counter", "s"), {E}),
    ("say which episodes there are", "publish", lambda _: AT.episodes("counter", "s"), {E}),
    ("read recordings", "publish", lambda _: "$JS.API.DIRECT.GET.MESHRL_EPISODES", {E, O}),
    ("have recordings read", "publish", lambda u: AT.recordings("read", u.me), {L, B, O}),
    ("have recordings read as another", "publish", lambda u: AT.recordings("read", u.ann), set()),
    ("have a position kept", "publish", lambda u: AT.recordings("keep", u.me), {L}),
    ("read and keep for others", "subscribe", lambda _: f"{AT.recordings('read', '*')} recordings", {E}),
    ("hear what others read for", "subscribe", lambda _: AT.recordings("read", "*"), set()),
    ("hear a recording as it is made", "subscribe", lambda _: AT.recording("counter", "s"), set()),
    ("show a live view", "publish", lambda _: f"{AT.prefix}tap.counter.s", {E}),
    ("say that somebody watches", "publish", lambda u: AT.tapping(u.me), {B, O}),
    ("hear who watches", "subscribe", lambda _: AT.tapping("*"), {E}),
    ("see a live view", "subscribe", lambda _: f"{AT.prefix}tap.counter.s", {B, O}),
    ("say what was done", "publish", lambda _: f"{AT.prefix}audit.e1", WORKERS),
    ("hear what was done", "subscribe", lambda _: f"{AT.prefix}audit.*", {O}),
    ("read a stream", "publish", lambda _: "$JS.API.STREAM.MSG.GET.REC", {O}),
    ("purge a stream", "publish", lambda _: "$JS.API.STREAM.PURGE.REC", set()),
    ("delete a stream", "publish", lambda _: "$JS.API.STREAM.DELETE.REC", set()),
    ("change a stream", "publish", lambda _: "$JS.API.STREAM.UPDATE.REC", set()),
    ("delete a message", "publish", lambda _: "$JS.API.STREAM.MSG.DELETE.REC", set()),
    ("put a backup over a stream", "publish", lambda _: "$JS.API.STREAM.RESTORE.REC", set()),
    ("take a copy of a stream", "publish", lambda _: "$JS.API.STREAM.SNAPSHOT.REC", set()),
    ("take a consumer away", "publish", lambda _: "$JS.API.CONSUMER.DELETE.REC.c", set()),
    # the server
    ("ask services who they are", "publish", lambda _: "$SRV.PING.meshrl-env", {B, O}),
    ("hear the server's events", "subscribe", lambda _: "$SYS.>", set()),
    ("ask the server", "publish", lambda _: "$SYS.REQ.SERVER.PING", set()),
]
# Of each role, a login that is not ann's.
NAMES = {E: "env-worker", A: "agent-worker", L: "bob", B: "observer", O: "operator"}


async def may(bus: Connection, how: str, what: str) -> bool:
    """Whether the server lets this connection publish or subscribe there."""
    if how == "publish":
        refused: list[MeshError] = []
        rid = bus.request(what, b"", lambda _: None, on_fail=refused.append)
        await bus.flush()  # what the server has against it comes before its PONG
        bus.forget(rid)
        assert all(isinstance(exc, SubjectNotPermitted) for exc in refused)
        return not refused
    subject, _, queue = what.partition(" ")
    try:
        await (await bus.subscribe(subject, lambda *_: None, queue=queue)).close()
    except SubjectNotPermitted:
        return False
    return True


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_do_what_the_matrix_says_and_nothing_else(role: Any, tmp_path: Path) -> None:
    async with (
        two_teams(tmp_path / "d") as server,
        connect(server.url, credentials=server.login("ann")) as ann,
        connect(server.url, credentials=server.login(NAMES[role]), on_error=lambda _: None) as bus,
    ):
        users = Users(bus.user, ann.user)
        assert users.me != users.ann
        found = {act: await may(bus, how, subject(users)) for act, how, subject, _ in MATRIX}
    assert found == {act: role in roles for act, _, _, roles in MATRIX}


# --------------------------------------------------------------------------- what must not come about


async def test_a_learner_reaches_neither_anothers_session_nor_its_replies(tmp_path: Path) -> None:
    heard: list[str] = []
    async with (
        two_teams(tmp_path / "d") as server,
        EnvWorker({"counter": Counter}, server.url, credentials=server.login("env-worker")) as worker,
        Mesh(server.url, credentials=server.login("ann")) as ann,
        await ann.env("counter") as env,
        connect(server.url, credentials=server.login("bob"), on_error=lambda _: None) as bob,
    ):
        await env.reset()
        (session,) = worker.table
        with pytest.raises(SubjectNotPermitted):
            await bob.subscribe(f"_INBOX.{session.user}.>", lambda subject, *_: heard.append(subject))
        for op in ("step", "close"):
            with pytest.raises(SubjectNotPermitted):
                await bob.ask(AT.session(worker.id, session.user, session.id, op), b"\x80", 30.0)
        # Under its own name there is no such session: sessions are found by their user.
        answer = await bob.ask(AT.session(worker.id, bob.user, session.id, "close"), b"\x81\xa5epoch\x01", 30.0)
        assert answer is not None
        assert b"existed\xc2" in answer
        assert (await env.step(3))[:2] == (1, 3.0)
        assert heard == []


async def test_an_account_does_not_reach_another_teams_workers(tmp_path: Path) -> None:
    async with (
        two_teams(tmp_path / "d") as server,
        EnvWorker({"counter": Counter}, server.url, credentials=server.login("env-worker", "blue")) as worker,
        Mesh(server.url, credentials=server.login("learner", "blue")) as blue,
        Mesh(server.url, credentials=server.login("ann")) as red,
        connect(server.url, credentials=server.login("ann")) as bus,
    ):
        assert [each.worker for each in await blue.envs()] == [worker.id]
        assert await red.envs() == []
        with pytest.raises(UnknownName):
            await red.env("counter", wait=0.5)
        body = Open(session="s", name="counter").to_wire()
        assert await bus.ask(AT.worker(worker.id, "open", bus.user), body, 30.0) is None, "nobody is there for it"
        assert len(worker.table) == 0


async def test_a_stream_of_recordings_is_whole_whatever_anybody_tries(tmp_path: Path) -> None:
    async with two_teams(tmp_path / "d") as server:
        async with (
            connect(server.url, credentials=server.login("operator")) as operator,
            connect(server.url, credentials=server.login("env-worker")) as worker,
        ):
            made = {"name": "REC", "subjects": [f"{AT.prefix}rec.>"], "storage": "file", "num_replicas": 1}
            assert "error" not in await _js(operator, "STREAM.CREATE.REC", made)
            for n in range(3):
                ack = await worker.ask(f"{AT.prefix}rec.counter.s", b"%d" % n, 30.0)
                assert json.loads(ack or b"{}")["stream"] == "REC"
            changed = await _js(operator, "STREAM.CREATE.REC", {**made, "max_msgs": 1})
            assert "already in use" in changed["error"]["description"], "to make it again does not change it"
        tried: list[tuple[str, dict[str, Any]]] = [
            ("STREAM.PURGE.REC", {}),
            ("STREAM.MSG.DELETE.REC", {"seq": 1}),
            ("STREAM.UPDATE.REC", {**made, "max_msgs": 1}),
            ("STREAM.DELETE.REC", {}),
        ]
        for name in NAMES.values():
            async with connect(server.url, credentials=server.login(name), on_error=lambda _: None) as bus:
                for api, body in tried:
                    with pytest.raises(SubjectNotPermitted):
                        await _js(bus, api, body)
        async with connect(server.url, credentials=server.login("operator")) as operator:
            state = (await _js(operator, "STREAM.INFO.REC", {}))["state"]
            assert (state["messages"], state["first_seq"], state["last_seq"]) == (3, 1, 3)
        async with connect(server.url, credentials=server.login("operator", "blue")) as other:
            assert (await _js(other, "STREAM.INFO.REC", {}))["error"]["code"] == 404


async def _js(bus: Connection, api: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await bus.ask(f"$JS.API.{api}", json.dumps(body).encode(), 30.0)
    assert answer is not None
    read: dict[str, Any] = json.loads(answer)
    return read


async def test_an_observer_sees_who_is_there_and_steps_nothing(tmp_path: Path) -> None:
    async with (
        two_teams(tmp_path / "d") as server,
        EnvWorker({"counter": Counter}, server.url, credentials=server.login("env-worker")) as worker,
        Mesh(server.url, credentials=server.login("observer")) as mesh,
    ):
        assert [each.worker for each in await mesh.envs()] == [worker.id]
        assert (await mesh.describe("counter")).worker == worker.id
        with pytest.raises(SubjectNotPermitted, match="the server's operator grants that"):
            await mesh.env("counter")
        assert len(worker.table) == 0


async def test_nobody_gets_in_without_a_login_or_with_one_that_was_revoked(tmp_path: Path) -> None:
    from meshrl.bus.login import Credentials
    from meshrl.cli import main

    home = tmp_path / "d"
    async with two_teams(home) as server:
        with pytest.raises(LoginRefused):
            async with connect(server.url, credentials=Credentials(tls_ca=home / "tls" / "ca.pem")):
                pass
        copy = tmp_path / "stolen"
        copy.write_text(server.login("bob").read_text())
        async with connect(server.url, credentials=copy, on_error=lambda _: None) as bob:
            gone = asyncio.Event()
            bob.on_disconnect.append(gone.set)
            assert main(["secure", "revoke", str(home), "red/bob"]) == 0
            server.reload()
            async with asyncio.timeout(30.0):
                await gone.wait()
        with pytest.raises(LoginRefused):
            async with connect(server.url, credentials=copy):
                pass
        async with connect(server.url, credentials=server.login("ann")):
            pass


async def test_a_team_has_the_connections_and_subscriptions_that_the_operator_gives_it(tmp_path: Path) -> None:
    home = tmp_path / "d"
    init(home, *RED)
    record = json.loads((home / "logins.json").read_text())
    record["teams"]["red"]["limits"] |= {"max_connections": 2, "max_subscriptions": 5}
    (home / "logins.json").write_text(json.dumps(record))
    init(home, "--team", "red", "--team", "blue")
    errors: list[Exception] = []
    async with (
        secured_server(home) as server,
        connect(server.url, credentials=server.login("ann")),
        connect(server.url, credentials=server.login("env-worker"), on_error=errors.append) as worker,
    ):
        with pytest.raises(MeshUnreachable, match=r"it says .*maximum .*connections.*ask its operator to raise"):
            async with connect(server.url, credentials=server.login("bob"), timeout=2.0):
                pass
        async with connect(server.url, credentials=server.login("learner", "blue")):
            for n in range(6):
                await worker.subscribe(AT.at_worker(f"e{n}", "open"), lambda *_: None)
            await until(lambda: any("maximum subscriptions" in str(exc) for exc in errors), "there is one too many")


# --------------------------------------------------------------------------- what must work


class Big(Picture):
    """Observations of 6 MB: over what the server takes in one message."""

    def __init__(self) -> None:
        super().__init__((1024, 2048, 3))
        self.action_space = spaces.Discrete(2)


async def test_everything_that_learners_and_workers_do_works_under_their_permissions(tmp_path: Path) -> None:
    async with two_teams(tmp_path / "d") as server:
        given: dict[str, Any] = {"url": server.url, "credentials": server.login("env-worker")}
        envs: dict[str, Any] = {"counter": Counter, "cartpole": "CartPole-v1", "big": Big}
        async with (
            EnvWorker(envs, slots=8, allow=("add",), lease_s=1.5, **given) as one,
            EnvWorker(envs, slots=8, allow=("add",), lease_s=1.5, **given) as two,
            AgentWorker(
                {"random": random_policy, "remembers": Remembers},
                server.url,
                credentials=server.login("agent-worker"),
            ) as agents,
            Mesh(server.url, credentials=server.login("ann")) as mesh,
            Mesh(server.url, credentials=server.login("bob")) as other,
        ):
            await _singles(mesh, [one, two])
            await asyncio.gather(_vectors(mesh), _pools(other))
            await _agents(mesh, agents)
            await _large(mesh)
            report = await mesh.evaluate("cartpole", "random", episodes=2, concurrency=2)
            assert len(report.episodes) == 2


async def _singles(mesh: Mesh, workers: list[EnvWorker]) -> None:
    async with await mesh.env("counter", render_mode=None) as env:
        await env.reset(seed=1)
        assert await env.call("add", 1, 2) == 3
        assert await env.get_attr("count") == 0
        assert (await env.state()).phase == "running"
        (session,) = [session for worker in workers for session in worker.table]
        until_s = time.monotonic() + 3 * 1.5
        # Longer than three leases could be without the keeper, which has a connection of its own.
        await until(lambda: time.monotonic() > until_s and session.lease_until > until_s, "it is renewed")
        assert (await env.step(5))[:2] == (1, 5.0)


async def _vectors(mesh: Mesh) -> None:
    vector = await mesh.vector("cartpole", 6, shards=2)
    await vector.reset(seed=1)
    for _ in range(5):
        await vector.step(np.zeros(6, np.int64))
    await vector.close()


async def _pools(mesh: Mesh) -> None:
    pool = await mesh.pool("cartpole", 4, shards=2)
    await pool.reset(seed=1)
    for _ in range(5):
        batch = await pool.recv(min=2)
        await pool.send(np.zeros(len(batch.env_ids), np.int64), batch.env_ids)
    await pool.close()


async def _agents(mesh: Mesh, worker: AgentWorker) -> None:
    leased = await mesh.agent("remembers", stateful=True)
    await leased.reset(seed=1)
    assert [await leased.act(0), await leased.act(0)] == [1, 2]
    await leased.close()
    async with await mesh.env("cartpole") as env:
        agent = await mesh.agent("random", env=env)
        obs, _ = await env.reset(seed=1)
        assert env.action_space.contains(await agent.act(obs, seed=1))


async def _large(mesh: Mesh) -> None:
    """Answers in parts, to an inbox; and acts in parts, to one worker."""
    async with await mesh.env("big") as env:
        obs, _ = await env.reset(seed=1)
        assert obs.nbytes > 6_000_000
        agent = await mesh.agent("random", env=env)
        obs, *_ = await env.step(await agent.act(obs, seed=1))
        assert (obs == 1).all()


async def test_the_operators_and_the_observers_commands_work(tmp_path: Path) -> None:
    async with (
        two_teams(tmp_path / "d") as server,
        EnvWorker({"cartpole": "CartPole-v1"}, server.url, credentials=server.login("env-worker")) as worker,
        AgentWorker({"random": random_policy}, server.url, credentials=server.login("agent-worker")) as agents,
    ):
        listing = json.loads(await cli(server, "operator", "ls", "--json"))
        assert [each["worker"] for each in listing["envs"]] == [worker.id]
        assert [each["worker"] for each in listing["agents"]] == [agents.id]
        assert json.loads(await cli(server, "observer", "ls", "--json")) == listing
        examined = json.loads(await cli(server, "operator", "doctor", "--json"))
        rows = {row["what"]: row for row in examined["rows"]}
        for what in ("mesh", "server", "max_payload", "JetStream", "workers"):
            assert rows[what]["status"] == "ok", rows[what]
        report = json.loads(await cli(server, "operator", "check", "cartpole", "--episodes", "1", "--json"))
        assert not [result for result in report["results"] if result["outcome"] == "failed"]
