"""A lane at the client: one request at a time, and none forgotten that was cancelled (R2).

    state       begin             cancelled    answered
    free        -> waiting        -            -
    waiting     ConcurrentStep    -> unsettled -> free
    unsettled   StepUnsettled     -            stays unsettled, its answer kept

Ops that change nothing at the worker (render, state, get_attr) leave nothing worth settling: the next request waits for
their answer and drops it. ``reset`` does so with anything.
"""

from __future__ import annotations

from enum import Enum

from meshrl.errors import ConcurrentStep, NothingUnsettled, StepUnsettled

READING = frozenset({"render", "state", "get_attr", "is_wrapped"})


class Phase(Enum):
    """Where the lane's last request is."""

    FREE = "free"
    WAITING = "waiting"
    UNSETTLED = "unsettled"


class Begin(Enum):
    """How a new request may begin."""

    NOW = "now"
    AFTER_LAST = "after_last"  # wait for the cancelled request's answer and drop it


class Turn:
    """Whose turn it is on one lane, as the client sees it.

    Attributes:
        seq: of the last request that was given a number.
        op: what it was.
        phase: where it is.
    """

    __slots__ = ("op", "phase", "seq", "who")

    def __init__(self, who: str) -> None:
        self.who = who
        self.seq = 0
        self.op = ""
        self.phase = Phase.FREE

    def __repr__(self) -> str:
        return f"<Turn {self.who}: {self.op or 'nothing'} {self.seq}, {self.phase.value}>"

    @property
    def unsettled(self) -> str:
        """The op that was cancelled and whose result may be had; empty if there is none."""
        return self.op if self.phase is Phase.UNSETTLED and self.op not in READING else ""

    def may_begin(self, op: str) -> Begin:
        """Whether ``op`` may be requested now.

        Raises:
            ConcurrentStep: another request is under way.
            StepUnsettled: a cancelled one has not been settled.
        """
        if self.phase is Phase.FREE:
            return Begin.NOW
        if self.phase is Phase.WAITING:
            raise ConcurrentStep(
                f"{self.who}: {op} was called while {self.op} is under way; await one before the next, or lease "
                "another env",
                op=op,
                under_way=self.op,
            )
        if op == "reset" or self.op in READING:
            return Begin.AFTER_LAST
        raise StepUnsettled(
            f"{self.who}: a {self.op} was cancelled and may have run; `await env.settle()` gives its result, or reset",
            op=self.op,
            seq=self.seq,
        )

    def begin(self, op: str) -> int:
        """Take the turn; gives the request's sequence number."""
        assert self.phase is Phase.FREE, "may_begin comes first"
        self.seq += 1
        self.op = op
        self.phase = Phase.WAITING
        return self.seq

    def cancelled(self) -> None:
        """The caller stopped waiting; the request goes on."""
        if self.phase is Phase.WAITING:
            self.phase = Phase.UNSETTLED

    def settling(self) -> str:
        """Wait for the unsettled request again, for its result; gives its op.

        Raises:
            NothingUnsettled: there is none, or only one that changed nothing.
            ConcurrentStep: a request is under way that nobody cancelled.
        """
        if self.phase is Phase.WAITING:
            raise ConcurrentStep(f"{self.who}: settle was called while {self.op} is under way", under_way=self.op)
        if not self.unsettled:
            raise NothingUnsettled(f"{self.who}: nothing to settle: no step, reset, call or set_attr was cancelled")
        return self.discarding()

    def discarding(self) -> str:
        """Wait for the unsettled request again, to drop its answer; gives its op."""
        assert self.phase is Phase.UNSETTLED, "may_begin said AFTER_LAST"
        self.phase = Phase.WAITING
        return self.op

    def answered(self) -> None:
        """The answer is there for who waits (a reset drops it); a caller cancelled in the same moment may settle."""
        if self.phase is Phase.WAITING:
            self.phase = Phase.FREE
