"""`make bench`: meshrl and every peer in one run, interleaved, each figure as a ratio to ours.

python benchmarks/run.py                           all of it, 25 to 45 minutes
python benchmarks/run.py --quick                   a look, about three minutes; not for quoting
python benchmarks/run.py --only single openenv     works and systems by name
python benchmarks/run.py --write-docs              tables and plots of this run into the documentation
python benchmarks/run.py --from FILE --write-docs  the same of a run that was kept
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents, driver, measuring, report, targets, works

ROOT = Path(__file__).resolve().parents[1]
LATEST = ROOT / "benchmarks" / "results" / "latest.json"
LOOK = ROOT / "benchmarks" / "out" / "look.json"
FILE_WIDTH = 180
FIRST_S = 0.1
QUICK = {"rounds": 2, "seconds": 0.2, "long_rounds": 1, "sessions": 256, "ppo_steps": 2560}


def main() -> None:
    settings = arguments()
    console = Console(stderr=True)
    if settings.source:
        results = json.loads(settings.source.read_text())
    else:
        results = measure(settings, console)
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(results, indent=1) + "\n")
    out = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    out.print(report.console(results))
    if not settings.source:
        console.print(f"written: {settings.json}")
    if settings.write_docs:
        for path in documents.write(results, ROOT):
            console.print(f"written: {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each turn")
    parser.add_argument("--long-rounds", type=int, default=10, help="of the sessions and of PPO")
    parser.add_argument("--sessions", type=int, default=works.SESSIONS, help="at once")
    parser.add_argument("--ppo-steps", type=int, default=works.PPO_STEPS, help="a side; the target is of 100000")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="systems, works or groups of works")
    parser.add_argument("--quick", action="store_true", help="a look in about three minutes; not for quoting")
    parser.add_argument("--json", type=Path, help="where the figures go: results/latest.json, of a look out/look.json")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing; take the figures of this file")
    parser.add_argument(
        "--write-docs", action="store_true", help="docs/benchmarks.md, its plots and the README's table"
    )
    settings = parser.parse_args()
    if unknown := set(settings.only) - works.known():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(sorted(works.known()))}")
    if settings.only and settings.write_docs:
        parser.error("--write-docs is of a run of all works: leave --only out")
    if settings.quick:
        vars(settings).update(QUICK)
    settings.json = settings.json or (LOOK if settings.quick or settings.only else LATEST)
    return settings


def measure(settings: argparse.Namespace, console: Console) -> dict[str, Any]:
    first = works.plan(1, settings.only, works.GROUPS)[0]
    rounds = works.plan(settings.rounds, settings.only, works.GROUPS)
    rounds += works.plan(settings.long_rounds, settings.only, works.LONG)
    wanted = {turn.system for turns in rounds for turn in turns}
    begun, load, run = measuring.now(), measuring.load(), measuring.Run()
    began = time.monotonic()
    columns = (TextColumn("{task.description:34}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        names = [name for name in driver.PEERS if name in wanted]
        starting = progress.add_task("starting", total=len(names))

        def started(name: str) -> None:
            progress.update(starting, description=f"starting {name}", advance=1)

        try:
            run.start(names, started)
            warming = progress.add_task("first turns", total=len(first))
            for turn in first:  # workers and vectors are made in them, imports happen; they do not count
                progress.update(warming, description=f"first: {turn.key}")
                run.take(turn, FIRST_S, keep=False)
                progress.advance(warming)
            weights = {turn: weight(turn, settings) for turns in rounds for turn in turns}
            task = progress.add_task("measuring", total=sum(weights[turn] for turns in rounds for turn in turns))
            for turns in rounds:
                for turn in turns:
                    progress.update(task, description=turn.key)
                    run.take(turn, settings.seconds, n=settings.sessions, steps=settings.ppo_steps)
                    progress.advance(task, weights[turn])
        finally:
            run.stop()
    settled = {
        name: getattr(settings, name)
        for name in ("rounds", "seconds", "long_rounds", "sessions", "ppo_steps", "only", "quick")
    }
    results = {
        "format": 1,
        "begun": begun,
        "took_s": round(time.monotonic() - began),
        "machine": measuring.machine(),
        "load": {"before": load, "after": measuring.load()},
        "settings": settled,
        **run.as_json(),
    }
    judged = targets.judged(results["series"], results["reasons"])
    return {**results, "targets": targets.as_json(judged, settled)}


def weight(turn: works.Turn, settings: argparse.Namespace) -> float:
    """About how many seconds it takes: for the progress bar alone."""
    if turn.work.startswith("sessions"):
        return 2.0 + float(settings.sessions) / 200
    if turn.work.startswith("ppo"):
        return 1.0 + float(settings.ppo_steps) / 1500
    segments = 3.0 if turn.work == "fair" else 1.0
    return float(settings.seconds * turn.longer * segments + 0.2)


if __name__ == "__main__":
    main()
