"""Options that several commands have, and how their texts are read."""

import json
import os
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from meshrl.bus.locate import URL_VARIABLE
from meshrl.bus.login import CREDENTIALS_VARIABLE
from meshrl.errors import UsageError
from meshrl.recording.streams import MAX_BYTES, Retention
from meshrl.wire.record import RECORD_LEVELS, RecordLevel
from meshrl.worker.sealing import STATE_KEY_VARIABLE

Url = Annotated[
    str | None,
    typer.Option(
        help="NATS server, such as nats://host:4222; found as Mesh() finds it when left out.",
        envvar=URL_VARIABLE,
        show_default=False,
        show_envvar=True,
        metavar="URL",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(help="One mesh of several on the same NATS account.", envvar="MESHRL_NAMESPACE", metavar="NAME"),
]
CredentialsFile = Annotated[
    Path | None,
    typer.Option(
        # Read where the URL is, for Mesh() too: a login in the URL goes before the variable.
        help=f"Credentials (.creds) or NKEY seed file; ${CREDENTIALS_VARIABLE} if the URL has no login.",
        show_default=False,
        metavar="FILE",
    ),
]
StateKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="The key of these workers, at least 32 bytes: with it ALE's envs are resumed from resets without a seed.",
        envvar=STATE_KEY_VARIABLE,
        show_default=False,
        metavar="FILE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the NATS server at the start.", min=0.0, metavar="S")]
Slots = Annotated[int, typer.Option(help="Envs held at once; a vector of 64 takes 64.", min=1, metavar="N")]
MaxSlotsPerUser = Annotated[
    int | None,
    typer.Option(
        help="Slots of a worker that one user (login) may take at once; further opens of that user wait.",
        min=1,
        show_default=False,
        metavar="N",
    ),
]
Processes = Annotated[
    str,
    typer.Option(
        help="Processes, each a worker of its own with its own slots; auto (or 0) for one a CPU core.",
        metavar="N|auto",
    ),
]
# What one of these processes gets from its parent: its number, which says that it is one, and shows in ps.
ProcessNumber = Annotated[int | None, typer.Option("--process", hidden=True)]
AllowKwargs = Annotated[
    str,
    typer.Option(help="Constructor arguments that clients may pass: a,b or '*'.", show_default=False, metavar="NAMES"),
]
Capability = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE that clients may ask for by where=; repeatable.", metavar="KEY=VALUE"),
]


IsolationMode = Annotated[
    str,
    typer.Option(
        help="Where envs run: thread (and inline once they are fast), inline, or process: one of its own for each.",
        metavar="HOW",
    ),
]
StepDeadline = Annotated[float, typer.Option(help="Seconds that a step may take; then its session ends.", metavar="S")]
ResetDeadline = Annotated[float, typer.Option(help="Seconds that a reset or a constructor may take.", metavar="S")]


DRAIN_S = 5.0
DrainSeconds = Annotated[
    float,
    typer.Option(
        help="Seconds that sessions have, from SIGTERM on, to move to other workers; 0 ends at once, as Ctrl-C does.",
        min=0.0,
        metavar="S",
    ),
]


RECORD_BYTES = f"{MAX_BYTES >> 30}G"
RecordBytes = Annotated[
    str,
    typer.Option(help="Of the recordings of an env, how much is kept; the oldest goes first. 0: all.", metavar="SIZE"),
]
RecordAge = Annotated[
    str | None,
    typer.Option(help="How long recordings are kept: 90m, 12h, 7d; for ever when left out.", metavar="TIME"),
]


def record_level(text: str) -> RecordLevel:
    """``off``, ``actions``, ``full`` or ``strict``.

    Raises:
        UsageError: it is none of these.
    """
    for level in RECORD_LEVELS:
        if text == level:
            return level
    raise UsageError(f"--record is one of {', '.join(RECORD_LEVELS)}, not {text!r}")


def retention_of(max_bytes: str, max_age: str | None) -> Retention:
    """How much of recordings is kept.

    Raises:
        UsageError: one of these is no size, or no time.
    """
    size = bytes_in(max_bytes, "--record-bytes")
    return Retention(size or None, None if max_age is None else time_in(max_age, "--record-age").total_seconds())


_TIMES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def time_in(text: str, option: str) -> timedelta:
    """How long ``90m``, ``12h`` or ``7d`` is.

    Raises:
        UsageError: it is no such time.
    """
    try:
        return timedelta(**{_TIMES[text[-1:]]: float(text[:-1])})
    except (KeyError, ValueError, OverflowError):
        raise UsageError(f"{option} is a time such as 90m, 12h or 7d, not {text!r}") from None


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)i?b?", re.IGNORECASE | re.ASCII)


def bytes_in(text: str | None, option: str) -> int | None:
    """How many bytes ``2G``, ``512MiB`` or ``1.5g`` are; units are powers of 1024.

    Raises:
        UsageError: it is no such size.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{option} is a size such as 512M or 2G, not {text!r}")
    return int(float(found["number"]) * _UNITS[found["unit"].lower()])


def names_in(text: str) -> tuple[str, ...]:
    """``a, b`` as a tuple of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def json_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object given on the command line.

    Raises:
        UsageError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"""{option} is a JSON object such as '{{"size": 5}}', not {text!r}: {exc}""") from exc
    if not isinstance(value, dict):
        raise UsageError(f"""{option} is a JSON object such as '{{"size": 5}}', not {text!r}""")
    return value


def capabilities_in(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``gpu=true`` and the like: values that read as JSON are what they say, others are texts.

    Raises:
        UsageError: one has no ``=``.
    """
    read: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--capability is KEY=VALUE such as gpu=true, not {pair!r}")
        try:
            read[key] = json.loads(text)
        except ValueError:
            read[key] = text
    return read


def processes_in(text: str) -> int:
    """How many processes ``4``, ``0`` or ``auto`` means; the last two mean one for each CPU core that may be used.

    Raises:
        UsageError: it is none of these.
    """
    wanted = text.strip()
    if wanted in {"auto", "0"}:
        return usable_cores()
    if not (wanted.isascii() and wanted.isdigit() and int(wanted)):
        raise UsageError(f"--processes is a number from 1, or auto (or 0) for one a CPU core, not {text!r}")
    return int(wanted)


def usable_cores() -> int:
    """CPU cores that this process may run on; where that is not known, those of the machine."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return int(os.process_cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
