"""Waiting: the opens that a full worker has parked, and whose turn it is (R5).

The rules: resumes go before opens; users take turns; one user's opens are served first come, first served; a
freed slot goes to exactly one waiter. Whoever was answered full keeps the place for a while by a ticket.

A waiter needs one slot for each sub-environment. The one whose turn it is may need more than are free: then nobody
overtakes it, not even one that would fit, and slots stay idle for it. Where small opens keep coming, one that lets them
pass would wait for ever. But it keeps slots from others for ``KEEP_S`` at a stretch: then it goes behind all who wait,
so that no wish for more than a worker will have soon shuts that worker for everybody.

Where the operator bounds what one user may have, a user whose next open is beyond that *stands aside*: it is passed
over, keeps nobody waiting, and has its old turn again as soon as slots of its own are freed, or its next open is
another. Its later opens wait behind that one.

A user's *turn* is a number, the smallest is next. A user who comes gets the largest so far, and a new one
each time one of the user's waiters is served. It outlives the waiters for as long as a ticket stands for one
of them, so that a user whose only open is away asking again does not fall behind those who came later.

Every operation is O(log n) amortized in the number of waiters.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from meshrl.errors import UsageError

# A client that was answered full asks again at once; ten seconds cover a reconnect in between.
TICKET_S = 10.0
# How long slots stay idle for one that needs more of them than are free: sessions that end by themselves (an
# evaluation, a test) do so in seconds; those of a training last for hours, and nobody should wait for them so.
KEEP_S = 5.0

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Waiter:
    """One parked open.

    Attributes:
        user: the user token it came under.
        session: the session id it asks for.
        ticket: what keeps its place if it is answered full; the same again each time it comes back with it.
        until: when its parking time is over, in the caller's monotonic seconds.
        resume: whether it resumes a session that was lost elsewhere.
        num_envs: the slots it needs, all at once.
    """

    user: str
    session: str
    ticket: str
    until: float
    resume: bool
    num_envs: int = 1


class _Ranked(Generic[K]):
    """Keys by rank, smallest first. Removal is lazy: a heap entry counts while its key has that very rank."""

    def __init__(self) -> None:
        self._rank: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()  # keys need not be comparable

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: K) -> bool:
        return key in self._rank

    def put(self, key: K, rank: float) -> None:
        """Give ``key`` that rank, whether it was there or not."""
        self._rank[key] = rank
        heapq.heappush(self._heap, (rank, next(self._order), key))
        # Ranks may be given anew without end (a client that repeats its open): without this the heap would
        # only grow.
        if len(self._heap) > 2 * len(self._rank) + 16:
            self._heap = [(rank, next(self._order), key) for key, rank in self._rank.items()]
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        """Take ``key`` out, if it is there."""
        self._rank.pop(key, None)

    def first(self) -> tuple[float, K] | None:
        """The smallest rank and its key."""
        while self._heap:
            rank, _, key = self._heap[0]
            if self._rank.get(key) == rank:
                return rank, key
            heapq.heappop(self._heap)
        return None


@dataclass
class _User:
    """One user's part of a line: its turn, its sessions by arrival, and how many tickets hold the turn."""

    turn: int
    sessions: _Ranked[str] = field(default_factory=_Ranked)
    tickets: int = 0


