"""Flights: requests under way, each until its answer or until it is lost (R9).

One timer looks after all of them, when there is something to look at. A request that has just been sent costs an entry
in a dict; only one that is quiet for a moment gets a :class:`~meshrl.protocol.doubt.Doubt`, and one probe a worker asks
about all of its quiet ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from meshrl.bus.connection import Connection
from meshrl.errors import MeshError, MeshUnreachable, SessionLost
from meshrl.protocol.doubt import GRACE_S, QUIET_S, Do, Doubt
from meshrl.wire.kept import Reads
from meshrl.wire.messages import MAX_BATCH, Probe, Probed, parse
from meshrl.wire.subjects import Subjects

if TYPE_CHECKING:
    from meshrl.client.session import RemoteSession

# Between looks, at least; while there is no connection, always.
TICK_S = 0.05
# A look that comes this late says that this process was stopped or its loop blocked: nobody else is to blame.
LATE_S = 0.5

_WHY = {
    "worker_lost": "worker {worker} is gone",
    "worker_frozen": "worker {worker} has been silent for {silence:g} s",
    "session_unknown": "worker {worker} does not know the session any more",
    "step_deadline": "the request ran longer than the {deadline:g} s that the worker allows",
}


class Entry(NamedTuple):
    """What a probe names a request by; ``seq`` 0 is the open."""

    session: str
    epoch: int
    lane: int
    seq: int


class Flight:
    """One request under way.

    Attributes:
        future: its answer's bytes, or the error. It is awaited bare, since a shield costs more than the rest of the
            waiting: a cancelled waiter cancels it, and :meth:`rearm` makes another.
        state: the worker's last word on it, if there was need to ask.
        on_fail: is told that there will be no answer, at once and not when somebody next waits for one.
        owner: whose it is, where that says for how long its worker may be away, and keeps the answer.
        reads: of a large answer, for an owner.
    """

    __slots__ = (
        "_flights",
        "_landed",
        "attempt",
        "body",
        "deadline_s",
        "doubt",
        "entry",
        "future",
        "on_fail",
        "owner",
        "reads",
        "rid",
        "sent_at",
        "state",
        "subject",
        "worker",
    )

    def __init__(
        self,
        flights: Flights,
        worker: str,
        entry: Entry,
        subject: str,
        body: bytes,
        deadline_s: float,
        now: float,
    ) -> None:
        self._flights = flights
        self.worker = worker
        self.entry = entry
        self.subject = subject
        self.body = body
        self.deadline_s = deadline_s
        self.sent_at = now
        self.attempt = 0
        self.rid = 0
        self.state = ""
        self.doubt: Doubt | None = None
        self.on_fail: Callable[[MeshError], None] | None = None
        self.owner: RemoteSession | None = None
        self.reads: Reads | None = None
        self._landed: bytes | MeshError | None = None
        self.future: asyncio.Future[bytes] = flights.loop.create_future()

    def __repr__(self) -> str:
        return f"<Flight {self.subject} {self.entry.seq} {self.state or 'sent'}>"

    def answered(self, data: bytes | None) -> None:
        """An answer arrived, or word that nobody listens."""
        if data is None:
            self._flights.alone(self)
            return
        self._flights.landed(self)
        if self._landed is None:
            self._landed = data
            if type(data) is not bytes and self.owner is not None:  # it is large, and its arrays are the user's
                self.reads = self._flights.reads_of(data)
            if not self.future.done():
                self.future.set_result(data)

    def failed(self, exc: MeshError) -> None:
        """There will be no answer."""
        self._flights.landed(self)
        if self._landed is None:
            self._landed = exc
            if not self.future.done():
                self.future.set_exception(exc)
                self.future.exception()  # who waits is told; when nobody does, there is nothing to log
            if self.on_fail is not None:
                self.on_fail(exc)

    def rearm(self) -> None:
        """Make it fit to be awaited again.

        A waiter that was cancelled took the future with it: there is a new one. A request of which nothing is known,
        because this client was without a connection for too long, is sent again.
        """
        if isinstance(self._landed, MeshUnreachable):
            self._landed = None
            self.future = self._flights.loop.create_future()
            self._flights.relaunch(self)
            return
        if not self.future.cancelled():
            return
        self.future = self._flights.loop.create_future()
        landed = self._landed
        if isinstance(landed, MeshError):
            self.future.set_exception(landed)
            self.future.exception()
        elif landed is not None:
            self.future.set_result(landed)

    @property
    def landed(self) -> bool:
        """Whether its answer, or its loss, is known."""
        return self._landed is not None

    # ---------------------------------------------------------------- what a probe asks, and what comes of it

    def awaited(self) -> list[Entry]:
        """The requests in it that are not answered yet."""
        return [self.entry]

    def told(self, states: list[str]) -> str:
        """What the worker's word on each of :meth:`awaited` says of the whole."""
        return states[0]

    def again(self) -> bytes:
        """The body of what is to be sent again."""
        return self.body


