"""``meshrl audit``: who opened what, when, with which kwargs, and how it ended."""

import json
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshrl.bus import streams
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.locate import locate
from meshrl.bus.secured import names_of
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.plain import plain
from meshrl.errors import MalformedMessage, UsageError
from meshrl.wire.audited import Audited
from meshrl.wire.messages import parse
from meshrl.wire.subjects import ROOT, VERSION, Subjects
from meshrl.worker.running import run

STREAM = "MESHRL_AUDIT"
# A month of a mesh that opens a session each second fits; then the oldest goes. Deny: nobody deletes or purges any of
# it, not even who may do so to other streams.
CONFIG = {
    "subjects": [f"{ROOT}.v{VERSION}.*.audit.*"],
    "retention": "limits",
    "storage": "file",
    "discard": "old",
    "max_bytes": 1 << 30,
    "max_msg_size": 64 << 10,
    "deny_delete": True,
    "deny_purge": True,
}
# Read back from the end in so many at a time, until enough are found.
CHUNK = 512
STYLES = {"opened": "green", "ended": "", "refused": "yellow"}


class Entry(BaseModel):
    """A line of the audit.

    Attributes:
        seq: its number in the stream.
        at: when it happened, on the server's clock.
        login: the user's name, where ``--names`` says it.
        said: what the worker told.
    """

    seq: int
    at: datetime
    login: str | None = None
    said: Audited


class Found(NamedTuple):
    """What of the audit was read.

    Attributes:
        entries: the oldest first.
        lost: how many entries of a worker are missing between those that were read; of workers with any.
    """

    entries: list[Entry]
    lost: dict[str, int]


def audit(
    create: Annotated[
        bool, typer.Option("--create", help="Make the stream in which JetStream keeps it, if there is none.")
    ] = False,
    last: Annotated[int, typer.Option(help="The newest N; 0 for all.", min=0, metavar="N")] = 100,
    user: Annotated[
        str | None, typer.Option(help="Of one user alone, or login with --names.", metavar="NAME", show_default=False)
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            help="Directory of meshrl secure init: show logins in place of keys.", metavar="DIR", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Show who opened what, when, with which kwargs, and how it ended. It is kept from --create on."""
    known = {} if names is None else names_of(names)

    async def look() -> Found | None:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        async with connect(address, name="meshrl audit", credentials=credentials) as connection:
            if create:
                new = await streams.make_stream(connection, STREAM, CONFIG)
                print(f"the audit is kept in the stream {STREAM}{'' if new else ', which is there already'}")
                return None
            return await entries(connection, namespace, last=last, user=user, known=known)

    found = run(look())
    if found is None:
        return
    if as_json:
        for entry in found.entries:
            print(json.dumps(plain(entry.model_dump(exclude_defaults=True))))
    else:
        show(Console(highlight=False), found)


async def entries(
    connection: Connection, namespace: str, *, last: int, user: str | None, known: Mapping[str, str]
) -> Found:
    """The newest ``last`` entries (0: all) of a namespace, the oldest first.

    Args:
        connection: of a login that may read the stream.
        namespace: of the mesh.
        last: how many.
        user: of one user, by token or by the name in ``known``.
        known: names of logins, by token.

    Raises:
        UsageError: there is no such stream, or no JetStream.
        SubjectNotPermitted: the login may not read it.
    """
    where = await streams.bounds(connection, STREAM)
    if where is None:
        raise UsageError(
            f"no audit is kept at {connection.url}: there is no stream {STREAM}; make it with meshrl audit --create"
        )
    first, end = where
    prefix = Subjects(namespace).prefix
    found: list[Entry] = []
    numbers: dict[str, set[int]] = defaultdict(set)
    while end >= first and (not last or len(found) < last):
        begin = max(first, end - CHUNK + 1)
        read = await streams.read(connection, STREAM, begin, end)
        all_of_it = [_entry(stored, known) for stored in read if stored.subject.startswith(prefix)]
        some = [entry for entry in all_of_it if entry is not None]
        for entry in some:
            numbers[entry.said.worker].add(entry.said.n)
        found = [entry for entry in some if user in {None, entry.said.user, entry.login}] + found
        end = begin - 1
    lost = {worker: max(ns) - min(ns) + 1 - len(ns) for worker, ns in numbers.items()}
    return Found(found[-last:] if last else found, {worker: count for worker, count in lost.items() if count})


def _entry(stored: streams.Stored, known: Mapping[str, str]) -> Entry | None:
    try:
        said = parse(Audited, stored.body)
    except MalformedMessage:
        return None  # whoever may publish there may publish anything
    return Entry(seq=stored.seq, at=stored.at - timedelta(seconds=said.ago_s), login=known.get(said.user), said=said)


def show(console: Console, found: Found) -> None:
    """Print it as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("when", "event", "user", "what", "worker", "session"):
        table.add_column(column, no_wrap=column != "what", overflow="fold")
    for entry in found.entries:
        said = entry.said
        table.add_row(
            entry.at.astimezone().isoformat(" ", "seconds"),
            Text(said.event, STYLES[said.event]),
            Text(entry.login or said.user),
            Text(_printable(_what(said))),
            said.worker,
            said.session,
        )
    console.print(table)
    for worker, count in found.lost.items():
        console.print(Text(f"{count} entries of worker {worker} between these were lost", "yellow"))


def _what(said: Audited) -> str:
    what = said.name if said.form == "single" else f"{said.name}, a {said.form} of {said.num_envs}"
    told = [what, *([f"render_mode={said.render_mode}"] if said.render_mode else [])]
    told += [f"{name}={value!r}" for name, value in said.kwargs.items()]
    why = [text for text in (said.reason, said.code, said.type) if text]
    after = f" after {said.lasted_s:.1f} s" if said.lasted_s is not None else ""
    return ", ".join(told) + (f": {' '.join(why)}" if why else "") + after


def _printable(text: str) -> str:
    """Names and kwargs are what clients sent: no word of theirs is to move a terminal's cursor."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
