"""The eight faults that were reproduced in OpenEnv 0.10, each done to this system: real server, real worker processes.

Every test does what made the other system fail, to a single env, a vector and a pool where the fault can touch them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Self

import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import (
    ConcurrentStep,
    DeadlineExceeded,
    EnvError,
    MeshFull,
    RequestTimeout,
    StepUnsettled,
    from_wire,
)
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Open, Probe, Probed, parse
from meshrl.wire.subjects import Subjects
from tests.chaos.proxy import Proxy
from tests.freezing import frozen
from tests.mesh.conftest import until
from tests.mesh.everybody import NUM_ENVS, Everybody, everybody, served
from tests.mesh.fault_envs import HANGS, RAISES, Hangs, odd_info, odd_observation
from tests.mesh.patient_client import NUM_ENVS as PATIENT_ENVS
from tests.mesh.patient_client import SLOTS as PATIENT_SLOTS
from tests.mesh.worker_process import ROOT, WorkerProcess

ENVS = "tests.mesh.fault_envs"
FAULTY = {name.lower(): f"{ENVS}:{name}" for name in ("Told", "Hangs", "Sleeps", "Blocks", "Odd")}
SUBJECTS = Subjects()


# Workers of the tests of one fault are a mesh of their own, so that starting them is paid for once.
DEADLINES, LEASES, BLOCKED = "deadlines", "leases", "blocked"
SLOTS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as running:
        yield running


@contextmanager
def faulty(url: str, count: int = 1, **kwargs: Any) -> Iterator[list[WorkerProcess]]:
    """Worker processes, which start at once."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(url, FAULTY, wait=False, **kwargs)) for _ in range(count)]
        for worker in workers:
            worker.wait_advertised()
        yield workers


@pytest.fixture(scope="module")
def counted(server: EmbeddedServer) -> Iterator[None]:
    """What :func:`~tests.mesh.everybody.everybody` uses."""
    with served(server.url):
        yield


@pytest.fixture(scope="module")
def two(server: EmbeddedServer) -> Iterator[list[WorkerProcess]]:
    """Two workers."""
    with faulty(server.url, 2, slots=SLOTS) as workers:
        yield workers


@pytest.fixture(scope="module")
def short_leases(server: EmbeddedServer) -> Iterator[None]:
    """One worker with room for the client that thinks, and for nobody else."""
    with faulty(server.url, namespace=LEASES, slots=PATIENT_SLOTS, lease_s=1.0):
        yield


@pytest.fixture(scope="module")
def short_deadlines(server: EmbeddedServer) -> Iterator[None]:
    """One worker of three slots."""
    with faulty(server.url, namespace=DEADLINES, slots=3, lease_s=1.0, step_deadline_s=1.5, reset_deadline_s=1.5):
        yield


# --------------------------------------------------------------------------- 1


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("how", ["dropped connection", "server restart", "client timeout"])
async def test_1_after_a_drop_a_restart_or_a_timeout_the_next_step_runs_in_the_same_env(
    server: EmbeddedServer, how: str
) -> None:
    """There: silently in a fresh env that was never reset."""
    with Proxy(server.port) as proxy:
        async with everybody(proxy.url(server.url)) as all_:
            for _ in range(3):
                if how == "client timeout":
                    await gives_up(all_)
                else:
                    stepping = asyncio.create_task(all_.round())
                    await asyncio.sleep(0)
                    if how == "dropped connection":
                        assert proxy.cut() > 0
                    else:
                        await asyncio.to_thread(server.restart)
                    await stepping
                await all_.round()


async def gives_up(all_: Everybody) -> None:
    """The user's own deadlines pass while steps are under way; what was begun is had before anything else is."""
    all_.rounds += 1
    n = all_.rounds
    actions = np.full(NUM_ENVS, n)
    for stepping in (all_.env.step(n), all_.envs.step(actions)):
        task = asyncio.create_task(stepping)
        await asyncio.sleep(0)  # it is sent
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await all_.pool.send(actions, range(NUM_ENVS))
    with pytest.raises(RequestTimeout):
        await all_.pool.recv(min=NUM_ENVS, timeout=0.0)
    with pytest.raises(StepUnsettled):
        await all_.env.step(n + 1)
    with pytest.raises(StepUnsettled):
        await all_.envs.step(actions)
    assert (await all_.env.settle())[0] == n
    assert (await all_.envs.settle())[0].tolist() == [n] * NUM_ENVS
    assert (await all_.pool.recv(min=NUM_ENVS)).observations.tolist() == [n] * NUM_ENVS
    assert (await all_.agent.act(n), await all_.stateless.act(n)) == (n, 2 * n)


