"""Isolation: where env code runs, and what an operator lets it take (R10).

inline    on the worker's event loop, all of it: envs that are known to be fast, or must stay on one thread
thread    on threads, and on the event loop once an env has shown itself fast (:mod:`meshrl.protocol.pace`)
process   each env in a process of its own: one that hangs, crashes or takes too much costs its own session alone
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from meshrl.errors import UsageError

Isolation = Literal["inline", "thread", "process"]
ISOLATIONS: tuple[Isolation, ...] = get_args(Isolation)

# How long a client goes on waiting past the longest deadline: the worker's own error tells more than the client's, and
# is found out in steps of a quarter of a second.
ENFORCED_S = 5.0


@dataclass(frozen=True)
class Deadlines:
    """How long env code may take.

    Attributes:
        step_s: for a step, and whatever else is asked of an env.
        reset_s: for a reset or a constructor.
    """

    step_s: float
    reset_s: float

    def __post_init__(self) -> None:
        for which, seconds in (("step", self.step_s), ("reset", self.reset_s)):
            if not (seconds > 0 and math.isfinite(seconds)):
                raise UsageError(
                    f"the deadline of a {which} is a number of seconds above 0, not {seconds}; leave it out for the "
                    "default",
                    deadline=which,
                )

    def seconds(self, which: Literal["step", "reset"]) -> float:
        """One of them."""
        return self.step_s if which == "step" else self.reset_s

    @property
    def longest_s(self) -> float:
        """After which nothing of an env runs any more."""
        return max(self.step_s, self.reset_s)


def check_isolation(isolation: str, vectors: object) -> Isolation:
    """One of the three, if it can be had here.

    Args:
        isolation: as the operator said it.
        vectors: how vectors are hosted.

    Raises:
        UsageError: it is none of them, needs a system with ``fork``, or vector implementations are to be hosted so.
    """
    for known in ISOLATIONS:
        if isolation == known:
            break
    else:
        raise UsageError(f"isolation is inline, thread or process, not {isolation!r}", isolation=isolation)
    if known == "process":
        if not hasattr(os, "fork"):
            raise UsageError(
                'isolation="process" needs os.fork, which this system has not; use several worker processes '
                "(meshrl serve --processes) with isolation thread",
                isolation=known,
            )
        how = {vectors} if isinstance(vectors, str) else set(getattr(vectors, "values", dict)())
        if how - {"meshrl"}:
            raise UsageError(
                'isolation="process" gives each sub-environment a process of its own, which vector implementations '
                'do not have; leave vectors at "meshrl", or isolate by several worker processes',
                isolation=known,
            )
    return known
