"""``meshrl check``: the conformance suite against a served env."""

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshrl.bus.locate import locate
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url, json_object
from meshrl.client.mesh import Mesh
from meshrl.testing.conformance import conformance
from meshrl.testing.report import Outcome, Report, Result
from meshrl.worker.running import run

STYLES: dict[Outcome, str] = {"passed": "green", "failed": "bold red", "warning": "yellow", "skipped": "dim"}


def check(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The env's served name.", show_default=False)],
    kwargs: Annotated[
        str, typer.Option(help="Arguments for its constructor.", show_default=False, metavar="JSON")
    ] = "{}",
    episodes: Annotated[int, typer.Option(help="Episodes to play.", min=1, metavar="N")] = 3,
    max_steps: Annotated[int, typer.Option(help="Steps at most in each.", min=1, metavar="N")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first episode.", min=0, metavar="N")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a free slot.", min=0.0, metavar="S")] = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Check a served env: spaces, seeds, reset and step, errors. Exit code 1 when something fails."""
    console = Console(highlight=False)
    arguments = json_object(kwargs, "--kwargs")

    async def examine() -> Report:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        with console.status("") as status:
            async with Mesh(address, namespace=namespace, credentials=credentials) as mesh:
                return await conformance(
                    mesh,
                    name,
                    kwargs=arguments,
                    episodes=episodes,
                    seed=seed,
                    max_steps=max_steps,
                    wait=wait,
                    on_result=lambda result: status.update(f"checked: {result.check}"),
                )

    report = run(examine())
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        show(console, report, tracebacks=ctx.obj.debug)
    if not report.ok:
        raise typer.Exit(1)


def show(console: Console, report: Report, *, tracebacks: bool) -> None:
    """Print a report as a table, what to do under what was found.

    Args:
        console: where to.
        report: the report.
        tracebacks: print those of the env's exceptions, too.
    """
    table = Table(title=f"{report.name}, seed {report.seed}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for result in report.results:
        table.add_row(result.check, Text(result.outcome, STYLES[result.outcome]), _found(result))
    console.print(table)
    if tracebacks:
        for result in report.having("failed"):
            if result.remote_traceback:
                console.print(Text(f"\n{result.check}:\n{result.remote_traceback}", "dim"))
    counts = [f"{len(report.having(each))} {each}" for each in STYLES if report.having(each)]
    verdict = Text("conforms" if report.ok else "does not conform", "bold green" if report.ok else "bold red")
    console.print(Text.assemble(f"{report.name} ", verdict, f": {', '.join(counts)}"))


def _found(result: Result) -> Text:
    text = Text(result.found)
    if result.remedy:
        text.append(f"\n→ {result.remedy}", "italic")
    return text