# --------------------------------------------------------------------------- 2


@pytest.mark.usefixtures("counted")
async def test_2_of_two_concurrent_steps_one_is_refused_and_every_reply_belongs_to_its_step(
    server: EmbeddedServer,
) -> None:
    """There: every later reply is one behind."""
    async with everybody(server.url) as all_:
        for _ in range(10):
            all_.rounds += 1
            n = all_.rounds
            assert (await one_of(all_.env.step(n), all_.env.step(n + 1)))[:2] == (n, float(n))
            ours, others = np.full(NUM_ENVS, n), np.full(NUM_ENVS, n + 1)
            _, rewards, *_ = await one_of(all_.envs.step(ours), all_.envs.step(others))
            assert rewards.tolist() == ours.tolist()
            await all_.pool.send(ours, range(NUM_ENVS))
            with pytest.raises(ConcurrentStep):
                await all_.pool.send([n + 1], [0])
            batch = await one_of(all_.pool.recv(min=NUM_ENVS), all_.pool.recv(min=NUM_ENVS))
            assert batch.rewards.tolist() == ours.tolist()
            assert await one_of(all_.agent.act(n), all_.agent.act(n)) == n
            await all_.round()


async def one_of(first: Awaitable[Any], second: Awaitable[Any]) -> Any:
    """What the first of two concurrent steps gives; the other is told that it is the second."""
    both: list[Any] = list(await asyncio.gather(first, second, return_exceptions=True))
    stepped, refused = both
    assert isinstance(refused, ConcurrentStep)
    assert not isinstance(stepped, BaseException)
    return stepped


# --------------------------------------------------------------------------- 3


class Patient:
    """The process of a client that thinks; an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.mesh.patient_client", self._url, LEASES, cwd=ROOT, stdin=pipe, stdout=pipe
        )
        self.pid = self._process.pid
        assert await self.heard() == "ready"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(30.0):
            await self._process.wait()

    async def tell(self, word: str) -> Any:
        self.say(word)
        return await self.heard()

    def say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")

    async def heard(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(60.0):
            return json.loads(await self._process.stdout.readline())


def outcomes(n: int) -> list[Any]:
    return [n, [n] * PATIENT_ENVS, [n] * PATIENT_ENVS]


@pytest.mark.usefixtures("short_leases")
async def test_3_a_client_that_thinks_longer_than_a_lease_keeps_its_envs_and_nobody_else_gets_them(
    server: EmbeddedServer,
) -> None:
    """There: it goes on with a closed env, whose slot is given away twice."""
    async with Patient(server.url) as client, Mesh(server.url, namespace=LEASES) as m:
        assert await client.tell("step") == outcomes(1)
        client.say("think 3")
        with pytest.raises(MeshFull):
            await m.env("told", wait=2.5)
        assert await client.heard() == "thought"
        assert await client.tell("step") == outcomes(2)


@pytest.mark.usefixtures("short_leases")
async def test_3_a_client_that_is_stopped_longer_than_a_lease_is_told_and_steps_nothing_of_the_next_one(
    server: EmbeddedServer,
) -> None:
    async with Patient(server.url) as client, Mesh(server.url, namespace=LEASES) as m:
        assert await client.tell("step") == outcomes(1)
        with frozen(client.pid):
            envs = await m.vector("told", PATIENT_SLOTS, wait=60.0)  # all of its slots, once the leases are over
            await envs.reset()
            assert (await envs.step([0] * PATIENT_SLOTS))[0].tolist() == [1] * PATIENT_SLOTS
        assert await client.tell("step") == ["SessionLost"] * 3
        assert await client.tell("step") == ["SessionLost"] * 3
        assert (await envs.step([0] * PATIENT_SLOTS))[0].tolist() == [2] * PATIENT_SLOTS
        with pytest.raises(MeshFull):  # and each slot was given away once
            await m.env("told", wait=0.2)
        await envs.close()


# --------------------------------------------------------------------------- 4


@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("form", ["env", "vector", "pool"])
async def test_4_a_step_that_hangs_is_given_up_its_slot_is_freed_and_others_are_served_meanwhile(
    server: EmbeddedServer, form: str
) -> None:
    """There: it holds its slot for ever, and everybody else is refused."""
    async with Mesh(server.url, namespace=DEADLINES) as m, Mesh(server.url, namespace=DEADLINES) as other:
        hanging = await hangs(m, form)
        async with await other.env("told") as env:  # the third slot
            await env.reset()
            waiting = asyncio.create_task(other.vector("told", 2, wait=60.0))
            while not waiting.done():
                await env.step(0)
            with pytest.raises(DeadlineExceeded, match="longer than") as given_up:
                await hanging
            assert given_up.value.details["deadline"] == "step"
            envs = await waiting
            await envs.reset()
            assert (await envs.step([1, 2]))[0].tolist() == [1, 1]
            await envs.close()


async def test_4_a_lane_that_is_given_up_is_told_so_and_nothing_else(server: EmbeddedServer) -> None:
    """The deadline's answer goes over another connection than that of its step, which is cancelled then."""
    async with (
        EnvWorker({"hangs": Hangs}, server.url, namespace="alone", step_deadline_s=0.5, reset_deadline_s=0.5) as worker,
        connect(server.url) as raw,
    ):
        subjects, told = Subjects("alone"), []
        open_ = Open(session="s1", name="hangs", form="pool", num_envs=2)
        assert await raw.ask(subjects.worker(worker.id, "open", raw.user), open_.to_wire(), 5.0) is not None
        both = {"epoch": 1, "lanes": np.arange(2)}
        reset = pack({**both, "seqs": np.ones(2, np.int64)})
        assert await raw.ask(subjects.session(worker.id, raw.user, "s1", "reset"), reset, 5.0) is not None
        await raw.subscribe("_INBOX.told", lambda _subject, _reply, body: told.append(unpack(body)))
        step = pack({**both, "seqs": np.full(2, 2), "actions": np.array([0, HANGS])})
        raw.publish(subjects.session(worker.id, raw.user, "s1", "step"), step, "_INBOX.told")
        await until(lambda: len(told) >= 3, "its answer, that of the deadline, and that of its cancelled step")
        assert told[0]["lanes"].tolist() == [0]
        for answer in told[1:]:
            assert answer["lanes"].tolist() == [1]
            assert answer["error"]["code"] == "deadline_exceeded"


