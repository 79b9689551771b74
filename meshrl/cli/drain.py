"""``meshrl drain``: have a worker leave; its sessions move to others first."""

import time
from typing import Annotated

import typer
from rich.console import Console

from meshrl.bus.facts import workers
from meshrl.bus.locate import locate
from meshrl.cli.options import CredentialsFile, Namespace, Url
from meshrl.client.context import Context, context_of
from meshrl.client.mesh import Mesh
from meshrl.errors import RequestTimeout, UsageError, WorkerError, from_wire
from meshrl.protocol.names import near
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Drain, Drained, check
from meshrl.worker.running import run

SECONDS = 60.0
ANSWER_S = 5.0
# After its time a worker closes its envs, for 5 s at most, and says goodbye.
GONE_S = 15.0
LOOK_S = 0.25


def drain(
    worker: Annotated[str, typer.Argument(help="Its id, as meshrl ls shows it.", metavar="WORKER")],
    seconds: Annotated[
        float, typer.Option(help="Seconds that its sessions have to move to other workers.", min=0.0, metavar="S")
    ] = SECONDS,
    wait: Annotated[bool, typer.Option(help="Wait until it has gone.")] = True,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Have a worker leave: its sessions move to others, then it ends; a supervisor starts it again."""
    console = Console(highlight=False, soft_wrap=True)

    async def leave() -> None:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        async with Mesh(address, namespace=namespace, credentials=credentials) as mesh:
            context = context_of(mesh)
            sessions = await ask(context, worker, seconds)
            console.print(f"{worker} leaves within {seconds:g} s: {_sessions(sessions)} to move")
            if wait:
                await _until_gone(context, worker, seconds, console)

    run(leave())


async def ask(context: Context, worker: str, seconds: float) -> int:
    """Have a worker leave; gives how many sessions it has still.

    Raises:
        UsageError: there is no such worker; near ones are named.
        MeshError: it does not answer, or the login may not ask this.
    """
    subject = context.subjects.worker(worker, "drain", context.connection.user)
    try:
        answer = await context.connection.ask(subject, Drain(seconds=seconds).to_wire(), ANSWER_S)
    except RequestTimeout:
        raise WorkerError(
            f"worker {worker} does not answer; if meshrl ls shows it still, its process is stopped or hangs"
        ) from None
    if answer is None:
        known = await _known(context)
        close = near(worker, known) or known
        hint = f"there is {', '.join(close[:5])}" if close else "meshrl ls shows who is"
        raise UsageError(f"no worker {worker!r} that can be drained is in {context.subjects.namespace!r}: {hint}")
    body = unpack(answer)
    if isinstance(body, dict) and "error" in body:
        raise from_wire(body["error"])
    return check(Drained, body).sessions


async def _until_gone(context: Context, worker: str, seconds: float, console: Console) -> None:
    registry, deadline = context.registry, time.monotonic() + seconds + GONE_S
    shown = None
    while True:
        said = [entry.advertisement for entry in registry.directory.entries() if entry.worker == worker]
        if not said and worker not in await _known(context):  # one that serves on demand may advertise nothing
            console.print(f"{worker} has gone")
            return
        taken = max((each.slots - each.free for each in said), default=0)
        if said and taken != shown:
            shown = taken
            console.print(f"  {taken} slot{'s' * (taken != 1)} taken still")
        if time.monotonic() > deadline:
            raise WorkerError(f"worker {worker} has not gone, {GONE_S:g} s after its time; its log may tell why")
        await registry.change(LOOK_S)


async def _known(context: Context) -> list[str]:
    return [fact.worker for fact in await workers(context.connection, context.subjects)]


def _sessions(count: int) -> str:
    return f"{count} session{'s' * (count != 1)}"
