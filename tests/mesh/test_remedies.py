"""Every typed error, raised where it really comes from, with the words by which its message says what to do.

An error without a row here fails the last test: whoever adds a class says how it comes about, and what to do then.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl import AgentWorker, EnvWorker, Mesh, RemoteEnv, errors
from meshrl.adapters.datasets import export_npz
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.storing import store
from meshrl.bus.streams import make_stream
from meshrl.cli.supervisor import Supervisor, WorkerProcess
from meshrl.client.context import context_of
from meshrl.client.tap import tapped
from meshrl.errors import MeshError, from_wire
from meshrl.recording.streams import stream_of
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Open, parse
from meshrl.wire.spaces import describe
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.dangerous_envs import Dangerous
from tests.mesh.envs import Breaks, Counter, Sampled
from tests.mesh.own_server import own_server
from tests.mesh.recordings import listed

SUBJECTS = Subjects()


class Particular:
    """An agent for pictures alone."""

    observation_space = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def act(self, obs: Any) -> int:
        return 0


def failing(obs: Any) -> int:
    raise ZeroDivisionError("no way to act")


class OddSpace(spaces.Space[Any]):
    """No converter knows it."""


@dataclass
class Stage:
    """A mesh with a worker of either kind, a client, and a bare connection."""

    url: str
    home: Path
    worker: EnvWorker
    mesh: Mesh
    raw: Connection

    async def env(self, name: str = "counter", **kwargs: Any) -> RemoteEnv:
        return await self.mesh.env(name, kwargs)

    async def counting(self, **kwargs: Any) -> RemoteEnv:
        env = await self.env(**kwargs)
        await env.reset(seed=0)
        return env

    async def ask(self, subject: str, body: bytes) -> Any:
        """An answer to the bare connection; the error in it is raised."""
        answer = await self.raw.ask(subject, body, 20.0)
        assert answer is not None
        value = unpack(answer)
        if "error" in value:
            raise from_wire(value["error"])
        return value

    async def open(self, session: str, **fields: Any) -> None:
        body = Open(session=session, name="counter", **fields).to_wire()
        await self.ask(SUBJECTS.worker(self.worker.id, "open", self.raw.user), body)

    async def request(self, op: str, seq: int, **fields: Any) -> Any:
        subject = SUBJECTS.session(self.worker.id, self.raw.user, "bare", op)
        return await self.ask(subject, pack({"epoch": 1, "lane": 0, "seq": seq, **fields}))

    async def bare_session(self, **fields: Any) -> None:
        await self.open("bare", **fields)
        await self.request("reset", 1)


@asynccontextmanager
async def staged(url: str, home: Path) -> AsyncIterator[Stage]:
    async with (
        EnvWorker({"counter": Counter, "breaks": Breaks}, url, slots=2, allow_kwargs=("at", "slow_s")) as worker,
        AgentWorker({"particular": Particular(), "failing": failing}, url),
        Mesh(url) as mesh,
        connect(url) as raw,
    ):
        yield Stage(url, home, worker, mesh, raw)


Raise = Callable[[Stage], Awaitable[object]]
CASES: dict[type[MeshError], tuple[Raise, str]] = {}


def case(error: type[MeshError], remedy: str) -> Callable[[Raise], Raise]:
    """Register what raises ``error``; ``remedy`` is found in its message."""

    def add(raise_: Raise) -> Raise:
        assert error not in CASES
        CASES[error] = (raise_, remedy)
        return raise_

    return add


# --------------------------------------------------------------------------- you


@case(errors.UsageError, "render_mode")
async def frame_without_a_mode(stage: Stage) -> None:
    await (await stage.counting()).render()


@case(errors.ConcurrentStep, "await one before the next")
async def two_steps_at_once(stage: Stage) -> None:
    env = await stage.counting(slow_s=0.3)
    first = asyncio.create_task(env.step(1))
    await asyncio.sleep(0)
    try:
        await env.step(2)
    finally:
        await first


@case(errors.StepUnsettled, r"`await env\.settle\(\)` gives its result, or reset")
async def step_after_a_cancelled_one(stage: Stage) -> None:
    env = await stage.counting(slow_s=0.1)
    cancelled = asyncio.create_task(env.step(1))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    await env.step(1)


@case(errors.NothingUnsettled, "no step, reset, call or set_attr was cancelled")
async def settle_without_a_reason(stage: Stage) -> None:
    await (await stage.counting()).settle()


@case(errors.NothingUnderWay, "send actions first")
async def recv_of_what_was_never_sent(stage: Stage) -> None:
    async with await stage.mesh.pool("counter", 2) as pool:
        await pool.recv()


@case(errors.SessionClosed, "open a new one")
async def step_of_a_closed_env(stage: Stage) -> None:
    env = await stage.counting()
    await env.close()
    await env.step(1)


@case(errors.InvalidAction, r"action space: Discrete\(1000000\)")
async def action_outside_the_space(stage: Stage) -> None:
    await (await stage.counting()).step(-1)


@case(errors.ResetNeeded, "call reset")
async def step_before_reset(stage: Stage) -> None:
    await (await stage.env()).step(1)


@case(errors.UnencodableValue, "object")
async def option_that_cannot_travel(stage: Stage) -> None:
    await (await stage.env()).reset(options={"thing": object()})


@case(errors.UnsupportedSpace, r"has no converter; on both sides say: meshrl\.wire\.spaces\.register\(")
async def space_of_ones_own(stage: Stage) -> None:
    describe(OddSpace())


@case(errors.NotAllowed, r"serve it with allow=\('label',\)")
async def attribute_that_is_not_allowed(stage: Stage) -> None:
    await (await stage.counting()).set_attr("label", "mine")


@case(errors.KwargsNotAllowed, r"serve it with allow_kwargs=\('start',\)")
async def kwargs_that_are_not_allowed(stage: Stage) -> None:
    await stage.env(start=5)


@case(errors.SpacesDiffer, "choose another agent, or wrap the env")
async def agent_for_other_observations(stage: Stage) -> None:
    await stage.mesh.agent("particular", env=await stage.env())


@case(errors.InvalidSeed, "a seed is a non-negative integer")
async def seed_below_zero(stage: Stage) -> None:
    await (await stage.env()).reset(seed=-1)


@case(errors.InvalidName, r"Gymnasium id \(Name-v1, module:Name-v1\) nor module:Class")
async def env_that_is_no_name(stage: Stage) -> None:
    EnvWorker({"x": "nonsense"}, stage.url)


# --------------------------------------------------------------------------- the peer


@case(errors.MalformedMessage, "session")
async def open_without_a_session(stage: Stage) -> None:
    await stage.ask(SUBJECTS.worker(stage.worker.id, "open", stage.raw.user), pack({"name": "counter"}))


@case(errors.UnsupportedVersion, "upgrade the older of the two")
async def open_of_another_version(stage: Stage) -> None:
    parse(Open, pack({"v": 2, "session": "s", "name": "counter"}))


@case(errors.MessageTooLarge, "raise max_payload in the server's configuration")
async def open_anywhere_over_the_limit(stage: Stage) -> None:
    body = Open(session="s", name="counter", kwargs={"text": "x" * (5 << 20)}).to_wire()
    await stage.raw.ask(SUBJECTS.any_open("counter", stage.raw.user), body, 20.0)


@case(errors.SequenceGap, "rise by one")
async def request_that_skips_one(stage: Stage) -> None:
    await stage.bare_session()
    await stage.request("step", 3, action=1)


@case(errors.StaleRequest, "request 1 is older than 2")
async def request_that_is_over(stage: Stage) -> None:
    await stage.bare_session()
    await stage.request("step", 2, action=1)
    await stage.request("reset", 1)


@case(errors.LaneBusy, "a lane has one in flight")
async def request_during_a_request(stage: Stage) -> None:
    await stage.bare_session(kwargs={"slow_s": 0.5})
    running = asyncio.create_task(stage.request("step", 2, action=1))
    await until(lambda: any(s.running for s in stage.worker.table), "it runs")
    try:
        await stage.request("step", 3, action=1)
    finally:
        await running


@case(errors.WrongEpoch, "open a new session")
async def request_of_an_old_epoch(stage: Stage) -> None:
    await stage.bare_session()
    await stage.open("bare", epoch=2)
    await stage.request("step", 2, action=1)


# --------------------------------------------------------------------------- the network


@case(errors.MeshUnreachable, r"start one \(meshrl up, docker compose up\) or give its address")
async def server_that_is_not_there(stage: Stage) -> None:
    async with Mesh("nats://127.0.0.1:9", timeout=0.5):
        pass


@case(errors.LoginRefused, r"check user and password in the URL or credentials=")
async def wrong_password(stage: Stage) -> None:
    async with Mesh(stage.url.replace("@", "x@")):
        pass


@case(errors.SubjectNotPermitted, "the server's operator grants that")
async def subject_of_others(stage: Stage) -> None:
    users = [{"user": "ann", "password": "p", "permissions": {"subscribe": "_INBOX.ann.>"}}]
    async with (
        own_server(stage.home, {"authorization": {"users": users}}) as server,
        connect(server.url("ann:p")) as bus,
    ):
        await bus.subscribe("_INBOX.bob.>", lambda *_: None)


@case(errors.RequestTimeout, "no answer on silence within 0.1 s")
async def peer_that_says_nothing(stage: Stage) -> None:
    await stage.raw.subscribe("silence", lambda *_: None)
    await stage.raw.ask("silence", b"x", 0.1)


@case(errors.BusClosed, "the connection to .* (is|was) closed")
async def connection_that_is_closed(stage: Stage) -> None:
    async with connect(stage.url) as bus:
        await bus.close()
        bus.publish("x", b"")


# --------------------------------------------------------------------------- the worker


@case(errors.WorkerError, "no-such-option")
async def worker_process_that_cannot_start(stage: Stage) -> None:
    supervisor = Supervisor([WorkerProcess(1, ["--no-such-option"], stage.url, stage.home, print)], None, print)
    try:
        await supervisor.start()
    finally:
        await supervisor.stop()


@case(errors.UnknownName, "did you mean counter")
async def env_that_nobody_serves(stage: Stage) -> None:
    await stage.mesh.env("conter", wait=0.1)


@case(errors.MeshFull, r"0 of 2 free.*; wait, close sessions, or start more workers")
async def env_of_a_full_mesh(stage: Stage) -> None:
    envs = [await stage.env(), await stage.env()]
    try:
        await stage.mesh.env("counter", wait=0.1)
    finally:
        for env in envs:
            await env.close()


@case(errors.WorkerDraining, "is going away and takes no new sessions")
async def worker_that_goes(stage: Stage) -> None:
    stage.worker.drain(60.0)
    await stage.open("late")


@case(errors.WorkerCondemned, "ends, to be started again: ")
async def worker_that_ends_itself(stage: Stage) -> None:
    async with EnvWorker({"other": Counter}, stage.url) as worker:
        worker.condemn("it holds what never ends")
        await worker.serve_forever()


@case(errors.SessionUnknown, "open a new session")
async def session_that_is_not_there(stage: Stage) -> None:
    await stage.request("reset", 1)


@case(errors.SessionExpired, "open another")
async def session_that_nobody_renewed(stage: Stage) -> None:
    await stage.bare_session()

    def overdue() -> bool:
        for session in stage.worker.table:  # as after fifteen seconds without a renewal
            session.lease_until = 0.0
        return stage.worker.table.free == 2

    await until(overdue, "the sweep ends it")
    await stage.request("step", 2, action=1)


@case(errors.SessionLost, "open ")
async def session_whose_env_raised(stage: Stage) -> None:
    env = await stage.env("breaks", at="step")
    await env.reset()
    with pytest.raises(errors.EnvError):
        await env.step(0)
    await env.step(0)


@case(errors.ReplayDiverged, "open a new one")
async def replay_of_what_was_never_told(stage: Stage) -> None:
    await stage.open("bare", digests="all")
    await stage.request("replay", 1, journal=[["reset", pack({"seed": 1})]], digest=bytes(16))


@case(errors.EnvError, "step raised RuntimeError: the simulator diverged")
async def env_that_raises(stage: Stage) -> None:
    env = await stage.env("breaks", at="step")
    await env.reset()
    await env.step(0)


@case(errors.EnvProcessDied, "was ended by SIGSEGV during step; .*open a new one")
async def env_that_crashes(stage: Stage) -> None:
    async with isolated(stage) as env:
        await env.step(Dangerous.SEGFAULT)


@case(errors.LimitExceeded, "have its operator raise --max-memory")
async def env_that_takes_too_much(stage: Stage) -> None:
    async with isolated(stage, max_memory_bytes=1 << 30) as env:
        await env.step(Dangerous.ALLOCATE)


@case(errors.DeadlineExceeded, "its session is over, open a new one; .* its operator raises --step-deadline")
async def env_that_hangs(stage: Stage) -> None:
    async with isolated(stage, step_deadline_s=1.0) as env:
        await env.step(Dangerous.HANG)


@asynccontextmanager
async def isolated(stage: Stage, **kwargs: Any) -> AsyncIterator[RemoteEnv]:
    """An env in a process of its own, after its reset."""
    async with EnvWorker({"dangerous": Dangerous}, stage.url, isolation="process", **kwargs):
        env = await stage.mesh.env("dangerous")
        await env.reset()
        yield env


@case(errors.AgentError, "act raised ZeroDivisionError: no way to act")
async def agent_that_raises(stage: Stage) -> None:
    await (await stage.mesh.agent("failing")).act(1)


# What stands for a kind of blame, and is never raised itself.
# --------------------------------------------------------------------------- what is stored, and what was recorded


@case(errors.StreamMissing, "an operator makes those of recordings: meshrl recordings NAME")
async def stored_nowhere(stage: Stage) -> None:
    await store(stage.raw, SUBJECTS.recording("counter", "s"), b"", 20.0, message_id="s:1:1")


@case(errors.StorageRefused, "operator makes room, or raises the limit")
async def stored_where_it_is_full(stage: Stage) -> None:
    await make_stream(stage.raw, "FULL", {"subjects": ["full"], "max_bytes": 100, "discard": "new"})
    await store(stage.raw, "full", b"x" * 200, 20.0, message_id="1")


@case(errors.WrongSequence, "read it, and store behind it")
async def stored_behind_another(stage: Stage) -> None:
    await make_stream(stage.raw, "ONE", {"subjects": ["one"]})
    await store(stage.raw, "one", b"1", 20.0, message_id="1")
    await store(stage.raw, "one", b"2", 20.0, message_id="2", after=0)


@case(errors.EpisodeUnknown, "`meshrl episodes` list those that there are")
async def an_episode_that_there_is_not(stage: Stage) -> None:
    await stage.mesh.episode("s.0.0")


async def recorded(stage: Stage, name: str) -> str:
    async with await stage.mesh.env(name, record="actions") as env:
        await env.reset()
        await env.step(0)
    (found,) = await listed(stage.mesh, name, 1)
    return found.episode_id


@case(errors.EpisodeTorn, "`meshrl episodes` list others")
async def an_episode_whose_stream_is_gone(stage: Stage) -> None:
    id_ = await recorded(stage, "counter")
    await stage.raw.ask(f"$JS.API.STREAM.DELETE.{stream_of(SUBJECTS, 'counter')}", b"{}", 20.0)
    await stage.mesh.episode(id_)


@case(errors.ViewerCut, "take them faster")
async def a_viewer_that_sleeps(stage: Stage) -> None:
    env = await stage.mesh.env("counter", record="full")
    async with aclosing(tapped(context_of(stage.mesh), "counter", None, 1)) as seen:
        first = asyncio.ensure_future(anext(seen))
        await env.reset()
        while not first.done():
            await env.step(0)
            await asyncio.sleep(0.01)
        await first
        await anext(seen)


@case(errors.NotRecorded, "maximum messages.*open a new one")
async def a_session_that_is_recorded_strictly_where_there_is_no_room(stage: Stage) -> None:
    full = {"subjects": [SUBJECTS.recording("counter", "*")], "max_msgs": 1, "discard": "new", "allow_direct": True}
    await make_stream(stage.raw, stream_of(SUBJECTS, "counter"), full)
    try:
        env = await stage.mesh.env("counter", record="strict")
        await env.reset()
    finally:
        await stage.raw.ask(f"$JS.API.STREAM.DELETE.{stream_of(SUBJECTS, 'counter')}", b"{}", 20.0)


@case(errors.EpisodeNotRendered, "serve it with one that has")
async def an_episode_of_an_env_that_draws_no_pictures(stage: Stage) -> None:
    async for _ in stage.mesh.frames(await recorded(stage, "counter")):
        pass


@case(errors.EpisodeDiverged, r"record='full'\) needs no rerun")
async def an_episode_of_an_env_that_draws_elsewhere(stage: Stage) -> None:
    async with EnvWorker({"uncertain": Uncertain}, stage.url):
        await stage.mesh.episode(await recorded(stage, "uncertain"))


@case(errors.FormatCannotHold, r"--format parquet \(export_parquet\) holds it")
async def a_dataset_of_sequences_as_arrays(stage: Stage) -> None:
    async with EnvWorker({"sequences": sequences}, stage.url):
        async with await stage.mesh.env("sequences", record="full") as env:
            await env.reset(seed=1)
            await env.step(0)
        await listed(stage.mesh, "sequences", 1)
        with tempfile.TemporaryDirectory() as place:
            await export_npz(stage.mesh, stage.mesh.episodes("sequences"), f"{place}/x.npz")


def sequences() -> Sampled:
    return Sampled(spaces.Sequence(spaces.Discrete(3)), spaces.Discrete(2))


class Uncertain(Counter):
    """Counts from somewhere else each time."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        _, info = super().reset(seed=seed)
        self.count = time.monotonic_ns() % 1_000_000
        return self.count, info


FAMILIES = {errors.MeshError, errors.ProtocolError, errors.TransportError, errors.RecordingError}


@pytest.mark.filterwarnings("ignore:unclosed <RemoteEnv:ResourceWarning")
@pytest.mark.parametrize("error", CASES, ids=lambda error: error.__name__)
async def test_an_error_says_what_to_do(url: str, tmp_path: Path, error: type[MeshError]) -> None:
    raise_, remedy = CASES[error]
    async with staged(url, tmp_path) as stage:
        with pytest.raises(error) as caught:
            await raise_(stage)
        assert type(caught.value) is error
        assert re.search(remedy, caught.value.message), caught.value.message
        assert "\n" not in caught.value.message, "one line; the traceback stands apart"
        if error is not errors.WorkerDraining:  # and the mesh goes on
            async with await stage.mesh.env("counter") as env:
                assert (await env.reset())[0] == 0


def test_no_error_is_without_a_case() -> None:
    every = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MeshError)}
    assert set(CASES) == every - FAMILIES
