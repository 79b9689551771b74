"""The command line, as real processes: what it prints, how it ends, and that nothing is left of it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from meshrl.bus.embedded import URL_VARIABLE, EmbeddedServer
from meshrl.cli.up import is_free
from meshrl.client.mesh import Mesh
from meshrl.errors import KwargsNotAllowed, UnknownName

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and waits by pidfd")

MODULE = """
import gymnasium

class Maze(gymnasium.Env):
    def __init__(self, size=3):
        self.size = size
        self.observation_space = gymnasium.spaces.Discrete(size)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = int(self.np_random.integers(self.size))
        return self.at, {}

    def step(self, action):
        self.at = (self.at + action) % self.size
        return self.at, 1.0, False, False, {}

class Broken(Maze):
    def step(self, action):
        raise ZeroDivisionError("division by zero")

class Unmade(Maze):
    def __init__(self):
        raise RuntimeError("no licence\\nfor this machine")

def greedy(obs):
    return 1
"""


class Cli:
    """Runs ``meshrl`` with a home, a state directory and a place for temporary files of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.temporary = directory / "tmp"
        for made in (self.state, self.temporary, directory / "home"):
            made.mkdir(mode=0o700)
        (directory / "mine.py").write_text(MODULE)
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MESHRL_") and k != URL_VARIABLE}
        return {
            **kept,
            "HOME": str(self.directory / "home"),
            "MESHRL_STATE_DIR": str(self.state),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            **more,
        }

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshrl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.environment(**more),
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The installed script in place of ``python -m``: the current directory is not on its path."""
        program = Path(sys.executable).with_name("meshrl")
        return subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            cwd=self.directory,
            env={k: v for k, v in self.environment().items() if k != "PYTHONPATH"},
            timeout=DEADLINE_S,
            check=False,
        )

    def listing(self, *arguments: str) -> dict[str, Any]:
        done = self.run("ls", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        listing: dict[str, Any] = json.loads(done.stdout)
        return listing

    def processes(self) -> list[int]:
        """The processes that belong to this test, by the state directory in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            except OSError:
                continue
            if f"MESHRL_STATE_DIR={self.state}".encode() in variables:
                found.append(int(entry.name))
        return found

    def hands(self) -> list[int]:
        """The worker processes of ``up``, without their guards."""
        return [pid for pid in self.processes() if arguments_of(pid)[1:3] == [b"-m", b"meshrl.worker.host"]]


def arguments_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def exits(pid: int) -> bool:
    """Whether that process, which need not be a child, ends before the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE_S)[0])
    finally:
        os.close(fd)


def read_until(stream: IO[str] | None, text: str) -> list[str]:
    """The lines up to the one that has ``text``; fails at the end of the stream."""
    assert stream is not None
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {''.join(lines)!r}")


def ends(process: subprocess.Popen[str], name: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(name)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    with ExitStack() as stack:
        for process in cli.started:
            stack.enter_context(process)  # closes its pipes
            if process.poll() is None:
                process.kill()
    for pid in cli.processes():
        assert exits(pid)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as server:
        yield server


def start_up(cli: Cli, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A mesh that is up, and what it printed."""
    process = cli.start("up", *arguments)
    return process, "".join(read_until(process.stdout, "Ctrl-C ends it"))


# --------------------------------------------------------------------------- up


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_up_serves_until_it_is_told_to_end_and_leaves_nothing(cli: Cli, name: signal.Signals) -> None:
    process, printed = start_up(cli, "--port", "0")
    assert "meshrl is up: 2 worker processes" in printed
    assert "MESHRL_URL=nats://embedded:" in printed
    assert max(len(line) for line in printed.splitlines()) <= 81
    listing = cli.listing()  # a bare Mesh() of this user finds it
    assert [agent["name"] for agent in listing["agents"]] == ["random"]
    assert [idle["kind"] for idle in listing["idle"]] == ["env", "env"]
    there = cli.processes()
    assert len(cli.hands()) == 2
    code, _, err = ends(process, name)
    assert (code, err) == (0, "")
    assert all(exits(pid) for pid in there)
    assert list(cli.temporary.iterdir()) == []
    assert [path.name for path in cli.state.iterdir()] == ["up.lock"]


