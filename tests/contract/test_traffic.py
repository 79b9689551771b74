"""What workers and clients really send, as a listener on the server sees it, against the AsyncAPI document."""

import asyncio
import re
from collections import Counter
from contextlib import aclosing
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli.drain import ask
from meshrl.client.context import context_of
from meshrl.client.mesh import Mesh
from meshrl.errors import MeshError
from meshrl.wire import messages
from meshrl.wire.codec import pack, unpack
from meshrl.wire.compressed import decompress
from meshrl.wire.parts import Assembler, is_part
from meshrl.wire.subjects import Subjects
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.policies import random_policy
from schemas.ops import FORMS
from tests.contract.asking import answer, answers_of_lanes, code_of
from tests.contract.reading import asyncapi, fault
from tests.mesh.conftest import until
from tests.mesh.recordings import listed

# No client of this package sends these: act_at_worker is for observations over the payload limit, the other for clients
# without a directory. probe needs a request that is quiet for long; read and keep, a login that may not read itself.
ELSEWHERE = {"act_at_worker", "open_anywhere", "probe", "read", "keep"}
UNANSWERED = {"advertisement", "audit", "recording", "episodes", "about", "rows", "tapping"}


class Remembering:
    """A leased agent."""

    def __init__(self, step: int = 1) -> None:
        self.at = 0
        self.by = step

    def act(self, obs: Any) -> tuple[int, str]:
        self.at += self.by
        return (self.at, "so far")

    def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
        self.at += int(reward)


def _patterns() -> dict[str, re.Pattern[str]]:
    return {
        name: re.compile(re.sub(r"\\{\w+\\}", "[^.]+", re.escape(channel["address"])) + r"\Z")
        for name, channel in asyncapi()["channels"].items()
        if channel["address"] is not None
    }


async def _use_everything(server: EmbeddedServer) -> None:
    envs = EnvWorker(
        {"cartpole": "CartPole-v1"}, url=server.url, allow=("gravity",), allow_kwargs=("sutton_barto_reward",), slots=16
    )
    agents = AgentWorker({"random": random_policy, "remembering": Remembering}, url=server.url, slots=1)
    async with envs, agents, Mesh(server.url) as mesh:
        env = await mesh.env("cartpole", kwargs={"sutton_barto_reward": False}, render_mode="rgb_array")
        obs, _ = await env.reset(seed=3, options={"low": -0.01, "high": 0.01})
        agent = await mesh.agent("random", env=env)
        await env.step(await agent.act(obs, seed=1, step=0))
        await env.render()
        await env.state()
        await env.get_attr("gravity")
        await env.set_attr("gravity", 9.0)
        for refused in (env.call("close"), env.get_attr("_private"), mesh.env("cartpole", kwargs={"x": 1})):
            with pytest.raises(MeshError):
                await refused
        leased = await mesh.agent("remembering", stateful=True)
        await leased.reset(seed=1)
        assert await leased.act(obs) == (1, "so far")
        await leased.observe(1.0, False, False)
        with pytest.raises(MeshError):
            await mesh.agent("remembering", stateful=True, wait=0.3)
        await env.close()
        await _use_recordings(mesh, envs)
        await _use_a_session_that_is_lost(mesh, envs)
        await _use_vectors(mesh)
        await _use_pools(mesh)
        await _use_shards_that_are_lost(mesh, envs)
        await _break_rules(server, envs)
        await until(lambda: not list(envs.table), "what was closed has ended")
        assert await ask(context_of(mesh), envs.id, 1.0) == 0


