"""Reaching the mesh: containers often start before their server."""

import asyncio
import sys
import time
from pathlib import Path

from meshrl.bus.connect import connect
from meshrl.bus.locate import locate
from meshrl.errors import MeshUnreachable

# One attempt to reach a server that is not there yet, and so the time between two lines about it.
ATTEMPT_S = 3.0


async def reach(url: str | None, *, credentials: Path | None, namespace: str, wait_s: float) -> str:
    """The address of the mesh, once its server lets this login in.

    Args:
        url: if one was given; else a mesh is looked for, and none is started.
        credentials: the login.
        namespace: of the mesh.
        wait_s: seconds to go on trying; every few of them a line on stderr says so.

    Raises:
        MeshUnreachable: nobody answers for all of that time.
        LoginRefused: a server answers and refuses the login; at once.
    """
    deadline = time.monotonic() + wait_s
    while True:
        began = time.monotonic()
        try:
            address = await locate(url, credentials=credentials, namespace=namespace, start=False)
            attempt_s = min(ATTEMPT_S, max(1.0, deadline - began))
            async with connect(address, name="meshrl", credentials=credentials, timeout=attempt_s):
                return address
        except MeshUnreachable as exc:
            now = time.monotonic()
            if now >= deadline:
                raise
            print(f"waiting {deadline - now:.0f} s more: {exc.message}", file=sys.stderr, flush=True)
            await asyncio.sleep(min(max(0.0, began + ATTEMPT_S - now), deadline - now))
