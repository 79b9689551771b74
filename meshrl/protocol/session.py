"""Sessions at the worker: opened once, leased, and told apart by epoch (R1, R3, R4).

    state      open (same epoch)   open (higher)   open (lower)    request        renew     close
    opening    JOIN                RAISED          WRONG_EPOCH     unknown        renewed   ending
    open       REPEAT              RAISED          WRONG_EPOCH     its lane's     renewed   ending
    ending     WAIT                WAIT            WRONG_EPOCH     unknown        lost      ending
    (none)     NEW or FULL         NEW or FULL     NEW or FULL     unknown        lost      nothing
    gone       WRONG_EPOCH         NEW or FULL     WRONG_EPOCH     unknown        lost      nothing

``gone`` is a session that had been renewed or used, or was closed, and is remembered: its client asked before it
ended, so an open of that epoch has been on its way for long. Taken for a new one, it would run the session's first
requests once more if they came late as well. A grant that lapsed may be asked for again (its answer was lost).

A grant holds for ``GRANT_S`` until it is renewed or used; from then on the lease counts. The countdown stands still
while the worker is disconnected, and a sweep that comes late (the process was stopped, the machine slept) grants full
leases again: a client may have renewed in time with nobody there to hear it.

Two threads share a table: one opens, closes and answers, the other renews, sweeps and probes. Every method reads
and writes single attributes or single entries, so no lock is needed for their order to make sense; ``sweep`` gives
the sessions that expired to its caller, and only the first thread removes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Literal, NamedTuple

from meshrl.protocol.lane import Lane
from meshrl.protocol.lanes import Indices, Lanes

# A lease survives two lost renewals; a vanished client's slot is free again within it.
LEASE_S = 15.0
# The client renews on receipt of a grant, so this is one round trip and a scheduling hiccup.
GRANT_S = 2.0
# A sweep is late when the process cannot have been well meanwhile.
LATE_SWEEPS = 4
# Why a session is gone is remembered for this many, so that its client is told more than "unknown".
MAX_REMEMBERED = 10_000
# The answers with which sessions ended are kilobytes each, and asked for within seconds.
MAX_LAST_ANSWERS = 200
# Cached answers of all sessions together; beyond it the worker takes no new sessions (R1).
MAX_CACHED_BYTES = 1024 * 1024 * 1024

Key = tuple[str, str]
Awaited = Literal["unknown", "not_received", "running", "parked", "answered"]
# Epoch, lane, seq and bytes of the answer with which a session ended (an exception of its env); a pool ends as a whole.
Last = tuple[int, int, int, bytes]
ANY_LANE = -1


class Gone(NamedTuple):
    """What is remembered of a session that has ended."""

    reason: str
    epoch: int
    final: bool  # not to be opened again in this epoch


class Opening(Enum):
    """What to do with an open."""

    NEW = "new"
    JOIN = "join"
    REPEAT = "repeat"
    RAISED = "raised"
    WAIT = "wait"
    WRONG_EPOCH = "wrong_epoch"
    FULL = "full"


class State(Enum):
    """Where a session is in its life."""

    OPENING = "opening"
    OPEN = "open"
    ENDING = "ending"


class Session:
    """One client's hold on as many slots as it has sub-environments.

    Attributes:
        user: the token of the login it was opened by.
        id: chosen by the client.
        epoch: its incarnation.
        lane: its one lane; None in a pool.
        lanes: of a pool, one a sub-environment; None in any other.
        num_envs: its sub-environments, each in a slot.
        reply_to: where the answer to the open goes.
        grant: the granted open's bytes, once there are some.
        lease_until: when it lapses, on the caller's clock.
        confirmed: whether the grant was renewed or used.
        held: what the worker keeps with it (the env), of no concern here.
    """

    __slots__ = (
        "confirmed",
        "epoch",
        "grant",
        "held",
        "id",
        "lane",
        "lanes",
        "lease_until",
        "num_envs",
        "reply_to",
        "state",
        "user",
    )

    def __init__(
        self, user: str, id_: str, epoch: int, reply_to: str, *, num_envs: int = 1, pool: bool = False
    ) -> None:
        self.user = user
        self.id = id_
        self.epoch = epoch
        self.num_envs = num_envs
        self.lane = None if pool else Lane()
        self.lanes = Lanes(num_envs) if pool else None
        self.state = State.OPENING
        self.reply_to = reply_to
        self.grant = b""
        self.lease_until = float("inf")  # an env under construction does not lapse; its grant may
        self.confirmed = False
        self.held: Any = None

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.user}, epoch {self.epoch}, {self.state.value}>"

    @property
    def key(self) -> Key:
        """What it is found by: a session belongs to its user."""
        return self.user, self.id

    @property
    def running(self) -> bool:
        """Whether a request of it has not been answered yet."""
        if self.lanes is not None:
            return bool(self.lanes.running.any())
        return self.lane is not None and self.lane.running

    @property
    def cached_bytes(self) -> int:
        """Of the answers that its lanes keep."""
        if self.lanes is not None:
            return self.lanes.cached_bytes
        return 0 if self.lane is None else len(self.lane.cached)

    def state_of(self, lane: int, seq: int) -> Awaited:
        """What became of a request of an open session, as a probe is told."""
        if self.lanes is not None:
            return self.lanes.state_of(lane, seq) if 0 <= lane < len(self.lanes) else "unknown"
        if self.lane is None or lane != 0:
            return "unknown"
        if seq > self.lane.seq:
            return "not_received"
        return "running" if self.lane.running and seq == self.lane.seq else "answered"


class SessionTable:
    """All sessions of one worker, and its slots.

    Attributes:
        slots: how many sub-environments its sessions may have together.
        max_slots_per_user: how many those of one user may have; None for all of them.
        cached_bytes: of the answers that lanes keep.
        on_ending: is told of each session that ends, once: why, and the answer it ended with if it has one.
    """

    def __init__(
        self,
        slots: int,
        *,
        max_slots_per_user: int | None = None,
        lease_s: float = LEASE_S,
        grant_s: float = GRANT_S,
    ) -> None:
        self.slots = slots
        self.max_slots_per_user = max_slots_per_user
        self.lease_s = lease_s
        self.grant_s = grant_s
        self.cached_bytes = 0
        self.on_ending: Callable[[Session, str, Last | None], None] | None = None
        self._sessions: dict[Key, Session] = {}
        self._taken = 0  # slots; written by the first thread alone
        self._held: dict[str, int] = {}  # of these, by user
        self._gone: OrderedDict[Key, Gone] = OrderedDict()
        self._lasts: OrderedDict[Key, Last] = OrderedDict()
        self._last_sweep: float | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def get(self, key: Key) -> Session | None:
        """The session, or None."""
        return self._sessions.get(key)

    @property
    def free(self) -> int:
        """Slots that may be given out now."""
        return max(0, self.slots - self._taken) if self.cached_bytes < MAX_CACHED_BYTES else 0

    def held(self, user: str) -> int:
        """Slots that a user's sessions take."""
        return self._held.get(user, 0)

    def share(self, user: str) -> int:
        """Slots that a user may have beside those that it has, were they free."""
        if self.max_slots_per_user is None:
            return self.slots
        return max(0, self.max_slots_per_user - self.held(user))

    def free_for(self, user: str) -> int:
        """Slots that may be given to a user now."""
        return min(self.free, self.share(user))

    # ---------------------------------------------------------------- opened once

    def open(
        self, user: str, id_: str, epoch: int, reply_to: str, now: float, *, num_envs: int = 1, pool: bool = False
    ) -> tuple[Opening, Session | None]:
        """Take an open. NEW has made the session and taken its slots; RAISED wants the old one ended first.

        FULL has taken nothing: fewer than ``num_envs`` slots are free, or left of the user's share.

        WRONG_EPOCH gives the session whose epoch counts; of one that is gone, a stand-in that is ending and held
        nowhere.
        """
        session = self._sessions.get((user, id_))
        if session is None:
            gone = self._gone.get((user, id_))
            if gone is not None and epoch < gone.epoch + gone.final:
                stand_in = Session(user, id_, gone.epoch, reply_to)
                stand_in.state = State.ENDING
                return Opening.WRONG_EPOCH, stand_in
            if num_envs > self.free_for(user):
                return Opening.FULL, None
            session = Session(user, id_, epoch, reply_to, num_envs=num_envs, pool=pool)
            self._sessions[session.key] = session
            self._taken += num_envs
            self._held[user] = self.held(user) + num_envs
            self._gone.pop(session.key, None)
            self._lasts.pop(session.key, None)
            return Opening.NEW, session
        if epoch < session.epoch:
            return Opening.WRONG_EPOCH, session
        if session.state is State.ENDING:
            return Opening.WAIT, session
        if epoch > session.epoch:
            return Opening.RAISED, session
        session.reply_to = reply_to
        if session.state is State.OPENING:
            return Opening.JOIN, session
        if not session.confirmed:
            self._grant(session, now)  # the first answer may have been lost
        return Opening.REPEAT, session

    def granted(self, session: Session, grant: bytes, now: float) -> str:
        """The session's env is there; gives the reply subject that the grant goes to."""
        session.state = State.OPEN
        session.grant = grant
        self._grant(session, now)
        return session.reply_to

    def _grant(self, session: Session, now: float) -> None:
        """Start its countdown anew."""
        session.lease_until = now + (self.lease_s if session.confirmed else self.grant_s)
        if session.confirmed:  # by now: the other thread may have renewed it in between, and its lease counts
            session.lease_until = now + self.lease_s

    def ending(self, session: Session, reason: str, last: Last | None = None) -> bool:
        """The session is over, its slots not yet free; False when it was ending already.

        ``last`` is the answer it ended with, which can still be had if its first sending was lost.
        """
        if session.state is State.ENDING:
            return False
        session.state = State.ENDING
        final = session.confirmed or reason in {"closed", "moved"}
        self._remember(session.key, Gone(reason, session.epoch, final), last)
        if self.on_ending is not None:
            self.on_ending(session, reason, last)
        return True

    def ended(self, session: Session) -> None:
        """Its env is closed; the slots are free."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            self._taken -= session.num_envs
            left = self._held.pop(session.user) - session.num_envs
            if left:
                self._held[session.user] = left
            self.cached_bytes -= session.cached_bytes

    def _remember(self, key: Key, gone: Gone, last: Last | None) -> None:
        self._gone[key] = gone
        self._gone.move_to_end(key)
        while len(self._gone) > MAX_REMEMBERED:
            self._gone.popitem(last=False)
        self._lasts.pop(key, None)
        if last is not None:
            self._lasts[key] = last
            while len(self._lasts) > MAX_LAST_ANSWERS:
                self._lasts.popitem(last=False)

    def why_gone(self, key: Key) -> str:
        """``session_expired``, ``closed``, another reason given to :meth:`ending`, or ``session_unknown``."""
        gone = self._gone.get(key)
        return "session_unknown" if gone is None else gone.reason

    def last_answer(self, key: Key, epoch: int, lane: int, seq: int) -> bytes | None:
        """The answer that the session ended with, if it is that of this request; of the newest sessions alone."""
        last = self._lasts.get(key)
        if last is None or last[0] != epoch:
            return None
        return last[3] if last[1] == ANY_LANE or last[1:3] == (lane, seq) else None

    # ---------------------------------------------------------------- leased

    def used(self, session: Session, now: float) -> None:
        """A request of the session arrived: that is as good as a renewal."""
        session.confirmed = True
        session.lease_until = now + self.lease_s

    def answered(self, lane: Lane, reply: bytes) -> str:
        """Keep a lane's answer; gives the reply subject that it goes to."""
        self.cached_bytes += len(reply) - len(lane.cached)
        return lane.answer(reply)

    def answered_together(self, lanes: Lanes, which: Indices, reply: bytes) -> set[str]:
        """The same for some lanes of a pool, whose answer it is together."""
        before = lanes.cached_bytes
        goes_to = lanes.answer(which, reply)
        self.cached_bytes += lanes.cached_bytes - before
        return goes_to

    def renew(self, key: Key, epoch: int, now: float) -> str | None:
        """Renew a lease. None when that was done, else why it could not be."""
        session = self._sessions.get(key)
        if session is None or session.state is State.ENDING:
            return self.why_gone(key)
        if session.epoch != epoch:
            return "wrong_epoch"
        session.confirmed = True
        if session.state is State.OPEN:
            session.lease_until = now + self.lease_s
        return None

    def sweep(self, now: float, interval_s: float, *, connected: bool) -> list[Session]:
        """The sessions whose lease ran out; to be called every ``interval_s``."""
        late = self._last_sweep is not None and now - self._last_sweep > LATE_SWEEPS * interval_s
        self._last_sweep = now
        if late or not connected:
            self.grant_again(now)
            return []
        return [s for s in list(self._sessions.values()) if s.lease_until < now and s.state is State.OPEN]

    def grant_again(self, now: float) -> None:
        """Start every countdown anew, as after a reconnect."""
        for session in list(self._sessions.values()):
            if session.state is State.OPEN:
                self._grant(session, now)

    # ---------------------------------------------------------------- probed

    def probe(self, key: Key, epoch: int, lane: int, seq: int) -> Awaited:
        """What became of request ``seq`` of a lane (R9); ``seq`` 0 asks for the open."""
        session = self._sessions.get(key)
        if seq == 0:
            if session is None or session.epoch != epoch or session.state is State.ENDING:
                return "not_received"
            return "running" if session.state is State.OPENING else "answered"
        if session is None or session.epoch != epoch or session.state is not State.OPEN:
            state: Awaited = "unknown"
        else:
            state = session.state_of(lane, seq)
        if state == "unknown" and self.last_answer(key, epoch, lane, seq) is not None:
            return "answered"
        return state
