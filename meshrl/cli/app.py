"""The app: its commands, its global options, and how its errors are told.

Every error is one line on stderr, ``error: <what and what to do>``. Exit codes: 0 done, 1 an error, 2 the command line
was not understood, 75 a worker that ended to be started again, 130 Ctrl-C.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from meshrl import __version__
from meshrl.cli.audit import audit
from meshrl.cli.check import check
from meshrl.cli.demo import demo
from meshrl.cli.doctor import doctor
from meshrl.cli.drain import drain
from meshrl.cli.experiment import experiment
from meshrl.cli.export import export
from meshrl.cli.fork import fork
from meshrl.cli.import_ import import_
from meshrl.cli.ls import ls
from meshrl.cli.recordings import episodes, recordings, replay, verify
from meshrl.cli.secure import app as secure
from meshrl.cli.serve import serve
from meshrl.cli.serve_agent import serve_agent
from meshrl.cli.tap import tap
from meshrl.cli.up import up
from meshrl.errors import MeshError, WorkerCondemned
from meshrl.worker.running import CONDEMNED_CODE

INTERRUPTED = 130


@dataclass
class Settings:
    """What the options before the command say.

    Attributes:
        debug: show tracebacks and the log.
    """

    debug: bool = False


app = typer.Typer(
    name="meshrl",
    help="RL environments and policies as services on a NATS bus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up)
app.command("serve")(serve)
app.command("serve-agent")(serve_agent)
app.command("ls")(ls)
app.command("check")(check)
app.command("drain")(drain)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("audit")(audit)
app.command("episodes")(episodes)
app.command("replay")(replay)
app.command("verify")(verify)
app.command("tap")(tap)
app.command("fork")(fork)
app.command("experiment")(experiment)
app.command("export")(export)
app.command("import")(import_)
app.command("recordings")(recordings)
app.add_typer(secure, name="secure")


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"meshrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.", envvar="MESHRL_DEBUG")] = False,
    version: Annotated[  # noqa: ARG001  # its callback does it
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """RL environments and policies as services on a NATS bus."""
    settings: Settings = ctx.obj
    settings.debug = debug
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code.

    Args:
        arguments: without the program's name; ``sys.argv``'s when None.
    """
    settings = Settings()
    try:
        # An exit code, or whatever the command returned.
        result = app(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name="meshrl",
            standalone_mode=False,
            obj=settings,
        )
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # `meshrl ls | head`: the reader has what it wanted. Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exc:  # noqa: BLE001  # the last place that can say anything
        return _tell(exc, debug=settings.debug or bool(os.environ.get("MESHRL_DEBUG")))
    return result if isinstance(result, int) else 0


def _tell(exc: BaseException, *, debug: bool) -> int:
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    # Errors of the command line itself. Typer's class for them has changed its name and place over its versions.
    message = getattr(exc, "format_message", None)
    if callable(message):
        text = one_line(str(message()))
        if text:  # else the help was printed in its place
            print(f"error: {text.rstrip('.')}; see meshrl --help", file=sys.stderr)
        return int(getattr(exc, "exit_code", 2))
    if debug:
        traceback.print_exception(exc)
    print(f"error: {_sentence(exc)}", file=sys.stderr)
    return CONDEMNED_CODE if isinstance(exc, WorkerCondemned) else 1


def _sentence(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return one_line(exc.message)
    return f"{one_line(f'{type(exc).__name__}: {exc}')}; meshrl --debug shows where"


def one_line(text: str) -> str:
    """The first line of ``text``, and the last where there are more: of a log's end, that is the one that tells."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines if len(lines) < 2 else (lines[0], lines[-1]))
