"""A lane at the worker: each request runs at most once, and its answer can be had again (R1, R2).

The rule is a table. ``n`` is the sequence number of the last request that began:

    request   while n is running      after n was answered
    < n       STALE                   STALE
    = n       JOIN                    REPEAT
    = n + 1   BUSY                    RUN
    > n + 1   GAP                     GAP

RUN begins the request. JOIN begins nothing: the answer will go to the newest reply subject. REPEAT sends the cached
bytes again. The other three are errors and change nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from meshrl.errors import LaneBusy, MeshError, SequenceGap, StaleRequest


class Verdict(Enum):
    """What to do with a request."""

    RUN = "run"
    JOIN = "join"
    REPEAT = "repeat"
    STALE = "stale"
    GAP = "gap"
    BUSY = "busy"


# (seq - n: below, same, next, beyond) -> (while running, after the answer)
_TABLE: dict[int, tuple[Verdict, Verdict]] = {
    -1: (Verdict.STALE, Verdict.STALE),
    0: (Verdict.JOIN, Verdict.REPEAT),
    1: (Verdict.BUSY, Verdict.RUN),
    2: (Verdict.GAP, Verdict.GAP),
}


class Lane:
    """One ordered stream of requests, as the worker sees it.

    Attributes:
        seq: of the last request that began; 0 before the first.
        running: whether it has not been answered yet.
        reply_to: where its answer goes.
        cached: the answer's bytes, kept until the next request begins.
        began: when it began, on the caller's clock.
    """

    __slots__ = ("began", "cached", "reply_to", "running", "seq")

    def __init__(self) -> None:
        self.seq = 0
        self.running = False
        self.reply_to = ""
        self.cached = b""
        self.began = 0.0

    def __repr__(self) -> str:
        return f"<Lane at {self.seq}, {'running' if self.running else 'idle'}>"

    def receive(self, seq: int, reply_to: str, now: float) -> Verdict:
        """Take a request; RUN obliges the caller to call :meth:`answer` once."""
        step = seq - self.seq
        if step == 1 and not self.running:  # the table's commonest cell, without the lookup
            self.seq = seq
            self.running = True
            self.reply_to = reply_to
            self.began = now
            return Verdict.RUN
        verdict = _TABLE[max(-1, min(step, 2))][0 if self.running else 1]
        if verdict is Verdict.REPEAT and self.seq == 0:
            return Verdict.STALE  # seq 0 was never asked
        if verdict is Verdict.JOIN:
            self.reply_to = reply_to
        return verdict

    def answer(self, reply: bytes) -> str:
        """Keep the answer of the running request; gives the reply subject that it goes to."""
        assert self.running, "only a running request is answered"
        self.running = False
        self.cached = reply
        return self.reply_to

    def refusal(self, verdict: Verdict, seq: int, session: str) -> MeshError:
        """The error for STALE, GAP or BUSY."""
        facts: dict[str, Any] = {"session": session, "seq": seq, "last_seq": self.seq}
        if verdict is Verdict.GAP:
            return SequenceGap(
                f"session {session}: request {seq} skips some after {self.seq}; a lane's requests rise by one",
                **facts,
            )
        if verdict is Verdict.BUSY:
            return LaneBusy(
                f"session {session}: request {seq} came while {self.seq} is running; a lane has one in flight",
                **facts,
            )
        return StaleRequest(f"session {session}: request {seq} is older than {self.seq}, which began after it", **facts)
