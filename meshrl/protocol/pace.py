"""Pace: whether an env is fast enough to be stepped on the event loop itself (R10).

An env starts on a thread. After a hundred steps in a row under a millisecond it is stepped inline, which saves two
thread switches a step; one step over ten milliseconds sends it back, and it has to earn the loop again.

Where many fight for the interpreter, each looks slow on its thread by itself, and none would ever earn it. So one that
is fast there now and then is tried inline for some steps, where it has the interpreter; where that shows it slow, the
next trial comes after twice as many steps.

The sub-environments of one message are fast if they are on average, and stepped inline if all of them together take
less than those ten milliseconds. Slow ones are stepped on threads of their own, at once.
"""

from __future__ import annotations

FAST_S = 0.001
SLOW_S = 0.010
FAST_STEPS = 100


# A trial begins after so many steps on a thread, one of which at least was fast; the next ones ever more rarely.
TRIAL_AFTER = 200
TRIAL_AFTER_AT_MOST = 6400
# It has so many steps, of which some may be slowed down by other threads, and none may take long.
TRIAL_STEPS = 20
TRIAL_MISSES = 3


class Pace:
    """The pace of one sub-environment.

    Attributes:
        inline: step it on the event loop.
    """

    __slots__ = ("_fast", "_misses", "_on_thread", "_seen_fast", "_trial", "_trial_after", "inline")

    def __init__(self) -> None:
        self.inline = False
        self._fast = 0  # in a row
        self._on_thread = 0  # steps since it is on a thread
        self._seen_fast = False  # one of those
        self._trial = 0  # steps that are left of it
        self._misses = 0
        self._trial_after = TRIAL_AFTER

    def took(self, seconds: float) -> None:
        """A step took that long."""
        if not self.inline:
            self._took_on_thread(seconds)
        elif seconds > SLOW_S:
            self._send_back(failed=self._trial > 0)
        elif self._trial:
            self._tried(seconds)

    def _took_on_thread(self, seconds: float) -> None:
        self._on_thread += 1
        if seconds < FAST_S:
            self._fast += 1
            self._seen_fast = True
        else:
            self._fast = 0
        if self._fast >= FAST_STEPS:
            self.inline = True
            self._trial_after = TRIAL_AFTER
        elif self._seen_fast and self._on_thread >= self._trial_after:
            self.inline = True
            self._trial = TRIAL_STEPS
            self._misses = 0

    def _tried(self, seconds: float) -> None:
        self._trial -= 1
        self._misses += seconds >= FAST_S
        if self._misses > TRIAL_MISSES:
            self._send_back(failed=True)
        elif not self._trial:
            self._trial_after = TRIAL_AFTER

    def _send_back(self, *, failed: bool) -> None:
        self.inline = False
        self._seen_fast = False
        self._fast = self._on_thread = self._trial = 0
        if failed:
            self._trial_after = min(2 * self._trial_after, TRIAL_AFTER_AT_MOST)


# Where threads fight for the interpreter, each looks slow by itself: so wide messages are tried narrow now and then.
NARROW_AGAIN = 50


class BatchPace:
    """The pace of the sub-environments of one session.

    Args:
        count: how many there are.

    Attributes:
        inline: step them on the event loop, one after another.
        wide: step them on threads of their own; else one after another on one, as long as they are fast.
    """

    __slots__ = ("_count", "_each_s", "_fast", "_messages", "inline", "wide")

    def __init__(self, count: int) -> None:
        self._count = count
        self.inline = False
        self.wide = False
        self._fast = 0
        self._each_s = 0.0
        self._messages = 0

    def inline_for(self, count: int) -> bool:
        """Whether to step so many on the event loop; the last message may have been of fewer."""
        return self._fast >= FAST_STEPS and self._each_s * count < SLOW_S

    def took(self, seconds: float, count: int = 0) -> None:
        """The ``count`` sub-environments of a message (0: all there are) took that long, summed over them."""
        count = count or self._count
        self._each_s = seconds / count
        self._messages += 1
        if seconds < FAST_S * count:
            self._fast = min(self._fast + count, FAST_STEPS)
            self.inline = self._fast >= FAST_STEPS and seconds < SLOW_S
            self.wide = self.wide and self._fast < FAST_STEPS
        else:
            self._fast = 0
            self.inline = False
            self.wide = self._messages % NARROW_AGAIN != 0
