"""``meshrl serve --processes``: several workers behind one command, which lives as long as they can."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.mesh import Mesh
from meshrl.errors import MeshError
from meshrl.wire.codec import unpack
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.dangerous_envs import Dangerous
from tests.mesh.test_cli import ROOT, Cli, arguments_of, ends, exits, free_port, one_error, read_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and waits by pidfd")


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


def workers_of(cli: Cli) -> dict[str, int]:
    """The process ids of the workers, without their guards, by their ``--process`` argument."""
    found = {}
    for pid in cli.processes():
        arguments = arguments_of(pid)
        if arguments[1:3] == [b"-m", b"meshrl"] and any(a.startswith(b"--process=") for a in arguments):
            found[arguments[4].decode()] = pid
    return found


async def ids(mesh: Mesh) -> set[str]:
    return {served.worker for served in await mesh.envs()}


def started(cli: Cli, server: EmbeddedServer, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A command that serves, and the line by which it says so."""
    process = cli.start(*arguments, MESHRL_URL=server.url)
    (line,) = read_until(process.stdout, "serving")
    return process, line


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
async def test_each_process_is_a_worker_and_all_say_goodbye_at_a_signal(
    cli: Cli, server: EmbeddedServer, name: signal.Signals
) -> None:
    process, line = started(
        *(cli, server, "serve", "cartpole", "--slots", "2", "--processes", "3", "--drain-seconds", "0.5")
    )
    assert line == f"serving CartPole-v1 at nats://127.0.0.1:{server.port} (3 processes, 2 slots each, 6 in all)\n"
    assert set(workers_of(cli)) == {"--process=1", "--process=2", "--process=3"}
    there = cli.processes()
    goodbyes = set()

    def hear(_subject: str, _reply: str, body: bytes) -> None:
        said = unpack(body)
        assert isinstance(said, dict)
        if said.get("left"):
            goodbyes.add(said["worker"])

    async with connect(server.url) as ear, Mesh(server.url) as mesh:
        await ear.subscribe(Subjects().advertisements, hear)
        served = await mesh.envs()
        assert [(one.name, one.slots) for one in served] == [("CartPole-v1", 2)] * 3
        workers = {one.worker for one in served}
        assert len(workers) == 3
        envs = [await mesh.env("cartpole") for _ in range(6)]
        assert {env.worker for env in envs} == workers
        # Sessions are open while the workers end.
        code, out, err = ends(process, name)
        assert (code, out) == (0, "")
        assert err.count("sessions that did not move: 2") == (3 if name is signal.SIGTERM else 0)
        await until(lambda: goodbyes == workers, "all said goodbye")
    assert all(exits(pid) for pid in there)


async def test_process_that_is_killed_is_replaced_by_a_new_worker(cli: Cli, server: EmbeddedServer) -> None:
    process, _ = started(cli, server, "serve", "cartpole", "--processes", "2")
    async with Mesh(server.url) as mesh:
        before = await ids(mesh)
        os.kill(workers_of(cli)["--process=2"], signal.SIGKILL)
        assert read_until(process.stderr, "process 2") == [
            "process 2 was ended by SIGKILL; it is started again in 0.5 s\n"
        ]
        (line,) = read_until(process.stderr, "serves again")
        new = line.strip().removeprefix("process 2 serves again (worker ").removesuffix(")")

        async def replaced() -> bool:
            now = await ids(mesh)
            return new in now and len(now) == 2

        await until(replaced, "the new worker is there, and the old one gone")
        assert new not in before
        assert len(await ids(mesh) & before) == 1
    assert ends(process, signal.SIGTERM) == (0, "", "")


def test_command_that_is_killed_takes_its_processes_with_it(cli: Cli, server: EmbeddedServer) -> None:
    process, _ = started(cli, server, "serve", "cartpole", "--processes", "2")
    there = cli.processes()
    assert len(there) == 5  # itself, the workers, their guards
    process.kill()
    assert all(exits(pid) for pid in there)


async def test_options_reach_every_process_and_the_password_no_command_line(cli: Cli, server: EmbeddedServer) -> None:
    secret = server.url.partition("@")[0].rpartition(":")[2]
    process, line = started(
        *(cli, server, "serve", "mine:Maze", "other=mine:Maze", "--processes", "2", "--namespace", "lab"),
        *("--kwargs", '{"size": 7}', "--allow-kwargs", "size", "--allow", "at"),
        *("--capability", "gpu=true", "--capability", "zone=eu 1"),
    )
    assert "serving Maze, other at" in line
    assert secret not in line
    there = cli.processes()
    assert not any(secret.encode() in argument for pid in there for argument in arguments_of(pid))
    async with Mesh(server.url, namespace="lab") as mesh:
        envs = [await mesh.env("Maze", where={"gpu": True, "zone": "eu 1"}) for _ in range(2)]
        assert len({env.worker for env in envs}) == 2
        for env in envs:
            assert env.observation_space.n == 7  # type: ignore[attr-defined]
            await env.reset(seed=1)
            await env.set_attr("at", 5)
        async with await mesh.env("other", {"size": 2}) as env:
            assert env.observation_space.n == 2  # type: ignore[attr-defined]
    assert ends(process, signal.SIGTERM)[0] == 0