async def _use_recordings(mesh: Mesh, worker: EnvWorker) -> None:
    """An episode that is recorded with all there is, and run again."""
    async with (
        await mesh.env("cartpole", record="actions") as watched,
        aclosing(mesh.tap("cartpole", watched.session_id)) as seen,
    ):
        first = asyncio.ensure_future(anext(seen))
        while not first.done():
            await watched.reset(seed=1)
            await watched.step(1)
            await asyncio.sleep(0.05)
        told = worker.recorded.recorded
    async with await mesh.env("cartpole", record="full", labels={"run": "a"}, policy="random") as env:
        await env.reset(seed=1, options={"low": -0.01, "high": 0.01})
        for _ in range(5):
            await env.step(1)
        await env.set_attr("gravity", 9.0)
        await env.reset()
        await env.step(1)
    # Who hears everything here keeps the server from saying that nobody listens: the streams have to be there.
    await until(lambda: worker.recorded.recorded >= told + 8, "what it did is stored")
    (ended, _) = await listed(mesh, "cartpole", 2, labels={"run": "a"})
    assert await mesh.verify(ended.episode_id)


async def _use_a_session_that_is_lost(mesh: Mesh, worker: EnvWorker) -> None:
    """And is opened again where it was, by a replay."""
    env = await mesh.env("cartpole", on_loss="resume")
    await env.reset()
    await env.step(1)
    await env.set_attr("gravity", 9.7)
    (session,) = [session for session in worker.table if session.id == env.session_id]
    worker._execution.end(session, "session_expired")
    await env.step(0)
    assert await env.get_attr("gravity") == 9.7
    await env.close()


async def _use_shards_that_are_lost(mesh: Mesh, worker: EnvWorker) -> None:
    """The same of a vector and a pool, in the middle of later episodes, whose resets had no seeds."""
    vector = await mesh.vector("cartpole", 2, shards=1, autoreset_mode="SameStep")
    pool = await mesh.pool("cartpole", 2, shards=1, seeding="derived")
    await vector.reset(seed=1)
    await pool.reset(seed=1)
    await pool.recv(min=2)
    for n in range(40):
        if n == 30:
            for session in list(worker.table):
                worker._execution.end(session, "session_expired")
        await vector.step(np.ones(2, np.int64))
        await pool.send(np.ones(2, np.int64), [0, 1])
        await pool.recv(min=2)
    await vector.close()
    await pool.close()


async def _use_vectors(mesh: Mesh) -> None:
    """Every op of a vector, of two shards; episodes end, so that there are infos."""
    vector = await mesh.vector("cartpole", 4, shards=2, render_mode="rgb_array", autoreset_mode="SameStep")
    await vector.reset(seed=1)
    await vector.reset(
        seed=[1, None, 3, None], options={"reset_mask": np.array([True, False, False, True]), "low": 0.0}
    )
    while "final_obs" not in (await vector.step(np.ones(4, np.int64)))[4]:
        pass
    await vector.render()
    await vector.get_attr("gravity")
    await vector.get_attr("gravity", [3, 0])
    await vector.set_attr("gravity", [9.0, 9.5], [1, 2])
    await vector.is_wrapped(gymnasium.wrappers.TimeLimit)
    for refused in (vector.call("close"), vector.get_attr("_private"), mesh.vector("cartpole", 1000, wait=0.3)):
        with pytest.raises(MeshError):
            await refused
    await vector.close()


async def _use_pools(mesh: Mesh) -> None:
    """A pool of two shards; episodes end."""
    pool = await mesh.pool("cartpole", 4, shards=2, seeding="derived")
    await pool.reset(seed=1, options={"low": 0.0, "high": 0.01})
    ended = False
    while not ended:
        batch = await pool.recv(min=2)
        ended = "final_obs" in batch.infos
        await pool.send(np.ones(len(batch.env_ids), np.int64), batch.env_ids)
    await pool.reset(env_ids=[2])
    await pool.close()


