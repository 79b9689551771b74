"""``isolation="process"``: an env that hangs, crashes or takes too much costs its own session, and nobody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl import EnvWorker, Factory, Mesh, RemotePool
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import (
    DeadlineExceeded,
    EnvError,
    EnvProcessDied,
    LimitExceeded,
    MeshError,
    NotAllowed,
    SessionLost,
    UnencodableValue,
    UsageError,
)
from meshrl.testing import conformance
from tests.mesh.conftest import until
from tests.mesh.dangerous_envs import Dangerous
from tests.mesh.envs import Breaks, Counter, Nested
from tests.mesh.worker_process import WorkerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

DANGEROUS = "tests.mesh.dangerous_envs:Dangerous"
SERVED = {"dangerous": DANGEROUS, "slowly": "tests.mesh.dangerous_envs:Slowly", "CartPole-v1": "CartPole-v1"}
# Short enough to wait for; a machine must be very busy for a constructor or a reset to take as long.
DEADLINE_S = 3.0
MEMORY_BYTES = 1 << 30


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes between opening and reading
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with one worker that isolates, for all tests of this file: whatever they do to it, it goes on."""
    with (
        EmbeddedServer.start() as server,
        WorkerProcess(
            server.url,
            SERVED,
            isolation="process",
            step_deadline_s=DEADLINE_S,
            reset_deadline_s=DEADLINE_S,
            max_memory_bytes=MEMORY_BYTES,
            allow=["*"],
            allow_kwargs=["*"],
        ),
    ):
        yield server.url
        asyncio.run(everything_is_free(server.url))


async def everything_is_free(url: str) -> None:
    async with Mesh(url) as m:

        async def free() -> bool:
            (served, *_) = await m.envs()
            return served.free == served.slots

        await until(free, "every slot is free again")


@asynccontextmanager
async def bystander(m: Mesh) -> AsyncIterator[None]:
    """A single env and a vector of the same worker, which go on as if nothing had happened."""
    local = gymnasium.make("CartPole-v1")
    async with await m.env("CartPole-v1") as env, await m.vector("CartPole-v1", 2) as envs:
        local.reset(seed=1)
        await env.reset(seed=1)
        await envs.reset(seed=1)
        yield
        for action in (0, 1, 1):
            expected, (obs, *_) = local.step(action), await env.step(action)
            assert obs.tobytes() == expected[0].tobytes()
            assert (await envs.step(np.array([action, action])))[0][0].tobytes() == obs.tobytes()


async def dies(error: type[MeshError], call: Awaitable[object]) -> MeshError:
    with pytest.raises(error) as caught:
        await call
    assert type(caught.value) is error
    return caught.value


# --------------------------------------------------------------------------- what costs its own session alone