async def test_agents_are_served_by_several_processes_too(cli: Cli, server: EmbeddedServer) -> None:
    process, line = started(cli, server, "serve-agent", "greedy=mine:greedy", "random", "--processes", "2")
    assert "serving greedy, random at" in line
    async with Mesh(server.url) as mesh:
        assert len({served.worker for served in await mesh.agents()}) == 2
        agent = await mesh.agent("greedy")
        assert await agent.act(3) == 1
    assert ends(process, signal.SIGTERM) == (0, "", "")


def test_what_a_process_writes_says_whose_it_is(cli: Cli, server: EmbeddedServer) -> None:
    (cli.directory / "talking.py").write_text(
        "import sys\nfrom mine import Maze\nprint('an import', end='', flush=True)\nprint('a warning', file=sys.stderr)"
    )
    process, line = started(cli, server, "serve", "talking:Maze", "--processes", "2")
    assert line.startswith("serving Maze at")
    code, out, err = ends(process, signal.SIGTERM)
    assert (code, out) == (0, "")
    assert sorted(err.splitlines()) == ["process 1: an importa warning", "process 2: an importa warning"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cartpol"], "did you mean CartPole-v1"),
        (["mine:Unmade"], "Unmade: the env cannot be constructed: RuntimeError: no licence"),
        (["mine:Maze", "--kwargs", '{"sise": 3}'], "unexpected keyword argument 'sise'"),
        (["mine:Maze", "--processes", "some"], "--processes is a number from 1, or auto"),
    ],
)
def test_what_cannot_be_served_is_one_error(cli: Cli, server: EmbeddedServer, arguments: list[str], says: str) -> None:
    done = cli.run("serve", "--processes", "3", *arguments, MESHRL_URL=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    one_error(done, says)


def test_process_that_crashes_at_its_first_start_is_one_error(cli: Cli, server: EmbeddedServer) -> None:
    (cli.directory / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = cli.run("serve", "crashing:Env", "--processes", "3", MESHRL_URL=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    one_error(done, "was ended by SIGKILL before it served")


def test_server_that_is_away_and_login_that_is_refused_are_one_error(cli: Cli, server: EmbeddedServer) -> None:
    command = ("serve", "cartpole", "--processes", "3", "--wait", "0", "--url")
    done = cli.run(*command, f"nats://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    one_error(done, "no NATS server answers at")
    done = cli.run(*command, f"nats://me:wrong@127.0.0.1:{server.port}")
    assert done.returncode == 1
    assert "wrong" not in one_error(done, "refuses the login of me")


async def test_crash_loop_ends_the_command_with_a_message_and_a_code(cli: Cli, server: EmbeddedServer) -> None:
    # Of its own number of crashes, with its own waits between them, this would take two minutes.
    (cli.directory / "sitecustomize.py").write_text("import meshrl.cli.processes as p; p.MAX_CRASHES = 1")
    process = cli.start(
        *("serve", "tests.mesh.dangerous_envs:Dangerous", "--processes", "2"),
        MESHRL_URL=server.url,
        PYTHONPATH=f"{cli.directory}{os.pathsep}{ROOT}",
    )
    read_until(process.stdout, "serving")
    async with Mesh(server.url) as mesh:
        while process.poll() is None:
            with contextlib.suppress(MeshError):  # by turns there is nobody, or it dies of this
                env = await mesh.env("Dangerous", wait=1.0)
                await env.reset()
                await env.step(Dangerous.EXIT)
    _, err = process.communicate(timeout=60.0)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: process ")
    # Clients may find a worker, and kill it, a moment before it says that it serves.
    assert re.search(
        r"ended with exit code 7( before it served: .*)?, 2 times in a row and each time within 30 s, so all", last
    )
    assert cli.processes() == []


def test_process_that_cannot_start_any_more_ends_the_command(cli: Cli, server: EmbeddedServer) -> None:
    process, _ = started(cli, server, "serve", "mine:Maze", "--processes", "2")
    (cli.directory / "mine.py").write_text("import os; os._exit(3)")
    os.kill(workers_of(cli)["--process=1"], signal.SIGKILL)
    out, err = process.communicate(timeout=100.0)
    assert (process.returncode, out) == (1, "")
    *told, last = err.splitlines()
    assert told[0].startswith("process 1 was ended by SIGKILL; it is started again")
    assert [line.rpartition("; ")[0] for line in told[1:]] == ["process 1 ended with exit code 3 before it served"] * 4
    assert last == (
        "error: process 1 ended with exit code 3 before it served; 5 starts in a row have failed, "
        "so all processes are ended"
    )
    assert cli.processes() == []
