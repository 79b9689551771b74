"""Doubt: what to do about a request that has had no answer for a moment too long (R9).

A request is *quiet* after ``QUIET_S``; then one probe asks its worker, and what comes back decides:

    word             do
    running          wait; ask again later, up to the worker's step deadline
    parked           wait; ask again later
    not_received     send again
    answered         send again (the cached answer comes back)
    unknown          LOST session_unknown
    no responders    send again while in grace, then LOST worker_lost; no word after that is silence again
    (silence)        ask again; after ``FROZEN_S`` LOST worker_frozen
    (disconnected)   wait; when the connection is back, ask at once; after ``DISCONNECTED_S`` LOST disconnected

Sending again is free: the lane runs each sequence number once. Finding a worker dead that is not is safe as well:
epochs keep it from answering for what it no longer owns.
"""

from __future__ import annotations

from enum import Enum

# Long against a round trip (0.1 ms) and the loop turns of a busy peer, short against a user's patience.
QUIET_S = 0.2
# A probe is answered by a thread that does nothing else; it is asked again after this long.
PROBE_AGAIN_S = 1.0
# While a request is known to run, it is asked about ever more rarely, up to this.
RUNNING_AGAIN_MAX_S = 5.0
# No word at all from the worker for this long: it is stopped or cut off, and given up.
FROZEN_S = 10.0
# This client has had no server for this long: nothing is known, and its caller should hear so. A server that is
# restarted or fails over is back in a fraction of it.
DISCONNECTED_S = 30.0
# NATS says that nobody listens: a worker's connection may be coming back (it does within half a second).
GRACE_S = 0.6
# Of what goes on elsewhere where it is lost: a worker that does come back later has cost a replay, and nothing else.
RESUMED_GRACE_S = 0.3
# The same when this client itself was cut off a moment ago: the server may have restarted for everyone.
GRACE_AFTER_RECONNECT_S = 5.0
AGAIN_IN_GRACE_S = 0.1


class Do(Enum):
    """What the caller has to do."""

    WAIT = "wait"
    PROBE = "probe"
    SEND_AGAIN = "send_again"
    LOST = "lost"


class Doubt:
    """The doubt about one request.

    Attributes:
        reason: why it is lost, once it is.
    """

    __slots__ = (
        "_again_s",
        "_alone_since",
        "_cut_at",
        "_cut_s",
        "_due",
        "_heard",
        "_nobody",
        "_probing",
        "_started",
        "deadline_s",
        "disconnected_s",
        "grace_s",
        "reason",
        "silence_s",
    )

    def __init__(self, now: float, *, deadline_s: float, silence_s: float = FROZEN_S, grace_s: float = GRACE_S) -> None:
        self.deadline_s = deadline_s
        self.grace_s = grace_s
        self.silence_s = silence_s
        self.disconnected_s = max(DISCONNECTED_S, silence_s)
        self.reason = ""
        self._started = now  # when it may have begun to run
        self._heard = now  # the worker's last word on it
        self._due = now + QUIET_S
        self._again_s = QUIET_S
        self._probing = False
        self._alone_since: float | None = None  # since when nobody listens
        self._nobody = False  # that was the last word, and it has not been tried again since
        self._cut_at: float | None = None  # the last tick, if it was without a connection
        self._cut_s = 0.0  # how long there has been none

    def due(self) -> float:
        """When :meth:`tick` has something to say."""
        return self._due

    def tick(self, now: float, *, connected: bool) -> Do:
        """Time passed. While disconnected, call it at every tick."""
        if not connected:
            self._cut_s += 0.0 if self._cut_at is None else now - self._cut_at
            self.deaf(now)
            self._cut_at = now
            return self._lost("disconnected") if self._cut_s >= self.disconnected_s else Do.WAIT
        if now < self._due:
            return Do.WAIT
        if self._nobody:
            # Once a word: where nobody listens the next word comes at once, else there is somebody to be asked.
            self._nobody = False
            self._due = now + AGAIN_IN_GRACE_S
            return Do.SEND_AGAIN
        if self._probing and now - self._heard >= self.silence_s:
            return self._lost("worker_frozen")
        self._probing = True
        self._due = now + PROBE_AGAIN_S
        return Do.PROBE

    def deaf(self, now: float) -> None:
        """Nobody could be heard until now: this process slept, say. Their silence says nothing."""
        self._heard = now
        self._due = now + QUIET_S
        self._probing = False
        self._alone_since = None
        self._cut_at = None  # nor does the time without a connection that passed in a sleep count

    def heard(self, state: str, now: float) -> Do:
        """The worker said what became of the request."""
        self._heard = now
        self._probing = False
        self._alone_since = None
        self._nobody = False
        if state == "unknown":
            return self._lost("session_unknown")
        if state == "running":
            if now - self._started >= self.deadline_s:
                return self._lost("step_deadline")
            self._later(now)
            return Do.WAIT
        self._later(now)
        if state in {"parked", "not_received"}:
            self._started = now  # it was not running until now
        return Do.WAIT if state == "parked" else Do.SEND_AGAIN

    def alone(self, now: float, up_for: float) -> Do:
        """NATS says that nobody listens, and this connection has been up for ``up_for`` seconds."""
        # A word long after the last one says that this process slept, or that somebody listened in between.
        if self._alone_since is None or now - self._heard > GRACE_S:
            self._alone_since = now
        self._heard = now
        self._probing = False
        self._nobody = True
        # A connection that is younger than the longer grace may have come back before the worker's did.
        grace = (
            self.grace_s if up_for - (now - self._alone_since) > GRACE_AFTER_RECONNECT_S else GRACE_AFTER_RECONNECT_S
        )
        if now - self._alone_since >= grace:
            return self._lost("worker_lost")
        self._due = now + AGAIN_IN_GRACE_S
        return Do.WAIT

    def reconnected(self, now: float) -> None:
        """The connection is back: what was under way may be lost in either direction."""
        self._heard = now
        self._alone_since = None
        self._nobody = False
        self._probing = False
        self._again_s = QUIET_S
        self._cut_at = None
        self._cut_s = 0.0
        self._due = now

    def _later(self, now: float) -> None:
        self._again_s = min(self._again_s * 2, RUNNING_AGAIN_MAX_S)
        self._due = now + self._again_s

    def _lost(self, reason: str) -> Do:
        self.reason = reason
        return Do.LOST