async def hangs(m: Mesh, form: str) -> asyncio.Task[Any]:
    """A session of two slots (or one, beside another that holds the second until then) whose step hangs."""
    if form == "env":
        env, beside = await m.env("hangs", on_loss="raise"), await m.env("told")
        await env.reset()

        async def alone() -> Any:
            try:
                return await env.step(HANGS)
            finally:
                await beside.close()

        return asyncio.create_task(alone())
    if form == "vector":
        envs = await m.vector("hangs", 2)
        await envs.reset()
        return asyncio.create_task(envs.step([0, HANGS]))
    pool = await m.pool("hangs", 2)
    await pool.reset()
    await pool.recv(min=2)

    async def pooled() -> Any:
        await pool.send([0, HANGS], [0, 1])
        assert (await pool.recv()).env_ids.tolist() == [0], "the other one is not held up"
        return await pool.recv()

    return asyncio.create_task(pooled())


@pytest.mark.usefixtures("two")
async def test_4_a_step_that_keeps_its_thread_holds_up_no_other_session_of_the_worker(server: EmbeddedServer) -> None:
    async with Mesh(server.url) as m:
        slow, env = await m.env("sleeps"), await m.env("told")
        envs = await m.vector("told", 2)
        for session in (slow, env, envs):
            await session.reset()
        stepping = asyncio.create_task(slow.step(1500))
        n = 0
        while not stepping.done():
            n += 1
            assert (await env.step(0))[0] == n
            assert (await envs.step([0, 0]))[0].tolist() == [n, n]
        assert n > 20
        assert (await stepping)[0] == 1
        await envs.close()


# --------------------------------------------------------------------------- 5


@pytest.mark.usefixtures("two")
async def test_5_every_step_of_a_session_runs_in_the_one_env_it_was_reset_in(server: EmbeddedServer) -> None:
    """There: stateless HTTP steps each run in a new env."""
    async with AsyncExitStack() as stack:
        meshes = [await stack.enter_async_context(Mesh(server.url)) for _ in range(2)]
        seen = [name for m in meshes for name in await instances(m)]
        assert len(set(seen)) == len(seen), "and no two sessions share one"


