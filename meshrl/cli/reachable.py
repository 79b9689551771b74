"""Which mesh can be reached from here, as ``meshrl doctor`` sees it."""

import re
from pathlib import Path

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.facts import Found, found, jetstream_problem, round_trip_s, workers
from meshrl.cli.rows import Row
from meshrl.client.mesh import Mesh
from meshrl.errors import LoginRefused, MeshError, MeshUnreachable
from meshrl.wire.subjects import Subjects

MIB = 1024 * 1024
# nats-server's default; below it, images of one step are already split.
SMALL_PAYLOAD_BYTES = MIB
# A step costs one of these; over 20 ms it is a wide-area mesh.
SLOW_S = 0.02
# The first with what recordings are written with.
MIN_SERVER = (2, 10)


async def rows(url: str | None, *, namespace: str, credentials: Path | None, timeout_s: float) -> list[Row]:
    """The mesh, its server and its workers; never starts one.

    Args:
        url: if one was given.
        namespace: of the mesh.
        credentials: the login.
        timeout_s: seconds to wait for the server.
    """
    try:
        where = await found(url, credentials=credentials, namespace=namespace)
    except LoginRefused as exc:
        return [Row(what="mesh", status="error", found="the login was refused", remedy=exc.message)]
    except MeshUnreachable:
        return [
            Row(
                what="mesh",
                status="warning",
                found="none runs here; Mesh() starts an embedded one of its own",
                remedy="start one that others find, too (meshrl up), or give its address (--url, MESHRL_URL)",
            )
        ]
    except MeshError as exc:
        return [Row(what="mesh", status="error", found="cannot be looked for", remedy=exc.message)]
    try:
        async with connect(where.url, name="meshrl doctor", credentials=credentials, timeout=timeout_s) as connection:
            return [
                Row(what="mesh", status="ok", found=f"{connection.url} as {connection.user} ({where.rule})"),
                *await _server(connection),
                await _workers(connection, where, namespace, credentials),
            ]
    except MeshError as exc:
        return [Row(what="mesh", status="error", found=f"found by {where.rule}", remedy=exc.message)]


async def _server(connection: Connection) -> list[Row]:
    numbers = re.search(r"(\d+)\.(\d+)[\w.+-]*", connection.server_version)
    version = numbers[0] if numbers else connection.server_version
    old = numbers is not None and (int(numbers[1]), int(numbers[2])) < MIN_SERVER
    limit = connection.max_payload
    small = limit < SMALL_PAYLOAD_BYTES
    problem = await jetstream_problem(connection)
    took_s = await round_trip_s(connection)
    return [
        Row(
            what="server",
            status="warning" if old else "ok",
            found=f"nats-server {version}",
            remedy=f"upgrade it to {'.'.join(map(str, MIN_SERVER))} or later" if old else "",
        ),
        Row(
            what="max_payload",
            status="warning" if small else "ok",
            found=f"{limit / MIB:g} MiB a message",
            remedy="raise max_payload in the server's configuration; larger messages are split" if small else "",
        ),
        Row(
            what="JetStream",
            status="warning" if problem else "ok",
            found=problem or "on",
            remedy="start the server with --jetstream; only recordings need it" if problem else "",
        ),
        Row(
            what="round trip",
            status="warning" if took_s > SLOW_S else "ok",
            found=f"{took_s * 1000:.2f} ms",
            remedy="serve envs nearer to their learner, or step many at once" if took_s > SLOW_S else "",
        ),
    ]


async def _workers(connection: Connection, where: Found, namespace: str, credentials: Path | None) -> Row:
    known = {fact.worker for fact in await workers(connection, Subjects(namespace))}
    async with Mesh(where.url, namespace=namespace, credentials=credentials) as mesh:
        served = [*await mesh.envs(), *await mesh.agents()]
    known |= {advertisement.worker for advertisement in served}
    if not known:
        return Row(
            what="workers",
            status="warning",
            found=f"none in the namespace {namespace}",
            remedy="start one (meshrl serve cartpole, meshrl up)",
        )
    names = sorted({advertisement.name for advertisement in served})
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return Row(what="workers", status="ok", found=f"{len(known)}, serving {shown or 'nothing until somebody asks'}")
