"""One request of several lanes under way: its answers come in as many messages as its lanes finish in (R2, R9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from meshrl.client.flights import Entry, Flight, Flights
from meshrl.errors import MeshError, MeshUnreachable
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.messages import MAX_BATCH

if TYPE_CHECKING:
    from meshrl.client.session import RemoteSession

# What decides about the whole when lanes are told different things: that the session is gone, then that some of it has
# to be sent again.
_SEND_AGAIN = ("not_received", "answered")


class LaneFlight(Flight):
    """A pool's request to one shard.

    Attributes:
        session: of the shard.
        op: of the request.
        lanes: int64, of the shard.
        seqs: int64, the sequence number on each.
        waiting: bool, by lane of the shard: whether it is one of these and has no answer yet.
        at: its position in the shard's journal, where there is one.
        begins: whether it is a reset in place of episodes that were lost.
    """

    __slots__ = (
        "_asked",
        "_lost",
        "_received",
        "_some_of",
        "at",
        "begins",
        "lanes",
        "op",
        "seqs",
        "session",
        "waiting",
    )

    def __init__(
        self,
        flights: Flights,
        session: RemoteSession,
        op: str,
        lanes: Indices,
        seqs: Indices,
        *,
        fields: Frame,
        some_of: Callable[[str, Frame, Indices], Frame],
        received: Callable[[LaneFlight, bytes], None],
        lost: Callable[[LaneFlight, MeshError], None],
        now: float,
    ) -> None:
        """A request that is not sent yet.

        Args:
            flights: those of the mesh.
            session: of the shard.
            op: ``step`` or ``reset``.
            lanes: of the shard.
            seqs: one a lane.
            fields: the request's own.
            some_of: of an op, those of some of the lanes, by their positions in ``lanes``.
            received: gets each answer.
            lost: is told that no more come.
            now: the clock.

        Raises:
            UnencodableValue: the fields cannot travel.
        """
        grant = session.grant
        body = pack({"epoch": grant.epoch, "lanes": lanes, "seqs": seqs, **fields})
        entry = Entry(grant.session, grant.epoch, int(lanes[0]), int(seqs[0]))
        super().__init__(flights, grant.worker, entry, session.subject + op, body, grant.step_deadline_s, now)
        self.owner = session
        self.session = session
        self.op = op
        self.lanes = lanes
        self.seqs = seqs
        self.waiting = np.zeros(session.num_envs, np.bool_)
        self.waiting[lanes] = True
        self.at = -1
        self.begins = False
        self._some_of = some_of
        self._asked = 0
        self._received = received
        self._lost = lost

    def answered(self, data: bytes | None) -> None:
        """An answer arrived, or word that nobody listens."""
        if data is None:
            self._flights.alone(self)
        else:
            self.reads = None if type(data) is bytes else self._flights.reads_of(data)
            self._received(self, data)
            self.reads = None

    def land(self, lanes: Indices) -> None:
        """These lanes have their answers."""
        self.waiting[lanes] = False
        if not self.waiting[self.lanes].any():
            self._flights.landed(self)
            self._landed = b""

    def failed(self, exc: MeshError) -> None:
        """There will be no more answers."""
        self._flights.landed(self)
        if self._landed is None:
            self._landed = exc
            self._lost(self, exc)

    def withdraw(self) -> None:
        """Its session is lost: whatever still comes of it is not heard."""
        self._flights.landed(self)
        self._landed = b""

    def relaunch(self) -> None:
        """Send it again, after nothing was heard of it because this client was without a connection for too long."""
        if isinstance(self._landed, MeshUnreachable):
            rows = self._rows()
            self._landed = None
            self.body = self.again()
            self.lanes, self.seqs = self.lanes[rows], self.seqs[rows]
            self._flights.relaunch(self)

    def left(self) -> Indices:
        """The lanes that have no answer yet."""
        return self.lanes[self._rows()]

    def _rows(self) -> Indices:
        """Of those, the positions in the request."""
        return np.flatnonzero(self.waiting[self.lanes])

    def awaited(self) -> list[Entry]:
        """The requests in it that are not answered yet; of more than a probe may name, others each time."""
        session, epoch, _, _ = self.entry
        rows = self._rows()
        if len(rows) > MAX_BATCH:
            rows = np.roll(rows, -self._asked)[:MAX_BATCH]
            self._asked += MAX_BATCH
        pairs = zip(self.lanes[rows].tolist(), self.seqs[rows].tolist(), strict=True)
        return [Entry(session, epoch, lane, seq) for lane, seq in pairs]

    def told(self, states: list[str]) -> str:
        """The word that counts for the whole."""
        if "unknown" in states:
            return "unknown"
        return next((state for state in states if state in _SEND_AGAIN), "running")

    def fields_of(self, rows: Indices) -> Frame:
        """The request's own fields, for some of its lanes, by their positions in it."""
        return self._some_of(self.op, unpack(self.body), rows)

    def fields_left(self) -> Frame:
        """The same for the lanes that have no answer yet."""
        return self.fields_of(self._rows())

    def again(self) -> bytes:
        """The body of those that have no answer yet; for a lane that runs it changes nothing.

        It is made of what was sent first: the user may have changed his arrays since.
        """
        rows = self._rows()
        if len(rows) == len(self.lanes):
            return self.body
        frame = unpack(self.body)
        some = self._some_of(self.op, frame, rows)
        return pack({"epoch": frame["epoch"], "lanes": self.lanes[rows], "seqs": self.seqs[rows], **some})
