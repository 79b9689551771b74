"""Running: an event loop for a command, and the end that SIGTERM and Ctrl-C bring to one that stays."""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from meshrl.bus.connection import connect
from meshrl.bus.locate import locate
from meshrl.errors import MeshUnreachable

log = logging.getLogger("meshrl.cli")

T = TypeVar("T")

# One attempt to reach a server that is not there yet, and so the time between two lines about it.
ATTEMPT_S = 3.0


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on uvloop where it exists."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run(main)
    result: T = uvloop.run(main)
    return result


async def until_stopped(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` until it ends, or until SIGTERM or Ctrl-C, which cancel it; then its ``finally`` blocks run.

    Only the first signal counts: in a terminal, Ctrl-C often arrives twice (from it and from a program around this
    one), and what happens at the end is bounded in time anyway.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(main)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            task.cancel()

    with contextlib.ExitStack() as handlers:
        for name in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C alone, as KeyboardInterrupt
                loop.add_signal_handler(name, stop)
                handlers.callback(loop.remove_signal_handler, name)
        try:
            await task
        except asyncio.CancelledError:
            if not stopped:
                raise


async def reach(url: str | None, *, credentials: Path | None, namespace: str, wait_s: float) -> str:
    """The address of the mesh, once its server lets this login in; containers often start before their server.

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
