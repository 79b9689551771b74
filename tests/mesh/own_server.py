"""A nats-server with a configuration of the test's own: users, permissions, tokens, limits."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from meshrl.bus.embedded import find_nats_server
from tests.mesh.conftest import until


class OwnServer:
    """It is stopped by its process id when the test is over.

    Attributes:
        port: that clients connect to; it stays the same.
    """

    port: int

    def __init__(self, home: Path, config: dict[str, Any]) -> None:
        self._home = home
        self._config = config
        self._process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    async def start(self) -> None:
        """Run it, after :meth:`kill` again with what is on its disk; returns when it listens."""
        for old in self._home.glob("*.ports"):
            old.unlink()
        _write(self._home, self._config, getattr(self, "port", -1))
        with (self._home / "log").open("ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220  # it does not wait
                [str(find_nats_server()), "-c", str(self._home / "server.conf")], stderr=log
            )
        self._process = process
        await until(lambda: process.poll() is not None or port_in(self._home) is not None, "the server listens")
        port = port_in(self._home)
        assert port is not None, (self._home / "log").read_text()
        self.port = port

    async def kill(self) -> None:
        """End it without a goodbye; returns when it is gone."""
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    async def stop(self) -> None:
        """End it in good order."""
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)

    def monitored(self, page: str) -> Any:
        """What HTTP monitoring says, where ``http`` is in the configuration."""
        for file in self._home.glob("*.ports"):
            with urllib.request.urlopen(f"{json.loads(file.read_text())['monitoring'][0]}/{page}") as answer:
                return json.load(answer)
        raise AssertionError("it does not run")

    def url(self, login: str = "") -> str:
        """Where to connect, with ``user:password`` or a token."""
        return f"nats://{login}{'@' if login else ''}127.0.0.1:{self.port}"

    def reload(self, config: dict[str, Any]) -> None:
        """Give the running server another configuration; it disconnects whom it does not know any more."""
        self._config = config
        _write(self._home, config, self.port)
        self._process.send_signal(signal.SIGHUP)


def _write(home: Path, config: dict[str, Any], port: int) -> None:
    # The format of nats-server's configuration contains JSON.
    whole = {"host": "127.0.0.1", "port": port, "ports_file_dir": str(home), **config}
    (home / "server.conf").write_text(json.dumps(whole))


def port_in(home: Path) -> int | None:
    """The port that a server says it listens on, in the directory of its ports file."""
    for file in home.glob("*.ports"):
        try:
            return int(json.loads(file.read_text())["nats"][0].rpartition(":")[2])
        except ValueError:  # half written yet
            return None
    return None


@asynccontextmanager
async def own_server(home: Path, config: dict[str, Any]) -> AsyncIterator[OwnServer]:
    """Run a server with ``config`` (as JSON would have it), with its files in ``home``, on a free port."""
    server = OwnServer(home, config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