class _Line:
    """Waiters of one urgency: users in turn, sessions of one user by arrival."""

    def __init__(self) -> None:
        self._users: dict[str, _User] = {}
        self._turns: _Ranked[str] = _Ranked()  # of the users that have a waiter and do not stand aside
        self._aside: set[str] = set()
        self._last_turn = itertools.count()
        self.aside = 0  # waiters of those who stand aside

    def add(self, user: str, session: str, arrival: int) -> None:
        """Put a session in its place."""
        own = self._users.get(user)
        if own is None:
            own = self._users[user] = _User(next(self._last_turn))
        if user in self._aside and session not in own.sessions:
            self.aside += 1
        own.sessions.put(session, arrival)
        if user not in self._turns and user not in self._aside:
            self._turns.put(user, own.turn)

    def stand_aside(self, user: str) -> None:
        """The user's next session is beyond its share: pass it over until :meth:`back`."""
        self._turns.discard(user)
        self._aside.add(user)
        self.aside += len(self._users[user].sessions)

    def back(self, user: str) -> None:
        """The user has its turn again, if it stood aside."""
        if user in self._aside:
            own = self._users[user]
            self._aside.remove(user)
            self.aside -= len(own.sessions)
            self._turns.put(user, own.turn)

    def before(self, user: str) -> bool:
        """Whether a session of this user that came now would have somebody before it."""
        return bool(len(self._turns)) or user in self._aside

    def remove(self, user: str, session: str) -> None:
        """Take a session out; others of the same user keep their turn."""
        self.back(user)  # the next of its sessions may be within its share
        own = self._users[user]
        own.sessions.discard(session)
        if not own.sessions:
            self._turns.discard(user)
        self._drop_if_idle(user)

    def head(self) -> tuple[str, str] | None:
        """The session that is next, as (user, session)."""
        first = self._turns.first()
        if first is None:
            return None
        user = first[1]
        session = self._users[user].sessions.first()
        assert session is not None, "a user in turn has a waiter"
        return user, session[1]

    def serve(self, user: str, session: str) -> None:
        """Take out the session that is next; its user goes behind everyone."""
        own = self._users[user]
        own.turn = next(self._last_turn)
        self._turns.put(user, own.turn)
        self.remove(user, session)

    def hold(self, user: str) -> None:
        """A ticket will stand for one of the user's sessions, which is still here: keep the turn."""
        self._users[user].tickets += 1

    def unhold(self, user: str) -> None:
        """That ticket is gone."""
        self._users[user].tickets -= 1
        self._drop_if_idle(user)

    def _drop_if_idle(self, user: str) -> None:
        own = self._users[user]
        if not own.sessions and not own.tickets:
            del self._users[user]


@dataclass(frozen=True)
class _Ticket:
    """A place that is kept."""

    arrival: int
    resume: bool
    text: str


_Key = tuple[str, str]  # (user, session)


