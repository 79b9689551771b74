"""A real nats-server on the very files that ``meshrl secure init`` wrote."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from meshrl.bus.embedded import find_nats_server
from meshrl.cli import main
from tests.mesh.conftest import until
from tests.mesh.own_server import port_in


class Secured:
    """It is stopped by its process id when the test is over.

    Attributes:
        home: the directory that ``secure init`` wrote.
        url: where to connect.
    """

    def __init__(self, home: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self.home = home
        self.url = f"tls://127.0.0.1:{port}"
        self._process = process

    def login(self, name: str, team: str = "red") -> Path:
        """The file of a login."""
        return self.home / "teams" / team / f"{name}.login"

    def reload(self) -> None:
        """Have it read its files again."""
        self._process.send_signal(signal.SIGHUP)


def init(home: Path, *more: str) -> None:
    """``meshrl secure init`` for a server on a free port of the loopback address."""
    assert main(["secure", "init", str(home), "--host", "127.0.0.1", "--listen", "127.0.0.1:-1", *more]) == 0


@asynccontextmanager
async def secured_server(home: Path) -> AsyncIterator[Secured]:
    """Run a server on what is in ``home``."""
    ports = home / "ports"
    ports.mkdir()
    argv = [str(find_nats_server()), "--config", str(home / "nats-server.conf"), "--ports_file_dir", str(ports)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(argv, stderr=log)  # noqa: ASYNC220
    try:
        await until(lambda: process.poll() is not None or port_in(ports) is not None, "the server listens")
        port = port_in(ports)
        assert port is not None, (home / "log").read_text()
        yield Secured(home, process, port)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


async def cli(server: Secured, login: str, *line: str) -> str:
    """What a command prints, with the login from the environment; an AssertionError with its stderr if it fails."""
    return await run_cli({"MESHRL_URL": server.url, "MESHRL_CREDENTIALS": str(server.login(login))}, *line)


async def run_cli(told: dict[str, str], *line: str) -> str:
    """The same, with that in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESHRL_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meshrl", *line),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**kept, "COLUMNS": "200", **told},
    )
    try:
        async with asyncio.timeout(90.0):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode()
