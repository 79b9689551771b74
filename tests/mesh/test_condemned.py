"""Without process isolation: a call over its deadline is told, and a worker that cannot end it is replaced."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from meshrl.client.context import context_of
from meshrl.errors import DeadlineExceeded, LimitExceeded, MeshError, SessionLost, WorkerCondemned
from meshrl.worker.running import CONDEMNED_CODE
from tests.mesh.conftest import until
from tests.mesh.dangerous_envs import Dangerous
from tests.mesh.envs import Coroutine, Gated
from tests.mesh.test_cli import ROOT, Cli, exits, read_until
from tests.mesh.test_processes import cli, ids
from tests.mesh.worker_process import WorkerProcess

__all__ = ["cli"]  # a fixture

DEADLINE_S = 1.5
DANGEROUS = "tests.mesh.dangerous_envs:Dangerous"


class Gate:
    """Holds whatever comes to it."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def hang_in_step(self, render_mode: str | None = None) -> Gated:
        return Gated("step", self.reached, self.open, render_mode)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


async def late(call: Any) -> DeadlineExceeded:
    with pytest.raises(DeadlineExceeded) as caught:
        await call
    return caught.value


# --------------------------------------------------------------------------- what its client is told


@pytest.mark.parametrize("form", ["single", "vector", "pool"])
async def test_step_over_its_deadline_is_told_and_the_slot_is_free_once_it_returns(
    url: str, gate: Gate, form: str
) -> None:
    async with (
        EnvWorker({"gated": gate.hang_in_step}, url, step_deadline_s=DEADLINE_S, reset_deadline_s=DEADLINE_S) as worker,
        Mesh(url) as m,
    ):
        if form == "single":
            env = await m.env("gated")
            await env.reset()
            exc = await late(env.step(0))
        elif form == "vector":
            envs = await m.vector("gated", 2)
            await envs.reset()
            exc = await late(envs.step(np.array([0, 0])))
        else:
            pool = await m.pool("gated", 2)
            await pool.reset()
            batch = await pool.recv(min=2)
            await pool.send(np.array([0]), batch.env_ids[:1])
            exc = await late(pool.recv())
            assert exc.details["env_id"] == batch.env_ids[0]
            await pool.close()
        assert (exc.details["deadline"], exc.details["op"]) == ("step", "step")
        assert exc.details["deadline_s"] == DEADLINE_S
        assert "its slot stays taken" in exc.message
        assert worker.table.free < worker.table.slots
        assert worker.draining_s is None, "nobody would replace it"
        gate.open.set()
        await until(lambda: worker.table.free == worker.table.slots, "its thread has come back")


async def test_constructor_over_its_deadline_is_told(url: str, gate: Gate) -> None:
    def make(render_mode: str | None = None) -> Gated:
        # The first one is made to be described.
        at, gate.made = ("constructor" if gate.made else ""), True  # type: ignore[attr-defined]
        return Gated(at, gate.reached, gate.open, render_mode)

    gate.made = False  # type: ignore[attr-defined]
    async with EnvWorker({"gated": make}, url, reset_deadline_s=DEADLINE_S) as worker, Mesh(url) as m:
        exc = await late(m.env("gated"))
        assert (exc.details["deadline"], exc.details["op"]) == ("reset", "constructor")
        gate.open.set()
        await until(lambda: worker.table.free == worker.table.slots, "its thread has come back")


async def test_coroutine_over_its_deadline_is_cancelled_and_condemns_nobody(url: str) -> None:
    called = threading.Event()
    async with (
        EnvWorker({"talk": Coroutine}, url, step_deadline_s=DEADLINE_S, last_resort=called.set) as worker,
        Mesh(url) as m,
    ):
        env = await m.env("talk")
        await env.reset()
        await late(env.step("never"))
        await until(lambda: worker.table.free == worker.table.slots, "it is closed")
        async with await m.env("talk") as another:
            await another.reset()
        assert worker.draining_s is None
        assert not called.is_set()


async def test_env_that_hangs_on_the_event_loop_is_told_by_the_pulse(server: EmbeddedServer) -> None:
    served = {"dangerous": DANGEROUS}
    with WorkerProcess(server.url, served, isolation="inline", step_deadline_s=DEADLINE_S) as worker:
        async with Mesh(server.url) as m:
            env = await m.env("dangerous")
            await env.reset()
            await late(env.step(Dangerous.HANG))
            await context_of(m).close()
        worker.kill()


# --------------------------------------------------------------------------- a worker that ends itself