async def instances(m: Mesh) -> list[str]:
    """Which envs stepped, of a session of each form: one for each of its sub-environments."""
    env, envs, pool = await m.env("told"), await m.vector("told", 2, shards=2), await m.pool("told", 2, shards=2)
    seen: list[Counter[str]] = [Counter() for _ in range(5)]
    seen[0][(await env.reset())[1]["instance"]] += 1
    _, infos = await envs.reset()
    for at in range(2):
        seen[1 + at][infos["instance"][at]] += 1
    await pool.reset()
    batch = await pool.recv(min=2)
    for n in range(1, 11):
        for at, env_id in enumerate(batch.env_ids.tolist()):
            seen[3 + env_id][batch.infos["instance"][at]] += 1
        await pool.send([0, 0], [0, 1])
        obs, _, _, _, info = await env.step(0)
        seen[0][info["instance"]] += 1
        observations, _, _, _, infos = await envs.step([0, 0])
        for at in range(2):
            seen[1 + at][infos["instance"][at]] += 1
        batch = await pool.recv(min=2)
        assert (obs, observations.tolist(), batch.observations.tolist()) == (n, [n, n], [n, n])
    for session in (env, envs, pool):
        await session.close()
    assert all(len(names) == 1 for names in seen)
    return [name for names in seen for name in names]


async def test_5_a_step_of_no_session_is_refused_and_makes_no_env(
    server: EmbeddedServer, two: list[WorkerProcess]
) -> None:
    async with connect(server.url) as raw, Mesh(server.url) as m:
        for worker in two:
            for op in ("reset", "step"):
                subject = SUBJECTS.session(worker.id, raw.user, "nobody", op)
                answer = await raw.ask(subject, pack({"epoch": 1, "lane": 0, "seq": 1, "action": 0}), 30.0)
                assert answer is not None
                error = from_wire(unpack(answer)["error"])
                assert error.code == "session_unknown"
        assert all(entry.free == entry.slots for entry in await m.envs())


# --------------------------------------------------------------------------- 6


@pytest.mark.usefixtures("two")
async def test_6_nan_inf_and_numpy_values_arrive_as_they_are(server: EmbeddedServer) -> None:
    """There: they become None, or the step an execution error."""
    async with Mesh(server.url) as m:
        env, envs, pool = await m.env("odd"), await m.vector("odd", 2), await m.pool("odd", 2)
        observation, info = await env.reset()
        exactly(observation, odd_observation())
        exactly(info, odd_info())
        observation, reward, _, _, info = await env.step(0)
        exactly([observation, reward, info], [odd_observation(), float("nan"), odd_info()])
        await envs.reset()
        observations, rewards, _, _, infos = await envs.step([0, 1])
        exactly(observations, np.stack([odd_observation()] * 2))
        assert np.isnan(rewards).all()
        both(infos)
        await pool.reset()
        await pool.recv(min=2)
        await pool.send([0, 1], [0, 1])
        batch = await pool.recv(min=2)
        exactly(batch.observations, np.stack([odd_observation()] * 2))
        assert np.isnan(batch.rewards).all()
        both(batch.infos)
        for session in (env, envs, pool):
            await session.close()


