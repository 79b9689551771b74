"""Which bus ``Mesh()`` means when it is told nothing (design, section 2).

In order: the url given; ``$MESHRL_URL``; the embedded mesh of this process tree, if it has one; the mesh that
``meshrl up`` left running here; nats://localhost:4222 if a meshrl registry answers there; else the embedded mesh is
started: a real nats-server on a loopback port, and one process that serves Gymnasium's registry on demand.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from pathlib import Path

from meshrl.bus.connection import connect
from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.embedded import shared_url
from meshrl.bus.guard import Guarded
from meshrl.bus.login import Credentials
from meshrl.bus.record import read_record
from meshrl.errors import MeshUnreachable, RequestTimeout
from meshrl.wire.messages import Ask
from meshrl.wire.subjects import Subjects

URL_VARIABLE = "MESHRL_URL"
LOCAL_URL = "nats://localhost:4222"
# A registry on this machine answers in a millisecond; a stranger's server costs this once.
REGISTRY_S = 0.5
# The program that serves the embedded mesh. A name and not an import: the bus is below the workers.
HOST_MODULE = "meshrl.worker.host"


class _Host:
    """The process that serves this process tree's embedded mesh, if this process started it."""

    def __init__(self) -> None:
        self.starting = threading.Lock()
        self.guarded: Guarded | None = None
        self.owner = 0


_HOST = _Host()


async def locate(
    url: str | None = None,
    *,
    credentials: str | Path | Credentials | None = None,
    namespace: str = "default",
    start: bool = True,
) -> str:
    """The address of the mesh that is meant, started if need be.

    Args:
        url: the address if it was given.
        credentials: the login, for asking whether a registry answers.
        namespace: of the mesh.
        start: start the embedded mesh when there is no other.

    Raises:
        LoginRefused: a server on localhost:4222 refuses the login: an error, never a reason to go elsewhere.
        MeshUnreachable: there is none, and none may be started or it does not start.
    """
    known = url or os.environ.get(URL_VARIABLE)
    if known:
        return known
    if not os.environ.get(EMBEDDED_VARIABLE):
        record = await asyncio.to_thread(read_record)
        if record is not None:
            return record.url
        if await _registry_answers(credentials, namespace):
            return LOCAL_URL
        if not start:
            raise MeshUnreachable(
                "no mesh runs here; start one (meshrl up, docker compose up) or give its address (url=, MESHRL_URL)"
            )
    return await asyncio.to_thread(_embedded)


async def _registry_answers(credentials: str | Path | Credentials | None, namespace: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", 4222), timeout=REGISTRY_S).close()
    except OSError:
        return False
    try:
        async with connect(LOCAL_URL, name="meshrl locate", credentials=credentials, timeout=2.0) as connection:
            return await connection.ask(Subjects(namespace).ask, Ask().to_wire(), REGISTRY_S) is not None
    except (RequestTimeout, MeshUnreachable):
        return False


def _embedded() -> str:
    url = shared_url()
    with _HOST.starting:
        inherited = _HOST.owner not in {0, os.getpid()}
        running = _HOST.guarded is not None and not inherited and _HOST.guarded.poll() is None
        started_here = _owns_server()
        if started_here and not running:
            env = {**os.environ, URL_VARIABLE: url}
            env.pop(EMBEDDED_VARIABLE, None)
            _HOST.guarded = Guarded.spawn([sys.executable, "-m", HOST_MODULE], env=env)
            _HOST.owner = os.getpid()
    return url


def _owns_server() -> bool:
    from meshrl.bus import embedded  # noqa: PLC0415  # its state of this moment

    return embedded._SHARED.server is not None  # noqa: SLF001  # two files, one concept: the process's own server


def stop_embedded() -> None:
    """Stop what this process started; tests and the command line do, others leave it to the interpreter's exit."""
    from meshrl.bus import embedded  # noqa: PLC0415

    with _HOST.starting:
        if _HOST.guarded is not None and _HOST.owner == os.getpid():
            _HOST.guarded.stop(timeout_s=5.0)
            _HOST.guarded = None
    server = embedded._SHARED.server  # noqa: SLF001
    if server is not None:
        server.stop()
