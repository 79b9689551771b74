"""The processes of the demo, as the one that started them sees them.

Each runs under a :mod:`guard <meshrl.bus.guard>`, so that none outlives the demo. What a process has to say it writes
to its log, as lines of JSON; the rest of the log is for people.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.guard import Guarded
from meshrl.bus.locate import URL_VARIABLE
from meshrl.cli.demo_pictures import Curve
from meshrl.cli.learner import Episode, Result
from meshrl.errors import WorkerError

# The program of the processes; a name, since nothing of it is needed here.
PARTS = "meshrl.cli.demo_parts"
LOG_LINES_IN_ERRORS = 8


class Child:
    """A guarded process, and what it writes to its log.

    Args:
        label: what it is called in messages.
        log: its log file; replaced.
        arguments: of :data:`PARTS`.
        url: of the mesh.
    """

    def __init__(self, label: str, log: Path, arguments: Sequence[str], url: str) -> None:
        self.label = label
        self.log = log
        log.unlink(missing_ok=True)
        log.touch(mode=0o600)
        env = {**os.environ, URL_VARIABLE: url}
        env.pop(EMBEDDED_VARIABLE, None)
        self.guarded = Guarded.spawn([sys.executable, "-m", PARTS, *arguments], log=log, env=env)
        self._read_bytes = 0

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON lines that were written since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):  # the rest of it is on its way
                    return
                self._read_bytes += len(line)
                if line.startswith(b'{"event":'):
                    yield json.loads(line)

    def last_lines(self) -> str:
        """The end of its log without the events: what went wrong."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([line for line in lines if not line.startswith('{"event":')][-LOG_LINES_IN_ERRORS:])

    def check_running(self) -> None:
        """Raise if it has ended.

        Raises:
            WorkerError: with the end of its log.
        """
        code = self.guarded.poll()
        if code is not None:
            raise WorkerError(
                f"{self.label} ended with code {code}; {self.log} ends with:\n{self.last_lines()}", code=code
            )


@dataclass
class Run:
    """One learner as the demo sees it; ``heard_at`` is when it last said something, in monotonic seconds."""

    number: int
    child: Child
    heard_at: float = field(default_factory=time.monotonic)
    curve: Curve = field(default_factory=Curve)
    generation: int = 0
    latest: Episode | None = None
    result: Result | None = None
    failed: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more comes of it."""
        return self.failed or self.result is not None
