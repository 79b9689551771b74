"""``meshrl serve-agent``: an agent worker in this process, or several in processes of their own."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from meshrl.cli.options import (
    DRAIN_S,
    AllowKwargs,
    Capability,
    CredentialsFile,
    DrainSeconds,
    MaxSlotsPerUser,
    Namespace,
    Processes,
    ProcessNumber,
    Slots,
    Url,
    Wait,
    capabilities_in,
    names_in,
    processes_in,
)
from meshrl.cli.processes import ready_line
from meshrl.cli.reach import reach
from meshrl.cli.serve import import_from_here
from meshrl.cli.serving import stay_serving, stay_serving_in_processes
from meshrl.errors import UsageError
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.policies import random_policy
from meshrl.worker.running import Leaving, run, until_stopped

BUILT_IN = {"random": random_policy}


def serve_agent(
    ctx: typer.Context,
    agents: Annotated[
        list[str],
        typer.Argument(
            help="Agents: a callable, an object or a class with act (mine=module:object), or the built-in random.",
            metavar="NAME=MODULE:OBJECT...",
            show_default=False,
        ),
    ],
    slots: Slots = 64,
    max_slots_per_user: MaxSlotsPerUser = None,
    processes: Processes = "1",
    allow_kwargs: AllowKwargs = "",
    capability: Capability = None,
    drain_seconds: DrainSeconds = DRAIN_S,
    wait: Wait = 30.0,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
    process: ProcessNumber = None,
) -> None:
    """Serve agents until Ctrl-C or SIGTERM, from this process or (--processes) from several."""
    count = processes_in(processes)
    import_from_here()
    sources = served_agents(agents)
    capabilities = capabilities_in(capability)
    what = ", ".join(sources)

    def announcement(worker: AgentWorker) -> str:
        if process is not None:
            return ready_line(worker.id)
        return f"serving {what} at {worker.url} (agent worker {worker.id})"

    leaving = Leaving()

    async def stay() -> None:
        address = await reach(url, credentials=credentials, namespace=namespace, wait_s=wait)
        if count > 1:
            await stay_serving_in_processes(
                ctx, what, address, count=count, slots=slots, leaving=leaving, drain_s=drain_seconds
            )
            return
        worker = AgentWorker(
            sources,
            address,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            max_slots_per_user=max_slots_per_user,
            capabilities=capabilities,
            allow_kwargs=names_in(allow_kwargs),
        )
        await stay_serving(worker, announcement, leaving=leaving, drain_s=drain_seconds)

    run(until_stopped(stay(), leaving))


def served_agents(agents: Sequence[str]) -> dict[str, Any]:
    """What ``NAME=MODULE:OBJECT...`` serves, by name.

    Raises:
        UsageError: a text has another form, or a name stands twice.
    """
    sources: dict[str, Any] = {}
    for text in agents:
        name, equals, source = text.partition("=")
        if not equals and name in BUILT_IN:
            found: Any = BUILT_IN[name]
        elif name and ":" in source:
            found = source
        else:
            raise UsageError(f"{text!r} is not NAME=MODULE:OBJECT, such as greedy=policies:greedy")
        if name in sources:
            raise UsageError(f"{name} is named twice; give one another name")
        sources[name] = found
    return sources
