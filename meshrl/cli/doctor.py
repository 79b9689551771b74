"""``meshrl doctor``: what is installed and reachable here, and what to do about the rest."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshrl.cli import installed, reachable
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.rows import Row
from meshrl.worker.running import run

# Extra, its package's name, and what needs it.
EXTRAS = (
    ("sb3", "stable-baselines3", "meshrl.adapters.sb3.MeshVecEnv"),
    ("envpool", "envpool", "meshrl serve --vectors envpool"),
    ("video", "av", "meshrl export --format mp4 or gif"),
    ("minari", "minari", "meshrl export --format minari, meshrl import"),
    ("parquet", "pyarrow", "meshrl export --format parquet"),
)
STYLES: dict[Literal["ok", "warning", "error"], str] = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Examination(BaseModel):
    """What ``doctor`` found.

    Attributes:
        ok: whether there is no error.
        rows: one a fact.
    """

    ok: bool
    rows: list[Row]


def doctor(
    as_json: Json = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the NATS server.", min=0.1, metavar="S")] = 5.0,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Say what is installed and reachable, and what to do where something is not. Exit code 1 on an error."""
    rows = [*installed.rows(url_given=bool(url)), *extras()]
    rows += run(reachable.rows(url, namespace=namespace, credentials=credentials, timeout_s=timeout))
    examination = Examination(ok=all(row.status != "error" for row in rows), rows=rows)
    if as_json:
        print(examination.model_dump_json(indent=2))
    else:
        show(Console(highlight=False), examination)
    if not examination.ok:
        raise typer.Exit(1)


def extras() -> list[Row]:
    """Whether the packages of each extra are there, beside those of the demo."""
    rows = []
    for extra, package, purpose in EXTRAS:
        try:
            row = Row(what=f"extra {extra}", status="ok", found=f"{package} {version(package)}")
        except PackageNotFoundError:
            row = Row(
                what=f"extra {extra}",
                status="warning",
                found=f"missing: {package}; needed for {purpose}",
                remedy=f"pip install 'meshrl[{extra}]'",
            )
        rows.append(row)
    return rows


def show(console: Console, examination: Examination) -> None:
    """Print it as a table, each remedy under what it is for."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for row in examination.rows:
        found = Text(row.found)
        if row.remedy:
            found.append(f"\n→ {row.remedy}", "italic")
        table.add_row(Text(row.status, STYLES[row.status]), row.what, found)
    console.print(table)
    counts = {status: sum(row.status == status for row in examination.rows) for status in STYLES}
    console.print(Text(", ".join(f"{n} {status}" for status, n in counts.items() if n), "dim"))
