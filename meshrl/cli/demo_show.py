"""What the demo shows in the terminal: live bars while it learns, then a table; plain lines where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from meshrl.cli.demo_pictures import colour_of

if TYPE_CHECKING:
    from rich.console import Console

    from meshrl.cli.demo_processes import Run
    from meshrl.cli.learner import Episode, Generation, Result


class Show:
    """Live bars on a terminal, plain lines elsewhere.

    Args:
        console: to write to.
        learners: how many.
        target: the return that fills a bar.
    """

    def __init__(self, console: Console, learners: int, target: float) -> None:
        self._console = console
        self._target = target
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✔"),
            TextColumn("[bold {task.fields[colour]}]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[now]:>5.0f} / {task.total:.0f}"),
            TextColumn("[dim]{task.fields[steps]:>7,} env steps  {task.fields[rate]:>5,.0f}/s"),
            TextColumn("{task.fields[doing]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: list[TaskID] = [
            self._bars.add_task(
                f"learner {index + 1}",
                total=target,
                colour=colour_of(index + 1),
                now=0.0,
                steps=0,
                rate=0.0,
                doing="starts",
            )
            for index in range(learners)
        ]

    def say(self, text: str) -> None:
        """A line, above the bars if there are any."""
        self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bars.stop()

    def episode(self, run: Run, episode: Episode) -> None:
        """An episode of a learner has ended."""
        now = run.curve.recent()
        self._bars.update(
            self._tasks[run.number - 1],
            completed=min(now, self._target * 0.99),  # full only when the evaluation says so
            now=now,
            steps=episode.steps,
            rate=episode.steps / max(episode.seconds, 1e-3),
            doing="evaluates" if episode.evaluation else f"generation {run.generation + 1}",
        )

    def generation(self, run: Run, generation: Generation) -> None:
        """A generation of a learner has been tried."""
        if not self._console.is_terminal:
            self.say(
                f"learner {run.number}: generation {generation.number}, mean return {generation.mean_return:.1f} "
                f"after {generation.steps:,} env steps"
            )

    def result(self, run: Run, result: Result) -> None:
        """A learner has ended."""
        reached = "reached the target" if result.reached else "did not reach the target"
        if not self._console.is_terminal:
            self.say(
                f"learner {run.number}: {reached}, evaluated at a mean return of {result.mean_return:.1f} "
                f"after {result.steps:,} env steps"
            )
        self._bars.update(
            self._tasks[run.number - 1],
            completed=self._target if result.reached else result.mean_return,
            now=result.mean_return,
            steps=result.steps,
            rate=result.steps / result.seconds,
            doing="[green]solved" if result.reached else "[red]gave up",
        )

    def failure(self, run: Run, what: str) -> None:
        """A learner's process ended, or was ended, without a result."""
        self._bars.update(self._tasks[run.number - 1], doing="[red]failed")
        self.say(f"learner {run.number} {what}")

    def table(self, env: str, runs: Sequence[Run], names: dict[str, str]) -> None:
        """What came of the learners of ``env``; ``names`` are the env workers' numbers by id."""
        table = Table(title=f"{env}, learned on one shared pool", title_justify="left", title_style="bold")
        table.add_column("learner")
        for heading in ("env steps", "episodes", "final return", "steps/s"):
            table.add_column(heading, justify="right")
        table.add_column("by env worker")
        for run in runs:
            result = run.result
            if result is None:
                table.add_row(str(run.number), "-", "-", "[red]failed", "-", "-")
                continue
            colour = "green" if result.reached else "red"
            served = sorted((names.get(worker, worker), count) for worker, count in result.workers.items())
            table.add_row(
                str(run.number),
                f"{result.steps:,}",
                f"{result.episodes:,}",
                f"[{colour}]{result.mean_return:.1f}",
                f"{result.steps / result.seconds:,.0f}",
                ", ".join(f"{name}: {count / max(result.steps, 1):.0%}" for name, count in served),
            )
        self._console.print(table)
