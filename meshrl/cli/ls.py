"""``meshrl ls``: who is on the mesh, what they serve and how busy they are."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meshrl.bus.facts import workers
from meshrl.bus.locate import locate
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.client.context import Context, context_of
from meshrl.client.mesh import Mesh
from meshrl.wire.messages import Advertisement, Kind, Vectors
from meshrl.worker.running import run

WATCH_S = 1.0
# Descriptions are asked for at the first advertisement; what one says is not worth more waiting.
DESCRIBED_S = 1.0


class IdleWorker(BaseModel):
    """A worker that advertises nothing: it serves on demand, and nobody has asked yet.

    Attributes:
        worker: its id.
        kind: of worker.
    """

    model_config = ConfigDict(frozen=True)

    worker: str
    kind: Kind


class ServedEnv(Advertisement):
    """An env as it is advertised, and who steps vectors of it.

    Attributes:
        implementation: of vectors: ``meshrl`` (sub-environments hosted one by one), ``gymnasium`` (the env's own vector
            entry point) or ``envpool``; None where there are no vectors, or the worker has not said so yet.
    """

    implementation: str | None = None


class Listing(BaseModel):
    """What ``ls`` shows.

    Attributes:
        url: of the server, without a password.
        namespace: of the mesh.
        envs: one a name and worker.
        agents: one a name and worker.
        idle: workers that serve nothing at this moment.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    namespace: str
    envs: list[ServedEnv]
    agents: list[Advertisement]
    idle: list[IdleWorker]


def ls(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """List workers, envs and agents, and how busy they are."""
    console = Console(highlight=False)

    async def look() -> None:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        async with Mesh(address, namespace=namespace, credentials=credentials) as mesh:
            listing = await listed(mesh)
            if as_json:
                print(listing.model_dump_json(indent=2), flush=True)
                while watch:
                    await asyncio.sleep(WATCH_S)
                    print((await listed(mesh)).model_dump_json(indent=2), flush=True)
            elif watch:
                with Live(tables(listing), console=console, auto_refresh=False) as live:
                    while True:
                        await asyncio.sleep(WATCH_S)
                        live.update(tables(await listed(mesh)), refresh=True)
            else:
                console.print(tables(listing))

    run(look())


async def listed(mesh: Mesh) -> Listing:
    """What is on the mesh at this moment."""
    context = context_of(mesh)
    known = await workers(context.connection, context.subjects)
    envs, agents = await _served_envs(context), await mesh.agents()
    serving = {advertisement.worker for advertisement in (*envs, *agents)}
    return Listing(
        url=context.connection.url,
        namespace=context.subjects.namespace,
        envs=envs,
        agents=agents,
        idle=[
            IdleWorker.model_validate({"worker": fact.worker, "kind": fact.kind})
            for fact in known
            if fact.worker not in serving
        ],
    )


async def _served_envs(context: Context) -> list[ServedEnv]:
    """Each env with what its description says, as far as it comes in time."""
    registry = context.registry
    deadline = time.monotonic() + DESCRIBED_S
    while any(entry.description is None for entry in registry.directory.entries("env")):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        await registry.change(left)
    served = []
    for entry in registry.directory.entries("env"):
        vectors = None if entry.description is None else entry.description.vectors
        implementation = None if vectors is None else vectors.implementation
        served.append(ServedEnv(**entry.advertisement.model_dump(), implementation=implementation))
    return served


def tables(listing: Listing) -> RenderableType:
    """A listing as tables of envs and agents, and a line about the rest."""
    shown: list[RenderableType] = []
    for title, served in (("Envs", listing.envs), ("Agents", listing.agents)):
        if served:
            shown.append(_table(title, served))
    if listing.idle:
        ids = ", ".join(idle.worker for idle in listing.idle)
        shown.append(
            Text.assemble(("Ready", "bold"), f" and serving nothing yet; they make envs when somebody asks: {ids}")
        )
    count = len({a.worker for a in (*listing.envs, *listing.agents)} | {i.worker for i in listing.idle})
    where = f"{listing.url}, namespace {listing.namespace}"
    if not count:
        return Text(f"No worker is at {where}.\nStart one: meshrl serve cartpole, or meshrl up")
    shown.append(Text(f"{count} worker{'s' if count > 1 else ''} at {where}", "dim"))
    return Group(*shown)


def _table(title: str, served: Sequence[Advertisement]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold", pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("worker", no_wrap=True)
    for number in ("slots", "free", "waiting"):
        table.add_column(number, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    # Most have no word on it: only where somebody's vectors are not meshrl's own.
    steppers = {a.worker + a.name: a.implementation for a in served if isinstance(a, ServedEnv) and a.implementation}
    foreign = {key: name for key, name in steppers.items() if name != Vectors().implementation}
    if foreign:
        table.add_column("vectors", no_wrap=True)
    for each in sorted(served, key=lambda a: (a.name, a.worker)):
        table.add_row(
            Text(each.name),
            each.worker,
            str(each.slots),
            Text(str(each.free), "" if each.free else "yellow"),
            Text(str(each.waiting), "yellow" if each.waiting else ""),
            _state(each),
            *([foreign.get(each.worker + each.name, "")] if foreign else []),
        )
    return table


def _state(advertisement: Advertisement) -> Text:
    if not advertisement.draining:
        return Text("serving", "green")
    left = advertisement.draining_s
    return Text("draining" if left is None else f"draining, {left:.0f} s left", "yellow")
