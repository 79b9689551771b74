"""Revival: what becomes of a pool's lanes whose shard is lost and opened again (R8).

What was under way is sent again when the shard is back in its state. Where that cannot be, all its lanes are reset, and
each of them tells once that its episode has ended: a lane whose step was under way at once, any other when it is next
sent an action. That row is like that of any step that ends an episode in a pool (the next one's first observation, and
the last of the old one in ``infos["final_obs"]``), with a reward of 0, ``truncations``, and ``infos["session_lost"]``.

    lane          the shard is back in its state    it begins with nothing
    under way     its request is sent again         step: it is truncated; reset: its request is sent again
    else          nothing                           it is truncated when it is next sent an action
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from meshrl.client.recovery import REFUSALS
from meshrl.client.shard_recovery import Proof, proof_of
from meshrl.errors import MeshError, SessionLost
from meshrl.protocol.journal import TOGETHER
from meshrl.protocol.journals import Origin
from meshrl.wire.batches import Batching
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.infos import split_infos
from meshrl.wire.kept import Kept, kept, whole
from meshrl.wire.large import LARGE_BYTES

if TYPE_CHECKING:
    from meshrl.client.lane_flight import LaneFlight
    from meshrl.client.pool_shard import PoolShard

# Gets a request's answer, the same as it arrived, the rows of it that were waited for, and their lanes.
Begun = Callable[["LaneFlight", Frame, bytes, Indices, Indices], None]


class Waits(NamedTuple):
    """What is to be sent once the shard is open again.

    Attributes:
        op: ``step``, ``reset``, or ``begin`` for a reset in place of an episode.
        lanes: of the shard.
        fields: the request's own.
        at: its position in the journal, where it stands already; else -1.
    """

    op: str
    lanes: Indices
    fields: Frame
    at: int


class Fresh(NamedTuple):
    """A lane that was reset in place of its episode.

    Attributes:
        frame: the answer.
        data: the same, as it arrived.
        row: the lane's.
    """

    frame: Frame
    data: Kept
    row: int


class Lanes(Protocol):
    """The pool's part in it."""

    def take(self, shard: PoolShard) -> list[LaneFlight]:
        """Take back all requests of a shard that is lost: no answer to them is heard any more."""

    def send(
        self, shard: PoolShard, op: str, lanes: Indices, fields: Frame, *, at: int = -1, begun: Begun | None = None
    ) -> None:
        """Send a request of some lanes.

        Args:
            shard: whose.
            op: ``step`` or ``reset``.
            lanes: of the shard.
            fields: the request's own.
            at: its position in the journal; -1 where it does not stand there yet.
            begun: gets its answers in place of the pool.
        """

    def deliver(self, shard: PoolShard, frame: Frame, lane: int) -> None:
        """Take a row of one lane as if it had arrived."""

    def began(self, shard: PoolShard, seq: int) -> None:
        """The shard was opened again; each of its lanes has had so many requests there."""


