"""Overdue: requests that have run over their deadline in code that their worker cannot interrupt (R10).

    session     request                                        its deadline
    opening     the constructor                                reset
    single      reset                                          reset
                replay                                         none: its client has one for the whole journal
                any other                                      step
    vector      step, which may reset sub-environments         the longer of the two
                reset, any other                               reset, step
    pool        any, since lanes reset themselves              the longer of the two

The clock is the caller's. When it has not looked for long, the process was stopped, and so was the env: then every
request has its whole time again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.lanes import Lanes
from meshrl.protocol.session import LATE_SWEEPS, Key, Session, SessionTable, State
from meshrl.wire.frames import Indices
from meshrl.worker.isolation import Deadlines

# What is over its deadline was answered and its session ended; what still holds a slot after this long is stuck.
STUCK_S = 1.0


@dataclass(frozen=True)
class Late:
    """A request over its deadline, told once.

    Attributes:
        session: whose it is.
        op: what was asked; ``constructor`` of an open.
        which: the deadline by which an operator allows more.
        deadline_s: its length.
        lanes: of a pool, those that are late; None otherwise.
    """

    session: Session
    op: str
    which: Literal["step", "reset"]
    deadline_s: float
    lanes: Indices | None = None


class _SeenLanes:
    """Since when each lane of a pool was seen at the request that it runs."""

    def __init__(self, count: int) -> None:
        self._seqs: NDArray[np.int64] = np.full(count, -1, np.int64)
        self._since: NDArray[np.float64] = np.zeros(count)

    def late(self, lanes: Lanes, now: float, not_before: float, deadline_s: float) -> Indices:
        running = lanes.running.copy()
        fresh = ~running | (self._seqs != lanes.seqs)
        self._seqs[:] = np.where(running, lanes.seqs, -1)
        self._since[fresh] = now
        return np.flatnonzero(running & (now - np.maximum(self._since, not_before) >= deadline_s))


class Overdue:
    """Looks for them.

    Args:
        deadlines: the operator's.
        interval_s: between looks.
    """

    def __init__(self, deadlines: Deadlines, interval_s: float) -> None:
        self._deadlines = deadlines
        self._late_s = LATE_SWEEPS * interval_s
        self._looked_at: float | None = None
        self._not_before = 0.0
        self._opening: dict[Key, tuple[Session, float]] = {}
        self._pools: dict[Key, tuple[Session, _SeenLanes]] = {}
        self._told: dict[Key, tuple[Session, float]] = {}

    def look(self, table: SessionTable, now: float) -> list[Late]:
        """Those that have become late since the last look."""
        if self._looked_at is not None and now - self._looked_at > self._late_s:
            self._not_before = now
        self._looked_at = now
        found = []
        for session in table:
            lane = session.lane
            if lane is not None and not lane.running and session.state is State.OPEN:
                continue  # thousands of them, four times a second
            late = None if self._was_told(session) else self._late(session, now)
            if late is not None:
                self._told[session.key] = (session, now)
                found.append(late)
        for known in (self._opening, self._pools, self._told):
            for key in [key for key, of in known.items() if table.get(key) is not of[0]]:
                del known[key]
        return found

    def stuck(self, now: float) -> Session | None:
        """One that was told to be late, and still holds its slot although its session was ended."""
        for session, at in self._told.values():
            if now - at >= STUCK_S:
                return session
        return None

    def _was_told(self, session: Session) -> bool:
        told = self._told.get(session.key)
        return told is not None and told[0] is session

    def _late(self, session: Session, now: float) -> Late | None:
        step_s, reset_s = self._deadlines.step_s, self._deadlines.reset_s
        if session.state is State.OPENING:
            known = self._opening.get(session.key)
            if known is None or known[0] is not session:
                known = self._opening[session.key] = (session, now)
            late = now - max(known[1], self._not_before) >= reset_s
            return Late(session, "constructor", "reset", reset_s) if late else None
        if session.state is not State.OPEN or (session.held.withhold is not None and session.held.withhold.withheld):
            return None
        if session.lanes is not None:
            return self._late_lanes(session, session.lanes, now)
        lane = session.lane
        if lane is None or not lane.running:
            return None
        op = session.held.op
        if op == "replay":
            return None
        which: Literal["step", "reset"] = "reset" if op == "reset" else "step"
        deadline_s = reset_s if op == "reset" else step_s
        if op == "step" and session.held.vector is not None:
            deadline_s = max(step_s, reset_s)
        late = now - max(lane.began, self._not_before) >= deadline_s
        return Late(session, op, which, deadline_s) if late else None

    def _late_lanes(self, session: Session, lanes: Lanes, now: float) -> Late | None:
        known = self._pools.get(session.key)
        if known is None or known[0] is not session:
            known = self._pools[session.key] = (session, _SeenLanes(len(lanes)))
        deadline_s = max(self._deadlines.step_s, self._deadlines.reset_s)
        late = known[1].late(lanes, now, self._not_before, deadline_s)
        return Late(session, "step", "step", deadline_s, late) if len(late) else None