def test_up_that_is_killed_takes_everything_with_it(cli: Cli) -> None:
    process, _ = start_up(cli, "--port", "0", "--workers", "1")
    there = cli.processes()
    assert len(there) > 3  # itself, server, worker, their guards
    process.kill()
    assert all(exits(pid) for pid in there)
    assert list(cli.temporary.iterdir()) == []
    done = cli.run("doctor", "--json")
    assert not [row for row in json.loads(done.stdout)["rows"] if "meshrl up (" in row["found"]]


def test_worker_that_dies_is_replaced_and_up_says_so(cli: Cli) -> None:
    process, _ = start_up(cli, "--port", "0", "--workers", "1")
    (first,) = cli.hands()
    os.kill(first, signal.SIGKILL)
    read_until(process.stdout, "worker process 1 ended with code 137")
    # The next sign of life is the new worker's answer.
    done = cli.run("check", "cartpole", "--episodes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    (second,) = cli.hands()
    assert second != first
    assert ends(process, signal.SIGTERM)[0] == 0


def test_server_that_dies_is_brought_back_at_the_same_address(cli: Cli) -> None:
    process, _ = start_up(cli, "--port", "0", "--workers", "1")
    url = cli.listing()["url"]
    (nats,) = [pid for pid in cli.processes() if arguments_of(pid)[0].endswith(b"/nats-server")]
    os.kill(nats, signal.SIGKILL)
    read_until(process.stdout, "nats-server died")
    done = cli.run("check", "cartpole", "--episodes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cli.listing()["url"] == url
    assert ends(process, signal.SIGTERM)[0] == 0


def test_second_up_of_a_user_is_refused_in_one_line(cli: Cli) -> None:
    process, _ = start_up(cli, "--port", "0", "--workers", "1")
    done = cli.run("up", "--port", "0")
    assert done.returncode == 1
    assert done.stderr == one_error(done, f"running as process {process.pid} already")


def test_store_is_kept(cli: Cli) -> None:
    process, _ = start_up(cli, "--port", "0", "--workers", "1", "--store", str(cli.directory / "store"))
    assert ends(process, signal.SIGTERM)[0] == 0
    assert (cli.directory / "store" / "jetstream").is_dir()


async def test_up_on_a_given_server_lets_clients_do_no_more_than_play(cli: Cli, server: EmbeddedServer) -> None:
    process, printed = start_up(cli, "--url", server.url, "--workers", "1")
    assert "@" not in printed  # no password
    assert list(cli.state.iterdir()) == []
    async with Mesh(server.url) as mesh:
        env = await mesh.env("cartpole")
        agent = await mesh.agent("random", env=env)
        obs, _ = await env.reset(seed=1)
        await env.step(await agent.act(obs))
        with pytest.raises(KwargsNotAllowed):
            await mesh.env("cartpole", {"sutton_barto_reward": True})
        await nobody_imports_a_trap(cli, mesh)
    assert ends(process, signal.SIGTERM)[0] == 0


async def nobody_imports_a_trap(cli: Cli, mesh: Mesh) -> None:
    """Ask for an env of a module that tells of its import, and see that no worker imports it for a stranger."""
    (cli.directory / "trap.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    with pytest.raises(UnknownName):
        await mesh.env("trap:Trap-v0", wait=5.0)
    assert not (cli.directory / "imported").exists()


# --------------------------------------------------------------------------- serve


def one_error(done: subprocess.CompletedProcess[str], says: str) -> str:
    """Its stderr, which is one line that begins with ``error:`` and has ``says``."""
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
async def test_served_env_is_there_until_a_signal_ends_it(
    cli: Cli, server: EmbeddedServer, name: signal.Signals
) -> None:
    arguments = ("--slots", "3", "--capability", "gpu=true", "--drain-seconds", "0")
    process = cli.start("serve", "cartpole", *arguments, MESHRL_URL=server.url)
    (line,) = read_until(process.stdout, "serving")
    assert line.startswith("serving CartPole-v1 at nats://127.0.0.1")
    assert "embedded" not in line  # neither user nor password
    async with Mesh(server.url) as mesh:
        (served,) = await mesh.envs()
        assert (served.name, served.slots) == ("CartPole-v1", 3)
        env = await mesh.env("cartpole", where={"gpu": True})
        await env.reset(seed=1)
        # A session is open while the worker ends.
        code, out, err = ends(process, name)
    assert (code, out, err) == (0, "", "")


async def test_classes_of_the_current_directory_are_served_with_their_arguments(
    cli: Cli, server: EmbeddedServer
) -> None:
    process = cli.start(
        *("serve", "mine:Maze", "other=mine:Maze", "--url", server.url, "--kwargs", '{"size": 7}'),
        *("--allow-kwargs", "size", "--allow", "at"),
    )
    (line,) = read_until(process.stdout, "serving")
    assert "serving Maze, other at" in line
    async with Mesh(server.url) as mesh:
        async with await mesh.env("Maze") as env:
            assert env.observation_space.n == 7  # type: ignore[attr-defined]
            await env.reset(seed=1)
            await env.set_attr("at", 5)
            assert (await env.step(1))[0] == 6
        async with await mesh.env("other", {"size": 2}) as env:
            assert env.observation_space.n == 2  # type: ignore[attr-defined]
    assert ends(process, signal.SIGTERM)[0] == 0


def test_installed_script_finds_modules_of_the_current_directory(cli: Cli, server: EmbeddedServer) -> None:
    done = cli.script("serve", "mine:Unmade", "--url", server.url)
    assert done.returncode == 1
    one_error(done, "Unmade: the env cannot be constructed: RuntimeError: no licence")


async def test_serve_on_demand_serves_any_id_of_the_registry(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", "--on-demand", "--url", server.url)
    read_until(process.stdout, "serving Gymnasium's registry on demand")
    async with Mesh(server.url) as mesh, await mesh.env("frozenlake") as env:
        assert env.name == "FrozenLake-v1"
        await nobody_imports_a_trap(cli, mesh)
    assert ends(process, signal.SIGTERM)[0] == 0


async def test_served_agent_acts(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve-agent", "greedy=mine:greedy", "random", "--url", server.url)
    read_until(process.stdout, "serving greedy, random at")
    async with Mesh(server.url) as mesh:
        agent = await mesh.agent("greedy")
        assert await agent.act(3) == 1
    assert ends(process, signal.SIGINT)[0] == 0


def test_serve_waits_for_its_server(cli: Cli) -> None:
    port = free_port()
    process = cli.start("serve", "cartpole", "--url", f"nats://127.0.0.1:{port}")
    read_until(process.stderr, f"no NATS server answers at nats://127.0.0.1:{port}")
    with EmbeddedServer.start(port=port, private=False):
        read_until(process.stdout, "serving CartPole-v1")
        assert ends(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_serve_that_waits_ends_at_a_signal_too(cli: Cli, name: signal.Signals) -> None:
    process = cli.start("serve", "cartpole", "--url", f"nats://127.0.0.1:{free_port()}")
    read_until(process.stderr, "waiting")
    assert ends(process, name)[0] == 0


def test_serve_gives_up_after_its_wait(cli: Cli) -> None:
    done = cli.run("serve", "cartpole", "--url", f"nats://127.0.0.1:{free_port()}", "--wait", "0")
    assert done.returncode == 1
    one_error(done, "no NATS server answers at")


def test_refused_login_is_told_at_once(cli: Cli, server: EmbeddedServer) -> None:
    done = cli.run("serve", "cartpole", "--url", f"nats://me:wrong@127.0.0.1:{server.port}")
    assert done.returncode == 1
    assert "wrong" not in one_error(done, "refuses the login of me")


# --------------------------------------------------------------------------- ls, check, doctor


def test_ls_fits_its_terminal(cli: Cli, server: EmbeddedServer) -> None:
    name = "a-name-that-is-longer-than-half-of-a-usual-terminal-would-be-wide"
    process = cli.start("serve", "cartpole", f"{name}=cartpole", "--url", server.url)
    read_until(process.stdout, "serving")
    for columns in (80, 120):
        done = cli.run("ls", "--url", server.url, COLUMNS=str(columns))
        assert done.returncode == 0
        assert "CartPole-v1" in done.stdout
        assert "1 worker at nats://127.0.0.1" in done.stdout
        assert max(len(line) for line in done.stdout.splitlines()) <= columns


def test_ls_of_an_empty_mesh_says_what_to_do(cli: Cli, server: EmbeddedServer) -> None:
    done = cli.run("ls", "--url", server.url)
    assert done.returncode == 0
    assert "meshrl serve cartpole" in done.stdout


def test_ls_shows_one_namespace_alone(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", "--on-demand", "--url", server.url, "--namespace", "lab")
    read_until(process.stdout, "serving")
    assert len(cli.listing("--url", server.url, "--namespace", "lab")["idle"]) == 1
    assert cli.listing("--url", server.url)["idle"] == []


def test_ls_that_watches_ends_quietly_at_ctrl_c(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("ls", "--watch", "--json", "--url", server.url)
    read_until(process.stdout, "}")
    code, _, err = ends(process, signal.SIGINT)
    assert (code, err) == (130, "")


def test_check_tells_each_result_and_the_verdict(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", "cartpole", "mine:Broken", "--url", server.url)
    read_until(process.stdout, "serving")
    good = cli.run("check", "cartpole", "--url", server.url)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "CartPole-v1 conforms" in good.stdout
    assert "seeding" in good.stdout
    assert max(len(line) for line in good.stdout.splitlines()) <= 80

    bad = cli.run("check", "broken", "--url", server.url)
    assert bad.returncode == 1
    assert "Broken does not conform" in bad.stdout
    assert "ZeroDivisionError" in bad.stdout
    assert "Traceback" not in bad.stdout
    assert "Traceback" in cli.run("--debug", "check", "broken", "--url", server.url).stdout

    told = cli.run("check", "broken", "--json", "--url", server.url)
    assert told.returncode == 1
    report = json.loads(told.stdout)
    assert report["ok"] is False
    assert {r["check"] for r in report["results"] if r["outcome"] == "failed"} == {"step"}


def test_check_of_a_name_that_nobody_serves_is_one_line(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", "cartpole", "--url", server.url)
    read_until(process.stdout, "serving")
    done = cli.run("check", "cartpol", "--url", server.url)
    assert done.returncode == 1
    one_error(done, "did you mean CartPole-v1?")


def test_doctor_finds_the_mesh_and_says_by_which_rule(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("serve", "cartpole", "--url", server.url)
    read_until(process.stdout, "serving")
    for arguments, more, rule in (
        (["--url", server.url], {}, "the url given"),
        ([], {"MESHRL_URL": server.url}, "$MESHRL_URL"),
    ):
        done = cli.run("doctor", "--json", *arguments, **more)
        rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
        assert done.returncode == 0, done.stdout
        assert rule in rows["mesh"]["found"]
        assert rows["server"]["found"].startswith("nats-server 2.")
        assert rows["max_payload"]["found"] == "4 MiB a message"
        assert rows["JetStream"]["found"] == "on"
        assert rows["workers"]["found"] == "1, serving CartPole-v1"
        assert rows["round trip"]["found"].endswith(" ms")


def test_doctor_calls_an_unreachable_server_an_error_with_the_remedy(cli: Cli) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    done = cli.run("doctor", "--url", url, "--timeout", "0.5")
    assert done.returncode == 1
    assert "error" in done.stdout
    assert "1 error" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


@pytest.mark.skipif(not is_free(4222), reason="a NATS server is on this machine")
def test_ls_check_and_doctor_never_start_a_mesh(cli: Cli) -> None:
    for command in (["ls"], ["check", "cartpole"]):
        done = cli.run(*command)
        assert done.returncode == 1
        one_error(done, "no mesh runs here")
    done = cli.run("doctor", "--json")
    (mesh,) = [row for row in json.loads(done.stdout)["rows"] if row["what"] == "mesh"]
    assert mesh["status"] == "warning"
    assert "meshrl up" in mesh["remedy"]
    assert list(cli.temporary.iterdir()) == []
    assert list(cli.state.iterdir()) == []


def test_reader_that_goes_away_is_no_traceback(cli: Cli, server: EmbeddedServer) -> None:
    process = cli.start("ls", "--json", "--url", server.url)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait(DEADLINE_S)