async def test_whatever_hangs_is_killed_at_its_deadline(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        env, called = await m.env("dangerous"), await m.env("dangerous")
        pid = (await env.reset())[1]["pid"]
        await called.reset()
        assert await called.call("nap", 0.01) == 0.01

        async def reset() -> None:
            await (await m.env("dangerous", {"at": "reset", "what": Dangerous.HANG})).reset()

        step, reset_, constructor, call = await asyncio.gather(
            dies(DeadlineExceeded, env.step(Dangerous.HANG)),
            dies(DeadlineExceeded, reset()),
            dies(DeadlineExceeded, m.env("dangerous", {"at": "constructor", "what": Dangerous.HANG})),
            dies(DeadlineExceeded, called.call("nap", 600.0)),
        )
        facts = {"op": "step", "deadline": "step", "deadline_s": DEADLINE_S, "worker": env.worker}
        assert step.details == facts
        assert call.details == {**facts, "op": "call"}
        assert reset_.details == {**facts, "op": "reset", "deadline": "reset"}
        assert constructor.details == {**facts, "op": "constructor", "deadline": "reset"}
        assert isinstance(step, TimeoutError)
        assert step.message.startswith("dangerous: step took longer than the step deadline of 3 s; its process was")
        assert "--step-deadline" in step.message
        assert "--reset-deadline" in reset_.message
        assert not lives(pid)
        with pytest.raises(SessionLost):
            await env.step(0)


async def test_segfault_is_told_by_its_name_and_where_it_was(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        env = await m.env("dangerous")
        await env.reset()
        exc = await dies(EnvProcessDied, env.step(Dangerous.SEGFAULT))
        assert exc.details["signal"] == "SIGSEGV"
        assert "was ended by SIGSEGV during step" in exc.message
        assert exc.remote_traceback is not None
        assert exc.remote_traceback == exc.details["stderr"]
        assert "dangerous_envs.py" in exc.remote_traceback
        assert "in do" in exc.remote_traceback
        with pytest.raises(SessionLost, match="raised an exception: dangerous: the env's process was ended"):
            await env.step(0)


async def test_exit_is_told_with_its_code_and_the_last_words(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        env = await m.env("dangerous")
        await env.reset()
        exc = await dies(EnvProcessDied, env.step(Dangerous.EXIT))
        assert exc.details["exit_code"] == 7
        assert exc.details["stderr"] == "I have seen enough"
        exc = await dies(EnvProcessDied, m.env("dangerous", {"at": "constructor", "what": Dangerous.EXIT}))
        assert (exc.details["exit_code"], exc.details["op"]) == (7, "constructor")


async def test_allocation_over_the_limit_is_a_typed_error(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        env = await m.env("dangerous")
        await env.reset()
        exc = await dies(LimitExceeded, env.step(Dangerous.ALLOCATE))
        assert (exc.details["limit"], exc.details["max_memory_bytes"]) == ("memory", MEMORY_BYTES)
        assert "1,024 MiB" in exc.message
        assert "--max-memory" in exc.message


async def test_cpu_time_over_the_limit_is_a_typed_error(server: EmbeddedServer) -> None:
    async with EnvWorker(SERVED, server.url, isolation="process", max_cpu_s=1) as worker, Mesh(server.url) as m:
        env = await m.env("dangerous")
        await env.reset()
        exc = await dies(LimitExceeded, env.step(Dangerous.COMPUTE))
        assert (exc.details["limit"], exc.details["max_cpu_s"]) == ("cpu", 1)
        assert "--max-cpu-seconds" in exc.message
        await until(lambda: worker.table.free == worker.table.slots, "its slot is free")


async def test_process_that_somebody_kills_is_told_so(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        env = await m.env("dangerous")
        pid = (await env.reset())[1]["pid"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not lives(pid), "it is dead")
        exc = await dies(EnvProcessDied, env.step(0))
        assert exc.details["signal"] == "SIGKILL"
        assert "want of memory" in exc.message


async def test_sub_environment_that_crashes_ends_its_vector_and_is_named(url: str) -> None:
    async with Mesh(url) as m, bystander(m):
        envs = await m.vector("dangerous", 3)
        pids = (await envs.reset(seed=1))[1]["pid"]
        assert len(set(pids)) == 3, "a process each"
        exc = await dies(EnvProcessDied, envs.step(np.array([0, 0, Dangerous.SEGFAULT])))
        assert (exc.details["env_id"], exc.details["signal"]) == (2, "SIGSEGV")
        await until(lambda: not any(map(lives, pids)), "the others went with their session")


async def test_sub_environment_that_hangs_ends_its_pool_and_is_named(url: str) -> None:
    async with Mesh(url) as m, bystander(m), await m.pool("dangerous", 3) as pool:
        await pool.reset(seed=1)
        batch = await pool.recv(min=3)
        await pool.send(np.where(batch.env_ids == 1, Dangerous.HANG, 0), batch.env_ids)
        exc = await dies(DeadlineExceeded, everything_of(pool))
        assert exc.details["env_id"] == 1


async def everything_of(pool: RemotePool) -> None:
    for _ in range(3):
        await pool.recv(min=1)


async def test_env_that_hangs_is_ended_when_its_client_closes_it(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.worker.hold.CLOSE_S", 0.1)
    async with EnvWorker(SERVED, server.url, isolation="process") as worker, Mesh(server.url) as m:
        env = await m.env("dangerous")
        pid = (await env.reset())[1]["pid"]
        stepping = asyncio.create_task(env.step(Dangerous.HANG))
        await until(lambda: any(s.running for s in worker.table), "it hangs")
        await env.close()
        await asyncio.gather(stepping, return_exceptions=True)
        await until(lambda: worker.table.free == worker.table.slots, "the slot is free, long before the deadline")
        assert not lives(pid)


# --------------------------------------------------------------------------- what is as without


@pytest.mark.parametrize("name", ["CartPole-v1", "Nested"])
async def test_values_are_those_of_the_same_env_on_a_thread(server: EmbeddedServer, name: str) -> None:
    factory = "CartPole-v1" if name == "CartPole-v1" else Factory(Nested)

    async def played(isolation: Any) -> list[Any]:
        async with EnvWorker({"env": factory}, server.url, isolation=isolation) as worker, Mesh(server.url) as m:
            async with await m.env("env") as env, await m.vector("env", 3) as envs:
                env.action_space.seed(5)
                envs.action_space.seed(5)
                told: list[Any] = [repr(await env.reset(seed=3)), repr(await envs.reset(seed=3))]
                for _ in range(25):
                    told.append(repr(await envs.step(envs.action_space.sample())))
                    _, _, terminated, truncated, _ = outcome = await env.step(env.action_space.sample())
                    told.append(repr(outcome))
                    if terminated or truncated:
                        told.append(repr(await env.reset()))
                description = await m.describe("env")
                assert worker.id == description.worker
                return [*told, repr(env.observation_space), description.fingerprint, description.versions]

    assert await played("process") == await played("thread")


async def test_attributes_methods_and_pictures_are_reached_in_its_process(url: str) -> None:
    async with Mesh(url) as m:
        async with await m.env("dangerous", render_mode="ansi") as env:
            await env.reset()
            await env.step(0)
            assert await env.render() == "after 1 steps"
            assert await env.get_attr("count") == 1
            assert await env.get_attr("render_mode") == "ansi"
            await env.set_attr("label", "mine")
            assert await env.get_attr("label") == "mine"
            assert await env.call("plus", 2, b=5) == 7
            with pytest.raises(NotAllowed, match="no attribute 'nothing'"):
                await env.get_attr("nothing")
            with pytest.raises(UnencodableValue):
                await env.get_attr("plus")
            assert (await env.step(0))[0] == 2, "none of that ended it"
        async with await m.vector("CartPole-v1", 2) as envs:
            assert await envs.is_wrapped(gymnasium.wrappers.TimeLimit) == (True, True)
            assert await envs.is_wrapped(gymnasium.wrappers.Autoreset) == (False, False)


async def test_coroutine_env_runs_in_a_process_too(url: str) -> None:
    async with Mesh(url) as m, await m.env("slowly") as env:
        own = (await env.reset())[1]["pid"]
        assert own != os.getpid()
        obs, _, _, _, info = await env.step(0)
        assert (obs, info["pid"]) == (1, own)


async def test_exception_has_the_traceback_of_its_process(server: EmbeddedServer) -> None:
    async with (
        EnvWorker({"breaks": Breaks}, server.url, isolation="process", allow_kwargs=("at",)) as worker,
        Mesh(server.url) as m,
    ):
        env = await m.env("breaks", {"at": "exit"})
        await env.reset()
        exc = await dies(EnvError, env.step(0))
        assert exc.details["type"] == "SystemExit"
        exc = await dies(EnvError, m.env("breaks", {"at": "constructor"}))
        assert "constructor raised RuntimeError: no simulator here" in exc.message
        assert exc.remote_traceback is not None
        assert "tests/mesh/envs.py" in exc.remote_traceback
        await until(lambda: worker.table.free == worker.table.slots, "both have let go of their slot")


async def test_info_that_cannot_travel_is_named_and_the_session_goes_on(url: str) -> None:
    async with Mesh(url) as m, await m.env("dangerous") as env, await m.vector("dangerous", 2) as envs:
        await env.reset()
        with pytest.raises(UnencodableValue, match=r"info\.thing: builtins\.object has no exact form"):
            await env.step(Dangerous.UNENCODABLE)
        assert (await env.step(0))[0] == 2
        await envs.reset()
        with pytest.raises(UnencodableValue) as caught:
            await envs.step(np.array([0, Dangerous.UNENCODABLE]))
        assert caught.value.details["env_id"] == 1
        assert (await envs.step(np.array([0, 0])))[0].tolist() == [2, 2]


async def test_what_an_env_prints_holds_nobody_up(url: str) -> None:
    async with Mesh(url) as m, await m.env("dangerous") as env:
        await env.reset()
        assert (await env.step(Dangerous.SHOUT))[0] == 1


async def test_each_process_draws_numbers_of_its_own(url: str) -> None:
    async with Mesh(url) as m, await m.vector("dangerous", 4) as envs:
        infos = (await envs.reset(seed=[7, 7, 7, 7]))[1]
        assert len(set(infos["draw"])) == 1, "the env's own generator is seeded"
        assert len(set(infos["global"])) == 4, "NumPy's, which no seed reaches, is not the same in each"


async def test_env_that_was_registered_in_the_worker_alone_is_made_in_its_process(server: EmbeddedServer) -> None:
    gymnasium.register("Mine-v0", entry_point="tests.mesh.envs:Counter", disable_env_checker=True)
    try:
        async with (
            EnvWorker({"mine": Factory("Mine-v0", {"start": 4})}, server.url, isolation="process"),
            Mesh(server.url) as m,
        ):
            async with await m.env("mine") as env:
                obs, info = await env.reset()
                assert (obs, info["pid"] != os.getpid()) == (4, True)
    finally:
        del gymnasium.registry["Mine-v0"]


async def test_env_on_demand_is_made_in_a_process(server: EmbeddedServer) -> None:
    async with EnvWorker(url=server.url, on_demand=True, isolation="process"), Mesh(server.url) as m:
        async with await m.env("cartpole") as env:
            await env.reset(seed=1)
            assert (await env.step(0))[1] == 1.0


async def test_isolated_env_keeps_every_promise_that_meshrl_check_knows(url: str) -> None:
    async with Mesh(url) as m:
        report = await conformance(m, "CartPole-v1")
    assert report.ok, str(report)


async def test_episode_moves_between_a_worker_that_isolates_and_one_that_does_not(server: EmbeddedServer) -> None:
    local = gymnasium.make("CartPole-v1")
    local.reset(seed=5)
    with WorkerProcess(server.url, SERVED, isolation="process") as isolating:
        async with Mesh(server.url) as m:
            env = await m.env("CartPole-v1", on_loss="resume")
            await env.reset(seed=5)
            local.reset()
            await env.reset()  # goes on with a generator that is in the env's own process
            for action in (0, 1, 1):
                local.step(action)
                await env.step(action)
            assert len(env._session.recovery.journal) == 4  # type: ignore[attr-defined]
            with WorkerProcess(server.url, SERVED) as other:
                isolating.kill()
                obs, *_ = await env.step(0)
                assert env.worker == other.id
                assert obs.tobytes() == local.step(0)[0].tobytes()
                await env.close()


async def test_isolated_env_that_says_it_cannot_be_resumed_is_not(server: EmbeddedServer) -> None:
    serves = {"never": "tests.mesh.resumed_envs:Unresumable"}
    with WorkerProcess(server.url, serves, isolation="process") as isolating:
        async with Mesh(server.url) as m, await m.env("never") as env:
            await env.reset(seed=1)
            await env.step(1)
            with WorkerProcess(server.url, serves, isolation="process"):
                isolating.kill()
                _, _, _, truncated, info = await env.step(1)
                assert truncated
                assert info["session_lost"]["not_resumed"] == "not_resumable"
                await env.close()


# --------------------------------------------------------------------------- processes that end with their worker


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_processes_end_with_their_worker_however_that_ends(server: EmbeddedServer, end: str) -> None:
    with WorkerProcess(server.url, SERVED, isolation="process") as worker:
        async with Mesh(server.url) as m:
            env, hung = await m.env("dangerous"), await m.env("dangerous")
            pids = [(await one.reset())[1]["pid"] for one in (env, hung)]
            (fork_server,) = children_of(worker.pid)
            assert set(pids) <= set(children_of(fork_server))
            stepping = asyncio.create_task(hung.step(Dangerous.HANG))
            await asyncio.sleep(0)
            getattr(worker, end)()
            await until(lambda: not any(map(lives, [*pids, fork_server])), "nobody is left")
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)


async def test_fork_server_that_is_killed_is_replaced_and_takes_its_processes_with_it(server: EmbeddedServer) -> None:
    async with EnvWorker(SERVED, server.url, isolation="process"), Mesh(server.url) as m:
        env = await m.env("dangerous")
        pid = (await env.reset())[1]["pid"]
        (fork_server,) = [one for one in children_of(os.getpid()) if pid in children_of(one)]
        os.kill(fork_server, signal.SIGKILL)
        await until(lambda: not lives(pid), "the kernel has ended it")
        await dies(EnvProcessDied, env.step(0))
        async with await m.env("dangerous") as another:
            await another.reset()


async def test_what_an_env_has_started_ends_with_it(server: EmbeddedServer, tmp_path: Path) -> None:
    async with EnvWorker({"starts": Starts}, server.url, isolation="process"), Mesh(server.url) as m:
        async with await m.env("starts") as env:
            started = (await env.reset())[0]
            assert lives(started)
        await until(lambda: not lives(started), "its program is gone")


class Starts(Counter):
    """Starts a program that never ends; observes its process id."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        sleeper = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        return sleeper.pid, {}


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"isolation": "container"}, "inline, thread or process"),
        ({"isolation": "process", "vectors": "gymnasium"}, "vector implementations"),
        ({"isolation": "process", "vectors": {"a": "envpool"}}, "vector implementations"),
        ({"max_memory_bytes": 1 << 30}, 'isolation="process"'),
        ({"isolation": "process", "max_cpu_s": 0}, "max_cpu_s is a number above 0"),
        ({"step_deadline_s": 0.0}, "the deadline of a step"),
        ({"reset_deadline_s": float("nan")}, "the deadline of a reset"),
    ],
)
def test_what_cannot_be_had_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EnvWorker({"counter": Counter}, **kwargs)


def unimportable() -> Callable[[], Any]:
    class Local(Counter):
        pass

    return Local


@pytest.mark.parametrize("source", [unimportable(), partial(unimportable())])
async def test_what_no_other_process_can_have_is_refused_at_the_start(server: EmbeddedServer, source: Any) -> None:
    with pytest.raises(UsageError, match="put it into a module that can be imported"):
        async with EnvWorker({"counter": source}, server.url, isolation="process"):
            pass


async def test_a_worker_that_was_stopped_does_not_count_the_stop_as_its_envs_time(server: EmbeddedServer) -> None:
    limits: dict[str, Any] = {"step_deadline_s": 1.0, "reset_deadline_s": DEADLINE_S, "allow": ["nap"]}
    with WorkerProcess(server.url, SERVED, slots=8, isolation="process", **limits) as worker:
        async with Mesh(server.url) as m:
            envs = [await m.env("dangerous") for _ in range(8)]
            for env in envs:
                await env.reset(seed=1)
            for _ in range(2):
                napping = [asyncio.ensure_future(env.call("nap", 0.3)) for env in envs]
                await asyncio.sleep(0.15)
                worker.freeze()
                await asyncio.sleep(2.0)
                worker.thaw()
                assert await asyncio.gather(*napping) == [0.3] * 8
            with pytest.raises(DeadlineExceeded):
                await envs[0].call("nap", 30.0)
            assert (await envs[1].step(0))[0] == 1
