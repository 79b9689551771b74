"""``meshrl drain``, and what SIGTERM does to programs that serve."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.conftest import until
from tests.mesh.test_cli import DEADLINE_S, Cli, ends, exits, one_error, read_until, start_up

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    with ExitStack() as stack:
        for process in cli.started:
            stack.enter_context(process)
            if process.poll() is None:
                process.kill()
    for pid in cli.processes():
        assert exits(pid)


def serving(cli: Cli, server: EmbeddedServer, *arguments: str) -> subprocess.Popen[str]:
    process = cli.start("serve", "cartpole", *arguments, MESHRL_URL=server.url)
    read_until(process.stdout, "serving")
    return process


async def told(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(process.communicate, timeout=DEADLINE_S)
    return process.returncode, out, err


async def test_drain_moves_the_sessions_of_a_worker_and_ends_it(cli: Cli, server: EmbeddedServer) -> None:
    first = serving(cli, server)
    async with Mesh(server.url) as m, await m.env("cartpole") as env:
        await env.reset(seed=1)
        await env.step(1)
        before = env.worker
        second = serving(cli, server)
        done = await asyncio.to_thread(cli.run, "drain", before, "--seconds", "30", MESHRL_URL=server.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == f"{before} leaves within 30 s: 1 session to move"
        assert done.stdout.splitlines()[-1] == f"{before} has gone"
        assert (await told(first))[0] == 0
        await env.step(1)
        assert env.worker != before
        assert second.poll() is None
    assert ends(second, signal.SIGTERM) == (0, "", "")


async def test_each_process_that_is_drained_is_started_again_and_so_all_are_renewed(
    cli: Cli, server: EmbeddedServer
) -> None:
    process = serving(cli, server, "--processes", "2")
    async with Mesh(server.url) as m, await m.pool("cartpole", 8) as pool:
        await pool.reset(seed=1)
        old = {each.worker for each in await m.envs()}
        for worker in old:
            done = await asyncio.to_thread(cli.run, "drain", worker, MESHRL_URL=server.url)
            assert (done.returncode, done.stderr) == (0, "")

            async def two() -> bool:
                return len({each.worker for each in await m.envs()}) == 2

            await until(two, "it was started again")
            batch = await pool.recv(min=8)
            assert "session_lost" not in batch.infos
            await pool.send([1] * 8, batch.env_ids)
        assert not {each.worker for each in await m.envs()} & old
    code, out, err = ends(process, signal.SIGTERM)
    assert (code, out) == (0, "")
    assert err.count("has left, as it was told to; it is started again") == 2


def test_drain_of_a_worker_of_up_has_it_replaced(cli: Cli) -> None:
    process, _ = start_up(cli, "--workers", "1")
    (before,) = [idle["worker"] for idle in cli.listing()["idle"] if idle["kind"] == "env"]
    done = cli.run("drain", before)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{before} has gone")
    read_until(process.stdout, "has left, as it was told to")
    assert ends(process, signal.SIGTERM)[0] == 0


async def test_drain_of_an_agent_worker_has_the_env_worker_of_the_same_process_leave_too(cli: Cli) -> None:
    process, printed = start_up(cli, "--workers", "1")
    url = next(line.partition("MESHRL_URL=")[2] for line in printed.splitlines() if "MESHRL_URL=" in line)
    async with Mesh(url) as m, await m.env("cartpole") as env:
        await env.reset(seed=1)
        (agent,) = await m.agents()
        drained = await asyncio.to_thread(cli.run, "drain", agent.worker, "--no-wait")
        assert drained.returncode == 0

        async def leaves() -> bool:
            return all(each.draining for each in [*await m.envs(), *await m.agents()])

        await until(leaves, "both say that they leave")
        await env.step(1)
        assert process.poll() is None
    assert ends(process, signal.SIGTERM)[0] == 0


def test_drain_of_nobody_says_who_there_is(cli: Cli, server: EmbeddedServer) -> None:
    done = cli.run("drain", "e123", MESHRL_URL=server.url)
    one_error(done, "no worker 'e123' that can be drained is in 'default': meshrl ls shows who is")
    process = serving(cli, server)
    done = cli.run("drain", "e123", MESHRL_URL=server.url)
    one_error(done, "there is e")
    assert ends(process, signal.SIGTERM)[0] == 0


async def test_one_that_nobody_can_take_over_from_leaves_when_its_time_is_over(
    cli: Cli, server: EmbeddedServer
) -> None:
    process = serving(cli, server, "--drain-seconds", "1")
    async with Mesh(server.url) as m, await m.env("cartpole"):
        began = time.monotonic()
        process.terminate()
        code, _, err = await told(process)
        assert code == 0
        assert time.monotonic() - began > 0.9
        assert "sessions that did not move: 1" in err


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    cli: Cli, server: EmbeddedServer, again: signal.Signals, count: int
) -> None:
    process = serving(cli, server, "--drain-seconds", "600", "--processes", str(count))
    async with Mesh(server.url) as m, await m.env("cartpole"):
        process.terminate()

        async def leaves() -> bool:
            return [each.draining for each in await m.envs()] == [True]

        await until(leaves, "the one with the session says that it leaves, the other has gone")
        assert process.poll() is None
        process.send_signal(again)
        code, _, err = await told(process)
        assert code == 0, err


@pytest.mark.parametrize("count", [1, 2])
async def test_ctrl_c_right_after_sigterm_ends_it_at_once(cli: Cli, server: EmbeddedServer, count: int) -> None:
    process = serving(cli, server, "--drain-seconds", "600", "--processes", str(count))
    async with Mesh(server.url) as m, await m.env("cartpole"):
        process.terminate()
        process.send_signal(signal.SIGINT)
        assert await told(process) == (0, "", "")


@pytest.mark.parametrize("count", [1, 2])
async def test_ctrl_c_waits_for_no_session(cli: Cli, server: EmbeddedServer, count: int) -> None:
    process = serving(cli, server, "--drain-seconds", "600", "--processes", str(count))
    async with Mesh(server.url) as m, await m.env("cartpole"):
        process.send_signal(signal.SIGINT)
        assert await told(process) == (0, "", "")
