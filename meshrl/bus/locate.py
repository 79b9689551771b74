"""Which bus ``Mesh()`` means when it is told nothing (design, section 2).

In order: the url given; ``$MESHRL_URL``; the embedded mesh of this process tree, if it has one; the mesh that
``meshrl up`` left running here; nats://localhost:4222 if a meshrl registry answers there; else the embedded mesh is
started: a real nats-server on a loopback port, and one process that serves Gymnasium's registry on demand.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from meshrl.bus.connect import connect
from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.login import Credentials
from meshrl.bus.record import read_record
from meshrl.bus.shared import embedded_mesh
from meshrl.errors import BusClosed, MeshUnreachable, RequestTimeout, SubjectNotPermitted
from meshrl.wire.messages import Ask
from meshrl.wire.subjects import Subjects

URL_VARIABLE = "MESHRL_URL"
LOCAL_URL = "nats://localhost:4222"
# A registry on this machine answers in a millisecond; a stranger's server costs this once.
REGISTRY_S = 0.5


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
    return await asyncio.to_thread(embedded_mesh)


async def _registry_answers(credentials: str | Path | Credentials | None, namespace: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", 4222), timeout=REGISTRY_S).close()
    except OSError:
        return False
    try:
        async with connect(LOCAL_URL, name="meshrl locate", credentials=credentials, timeout=2.0) as connection:
            return await connection.ask(Subjects(namespace).ask, Ask().to_wire(), REGISTRY_S) is not None
    except (RequestTimeout, MeshUnreachable, BusClosed, SubjectNotPermitted):
        return False