class Flights:
    """All requests of one :class:`~meshrl.Mesh` to sessions and workers."""

    def __init__(self, connection: Connection, subjects: Subjects, silence_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self._connection = connection
        self._subjects = subjects
        self._silence_s = silence_s
        self._fresh: dict[int, Flight] = {}  # in the order they were sent
        self._quiet: set[Flight] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._over = False
        self._look_at = 0.0  # when the timer is to go off, in monotonic seconds
        connection.on_reconnect.append(self._reconnected)
        connection.on_close.append(self._closed)

    def __len__(self) -> int:
        return len(self._fresh) + len(self._quiet)

    def launch(self, worker: str, entry: Entry, subject: str, body: bytes, deadline_s: float) -> Flight:
        """Send a request.

        Raises:
            BusClosed: the connection is closed.
        """
        flight = Flight(self, worker, entry, subject, body, deadline_s, time.monotonic())
        self.send(flight)
        return flight

    def relaunch(self, flight: Flight) -> None:
        """Send a request again that had landed without an answer."""
        flight.attempt += 1
        flight.sent_at = time.monotonic()
        flight.state = ""
        flight.doubt = None
        try:
            self.send(flight)
        except MeshError as exc:
            flight.failed(exc)

    def reads_of(self, data: bytes) -> Reads | None:
        """Of an answer that arrives at this moment."""
        return self._connection.reads_of(data)

    def send(self, flight: Flight) -> None:
        """Send a request that was never sent.

        Raises:
            BusClosed: the connection is closed.
        """
        entry = flight.entry
        flight.rid = self._connection.request(
            flight.subject,
            flight.body,
            flight.answered,
            mark=(entry.lane, entry.seq, flight.attempt),
            on_fail=flight.failed,
        )
        self._fresh[flight.rid] = flight
        if self._timer is None:  # else it goes off before this one is quiet
            self._look_by(flight.sent_at + QUIET_S, flight.sent_at)

    def landed(self, flight: Flight) -> None:
        """Nothing more is expected of it."""
        self._connection.forget(flight.rid)
        if self._fresh.pop(flight.rid, None) is None:
            self._quiet.discard(flight)

    def close(self) -> None:
        """Stop looking after them."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---------------------------------------------------------------- doubt

    def _doubt(self, flight: Flight) -> Doubt:
        if flight.doubt is None:
            grace_s = GRACE_S if flight.owner is None else flight.owner.grace_s
            flight.doubt = Doubt(
                flight.sent_at, deadline_s=flight.deadline_s, silence_s=self._silence_s, grace_s=grace_s
            )
            self._fresh.pop(flight.rid, None)
            self._quiet.add(flight)
        return flight.doubt

    def _look_by(self, at: float, now: float) -> None:
        """Look at them no later than ``at``."""
        if self._over:
            return
        if self._timer is not None:
            if self._look_at <= at:
                return
            self._timer.cancel()
        self._look_at = at
        self._timer = self.loop.call_later(max(0.0, at - now), self._look)

    def _look(self) -> None:
        now = time.monotonic()
        self._timer = None
        late = now - self._look_at > LATE_S
        for flight in list(self._fresh.values()):
            if now - flight.sent_at < QUIET_S:
                break
            self._doubt(flight)
        connected = self._connection.connected
        self._look_at_quiet(now, late=late, connected=connected)
        if self._fresh or self._quiet:
            oldest = next(iter(self._fresh.values()), None)
            # What is sent from now on is not quiet before this.
            due = [now + QUIET_S if oldest is None else oldest.sent_at + QUIET_S]
            due += [flight.doubt.due() for flight in self._quiet if flight.doubt is not None]
            self._look_by(max(min(due), now + TICK_S) if connected else now + TICK_S, now)

    def _look_at_quiet(self, now: float, *, late: bool, connected: bool) -> None:
        asked: dict[str, list[Flight]] = defaultdict(list)
        for flight in list(self._quiet):
            doubt = flight.doubt
            assert doubt is not None, "a quiet one has its doubt"
            if late or self._connection.sending(flight.rid):
                # Its answer may wait for this process; or the request, and a probe behind it, for the network.
                doubt.deaf(now)
                continue
            if doubt.due() > now and connected:
                continue
            do = doubt.tick(now, connected=connected)
            if do is Do.PROBE:
                asked[flight.worker].append(flight)
            else:
                self._act(flight, do)
        for worker, flights in asked.items():
            batch: list[tuple[Flight, list[Entry]]] = []
            size = 0
            for flight in flights:
                entries = flight.awaited()[:MAX_BATCH]
                size += len(entries)
                if size > MAX_BATCH:
                    self._probe(worker, batch)
                    batch, size = [], len(entries)
                batch.append((flight, entries))
            self._probe(worker, batch)

    def _probe(self, worker: str, batch: list[tuple[Flight, list[Entry]]]) -> None:
        flights = [flight for flight, _ in batch]

        def answered(data: bytes | None) -> None:
            self._connection.forget(rid)
            if data is None:
                for flight in flights:
                    if not flight.landed:
                        self.alone(flight)
                return
            try:
                states = parse(Probed, data).states
            except MeshError:
                return  # as good as silence: it is asked again
            now, at = time.monotonic(), 0
            for flight, entries in batch:
                own: list[str] = list(states[at : at + len(entries)])
                at += len(entries)
                if not flight.landed and len(own) == len(entries):
                    flight.state = flight.told(own)
                    self._act(flight, self._doubt(flight).heard(flight.state, now))
                    self._look_in_time(flight, now)

        def failed(exc: MeshError) -> None:
            for flight in flights:
                if not flight.landed:
                    flight.failed(exc)

        # Probes of one worker overlap: over a slow network the next leaves before the last is answered.
        body = Probe(awaited=[entry for _, entries in batch for entry in entries]).to_wire()
        subject = self._subjects.worker(worker, "probe", self._connection.user)
        rid = self._connection.request(subject, body, answered, on_fail=failed)
        self.loop.call_later(self._silence_s, self._connection.forget, rid)

    def alone(self, flight: Flight) -> None:
        """NATS says that nobody listens where it was sent, or where its probe was."""
        now = time.monotonic()
        self._act(flight, self._doubt(flight).alone(now, self._connection.up_for(now)))
        self._look_in_time(flight, now)

    def _look_in_time(self, flight: Flight, now: float) -> None:
        """See that it is looked at when its doubt has something to say."""
        if flight.doubt is not None and not flight.landed:
            self._look_by(max(flight.doubt.due(), now), now)

    def _act(self, flight: Flight, do: Do) -> None:
        if do is Do.SEND_AGAIN:
            flight.attempt += 1
            mark = (flight.entry.lane, flight.entry.seq, flight.attempt)
            self._connection.again(flight.rid, flight.subject, flight.again(), mark=mark)
        elif do is Do.LOST:
            assert flight.doubt is not None
            reason = flight.doubt.reason
            if reason == "disconnected":
                flight.failed(self._unreachable(flight.doubt.disconnected_s))
                return
            why = _WHY[reason].format(worker=flight.worker, silence=self._silence_s, deadline=flight.deadline_s)
            flight.failed(
                SessionLost(
                    f"session {flight.entry.session} is lost: {why}; open a new env",
                    reason=reason,
                    session=flight.entry.session,
                    worker=flight.worker,
                )
            )

    def _unreachable(self, disconnected_s: float) -> MeshUnreachable:
        url = self._connection.url
        return MeshUnreachable(
            f"{url} has not answered for {disconnected_s:g} s; see that the NATS server runs and can be reached from "
            "here. The connection goes on trying, and the request may have run",
            url=url,
            disconnected_s=disconnected_s,
        )

    def _reconnected(self) -> None:
        now = time.monotonic()
        for flight in [*self._fresh.values(), *self._quiet]:
            self._doubt(flight).reconnected(now)
        if self._quiet:
            self._look_by(now, now)

    def _closed(self, why: MeshError) -> None:
        self.close()
        for flight in [*self._fresh.values(), *self._quiet]:
            flight.failed(why)