class Revival:
    """One shard's.

    Args:
        shard: its session.
        observations: batches of them.
        pool: who its lanes belong to.
        failed: is told why it could not be opened again.
    """

    def __init__(
        self, shard: PoolShard, observations: Batching, pool: Lanes, failed: Callable[[MeshError], None]
    ) -> None:
        self._shard = shard
        self._observations = observations
        self._pool = pool
        self._left: list[Waits] = []
        self._lasts: NDArray[np.object_] = np.full(shard.num_envs, None)
        self._told: list[tuple[Indices, Kept]] = []  # not in those yet: see meshrl.protocol.journal
        self._cut: SessionLost | None = None
        self._beginning: set[int] = set()  # lanes whose reset in place of an episode has not been answered
        self._fresh: dict[int, Fresh] = {}  # those for which it has
        self._due: set[int] = set()  # of those that are beginning, the ones that were sent an action
        self._later: list[Waits] = []  # resets of lanes that are beginning
        self._recovery = shard.recovery
        shard.told_by(self._leave, self._back, failed, self._arrived)

    def __repr__(self) -> str:
        return f"<Revival of {self._shard!r}: {len(self._left)} requests wait>"

    # ---------------------------------------------------------------- what passes by

    @property
    def _last(self) -> NDArray[np.object_]:
        """Of each lane the answer that told last of it, as it arrived; None before the first."""
        self._note_told()
        return self._lasts

    def _note_told(self) -> None:
        told, self._told = self._told, []
        for lanes, data in told:
            self._lasts[lanes] = data

    def takes(self, flight: LaneFlight) -> bool:
        """A request is about to be sent; whether it is taken over here."""
        if not (self._shard.stands_still or self._fresh or self._beginning):
            return False
        lanes = flight.lanes.tolist()
        if self._shard.is_lost:
            self._shard.bring_back()
        if flight.op == "reset" and not self._beginning.isdisjoint(lanes):
            self._later.append(Waits("reset", flight.lanes, flight.fields_left(), -1))
            return True
        if flight.op == "reset":
            for lane in lanes:
                self._fresh.pop(lane, None)
        elif self._fresh or self._beginning:
            cut = [k for k, lane in enumerate(lanes) if lane in self._fresh or lane in self._beginning]
            if cut:
                self._cut_short(flight, cut)
                return True
        if self._shard.stands_still:
            self._keep(flight)
        return self._shard.stands_still

    def sent(self, flight: LaneFlight) -> None:
        """A request was sent."""
        recovery = self._recovery
        if flight.at < 0 and recovery.resumes and not recovery.journal.hopeless:
            flight.at = recovery.journal.asked(flight.op, flight.body)

    def told(self, flight: LaneFlight, proof: Proof, data: bytes, rows: Indices, lanes: Indices) -> None:
        """Some of its lanes have their answers, in those rows; ``proof`` is what went with it."""
        answer = kept(data, flight.reads)
        self._told.append((lanes, answer))
        if len(self._told) >= TOGETHER or len(answer) > LARGE_BYTES:
            self._note_told()
        self._prove(flight, proof, answer, rows, lanes)

    def _prove(self, flight: LaneFlight, proof: Proof, data: Kept, rows: Indices, lanes: Indices) -> None:
        recovery = self._recovery
        digests, origins = proof
        began: list[tuple[int, Origin]] = []
        if origins:
            lane_of = dict(zip(rows.tolist(), lanes.tolist(), strict=True))
            began = [(lane_of[row], origin) for row, origin in origins if row in lane_of]
            recovery.began(began)
        if flight.at >= 0:
            seconds = time.monotonic() - flight.sent_at if flight.landed else 0.0
            own = None if digests is None else digests[rows]
            recovery.journal.told((flight.at, data, flight.op, lanes, rows), began, own, seconds)

    def refused(self, flight: LaneFlight, exc: MeshError, lanes: Indices) -> None:
        """The same, with an error."""
        if flight.at >= 0 and exc.code not in REFUSALS:
            self._recovery.journal.unsure(lanes, flight.op)

    def lost(self, flight: LaneFlight, exc: MeshError) -> bool:
        """A request came to that; whether its lanes wait for the shard to be opened again."""
        if flight.entry.epoch != self._shard.grant.epoch and self._shard.is_lost:
            return False
        if not self._shard.lose(exc):
            return False
        self._keep(flight)
        return True

    def _leave(self) -> None:
        """The shard is lost: all that is under way is taken back at once, so that no late answer of it is heard."""
        for flight in self._pool.take(self._shard):
            self._keep(flight)

    def _keep(self, flight: LaneFlight) -> None:
        if len(lanes := flight.left()):
            self._left.append(Waits("begin" if flight.begins else flight.op, lanes, flight.fields_left(), flight.at))

    # ---------------------------------------------------------------- when the shard is back

    def _back(self, gone: SessionLost | None) -> None:
        """The shard is open again; with an error, it has begun with nothing."""
        shard = self._shard
        self._pool.began(shard, 1 if gone is None and len(self._recovery.journal) else 0)
        if gone is not None:
            self._begin_anew(gone)
        self._send_left()

    def _arrived(self, seq: int | None) -> None:
        """The shard has moved to another worker, where each lane has had so many requests, or (None) stays."""
        if seq is not None:
            self._pool.began(self._shard, seq)
        self._send_left()

    def _send_left(self) -> None:
        shard, pool = self._shard, self._pool
        left, self._left = self._left, []
        for op, lanes, fields, at in left:
            if op == "begin":
                pool.send(shard, "reset", lanes, fields, at=at, begun=self._begun)
            else:
                pool.send(shard, op, lanes, fields, at=at)

    def _begin_anew(self, gone: SessionLost) -> None:
        """Reset all lanes that have an episode, but those that are about to be reset anyway."""
        self._cut = gone
        self._due |= {lane for op, lanes, *_ in self._left if op == "step" for lane in lanes.tolist()}
        # The journal begins anew as well.
        later, self._later = self._later, []
        self._left = [self._rooted(waits) for waits in (*self._left, *later) if waits.op == "reset"]
        begun = np.array([last is not None for last in self._last], np.bool_)
        for waits in self._left:
            begun[waits.lanes] = False
        lanes = np.flatnonzero(begun)
        self._fresh.clear()
        self._beginning = set(lanes.tolist())
        if len(lanes):
            self._left.append(Waits("begin", lanes, self._places(lanes), -1))

    def _rooted(self, waits: Waits) -> Waits:
        """A user's reset, for a shard that knows nothing of the roots that derived seeds come from."""
        told = [self._last[lane] is not None for lane in waits.lanes.tolist()]
        if waits.fields.get("seeds") or not all(told):
            return waits._replace(at=-1)
        return waits._replace(fields={**self._places(waits.lanes), **waits.fields}, at=-1)

    def _places(self, lanes: Indices) -> Frame:
        """The fields of a reset that goes on with the numbers of the lanes' episodes, and with their seeds."""
        lasts = [Last.of(self._last[lane], lane) for lane in lanes.tolist()]
        fields: Frame = {"episodes": [last.episode for last in lasts]}
        places = [self._recovery.place(lane) for lane in lanes.tolist()]
        if all(place is not None for place in places):
            fields["seeds"] = [place["root"] for place in places if place is not None]
        return fields

    # ---------------------------------------------------------------- what is told in place of an episode's end

    def _begun(self, flight: LaneFlight, frame: Frame, data: bytes, rows: Indices, lanes: Indices) -> None:
        """Some lanes were reset in place of their episodes."""
        answer = kept(data, flight.reads)
        self._prove(flight, proof_of(frame, len(frame["lanes"])), answer, rows, lanes)
        for row, lane in zip(rows.tolist(), lanes.tolist(), strict=True):
            self._beginning.discard(lane)
            fresh = Fresh(frame, answer, row)
            if lane in self._due:
                self._due.discard(lane)
                self._tell(lane, fresh)
            else:
                self._fresh[lane] = fresh
        self._send_later()

    def not_begun(self, flight: LaneFlight, exc: MeshError, lanes: Indices) -> None:
        """They could not be: that is told, and their user may reset them."""
        self.refused(flight, exc, lanes)
        self._beginning.difference_update(lanes.tolist())
        self._due.difference_update(lanes.tolist())
        self._send_later()

    def _send_later(self) -> None:
        """The resets that waited for lanes to have begun."""
        later, self._later = self._later, []
        for waits in later:
            if self._beginning.isdisjoint(waits.lanes.tolist()):
                for lane in waits.lanes.tolist():
                    self._fresh.pop(lane, None)
                self._pool.send(self._shard, "reset", waits.lanes, waits.fields)
            else:
                self._later.append(waits)

    def _cut_short(self, flight: LaneFlight, cut: list[int]) -> None:
        """A step is about to be sent to lanes whose episodes were ended: ``cut`` are their positions in it."""
        rest = np.delete(np.arange(len(flight.lanes)), cut)
        if len(rest) and self._shard.stands_still:
            self._left.append(Waits("step", flight.lanes[rest], flight.fields_of(rest), -1))
        elif len(rest):
            self._pool.send(self._shard, "step", flight.lanes[rest], flight.fields_of(rest))
        for lane in flight.lanes[cut].tolist():
            fresh = self._fresh.pop(lane, None)
            if fresh is None:
                self._due.add(lane)
            else:
                self._tell(lane, fresh)

    def _tell(self, lane: int, fresh: Fresh) -> None:
        """That the episode of a lane has ended."""
        assert self._cut is not None, "it was ended by a loss"
        before, size = Last.of(self._last[lane], lane), len(fresh.frame["lanes"])
        final = next(islice(self._observations.rows(before.frame["obs"], before.size), before.row, None))
        info: dict[str, Any] = {"session_lost": {"message": self._cut.message, **self._cut.details}}
        infos = split_infos([(unpack(whole(fresh.data)).get("infos"), 0, size)], size)[fresh.row]
        entries = [{"final_obs": final, "final_info": {}}, {**dict(ChainMap(*reversed(infos))), **info}]
        row = {
            "lanes": np.array([lane], np.int64),
            "obs": self._observations.pick(fresh.frame["obs"], np.array([fresh.row])),
            "rewards": np.zeros(1),
            "terminations": np.zeros(1, np.bool_),
            "truncations": np.ones(1, np.bool_),
            "first": False,
            "episodes": np.array([before.episode], np.int64),
            "steps": np.array([before.steps], np.int64),
            "infos": unpack(pack({"entries": [[0, entry] for entry in entries]})),
        }
        self._last[lane] = fresh.data
        self._pool.deliver(self._shard, row, lane)


class Last(NamedTuple):
    """What was told last of a lane.

    Attributes:
        frame: the answer.
        row: the lane's in it.
        size: how many rows it has.
        episode: the number of the lane's episode after it.
        steps: how many steps that has.
    """

    frame: Frame
    row: int
    size: int
    episode: int
    steps: int

    @classmethod
    def of(cls, data: Kept, lane: int) -> Last:
        """Of an answer as it arrived."""
        frame = unpack(whole(data))
        row = int(np.flatnonzero(frame["lanes"] == lane)[0])
        ended = bool(frame["terminations"][row] or frame["truncations"][row])
        steps = 0 if ended else int(frame["steps"][row])
        return cls(frame, row, len(frame["lanes"]), int(frame["episodes"][row]) + ended, steps)