async def _break_rules(server: EmbeddedServer, worker: EnvWorker) -> None:
    """What no client of this package does: one that skips a number on some lanes, and names others in vain."""
    async with connect(server.url) as connection:
        at = Subjects()
        asked = {"session": "rough", "name": "cartpole", "form": "pool", "num_envs": 3}
        await answer(connection, at.worker(worker.id, "open", connection.user), [pack(asked)])
        reset = at.session(worker.id, connection.user, "rough", "reset")
        lanes, seqs = np.arange(3), np.array([1, 2, 1])
        told = await answers_of_lanes(connection, reset, pack({"epoch": 1, "lanes": lanes, "seqs": seqs}))
        (error,) = [frame for frame in told if "error" in frame]
        assert (error["error"]["code"], error["lanes"].tolist(), error["seqs"].tolist()) == ("sequence_gap", [1], [2])
        assert sorted(lane for frame in told if "obs" in frame for lane in frame["lanes"].tolist()) == [0, 2]
        beyond = {"epoch": 1, "lanes": np.array([3]), "seqs": np.array([1])}
        assert code_of(await answer(connection, reset, [pack(beyond)])) == "malformed_message"
        close = at.session(worker.id, connection.user, "rough", "close")
        await answer(connection, close, [messages.Close(epoch=1).to_wire()])


async def test_everything_that_the_code_sends_is_on_a_channel_and_valid(server: EmbeddedServer) -> None:
    heard: list[tuple[str, str, bytes]] = []
    async with connect(server.url) as connection:
        await connection.subscribe(">", lambda *message: heard.append(message), join=False)
        await _use_everything(server)
        await connection.flush()
    patterns, document = _patterns(), asyncapi()
    operations = {op["channel"]["$ref"].rpartition("/")[2]: (name, op) for name, op in document["operations"].items()}
    asked: dict[str, tuple[str, str]] = {}  # reply subject: its channel, and the form of its session
    forms: dict[str, str] = {}  # of sessions
    seen: Counter[str] = Counter()
    joining = Assembler()
    for subject, reply, data in heard:
        body = data
        if is_part(data):
            assert fault("part", data) == ""
            whole = joining.feed(f"{subject} {reply}", data, 0.0)
            if whole is None:
                continue
            body = whole
        if subject.startswith(("$", "meshrl.describe.")) or (subject.startswith("_INBOX.") and subject not in asked):
            continue  # JetStream's, micro services'
        if subject in asked:
            if not body:
                continue  # the server's own word that nobody listens
            channel, form = asked[subject]
            _, operation = operations[channel]
            names = [ref["$ref"].rpartition("/")[2] for ref in operation["reply"]["messages"]]
            candidates = ["error"] if "error" in unpack(body) else _of_form(names, form)
            faults = [fault(name, body) for name in candidates]
            assert "" in faults, f"{channel}: {faults}"
            seen[f"answer to {form}{channel}"] += 1
            continue
        found = [name for name, pattern in patterns.items() if pattern.match(subject)]
        assert len(found) == 1, f"{subject} is on {found}"
        (channel,) = found
        if channel == "open":
            opened = unpack(body)
            assert isinstance(opened, dict)
            forms[opened["session"]] = {"single": ""}.get(opened.get("form", "single"), f"{opened.get('form')}_")
        form = forms[subject.split(".")[6]] if channel.startswith("session_") else ""
        names = _of_form(list(document["channels"][channel]["messages"]), form)
        if channel in {"recording", "about", "rows"}:
            body = decompress(body, 1 << 24)
            names = ["chunk" if "n" in unpack(body) else "recorded"]
        (message,) = names
        assert fault(message, body) == "", f"{subject}: {fault(message, body)}"
        seen[f"{form}{channel}"] += 1
        if reply and "reply" in operations[channel][1]:
            asked[reply] = channel, form
    told = {f"{form}session_{op}" for form, table in FORMS.items() for op in table}
    channels = {name for name in patterns if not name.startswith("session_")} | {"session_close"} | told
    channels -= ELSEWHERE
    answered = {f"answer to {name}" for name in channels - UNANSWERED}
    assert set(seen) >= channels | answered, (channels | answered) - set(seen)


def _of_form(names: list[str], form: str) -> list[str]:
    """The messages of a channel that sessions of that form have: ``vector_`` and the like stand before the others."""
    if form and any(name.startswith(form) for name in names):
        return [name for name in names if name.startswith(form)]
    return [name for name in names if not name.startswith(("vector_", "pool_", "error"))]
