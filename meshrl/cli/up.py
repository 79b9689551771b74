"""``meshrl up``: a whole mesh on this machine, until Ctrl-C."""

import contextlib
import os
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from meshrl.bus.certificates import write_private
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.login import login
from meshrl.bus.record import UpLock, write_record
from meshrl.cli.options import (
    CredentialsFile,
    IsolationMode,
    Namespace,
    ResetDeadline,
    StateKeyFile,
    StepDeadline,
    Url,
    Wait,
)
from meshrl.cli.reach import reach
from meshrl.cli.supervisor import Supervisor, WorkerProcess
from meshrl.errors import UsageError
from meshrl.worker.env_worker import RESET_DEADLINE_S, STEP_DEADLINE_S
from meshrl.worker.isolation import Deadlines, check_isolation
from meshrl.worker.running import run, until_stopped
from meshrl.worker.sealing import StateKey

HOST = "127.0.0.1"
ANY_PORT = -1


def up(
    url: Url = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1, metavar="N")] = 2,
    slots: Annotated[
        int, typer.Option(help="Envs held at once by each worker; a vector of 64 takes 64.", min=1, metavar="N")
    ] = 1024,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Directory for JetStream's files, kept afterwards; a temporary one when left out.",
            show_default=False,
            metavar="DIR",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the server; 0 for any.", min=0, max=65535)] = 0,
    isolation: IsolationMode = "thread",
    step_deadline: StepDeadline = STEP_DEADLINE_S,
    reset_deadline: ResetDeadline = RESET_DEADLINE_S,
    state_key: StateKeyFile = None,
    wait: Wait = 30.0,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Run a NATS server (unless --url names one) and workers for any id in Gymnasium's registry."""
    if url and (store is not None or port):
        raise UsageError("--store and --port are for a server of meshrl's own; leave them out with --url")
    check_isolation(isolation, "meshrl")
    if state_key is not None:
        StateKey.read(state_key)  # refused before anything is started
    deadlines = Deadlines(step_deadline, reset_deadline)
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, soft_wrap=True)

    async def stay() -> None:
        with contextlib.ExitStack() as stack:
            server = None
            if not url:
                stack.enter_context(UpLock())
                server = stack.enter_context(start_server(store, port))
                address = server.url
            else:
                address = await reach(url, credentials=credentials, namespace=namespace, wait_s=wait)
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshrl-up-")))
            options = ["--namespace", namespace, "--slots", str(slots), "--isolation", isolation]
            options += [f"--step-deadline={deadlines.step_s}", f"--reset-deadline={deadlines.reset_s}"]
            if state_key is not None:
                options += ["--state-key", str(state_key.absolute())]
            elif server is not None:
                write_private(home / "state.key", secrets.token_hex(32))
                options += ["--state-key", str(home / "state.key")]
            if server is not None:  # its login is in its address
                options += ["--private"]
            elif credentials is not None:
                options += ["--credentials", str(credentials.absolute())]
            processes = [
                WorkerProcess(n, [*options, *(["--agents"] if n == 1 else [])], address, home, say)
                for n in range(1, workers + 1)
            ]
            supervisor = Supervisor(processes, server, say)
            try:
                await supervisor.start()
                if server is not None:
                    write_record(server.url, monitor_url=server.monitor_url)
                console.print(how_to_connect(address, workers, namespace, own=server is not None), soft_wrap=True)
                await supervisor.watch()
            finally:
                console.print("stopping")
                await supervisor.stop()

    run(until_stopped(stay()))


def start_server(store: Path | None, port: int) -> EmbeddedServer:
    """A server of this command's own, on the loopback address and with a password.

    NATS's own port 4222 is not taken unless asked for: others would find a server there that refuses them.

    Args:
        store: for JetStream's files.
        port: the one asked for; 0 for any.

    Raises:
        UsageError: the port asked for is taken.
        MeshUnreachable: the server does not start.
    """
    if port and not is_free(port):
        raise UsageError(f"port {port} is taken by another program; leave --port out, or use --port 0 for any")
    return EmbeddedServer.start(store=store, host=HOST, port=port or ANY_PORT)


def is_free(port: int) -> bool:
    """Whether a server could listen on that loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # ports of connections that have just ended count as free, as for nats-server
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def how_to_connect(url: str, workers: int, namespace: str, *, own: bool) -> Text:
    """What stands on the screen while the mesh is up.

    Args:
        url: where to connect, password included.
        workers: how many.
        namespace: of the mesh.
        own: whether the server was started here, so that this user's processes find it by themselves.
    """
    shown = url if own else login(url).url
    who = f"{workers} worker processes serve" if workers > 1 else "1 worker process serves"
    given = [] if own else [repr(shown)]
    given += [f"namespace={namespace!r}"] if namespace != "default" else []
    more = [] if own else ["--url", shown]
    more += ["--namespace", namespace] if namespace != "default" else []
    text = Text()
    text.append("meshrl is up: ", "bold green")
    text.append(f"{who} any id in Gymnasium's registry,\nand the agent random.\n\n")
    text.append("  From Python:\n")
    text.append(f"    async with meshrl.Mesh({', '.join(given)}) as m:\n", "cyan")
    text.append('        env = await m.env("cartpole")\n\n', "cyan")
    text.append("  What is there, and whether an env keeps its promises:\n")
    text.append(f"    meshrl {' '.join(['ls', *more])}\n", "cyan")
    text.append(f"    meshrl {' '.join(['check', 'cartpole', *more])}\n\n", "cyan")
    if own:
        text.append("  From other users, languages and tools on this machine:\n")
        text.append(f"    MESHRL_URL={shown}\n\n", "cyan")
    text.append("Ctrl-C ends it.")
    return text
