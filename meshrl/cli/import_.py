"""``meshrl import``: a Minari dataset as recordings."""

import json
from typing import Annotated

import typer
from rich.console import Console

from meshrl.adapters.datasets.importing import Destination, Imported, import_to
from meshrl.bus.connect import connect
from meshrl.bus.locate import locate
from meshrl.bus.storing import Reader
from meshrl.cli.bars import Bars
from meshrl.cli.options import (
    RECORD_BYTES,
    CredentialsFile,
    Json,
    Namespace,
    RecordAge,
    RecordBytes,
    Url,
    retention_of,
)
from meshrl.cli.recordings import Label, labels_in
from meshrl.client.context import READ_S
from meshrl.recording.library import Library
from meshrl.wire.subjects import Subjects
from meshrl.worker.running import run


def import_(
    dataset: Annotated[
        str, typer.Argument(help="The id of a Minari dataset, or a path to where one is.", metavar="DATASET")
    ],
    env: Annotated[
        str | None,
        typer.Option(help="The name to list it under; its env's when left out.", metavar="NAME", show_default=False),
    ] = None,
    label: Label = None,
    again: Annotated[bool, typer.Option("--again", help="Import it once more, even if it is there.")] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out episodes that are none, and say so.")
    ] = False,
    record_bytes: RecordBytes = RECORD_BYTES,
    record_age: RecordAge = None,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Make the episodes of a Minari dataset recordings, to be listed, replayed and learnt from."""
    retention = retention_of(record_bytes, record_age)

    async def store() -> Imported:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        async with (
            connect(address, name="meshrl import", credentials=credentials) as connection,
            Reader(connection, READ_S) as reader,
        ):
            subjects = Subjects(namespace)
            with Bars(hidden=as_json) as bars:
                return await import_to(
                    Destination(connection, Library(reader, subjects), subjects),
                    dataset,
                    env,
                    labels=labels_in(label),
                    again=again,
                    retention=retention,
                    skip_unreadable=skip_unreadable,
                    on_progress=bars.show,
                )

    told = run(store())
    left_out = [{"index": int(one.episode_id), "code": one.code, "why": one.why} for one in told.skipped]
    if as_json:
        facts = {name: getattr(told, name) for name in ("dataset", "env", "session", "episodes", "steps", "already")}
        print(json.dumps({**facts, "skipped": left_out}))
        return
    console = Console(highlight=False, soft_wrap=True)
    state = "are there already" if told.already else "imported"
    console.print(f"{told.episodes} episodes, {told.steps} steps of {told.dataset} {state}: {told.env}, {told.session}")
    for one in left_out:
        console.print(f"left out {one['index']}: {one['why']}", markup=False)
