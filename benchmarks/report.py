"""A run's figures as tables of text: systems and works, the targets, and what is ours in full."""
# ruff: noqa: RUF001  # multiplication signs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from benchmarks import estimates
from benchmarks.estimates import Estimate

Results = Mapping[str, Any]
NOTHING = ""

TITLES = {
    "meshrl": "meshrl",
    "openenv_best": "OpenEnv, best case",
    "openenv": "OpenEnv, as documented",
    "rlmesh": "RLMesh",
    "dm_env_rpc": "dm_env_rpc",
    "gymnasium_sync": "SyncVectorEnv, local",
    "gymnasium_async": "AsyncVectorEnv, local",
    "gymnasium_vector": "CartPole's vector implementation, local",
    "envpool": "EnvPool, local",
    "echo": "bare echo on our bus, no env",
    "tcp": "bare TCP, no env",
}
"""Rows of the comparison, in their order."""


@dataclass(frozen=True)
class Column:
    """One work that systems have in common.

    Attributes:
        title: of it.
        quantity: of each turn.
        work: the name of it at the peers; ours unless ``ours`` says otherwise.
        ours: our turns, of which the best is taken.
        other: by system, another name for it, or a turn of another system.
    """

    title: str
    quantity: str
    work: str
    ours: tuple[str, ...] = ()
    other: tuple[tuple[str, str], ...] = ()

    def turn(self, system: str, results: Results) -> str:
        """The turn of a system: the best of ours; empty where it has no figures."""
        works = (self.ours or (self.work,)) if system == "meshrl" else (dict(self.other).get(system, self.work),)
        found = {}
        for turn in (work if "/" in work else f"{system}/{work}" for work in works):
            values = results["series"].get(turn, {}).get(self.quantity, ())
            if estimates.present(values):
                found[turn] = estimates.median(values)
        if not found:
            return ""
        return (min if self.quantity == "p50_us" else max)(found, key=lambda turn: found[turn])


COLUMNS = (
    Column("CartPole, one env: p50", "p50_us", "single", other=(("tcp", "echo"), ("echo", "meshrl/echo"))),
    Column("16 clients: steps/s", "rate", "clients16", ("clients16_one_mesh", "clients16_meshes")),
    Column("84×84×4 picture: steps/s", "rate", "image", other=(("echo", "meshrl/echo_image"),)),
    Column("64 CartPoles: steps/s", "rate", "vector64", ("vector64_1", "vector64_2")),
    Column("256: steps/s", "rate", "vector256", ("vector256_1", "vector256_2", "pool256_1", "pool256_2")),
    Column("4,096: steps/s", "rate", "vector4096", ("vector4096_1", "vector4096_2", "two2048_1", "two2048_2")),
    Column("sessions at once: /s", "rate", "sessions", ("sessions_one_mesh", "sessions_meshes")),
)


@dataclass(frozen=True)
class Table:
    """Cells of text, the first row the heads."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def amount(value: float, quantity: str) -> str:
    """A figure with its unit."""
    if quantity.endswith("_us"):
        return f"{value:,.0f} µs"
    if quantity.endswith("_s") and quantity != "mb_per_s":
        return f"{value:,.2f} s"
    if quantity in {"kept", "succeeded"}:
        return f"{100 * value:.0f} %"
    return f"{value:,.0f} {'MB/s' if quantity == 'mb_per_s' else '/s'}".replace(" /s", "/s")


def times(one: Estimate, *, interval: bool = True) -> str:
    """A ratio, with its interval."""
    text = f"{short(one.value)} ×"
    return f"{text} ({_range(one.low, one.high, one.rounds)})" if interval else text


def _range(low: float, high: float, rounds: int) -> str:
    """An interval; one round has none."""
    return f"{short(low)} to {short(high)}" if rounds > 1 else "one round"


def short(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def comparison(results: Results, *, interval: bool = True) -> Table:
    """Systems by works: each figure, and what it is of ours, round by round."""
    rows = []
    for system, title in TITLES.items():
        cells = [_compared(column, system, results, interval=interval) for column in COLUMNS]
        if any(cells):
            rows.append((title, *cells))
        elif reason := results["reasons"].get(system):
            rows.append((title, f"unavailable: {reason}", *[NOTHING] * (len(COLUMNS) - 1)))
    return Table("systems and works", ("", *(column.title for column in COLUMNS)), rows)


def _compared(column: Column, system: str, results: Results, *, interval: bool) -> str:
    turn, ours = column.turn(system, results), column.turn("meshrl", results)
    if not turn:
        return NOTHING
    values = results["series"][turn][column.quantity]
    figure = amount(estimates.median(values), column.quantity)
    if system == "meshrl" or not ours:
        return figure
    try:
        return (
            f"{figure}, {times(estimates.ratio(values, results['series'][ours][column.quantity]), interval=interval)}"
        )
    except ValueError:  # not in the same rounds
        return figure


def taken(results: Results) -> list[str]:
    """Which of our turns the comparison took, where there are several."""
    return [
        f"{column.title.partition(':')[0]}: `{turn.partition('/')[2]}`"
        for column in COLUMNS
        if column.ours and (turn := column.turn("meshrl", results))
    ]


def judgements(results: Results) -> Table:
    """Every part of every target, with its figure and the verdict."""
    rows = []
    for target in results["targets"]:
        for number, part in enumerate(target["parts"]):
            first = (target["work"], target["target"]) if not number else (NOTHING, NOTHING)
            rows.append((*first, *_judged(part, target["measured_at"])))
    return Table("targets", ("work", "target", "measured", "bound", "verdict"), rows)


def _judged(part: Mapping[str, Any], at: str) -> tuple[str, str, str]:
    sign = {">=": "≥", "<=": "≤"}[part["sense"]]
    factor, unit = _scale(part)
    bound = f"{sign} {factor * part['bound']:g}{unit}"
    if part["estimate"] is None:
        return part["what"], bound, f"not measured: {part['reason']}"
    middle, low, high = (factor * part["estimate"][name] for name in ("value", "low", "high"))
    which, rounds = part["ours"].partition("/")[2], part["estimate"]["rounds"]
    measured = f"{part['what']}: {short(middle)}{unit} ({_range(low, high, rounds)}), `{which}`{at and ', '}{at}"
    return measured, bound, part["status"] + (" (the interval holds the bound)" if part["close"] else "")


def _scale(part: Mapping[str, Any]) -> tuple[float, str]:
    """What a part's figure is shown times, and in which unit."""
    if part["what"].endswith("succeed") or part["what"].startswith("kept"):
        return 100.0, " %"
    return 1.0, f" {part['unit'] or '×'}"


