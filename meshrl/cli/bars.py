"""Bars: how far something is, on stderr while it goes on, and gone when it is done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from meshrl.adapters.datasets.source import Progress as Done

# Is told how much is done, and of how much.
Told = Callable[[int, int], None]


@contextmanager
def bar(what: str) -> Iterator[Told]:
    """Show one.

    Args:
        what: stands before it.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class Bars:
    """A bar on the terminal for each phase, while something is exported or imported."""

    def __init__(self, *, hidden: bool = False) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f} episodes, {task.fields[steps]:,} steps"),
            TextColumn("{task.fields[left_out]}"),
            console=Console(file=sys.stderr),
            disable=hidden or not sys.stderr.isatty(),
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._read = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bars.stop()

    def show(self, done: Done) -> None:
        """How far it is."""
        if done.phase not in self._tasks:
            # What is written was read before; how many there are to read, nobody knows.
            self._tasks[done.phase] = self._bars.add_task(done.phase, total=self._read or None, steps=0, left_out="")
        if done.phase == "reading":
            self._read = done.episodes
        left_out = f"[yellow]{done.skipped} left out" if done.skipped else ""
        task = self._tasks[done.phase]
        self._bars.update(task, completed=done.episodes, steps=done.steps, left_out=left_out)
