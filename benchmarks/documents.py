"""The documentation's generated parts: what stands between markers, and nothing else, is written anew."""
# ruff: noqa: RUF001  # multiplication signs

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.report import Results

BEGIN = "<!-- bench:begin, written by `python benchmarks/run.py --write-docs` -->"
END = "<!-- bench:end -->"
IMAGES = "images"
CAPTIONS = {
    "bench-num-envs.png": "Env steps a second against the number of sub-environments",
    "bench-latency.png": "Latency distributions of one step at each remote system",
    "bench-first-ready.png": "First ready against lockstep",
}


class NoMarkers(Exception):
    """A document has no place for what is generated."""


def write(results: Results, root: Path) -> list[Path]:
    """Writes docs/benchmarks.md, its pictures and the README's table; gives what was written.

    Raises:
        NoMarkers: a document has no place for it.
    """
    from benchmarks import plots  # noqa: PLC0415  # of the extra "demo": who only looks does not need it

    drawn = plots.draw(results, root / "docs" / IMAGES)
    kept = sorted((root / "benchmarks" / "results").glob("*.json"))
    others = [other for path in kept if (other := json.loads(path.read_text()))["begun"] != results["begun"]]
    pages = {
        root / "docs" / "benchmarks.md": page(results, [path.name for path in drawn], others),
        root / "README.md": short(results),
    }
    for path, text in pages.items():
        path.write_text(between(path.read_text(), text))
    return [*pages, *drawn]


def between(document: str, text: str) -> str:
    """``document`` with ``text`` in place of what stood between the markers.

    Raises:
        NoMarkers: they are not there, once each and in order.
    """
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or document.count(BEGIN) != 1 or document.count(END) != 1:
        raise NoMarkers(f"there must be one {BEGIN} and, after it, one {END}")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def page(results: Results, pictures: list[str], others: Sequence[Results] = ()) -> str:
    """The generated part of docs/benchmarks.md; ``others`` are runs of other machines, to be shown beside this one."""
    compared, judged, full = report.comparison(results), report.judgements(results), report.in_full(results)
    systems = [
        (of_it["title"], ", ".join(f"{name} {version}" for name, version in of_it["versions"].items()), of_it["notes"])
        for of_it in results["systems"].values()
    ]
    reasons = [f"- `{name}`: {reason}" for name, reason in sorted(results["reasons"].items())]
    parts = [
        "## The run",
        report.conditions(results),
        "## Systems and works",
        "Medians over rounds; after the comma what that is of ours (`×`): the median of each round's ratio, with its "
        "95 % bootstrap interval. Of a latency less is better, of a rate more. Ours is the better of its ways: "
        + "; ".join(report.taken(results))
        + ".",
        report.markdown(compared.head, compared.rows),
        "## Targets",
        f"{report.counted(results).capitalize()} parts. Where the interval holds the bound, another run may differ.",
        report.markdown(judged.head, judged.rows),
        *(_elsewhere(results, others) if others else ()),
        "## Pictures",
        *(f"![{CAPTIONS[name]}]({IMAGES}/{name})" for name in pictures),
        "## All figures",
        report.markdown(full.head, full.rows),
        "## What ran",
        report.markdown(("system", "versions", "how"), systems),
    ]
    if reasons:
        parts += ["What could not be measured, or went wrong in a round:", "\n".join(reasons)]
    return "\n\n".join(parts)


def _elsewhere(results: Results, others: Sequence[Results]) -> list[str]:
    table = report.side_by_side(results, others)
    return [
        "## The same on other machines",
        "Other runs that are kept in `benchmarks/results/`, each with its own conditions:",
        "\n".join(f"- {report.conditions(other)} {report.counted(other).capitalize()} parts." for other in others),
        report.markdown(table.head, table.rows),
    ]


def short(results: Results) -> str:
    """The README's table: ours and theirs, and what is missed."""
    compared = report.comparison(results, interval=False)
    missed = [
        f"- {target['work']}: " + "; ".join(f"{part['what']} {_figure(part)}" for part in of_it)
        for target in results["targets"]
        if (of_it := [part for part in target["parts"] if part["status"] == "missed"])
    ]
    settings = results["settings"]
    how = (
        f"{results['machine']['cores']} cores, loopback, {settings['rounds']} interleaved rounds (sessions and PPO: "
        f"{settings['long_rounds']}); `×`: of ours in the same rounds, where ours is the better of its ways. Local "
        "vectors send nothing anywhere; EnvPool's CartPole is C++."
    )
    text = [
        report.markdown(compared.head, compared.rows),
        how,
        f"Targets: {report.counted(results)}." + (" Missed:" if missed else ""),
    ]
    if missed:
        text.append("\n".join(missed))
    if results["settings"]["quick"]:
        text.append("**A quick look, not for quoting.**")
    return "\n\n".join(text)


def _figure(part: dict[str, object]) -> str:
    estimate = part["estimate"]
    assert isinstance(estimate, dict), "what is missed was measured"
    value, bound = float(estimate["value"]), float(str(part["bound"]))
    sign = {">=": "at least", "<=": "at most"}[str(part["sense"])]
    unit = f" {part['unit']}" if part["unit"] else ""
    # One that is missed by less than what is written shows by how little.
    text = report.short(value) if report.short(value) != report.short(bound) else f"{value:.3f}"
    return f"{text}{unit} (target: {sign} {bound:g}{unit})"
