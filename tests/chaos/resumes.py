"""Resumes: counts what the learners' clients say of their sessions, in records of the logger ``meshrl.client``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOGGER = logging.getLogger("meshrl.client")


class Resumes(logging.Handler):
    """Hears them.

    Args:
        stepping: of a session, whether a step is what is under way in it.

    Attributes:
        in_flight: sessions that were resumed while a step was under way.
        idle: that were resumed otherwise.
        moved: that went to another worker before their own left.
        replays_lost: whose journal was being done again when the worker was lost, with that worker.
        seconds: that each resume took.
        reasons: why each session was lost.
    """

    def __init__(self, stepping: Callable[[str], bool]) -> None:
        super().__init__(logging.INFO)
        self.in_flight = 0
        self.idle = 0
        self.moved = 0
        self.replays_lost: set[tuple[str, str]] = set()
        self.seconds: list[float] = []
        self.reasons: dict[str, int] = {}
        self._stepping = stepping

    def emit(self, record: logging.LogRecord) -> None:
        """Count it."""
        resumed: dict[str, Any] | None = getattr(record, "resumed", None)
        lost: dict[str, Any] | None = getattr(record, "replay_lost", None)
        if lost is not None:
            self.replays_lost.add((lost["session"], lost["worker"]))
        if hasattr(record, "moved"):
            self.moved += 1
        if resumed is None:
            return
        self.seconds.append(resumed["seconds"])
        self.reasons[resumed["reason"]] = self.reasons.get(resumed["reason"], 0) + 1
        if resumed["under_way"] and self._stepping(resumed["session"]):
            self.in_flight += 1
        else:
            self.idle += 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it."""
        level = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self)
        try:
            yield
        finally:
            LOGGER.removeHandler(self)
            LOGGER.setLevel(level)
