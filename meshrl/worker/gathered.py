"""Gathered: what sub-environments do on threads, each by itself, and the one answer that comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from meshrl.protocol.pace import BatchPace
from meshrl.wire.frames import Frame
from meshrl.worker.spread import Finished, Spread
from meshrl.worker.threads import Threads

# What a spread gives in the end.
Told = Callable[[Frame | BaseException], None]


class Gathered:
    """A step, reset or replay of a vector on threads: one answer when all sub-environments have finished."""

    def __init__(
        self,
        pace: BatchPace,
        ids: Sequence[int],
        job: Callable[[int], Any],
        frame: Callable[[list[Any]], Frame],
        told: Told,
        threads: Threads,
        *,
        narrow: bool,
    ) -> None:
        self._pace = pace
        self._count = len(ids)
        self._frame = frame
        self._told = told
        self._spread = Spread(threads, len(ids), job, self._collect, together=True, wide=self._pace.wide, narrow=narrow)

    def stop(self) -> None:
        """Begin no more of them."""
        self._spread.stop()

    def _collect(self, finished: list[Finished]) -> None:
        self._pace.took(sum(one.seconds for one in finished), self._count)
        outcomes: list[Any] = [None] * self._count
        for number, outcome, _ in finished:
            outcomes[number] = outcome
        try:
            crashes = [one for one in outcomes if isinstance(one, BaseException)]
            # Of those that did not begin any more, nothing is to be told where another says why.
            crash = min(crashes, key=lambda one: isinstance(one, asyncio.CancelledError), default=None)
            frame = crash if crash is not None else self._frame(outcomes)
        except Exception as exc:  # noqa: BLE001  # an observation that does not fit its space is the env's error
            frame = exc
        self._told(frame)