class Waiting:
    """The queue for one pool of slots.

    Args:
        max_waiting: how many may wait at once, at least 0.
        max_tickets: how many tickets are remembered at once, the newest; as many as may wait when None.

    Raises:
        UsageError: a bound is negative.
    """

    def __init__(self, max_waiting: int = 10_000, *, max_tickets: int | None = None) -> None:
        if max_waiting < 0 or (max_tickets is not None and max_tickets < 0):
            raise UsageError(f"bounds are at least 0, not {max_waiting} and {max_tickets}")
        self._max_waiting = max_waiting
        self._max_tickets = max_waiting if max_tickets is None else max_tickets
        self._waiters: dict[_Key, Waiter] = {}
        self._arrivals: dict[_Key, int] = {}
        self._ends: _Ranked[_Key] = _Ranked()
        self._tickets: dict[_Key, _Ticket] = {}
        self._ticket_ends: _Ranked[_Key] = _Ranked()
        self._lines = {True: _Line(), False: _Line()}
        self._last_arrival = itertools.count(1)
        # For whom slots are kept, and since when.
        self._kept_for: tuple[_Key, float] | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._waiters

    @property
    def in_line(self) -> int:
        """Waiters who would take slots as soon as there are some: not those of users who stand aside."""
        return len(self._waiters) - sum(line.aside for line in self._lines.values())

    def before(self, user: str) -> bool:
        """Whether an open of this user that came now would have somebody before it."""
        return any(line.before(user) for line in self._lines.values())

    def share_freed(self, user: str) -> None:
        """Slots of this user were freed: what is beyond its share has to be looked at anew."""
        for line in self._lines.values():
            line.back(user)

    def __repr__(self) -> str:
        return f"<Waiting {len(self._waiters)}/{self._max_waiting}, {len(self._tickets)} tickets>"

    def park(
        self,
        user: str,
        session: str,
        now: float,
        until: float,
        ticket: str | None = None,
        *,
        resume: bool = False,
        num_envs: int = 1,
    ) -> Waiter | None:
        """Put an open in the queue; one that is there already keeps its place.

        Args:
            user: the user token of the subject it came on.
            session: the session id it asks for.
            now: monotonic seconds.
            until: when its parking time is over; said again, the newest counts.
            ticket: of an earlier answer full to the same (user, session). One that is wrong, too old or
                forgotten is as good as none: the open goes to the end, and a place that was kept for it is
                given up.
            resume: whether it resumes a session lost elsewhere. An open that is said again as a resume moves
                up; a resume stays one.
            num_envs: the slots it needs; said again, the newest counts.

        Returns:
            the waiter, or None when ``max_waiting`` are there: to be answered full at once. A ticket stays
            good then.
        """
        self._forget_tickets(now)
        key = (user, session)
        there = self._waiters.get(key)
        if there is not None:
            if resume and not there.resume:
                self._lines[False].remove(user, session)
                self._lines[True].add(user, session, self._arrivals[key])
            self.share_freed(user)  # it may need fewer now
            there = replace(there, until=until, resume=resume or there.resume, num_envs=num_envs)
            self._waiters[key] = there
            self._ends.put(key, until)
            return there
        if len(self._waiters) >= self._max_waiting:
            return None
        kept = self._tickets.get(key)
        if kept is not None and kept.text == ticket:
            arrival = kept.arrival
        else:
            arrival = next(self._last_arrival)
            self._forget_ticket(key)
        waiter = Waiter(user, session, str(arrival), until, resume, num_envs)
        self._waiters[key] = waiter
        self._arrivals[key] = arrival
        self._ends.put(key, until)
        # The session enters before its ticket goes, or the user's turn would be lost in between.
        self._lines[resume].add(user, session, arrival)
        self._forget_ticket(key)
        return waiter

    def next(self, free: int = 1, now: float = 0.0, share: Callable[[str], int] | None = None) -> Waiter | None:
        """Take out the one waiter whose turn it is.

        Args:
            free: slots that can be given out now.
            now: monotonic seconds.
            share: gives what a user may have beside what it has; without it, anything.

        Returns:
            it; None when nobody waits, or when it needs more than ``free`` and has not yet kept them for ``KEEP_S``.
        """
        for line in (self._lines[True], self._lines[False]):
            passed: set[_Key] = set()  # all who wait may need more than there is
            while (head := line.head()) is not None and head not in passed:
                if share is not None and self._waiters[head].num_envs > share(head[0]):
                    line.stand_aside(head[0])
                    continue
                if self._waiters[head].num_envs <= free:
                    line.serve(*head)
                    return self._take(head)
                if self._kept_for is None or self._kept_for[0] != head:
                    self._kept_for = head, now
                if now - self._kept_for[1] < KEEP_S or not free:
                    return None
                passed.add(head)
                self._to_the_end(line, head)
        return None

    def _to_the_end(self, line: _Line, key: _Key) -> None:
        """Put a waiter behind all others of its line."""
        self._kept_for = None
        self._arrivals[key] = next(self._last_arrival)
        line.serve(*key)
        line.add(*key, self._arrivals[key])

    def leave(self, user: str, session: str) -> bool:
        """The client gave up or closed: forget its open, and its ticket.

        Returns:
            whether it was waiting.
        """
        key = (user, session)
        self._forget_ticket(key)
        waiter = self._waiters.get(key)
        if waiter is None:
            return False
        self._lines[waiter.resume].remove(user, session)
        self._take(key)
        return True

    def due(self, now: float) -> list[Waiter]:
        """Take out the waiters whose parking time is over: to be answered full, each with its ``ticket``.

        Args:
            now: monotonic seconds. A ticket is remembered until ``now + TICKET_S``.

        Returns:
            them, the one whose time was over first at the front.
        """
        self._forget_tickets(now)
        over: list[Waiter] = []
        while (end := self._ends.first()) is not None and end[0] <= now:
            key = end[1]
            waiter = self._waiters[key]
            line = self._lines[waiter.resume]
            line.hold(waiter.user)
            self._tickets[key] = _Ticket(self._arrivals[key], waiter.resume, waiter.ticket)
            self._ticket_ends.put(key, now + TICKET_S)
            line.remove(waiter.user, waiter.session)
            over.append(self._take(key))
        while len(self._tickets) > self._max_tickets:
            oldest = self._ticket_ends.first()
            assert oldest is not None, "every ticket has an end"
            self._forget_ticket(oldest[1])
        return over

    def next_due(self) -> float | None:
        """When :meth:`due` has something to give, in monotonic seconds; None when nobody waits."""
        end = self._ends.first()
        return None if end is None else end[0]

    def _take(self, key: _Key) -> Waiter:
        """Forget a waiter that has left its line."""
        self._ends.discard(key)
        del self._arrivals[key]
        return self._waiters.pop(key)

    def _forget_ticket(self, key: _Key) -> None:
        ticket = self._tickets.pop(key, None)
        if ticket is not None:
            self._ticket_ends.discard(key)
            self._lines[ticket.resume].unhold(key[0])

    def _forget_tickets(self, now: float) -> None:
        while (end := self._ticket_ends.first()) is not None and end[0] <= now:
            self._forget_ticket(end[1])
