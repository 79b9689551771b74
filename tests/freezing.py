"""Processes that stop running for a while, as on a machine that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 10.0


def freeze(pid: int) -> None:
    """Stop a process; returns when none of its threads runs any more, where the system shows that.

    The signal alone says only that they will: until then another thread than the first may still answer.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE_S
    while running := [state for state in _states(pid) if state not in "TtZX"]:
        assert time.monotonic() < end, f"threads of process {pid} do not stop: {running}"
        os.sched_yield()


def _states(pid: int) -> list[str]:
    states = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # it has ended, or this system shows nothing
        return []
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            states.append((thread / "stat").read_text().rpartition(") ")[2][0])
    return states


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that does not run meanwhile."""
    try:
        freeze(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
