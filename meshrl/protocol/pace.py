"""Pace: whether an env is fast enough to be stepped on the event loop itself (R10).

An env starts on a thread. After a hundred steps in a row under a millisecond it is stepped inline, which saves two
thread switches a step; one step over ten milliseconds sends it back, and it has to earn the loop again.
"""

from __future__ import annotations

FAST_S = 0.001
SLOW_S = 0.010
FAST_STEPS = 100


class Pace:
    """The pace of one sub-environment.

    Attributes:
        inline: step it on the event loop.
    """

    __slots__ = ("_fast", "inline")

    def __init__(self) -> None:
        self.inline = False
        self._fast = 0

    def took(self, seconds: float) -> None:
        """A step took that long."""
        if seconds < FAST_S:
            if not self.inline:
                self._fast += 1
                self.inline = self._fast >= FAST_STEPS
        elif seconds > SLOW_S:
            self._fast = 0
            self.inline = False
        elif not self.inline:
            self._fast = 0
