"""A nats-server with a configuration of the test's own: users, permissions, tokens, limits."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from meshrl.bus.embedded import find_nats_server
from tests.mesh.conftest import until


class OwnServer:
    """It is stopped by its process id when the test is over.

    Attributes:
        port: that clients connect to.
        pid: of the process.
    """

    def __init__(self, home: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self._home = home
        self._process = process
        self.port = port
        self.pid = process.pid

    def url(self, login: str = "") -> str:
        """Where to connect, with ``user:password`` or a token."""
        return f"nats://{login}{'@' if login else ''}127.0.0.1:{self.port}"

    def reload(self, config: dict[str, Any]) -> None:
        """Give the running server another configuration; it disconnects whom it does not know any more."""
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
    _write(home, config, -1)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([str(find_nats_server()), "-c", str(home / "server.conf")], stderr=log)  # noqa: ASYNC220
    try:
        await until(lambda: process.poll() is not None or port_in(home) is not None, "the server listens")
        port = port_in(home)
        assert port is not None, (home / "log").read_text()
        yield OwnServer(home, process, port)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
