"""Polling: the moment before an answer is spent looking for it, not asleep (the step path).

A thread that sleeps until its answer arrives wakes late, on a processor that went idle and with caches that belong to
others: a fifth of a step's round trip, where it was measured. So after a request the event loop looks at its sockets
again and again without waiting, for :data:`POLL_S` at most.

That pays only where answers are near and the processor has nothing better to do. Both show in hindsight: of some polls,
too many ended without an answer, or the thread ran for too little of their time because others wanted the processor or
the interpreter. Then polling rests, for a time that doubles each time.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Container

# A step's answer comes within this, or is of an env that takes its time.
POLL_S = 0.001
# So many polls are judged together, since one alone may have met anything; fewer where the last were in vain.
POLLS_JUDGED = 16
POLLS_ON_TRIAL = 4
# Of those, this part may end without an answer. Measured with 0.5 ms: to a sixth where it pays, half where not.
MISSES_ALLOWED = 1 / 3
# What the thread must get of their time. Measured with 0.5 ms: half or more where polling pays.
RUNNING_SHARE = 0.4
# Where requests overlap a poll goes on from one to the next; it ends after this to be judged, and begins again.
LONGEST_POLL_S = POLLS_JUDGED * POLL_S
# A poll that began so long ago has been lost.
LOST_S = 1.0
# How long it rests after it was in vain, at first and at most: then a trial of two polls is 2 ms of it.
SHORTEST_REST_S = 0.02
LONGEST_REST_S = 0.25


def may_poll() -> bool:
    """Whether there is a processor to spare, and the user did not turn it off (``MESHRL_POLL=0``)."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return processors > 1 and os.environ.get("MESHRL_POLL") != "0"


class Polling:
    """Polls for the answers of one connection, on its event loop.

    Args:
        awaited: the numbers of the requests that have no answer yet.
        clock: of the time that passes, in seconds.
        running: of the time in which this thread runs, in seconds.
        soon: calls something at the event loop's next turn, which does not sleep before it.

    Attributes:
        rests_until: on the clock.
    """

    __slots__ = (
        "_asked",
        "_awaited",
        "_began",
        "_clock",
        "_judged",
        "_misses",
        "_next_rest_s",
        "_on",
        "_polled_s",
        "_polls",
        "_ran",
        "_ran_s",
        "_running",
        "_soon",
        "rests_until",
    )

    def __init__(
        self,
        awaited: Container[int],
        *,
        clock: Callable[[], float] = time.monotonic,
        running: Callable[[], float] = time.thread_time,
        soon: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self.rests_until = -math.inf
        self._awaited = awaited
        self._clock = clock
        self._running = running
        self._soon = soon or asyncio.get_running_loop().call_soon
        # What is polled for, the oldest first, and until when.
        self._asked: deque[tuple[int, float]] = deque()
        self._on = False
        self._began = self._ran = 0.0
        self._next_rest_s = SHORTEST_REST_S
        self._judged = POLLS_JUDGED
        self._judge_from_here()

    def asked(self, rid: int) -> None:
        """The request with that number has left."""
        now = self._clock()
        if now < self.rests_until:
            return
        if self._on and now - self._began > LOST_S:
            self._on = False  # an interrupt may have come in the middle of a look, and nobody looks any more
            self._asked.clear()
        self._asked.append((rid, now + POLL_S))
        if not self._on:
            self._on = True
            self._began = now
            self._ran = self._running()
            self._soon(self._look)

    def _look(self) -> None:
        now, asked = self._clock(), self._asked
        while asked and asked[0][0] not in self._awaited:
            asked.popleft()
        overdue = bool(asked) and now >= asked[0][1]
        if asked and not overdue and now - self._began < LONGEST_POLL_S:
            self._soon(self._look)  # the loop looks at its sockets between this and that
            return
        self._on = False
        self._polls += 1
        self._polled_s += now - self._began
        self._ran_s += self._running() - self._ran
        self._misses += overdue
        asked.clear()
        if self._polls == self._judged or self._misses > MISSES_ALLOWED * self._judged:
            self._judge(now)

    def _judge(self, now: float) -> None:
        if self._misses > MISSES_ALLOWED * self._judged or self._ran_s < RUNNING_SHARE * self._polled_s:
            self.rests_until = now + self._next_rest_s
            self._next_rest_s = min(2 * self._next_rest_s, LONGEST_REST_S)
            self._judged = POLLS_ON_TRIAL
        else:
            self._next_rest_s = SHORTEST_REST_S
            self._judged = POLLS_JUDGED
        self._judge_from_here()

    def _judge_from_here(self) -> None:
        self._polls = self._misses = 0
        self._polled_s = self._ran_s = 0.0