def exactly(one: Any, other: Any) -> None:
    """Of the same types, to the bit."""
    assert type(one) is type(other)
    if isinstance(other, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(other, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            exactly(mine, theirs)
    elif isinstance(other, np.ndarray | np.generic):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert one == other or (one != one and other != other)  # noqa: PLR0124  # NaN alone is not itself


def both(infos: dict[str, Any]) -> None:
    """The infos of two sub-environments, as Gymnasium merges them."""
    expected = odd_info()
    assert np.isnan(infos["nan"]).all()
    assert infos["inf"].tolist() == [-np.inf] * 2
    assert infos["number"].tolist() == [np.inf] * 2
    assert infos["count"].tolist() == [1 << 60] * 2
    exactly(infos["array"], np.stack([expected["array"]] * 2))
    assert list(infos["deep"]["bytes"]) == [expected["deep"]["bytes"]] * 2
    assert all(infos[f"_{key}"].all() for key in expected)


@pytest.mark.usefixtures("two")
async def test_6_errors_are_typed_with_their_facts_and_the_remote_traceback(server: EmbeddedServer) -> None:
    """There: all of them are bare strings."""
    async with Mesh(server.url) as m:
        env, envs, pool = await m.env("odd"), await m.vector("odd", 2), await m.pool("odd", 2)
        await env.reset()
        await envs.reset()
        await pool.reset()
        await pool.recv(min=2)
        raised = []
        for failing in (env.step(RAISES), envs.step([0, RAISES]), last_of(pool)):
            with pytest.raises(EnvError, match="the pole has no length") as caught:
                await failing
            raised.append(caught.value)
        for error in raised:
            assert error.details["type"] == "ZeroDivisionError"
            assert error.details["op"] == "step"
            assert error.remote_traceback is not None
            assert "fault_envs.py" in error.remote_traceback
        assert [error.details.get("env_id") for error in raised] == [None, 1, 1]


async def last_of(pool: Any) -> Any:
    await pool.send([RAISES], [1])
    return await pool.recv()


# --------------------------------------------------------------------------- 7


async def test_7_blocking_code_in_a_coroutine_env_costs_no_session_and_is_taken_for_no_death(
    server: EmbeddedServer,
) -> None:
    """There: it stalls every session and the health check. Here those of its own process wait, and nothing else does.

    Each block is three leases long.
    """
    with faulty(server.url, 2, namespace=BLOCKED, slots=5, lease_s=0.4) as workers:
        async with (
            Mesh(server.url, namespace=BLOCKED) as m,
            connect(server.url) as raw,
            holding(m) as (blocking, beside, elsewhere),
        ):
            assert blocking.worker in {worker.id for worker in workers}
            for n in range(1, 3):
                stepping = asyncio.create_task(blocking.step(1200))
                waiting = [asyncio.create_task(env.step(0)) for env in beside]
                probes = steps = 0
                while not stepping.done():
                    # The health check: renewals and probes are answered all the time.
                    assert await running(raw, blocking, n + 1)
                    probes += 1
                    for env in elsewhere:
                        await env.step(0)
                    steps += 1
                assert probes > 10
                assert (await stepping)[0] == n
                assert [(await step)[0] for step in waiting] == [n] * len(beside)
            assert (await elsewhere[0].step(0))[0] > 2 * 10


async def test_7_in_a_process_of_its_own_it_holds_up_nobody_at_all(server: EmbeddedServer) -> None:
    with faulty(server.url, namespace=BLOCKED + "-apart", slots=4, isolation="process"):
        async with Mesh(server.url, namespace=BLOCKED + "-apart") as m:
            blocking, env = await m.env("blocks"), await m.env("blocks")
            envs = await m.vector("blocks", 2)
            for session in (blocking, env, envs):
                await session.reset()
            stepping = asyncio.create_task(blocking.step(1500))
            n = 0
            while not stepping.done():
                n += 1
                assert (await env.step(0))[0] == n
                assert (await envs.step([0, 0]))[0].tolist() == [n, n]
            assert n > 20
            assert (await stepping)[0] == 1


@asynccontextmanager
async def holding(m: Mesh) -> AsyncIterator[tuple[Any, list[Any], list[Any]]]:
    """An env that blocks, others at its worker, and one at another."""
    async with AsyncExitStack() as stack:
        blocking = await stack.enter_async_context(await m.env("blocks"))
        others = [await stack.enter_async_context(await m.env("told")) for _ in range(4)]
        for env in (blocking, *others):
            await env.reset()
        beside = [env for env in others if env.worker == blocking.worker]
        elsewhere = [env for env in others if env.worker != blocking.worker]
        assert beside
        assert elsewhere
        yield blocking, beside, elsewhere


async def running(raw: Any, env: Any, seq: int) -> bool:
    """What the worker says of a request; by now it may be answered."""
    probe = Probe(awaited=[(env.session_id, 1, 0, seq)]).to_wire()
    answer = await raw.ask(Subjects(BLOCKED).worker(env.worker, "probe", raw.user), probe, 5.0)
    return answer is not None and parse(Probed, answer).states[0] in {"running", "answered", "not_received"}


# --------------------------------------------------------------------------- 8


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("form", ["env", "vector", "pool"])
async def test_8_sessions_of_unrelated_learners_fill_all_workers_alike_and_none_is_refused(
    server: EmbeddedServer, form: str
) -> None:
    """There: they pile up on one of two servers and are refused, while the other idles."""
    async with AsyncExitStack() as stack:
        meshes = [await stack.enter_async_context(Mesh(server.url)) for _ in range(4)]
        size = 1 if form == "env" else 4

        def opening(m: Mesh) -> Any:
            return m.env("told") if form == "env" else getattr(m, form)("told", size)

        half = [opening(m) for m in meshes for _ in range(4 // size)]
        sessions = await asyncio.gather(*half)
        assert all(4 <= count <= 12 for count in await taken(meshes[0], 16)), "of sixteen slots each"
        sessions += await asyncio.gather(*(opening(m) for m in meshes for _ in range(4 // size)))
        assert await taken(meshes[0], 32) == [16, 16]
        with pytest.raises(MeshFull):
            await meshes[0].env("told", wait=0.1)
        await asyncio.gather(*(session.close() for session in sessions))


async def taken(m: Mesh, count: int) -> list[int]:
    """How many slots of each worker are taken, once that is as many in all."""
    found: list[int] = []

    async def heard() -> bool:
        found[:] = [entry.slots - entry.free for entry in await m.envs() if entry.name == "told"]
        return sum(found) == count

    await until(heard, "all are advertised")
    return found
