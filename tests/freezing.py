"""Processes that stop running for a while, as on a machine that hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def freeze(pid: int) -> None:
    """Stop a process; returns when none of its threads runs any more, where the system shows that.

    The signal alone says only that they will: until then another thread than the first may still answer.
    """
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    while threads.exists() and not all(_stands(thread) for thread in threads.iterdir()):
        os.sched_yield()


def _stands(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0] in "TZX"
    except OSError:  # it ended meanwhile
        return True


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that does not run meanwhile."""
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
