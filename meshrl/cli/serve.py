"""``meshrl serve``: an env worker in this process, or several in processes of their own."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import typer

from meshrl.cli.options import (
    DRAIN_S,
    RECORD_BYTES,
    AllowKwargs,
    Capability,
    CredentialsFile,
    DrainSeconds,
    IsolationMode,
    MaxSlotsPerUser,
    Namespace,
    Processes,
    ProcessNumber,
    RecordAge,
    RecordBytes,
    ResetDeadline,
    Slots,
    StateKeyFile,
    StepDeadline,
    Url,
    Wait,
    bytes_in,
    capabilities_in,
    json_object,
    names_in,
    processes_in,
    record_level,
    retention_of,
)
from meshrl.cli.processes import ready_line
from meshrl.cli.reach import reach
from meshrl.cli.serving import NO_LIMITS, stay_serving, stay_serving_in_processes
from meshrl.errors import InvalidName, UsageError
from meshrl.protocol.names import near, resolve
from meshrl.worker.env_worker import RESET_DEADLINE_S, STEP_DEADLINE_S, EnvWorker
from meshrl.worker.factories import Factory, is_gymnasium_id
from meshrl.worker.isolation import Deadlines, check_isolation
from meshrl.worker.limits import Limits
from meshrl.worker.running import Leaving, end_condemned, run, until_stopped
from meshrl.worker.sealing import StateKey


def serve(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Envs: an id (CartPole-v1, or cartpole for the newest), module:Name-v1, module:Class; "
            "or a name of its own for one (cartpole=CartPole-v1).",
            metavar="NAME[=ID]...",
            show_default=False,
        ),
    ] = None,
    slots: Slots = 64,
    max_slots_per_user: MaxSlotsPerUser = None,
    processes: Processes = "1",
    kwargs: Annotated[
        str, typer.Option(help="Arguments for the envs' constructors.", show_default=False, metavar="JSON")
    ] = "{}",
    allow_kwargs: AllowKwargs = "",
    allow: Annotated[
        str,
        typer.Option(
            help="Public names of the env that clients may call and set: a,b or '*'.",
            show_default=False,
            metavar="NAMES",
        ),
    ] = "",
    capability: Capability = None,
    vectors: Annotated[
        str,
        typer.Option(
            help="How vectors are hosted: meshrl (envs one by one), gymnasium (the env's own vector entry point) or "
            "envpool.",
            metavar="HOW",
        ),
    ] = "meshrl",
    isolation: IsolationMode = "thread",
    step_deadline: StepDeadline = STEP_DEADLINE_S,
    reset_deadline: ResetDeadline = RESET_DEADLINE_S,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of each env's process (--isolation process), else of each worker process: 512M, 2G.",
            show_default=False,
            metavar="SIZE",
        ),
    ] = None,
    max_cpu_seconds: Annotated[
        float | None,
        typer.Option(help="CPU seconds of each of these processes in its life.", show_default=False, metavar="S"),
    ] = None,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Serve any id of Gymnasium's registry when somebody asks.")
    ] = False,
    record: Annotated[
        str | None,
        typer.Option(
            help="What is recorded where clients do not say: off, actions (enough to run it again; the default), full, "
            "or strict (and no answer before it is stored).",
            metavar="LEVEL",
            show_default=False,
        ),
    ] = None,
    record_bytes: RecordBytes = RECORD_BYTES,
    record_age: RecordAge = None,
    drain_seconds: DrainSeconds = DRAIN_S,
    wait: Wait = 30.0,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
    state_key: StateKeyFile = None,
    process: ProcessNumber = None,
) -> None:
    """Serve environments until Ctrl-C or SIGTERM, from this process or (--processes) from several."""
    if not names and not on_demand:
        raise UsageError("serve needs a name (meshrl serve cartpole), or --on-demand")
    count = processes_in(processes)
    import_from_here()
    envs = served_envs(names or [], json_object(kwargs, "--kwargs"))
    capabilities = capabilities_in(capability)
    where = check_isolation(isolation, vectors)
    limits = Limits(bytes_in(max_memory, "--max-memory"), max_cpu_seconds)
    limits.check()
    Deadlines(step_deadline, reset_deadline)  # refused before anything is waited for
    level, retention = None if record is None else record_level(record), retention_of(record_bytes, record_age)
    key = None if state_key is None else StateKey.read(state_key)
    of_envs = limits if where == "process" else NO_LIMITS
    what = ", ".join([*envs, *(["Gymnasium's registry on demand"] if on_demand else [])])

    def announcement(worker: EnvWorker) -> str:
        if process is not None:
            return ready_line(worker.id)
        return f"serving {what} at {worker.url} (worker {worker.id}, {slots} slots)"

    leaving = Leaving()

    async def stay() -> None:
        address = await reach(url, credentials=credentials, namespace=namespace, wait_s=wait)
        if count > 1:
            await stay_serving_in_processes(
                ctx, what, address, count=count, slots=slots, leaving=leaving, drain_s=drain_seconds
            )
            return
        worker = EnvWorker(
            envs,
            address,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            max_slots_per_user=max_slots_per_user,
            capabilities=capabilities,
            allow_kwargs=names_in(allow_kwargs),
            allow=names_in(allow),
            on_demand=on_demand,
            isolation=where,
            step_deadline_s=step_deadline,
            reset_deadline_s=reset_deadline,
            max_memory_bytes=of_envs.max_memory_bytes,
            max_cpu_s=of_envs.max_cpu_s,
            vectors=vectors,
            state_key=key,
            record=level,
            retention=retention,
            last_resort=end_condemned,
        )
        await stay_serving(
            worker,
            announcement,
            NO_LIMITS if where == "process" else limits,
            leaving=leaving,
            drain_s=drain_seconds,
        )

    run(until_stopped(stay(), leaving))


def import_from_here() -> None:
    """Let modules of the current directory be found, as ``python -m`` does and an installed script does not."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)


def served_envs(names: Sequence[str], kwargs: Mapping[str, Any]) -> dict[str, Factory]:
    """What ``NAME[=ID]...`` serves, by name.

    A name alone is served under the id that it means, the module before a colon left out.

    Raises:
        InvalidName: an id is not in Gymnasium's registry; near ones are listed.
        UsageError: a name stands twice.
    """
    envs: dict[str, Factory] = {}
    for text in names:
        name, equals, source = text.partition("=")
        if equals and not (name and source):
            raise UsageError(f"{text!r} is not NAME or NAME=ID, such as cartpole=CartPole-v1")
        source = _source(source or name)
        name = name if equals else source.rpartition(":")[2]
        if name in envs:
            raise UsageError(f"{name} is named twice; give one another name: other={source}")
        envs[name] = Factory(source, kwargs)
    return envs


def _source(text: str) -> str:
    if ":" in text:
        return text
    found = resolve(text, gymnasium.registry)
    if found is not None:
        return found
    close = near(text, gymnasium.registry)
    hint = f"did you mean {', '.join(close)}?" if close else "gymnasium.pprint_registry() lists what it has"
    package = text if is_gymnasium_id(text) else f"{text}-v0"
    raise InvalidName(
        f"Gymnasium has no env {text!r}: {hint} (one that a package registers is written package:{package}, "
        "a class module:Class)"
    )
