"""Serving, in this process or in several of its own: from the announcement to the goodbye.

Programs wrap it in :func:`meshrl.worker.running.until_stopped`, which is what ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import typer

from meshrl.bus.login import login
from meshrl.cli.processes import ServingProcess
from meshrl.cli.supervisor import Supervisor
from meshrl.errors import WorkerError
from meshrl.worker.limits import GRACE_CPU_S, Limits
from meshrl.worker.running import Leaving, spare_what_stays
from meshrl.worker.service import Service

W = TypeVar("W", bound=Service)

NO_LIMITS = Limits()

# Between two signals to processes that are to end at once and have not.
HURRY_S = 0.5

# What differs between the parent's command line and its processes'. The url may hold a password.
NOT_PASSED_ON = {"url", "processes", "process"}


async def stay_serving(
    worker: W,
    announcement: Callable[[W], str],
    limits: Limits = NO_LIMITS,
    *,
    leaving: Leaving | None = None,
    drain_s: float = 0.0,
) -> None:
    """Serve until cancelled, or until it has left; then the worker says goodbye.

    Args:
        worker: not yet entered.
        announcement: the line for stdout once it is advertised; its address is known by then.
        limits: of this process.
        leaving: is given what has the worker leave.
        drain_s: how long its sessions have then to move to others.

    Raises:
        WorkerCondemned: it holds env code that it cannot end, or this process has used its CPU time.
        MeshError: it cannot start, or its connection ended for good.
    """
    limits.apply(grace_cpu_s=GRACE_CPU_S)
    if limits.max_cpu_s is not None:
        message = f"its process has used the {limits.max_cpu_s:g} s of CPU time that it may have (--max-cpu-seconds)"
        asyncio.get_running_loop().add_signal_handler(signal.SIGXCPU, worker.condemn, message)
    async with worker:
        spare_what_stays()
        if leaving is not None and drain_s > 0:
            leaving.begin = partial(worker.leave, drain_s)
        print(announcement(worker), flush=True)
        await worker.serve_forever()


async def stay_serving_in_processes(
    ctx: typer.Context, what: str, url: str, *, count: int, slots: int, leaving: Leaving, drain_s: float
) -> None:
    """Run the command ``ctx`` in several processes until cancelled; then they are told to end, and waited for.

    Args:
        ctx: of the command, which has the option ``--process`` for its processes.
        what: is served.
        url: of the server, password included.
        count: processes.
        slots: of each.
        leaving: is given what has all of them leave.
        drain_s: how long their sessions have then to move to others.

    Raises:
        WorkerError: one cannot start, cannot be kept alive, or did not end in good order.
    """
    processes = [ServingProcess(n, process_line(ctx, n), url, say, drain_s=drain_s) for n in range(1, count + 1)]
    supervisor = Supervisor(processes, None, say)
    stopped = leaves = False
    left = asyncio.Event()
    try:
        await supervisor.start()
        leaving.begin = left.set
        each = f"{slots} slot{'s' if slots > 1 else ''} each, {count * slots} in all"
        print(f"serving {what} at {login(url).url} ({count} processes, {each})", flush=True)
        await _until(left, supervisor.watch())
        stopped = leaves = True
    except asyncio.CancelledError:
        stopped = True
        raise
    finally:
        await _end(supervisor, processes, at_once=not leaves)
        failures = [process.failure for process in processes if process.failure]
        for failure in failures if not stopped else failures[:-1]:
            say(failure)
        if stopped and failures:
            # In place of the cancellation: until_stopped asked for it, and the exit code is to tell.
            raise WorkerError(failures[-1])


async def _end(supervisor: Supervisor, processes: Sequence[ServingProcess], *, at_once: bool) -> None:
    """Tell all of them to end, and wait for it; cancelled, they are to end at once."""
    if at_once:
        for process in processes:
            process.hurry(signal.SIGINT)
    stopping = asyncio.ensure_future(supervisor.stop())
    try:
        await asyncio.shield(stopping)
    except asyncio.CancelledError:
        # Their second SIGTERM; one that is at its end just ends by it. More than once, for one that arrives before the
        # first was read is the same signal.
        while not stopping.done():
            for process in processes:
                process.hurry(signal.SIGTERM)
            await asyncio.wait({stopping}, timeout=HURRY_S)
        stopping.result()


async def _until(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Work until the event is set."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def process_line(ctx: typer.Context, number: int) -> list[str]:
    """The command line by which this program runs the same command as one of several processes.

    Args:
        ctx: of the command that runs; every option of it is passed on with the value that it has now, whether from
            the command line or the environment, but for :data:`NOT_PASSED_ON`.
        number: of the process.
    """
    options = [f"--process={number}"]
    arguments: list[str] = []
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name in NOT_PASSED_ON or value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            arguments += map(str, values)
        elif isinstance(value, bool):
            options += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            options += [f"{parameter.opts[0]}={one}" for one in values]
    # -P as an installed script has it, where a random.py of the current directory is not Python's own; the command
    # adds the directory when Python's modules are imported.
    script = getattr(sys.modules["__main__"], "__spec__", None) is None
    before = ["--debug"] if ctx.find_root().params.get("debug") else []
    program = [sys.executable, *(["-P"] if script else []), "-m", "meshrl"]
    return [*program, *before, str(ctx.command.name), *options, "--", *arguments]


def say(text: str) -> None:
    """A line on stderr, whole, from any thread."""
    with contextlib.suppress(OSError):  # nobody reads it; the processes are not to wait for that
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