async def test_worker_that_holds_what_never_ends_condemns_itself(
    url: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.worker.service.LAST_RESORT_S", 0.1)
    monkeypatch.setattr("meshrl.worker.service.CONDEMNED_S", 0.5)
    monkeypatch.setattr("meshrl.worker.service.CLOSE_S", 0.5)
    called = threading.Event()
    served: dict[str, Any] = {"gated": gate.hang_in_step, "CartPole-v1": "CartPole-v1"}
    async with Mesh(url) as m:
        async with EnvWorker(served, url, step_deadline_s=DEADLINE_S, last_resort=called.set) as worker:
            other = await m.env("CartPole-v1", on_loss="raise")
            await other.reset(seed=1)
            env = await m.env("gated")
            await env.reset()
            exc = await late(env.step(0))
            assert "its worker ends, and is replaced" in exc.message
            await until(lambda: worker.draining_s is not None, "it takes no new sessions")
            await other.step(0)  # and goes on with those that it has
            with pytest.raises(WorkerCondemned, match="took longer than the step deadline") as caught:
                await worker.serve_forever()
            assert caught.value.details["worker"] == worker.id
        await until(called.is_set, "the last resort")
        with pytest.raises(SessionLost):
            await other.step(0)


async def test_serve_replaces_a_process_that_holds_what_never_ends(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start(
        *("serve", DANGEROUS, "CartPole-v1", "--processes", "2", "--step-deadline", str(DEADLINE_S)),
        MESHRL_URL=server.url,
    )
    read_until(process.stdout, "serving")
    async with Mesh(server.url) as m:
        before = await ids(m)
        hung = await m.env("Dangerous")
        await hung.reset()
        kept = await m.env("CartPole-v1", on_loss="resume")
        obs, _ = await kept.reset(seed=1)
        await late(hung.step(Dangerous.HANG))
        (*_, ended) = read_until(process.stderr, "it is started again")
        assert f"ended with exit code {CONDEMNED_CODE}, since its worker was condemned" in ended
        read_until(process.stderr, "serves again")

        async def replaced() -> bool:
            now = await ids(m)
            return len(now) == 2 and hung.worker not in now

        await until(replaced, "another worker is there in its place")
        assert len(await ids(m) & before) == 1
        for action in (0, 1):
            obs, *_ = await kept.step(action)
        assert obs.shape == (4,), "a session that could move has moved, or was not concerned"
    process.terminate()
    assert process.wait(60) == 0


async def test_up_replaces_a_process_that_holds_what_never_ends(cli: Cli) -> None:
    path = f"{cli.directory}:{ROOT}"
    process = cli.start("up", "--workers", "1", "--step-deadline", str(DEADLINE_S), PYTHONPATH=path)
    (cli.directory / "hanging.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Hanging-v0', 'tests.mesh.dangerous_envs:Dangerous', disable_env_checker=True)\n"
    )
    address = next(line for line in read_until(process.stdout, "Ctrl-C ends it.") if "MESHRL_URL=" in line)
    async with Mesh(address.strip().removeprefix("MESHRL_URL=")) as m:
        env = await m.env("hanging:Hanging-v0")
        await env.reset()
        await late(env.step(Dangerous.HANG))
        told = " ".join(read_until(process.stdout, "it is started again"))
        assert f"ended with code {CONDEMNED_CODE}" in " ".join(told.split())
        async with await m.env("cartpole", wait=60.0) as another:
            await another.reset(seed=1)
    process.terminate()
    assert process.wait(60) == 0


async def test_worker_whose_process_has_used_its_cpu_time_is_replaced(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", DANGEROUS, "--max-cpu-seconds", "3", MESHRL_URL=server.url)
    read_until(process.stdout, "serving")
    async with Mesh(server.url) as m:
        env = await m.env("Dangerous", on_loss="raise")
        await env.reset()
        with pytest.raises(MeshError):
            await env.step(Dangerous.COMPUTE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == CONDEMNED_CODE
    assert "has used the 3 s of CPU time that it may have (--max-cpu-seconds)" in err.splitlines()[-1]


async def test_memory_over_the_limit_of_a_worker_process_is_a_typed_error(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", DANGEROUS, "--max-memory", "1G", MESHRL_URL=server.url)
    read_until(process.stdout, "serving")
    async with Mesh(server.url) as m:
        env, other = await m.env("Dangerous"), await m.env("Dangerous")
        await asyncio.gather(env.reset(), other.reset())
        with pytest.raises(LimitExceeded) as caught:
            await env.step(Dangerous.ALLOCATE)
        assert caught.value.details["max_memory_bytes"] == 1 << 30
        assert (await other.step(0))[0] == 1, "the worker goes on"
    process.terminate()
    assert process.wait(60) == 0


async def test_serve_isolates_by_processes(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start(
        *("serve", DANGEROUS, "--isolation", "process", "--max-memory", "1G", "--reset-deadline", "60"),
        MESHRL_URL=server.url,
    )
    read_until(process.stdout, "serving")
    async with Mesh(server.url) as m:
        env, other = await m.env("Dangerous"), await m.env("Dangerous")
        pids = {(await one.reset())[1]["pid"] for one in (env, other)}
        assert process.pid not in pids
        assert len(pids) == 2
        with pytest.raises(LimitExceeded, match="1,024 MiB"):
            await env.step(Dangerous.ALLOCATE)
        assert (await other.step(0))[0] == 1
    process.terminate()
    assert process.wait(60) == 0
    assert all(map(exits, pids))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--isolation", "box"], "isolation is inline, thread or process"),
        (["--isolation", "process", "--vectors", "gymnasium"], "vector implementations"),
        (["--max-memory", "plenty"], "--max-memory is a size such as 512M or 2G"),
        (["--max-cpu-seconds", "0"], "max_cpu_s is a number above 0"),
        (["--step-deadline", "0"], "the deadline of a step"),
    ],
)
def test_serve_refuses_what_cannot_be_had(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "cartpole", *arguments]) == 1
    assert says in capsys.readouterr().err