def side_by_side(results: Results, others: Sequence[Results]) -> Table:
    """The figure and the verdict of each part of each target, of this run and of others."""
    runs = [results, *others]
    found = [{(of["work"], part["what"]): part for of in run["targets"] for part in of["parts"]} for run in runs]
    rows = []
    for target in results["targets"]:
        for number, part in enumerate(target["parts"]):
            figures = [_in_short(of.get((target["work"], part["what"]))) for of in found]
            rows.append((NOTHING if number else target["work"], part["what"], _judged(part, "")[1], *figures))
    names = (f"{run['machine']['processor'] or 'processor unknown'}, {run['begun']}" for run in runs)
    return Table("targets on several machines", ("work", "part", "bound", *names), rows)


def _in_short(part: Mapping[str, Any] | None) -> str:
    if part is None or part["estimate"] is None:
        return "not measured"
    factor, unit = _scale(part)
    middle, low, high = (factor * part["estimate"][name] for name in ("value", "low", "high"))
    return f"{short(middle)}{unit} ({_range(low, high, part['estimate']['rounds'])}): {part['status']}"


def counted(results: Results) -> str:
    """How many parts of targets are met, in a sentence."""
    parts = [part for target in results["targets"] for part in target["parts"]]
    said = [(status, sum(part["status"] == status for part in parts)) for status in ("met", "missed", "not measured")]
    return ", ".join(f"{count} {status}" for status, count in said if count) + f" of {len(parts)}"


def in_full(results: Results) -> Table:
    """Every turn of every system: medians with their intervals."""
    rows: list[tuple[str, ...]] = []
    for turn, quantities in results["series"].items():
        for quantity, values in quantities.items():
            if estimates.present(values):
                one = estimates.estimate(values)
                low, high = amount(one.low, quantity), amount(one.high, quantity)
                interval = f"{low} to {high}" if one.rounds > 1 else NOTHING
                rows.append((turn, quantity, amount(one.value, quantity), interval, str(one.rounds)))
    return Table("all figures", ("turn", "quantity", "median", "95 % interval", "rounds"), rows)


def conditions(results: Results) -> str:
    """Where, when and how, in a few sentences."""
    machine, settings, load = results["machine"], results["settings"], results["load"]
    loads = [f"{one[0]:.2f}" if one else "unknown" for one in (load["before"], load["after"])]
    text = (
        f"{results['begun']}, {results['took_s'] / 60:.0f} minutes. {machine['processor'] or 'processor unknown'}, "
        f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}. Load average {loads[0]} before, "
        f"{loads[1]} after (of which the benchmark is a part). {settings['rounds']} rounds of {settings['seconds']:g} "
        f"s a turn; {settings['long_rounds']} of {settings['sessions']:,} sessions at once and of PPO with "
        f"{settings['ppo_steps']:,} steps a side."
    )
    return f"{text} **A quick look, not for quoting.**" if settings["quick"] else text


def console(results: Results) -> RenderableType:
    """All of it, for a terminal."""
    tables: list[RenderableType] = [
        _rich(table) for table in (in_full(results), comparison(results), judgements(results))
    ]
    missing = [f"{name}: {reason}" for name, reason in sorted(results["reasons"].items())]
    ends = [conditions(results).replace("**", ""), f"targets: {counted(results)}", *missing]
    return Group(*tables, *ends)


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title)
    for number, head in enumerate(table.head):
        shown.add_column(head, justify="left" if not number else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    return shown


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
