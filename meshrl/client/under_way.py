"""A pool's requests under way: whose turn each sub-environment is, and what became of what it was sent (R2, R9).

    held        the caller's turn          send, reset       -> under way
    under way   its worker's turn          its answer        -> ready
    ready       waits to be received       recv              -> held

Nothing here holds the pool: one that was forgotten is found, although the mesh holds its flights.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshrl.client.lane_flight import LaneFlight
from meshrl.client.pool_shard import PoolShard
from meshrl.client.ready import Ready, Results
from meshrl.client.revival import Begun, Revival
from meshrl.client.session import RemoteSession
from meshrl.client.shard_recovery import proof_of
from meshrl.errors import ConcurrentStep, MalformedMessage, MeshError, MeshUnreachable, ResetNeeded, from_wire
from meshrl.wire.batches import Batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame, Indices, check_lanes

if TYPE_CHECKING:
    from meshrl.client.flights import Flights

# The fields of a request for some of its lanes, by their positions in what the user gave, and by env_id.
FieldsOf = Callable[[Indices, Indices], Frame]
_NEW, _HELD, _UNDER_WAY, _READY = range(4)
_PHASES = ("was never reset", "", "is under way", "has a result that was not received")


class UnderWay:
    """What the lanes of one pool were sent, until it is answered or lost.

    Args:
        sessions: of the shards, in the order of env_ids.
        flights: those of the mesh.
        results: where answers go.
        actions: batches of the pool's actions.

    Attributes:
        errors: what went wrong and was not raised yet, the oldest first, with the env_ids that it is about; none where
            it is about all.
    """

    def __init__(
        self, sessions: Sequence[RemoteSession], flights: Flights, results: Results, actions: Batching
    ) -> None:
        self.errors: deque[tuple[MeshError, frozenset[int]]] = deque()
        self._name = sessions[0].grant.description.name
        self._sessions = sessions
        self._flights = flights
        self._results = results
        self._actions = actions
        num_envs = sum(session.num_envs for session in sessions)
        self._phases: NDArray[np.int8] = np.full(num_envs, _NEW, np.int8)
        self._seqs: Indices = np.zeros(num_envs, np.int64)
        self._under_way: set[LaneFlight] = set()
        self._stranded: list[LaneFlight] = []  # of those, what a server that was away for too long may not have got
        self._wanted = 0  # results that recv waits for; 0 while it does not
        self._changed: asyncio.Future[None] | None = None
        self._revivals: dict[RemoteSession, Revival] = {}
        self._failed: set[PoolShard] = set()  # could not be opened again
        for session in sessions:
            if isinstance(session, PoolShard):
                failed = partial(self._not_revived, session)
                self._revivals[session] = Revival(session, results.batches, self, failed)
            session.watched_by(self._is_waiting_for, self._fail)

    # ---------------------------------------------------------------- whose turn it is

    @property
    def lanes(self) -> int:
        """How many were sent something and have not answered."""
        return int(np.count_nonzero(self._phases == _UNDER_WAY))

    def holds(self, env_ids: Indices) -> bool:
        """Whether one of them was sent something and has not answered."""
        return bool((self._phases[env_ids] == _UNDER_WAY).any())

    def handed_out(self, env_ids: Indices) -> None:
        """Their results were received: it is the caller's turn."""
        self._phases[env_ids] = _HELD

    def check_held(self, env_ids: Indices) -> None:
        """Whether it is the caller's turn in all of them.

        Raises:
            ConcurrentStep: one of them is under way, or has a result that was not received.
            ResetNeeded: one of them was never reset.
        """
        phases = self._phases[env_ids]
        if (phases == _HELD).all():
            return
        at = int(np.flatnonzero(phases != _HELD)[0])
        env_id, phase = int(env_ids[at]), int(phases[at])
        why = f"{self._name}: sub-environment {env_id} {_PHASES[phase]}"
        if phase == _NEW:
            raise ResetNeeded(f"{why}; call reset first", env_id=env_id)
        raise ConcurrentStep(f"{why}; call recv first", env_id=env_id)

    # ---------------------------------------------------------------- requests

    def flights_of(self, op: str, ids: Indices, fields_of: FieldsOf) -> list[LaneFlight]:
        """A request for each shard that has some of ``ids``; none of them is sent yet.

        Args:
            op: ``step`` or ``reset``.
            ids: env_ids, each once.
            fields_of: the request's own fields, for some of ``ids``.

        Raises:
            UnencodableValue: what is to be sent cannot travel.
        """
        flights = []
        for session in self._sessions:
            start = session.first_env_id
            rows = np.flatnonzero((ids >= start) & (ids < start + session.num_envs))
            if len(rows):
                own = ids[rows]
                flight = LaneFlight(
                    self._flights,
                    session,
                    op,
                    own - start,
                    self._seqs[own] + 1,
                    fields=fields_of(rows, own),
                    some_of=self._some_of,
                    received=self._received,
                    lost=self._lost,
                    now=time.monotonic(),
                )
                flights.append(flight)
        return flights

    def launch(self, flights: list[LaneFlight]) -> None:
        """Send what was made of :meth:`flights_of`.

        Raises:
            BusClosed: the connection is closed.
        """
        for flight in flights:
            self._phases[flight.lanes + flight.session.first_env_id] = _UNDER_WAY
            revival = self._revivals.get(flight.session)
            if revival is None or not revival.takes(flight):
                self._send(flight, revival)

    def _send(self, flight: LaneFlight, revival: Revival | None) -> None:
        self._flights.send(flight)
        if revival is not None:
            revival.sent(flight)
        self._under_way.add(flight)
        self._seqs[flight.lanes + flight.session.first_env_id] = flight.seqs

    # ---------------------------------------------------------------- shards that are opened again

    def send(
        self, shard: PoolShard, op: str, lanes: Indices, fields: Frame, *, at: int = -1, begun: Begun | None = None
    ) -> None:
        """Send a request of some lanes of a shard; see :class:`~meshrl.client.revival.Lanes`."""
        flight = LaneFlight(
            self._flights,
            shard,
            op,
            lanes,
            self._seqs[lanes + shard.first_env_id] + 1,
            fields=fields,
            some_of=self._some_of,
            received=self._received if begun is None else partial(self._received_apart, begun),
            lost=self._lost,
            now=time.monotonic(),
        )
        flight.at, flight.begins = at, begun is not None
        self._send(flight, self._revivals[shard])

    def take(self, shard: PoolShard) -> list[LaneFlight]:
        """Take back all requests of a shard that is lost; see :class:`~meshrl.client.revival.Lanes`."""
        taken = [flight for flight in self._under_way if flight.session is shard]
        for flight in taken:
            flight.withdraw()
        self._under_way.difference_update(taken)
        self._stranded = [flight for flight in self._stranded if flight.session is not shard]
        return taken

    def deliver(self, shard: PoolShard, frame: Frame, lane: int) -> None:
        """Take a row of one lane as if it had arrived."""
        ids = np.array([shard.first_env_id + lane], np.int64)
        self._phases[ids] = _READY
        self._results.add(Ready(frame, 1, np.zeros(1, np.int64), ids))
        if self._results.count >= self._wanted:
            self.wake()

    def began(self, shard: PoolShard, seq: int) -> None:
        """A shard was opened again; see :class:`~meshrl.client.revival.Lanes`."""
        self._seqs[shard.first_env_id : shard.first_env_id + shard.num_envs] = seq

    def _not_revived(self, shard: PoolShard, exc: MeshError) -> None:
        self._failed.add(shard)
        self._fail(exc)

    def _received_apart(self, begun: Begun, flight: LaneFlight, data: bytes) -> None:
        """An answer that the user is not told as it is."""
        parsed = self._parsed(flight, data)
        if parsed is None:
            return
        frame, lanes, seqs = parsed
        awaited = (self._seqs[lanes + flight.session.first_env_id] == seqs) & flight.waiting[lanes]
        rows = np.flatnonzero(awaited)
        self._landed(flight, lanes[rows])
        if not len(rows):
            return
        try:
            if "error" in frame:
                raise from_wire(frame["error"])
            self._results.check(frame, len(lanes))
            begun(flight, frame, data, rows, lanes[rows])
        except MeshError as exc:
            ids = lanes[rows] + flight.session.first_env_id
            self._revivals[flight.session].not_begun(flight, exc, lanes[rows])
            self._phases[ids] = _NEW
            self._fail_by(flight.session, exc, ids)

    def _some_of(self, op: str, frame: Frame, rows: Indices) -> Frame:
        """A request's own fields for some of its lanes, out of the request itself."""
        if op == "step":
            said = {"policy": frame["policy"]} if "policy" in frame else {}
            return {"actions": self._actions.pick(frame["actions"], rows), **said}
        some: Frame = {name: frame[name] for name in ("seeds", "episodes", "options") if name in frame}
        return {
            name: [value[row] for row in rows.tolist()] if name != "options" and value is not None else value
            for name, value in some.items()
        }

    def _parsed(self, flight: LaneFlight, data: bytes) -> tuple[Frame, Indices, Indices] | None:
        """An answer, its lanes and their sequence numbers; None where it is none, and its request has failed."""
        try:
            frame = unpack(data)
            if type(frame) is dict and "lanes" in frame:
                _, lanes, seqs = check_lanes(frame, flight.session.num_envs)
                return frame, lanes, seqs
            if type(frame) is dict and "error" in frame:
                raise from_wire(frame["error"])
            raise MalformedMessage("a pool's answer names no lanes")
        except MeshError as exc:
            flight.failed(exc)
            return None

    def _landed(self, flight: LaneFlight, lanes: Indices) -> None:
        flight.land(lanes)
        if flight.landed:
            self._under_way.discard(flight)

    def _received(self, flight: LaneFlight, data: bytes) -> None:
        parsed = self._parsed(flight, data)
        if parsed is None:
            return
        session = flight.session
        frame, lanes, seqs = parsed
        ids = lanes + session.first_env_id
        # A second answer to the same request (it was sent again) or one that came late changes nothing.
        awaited = (self._seqs[ids] == seqs) & (self._phases[ids] == _UNDER_WAY) & flight.waiting[lanes]
        rows = np.flatnonzero(awaited)
        if not len(rows):
            return
        ids = ids[rows]
        self._landed(flight, lanes[rows])
        revival = self._revivals.get(session)
        if "error" in frame:
            exc = from_wire(frame["error"])
            if revival is not None:
                revival.refused(flight, exc, lanes[rows])
            self._phases[ids] = _HELD if flight.op == "step" else _NEW
            self._fail_by(session, exc, ids)
            return
        try:
            proof = None if revival is None else proof_of(frame, len(lanes))
            self._results.add(Ready(frame, len(lanes), rows, ids))
        except MeshError as exc:
            which = ids.tolist()
            self._phases[ids] = _NEW
            told = f"{self._name}: worker {session.grant.worker}, sub-environments {which}: {exc.message}"
            self._fail_by(session, type(exc)(told, **{**exc.details, "env_ids": which}), ids)
            return
        if revival is not None and proof is not None:
            revival.told(flight, proof, data, rows, ids - session.first_env_id)
        self._phases[ids] = _READY
        if self._results.count >= self._wanted:
            self.wake()

    def _lost(self, flight: LaneFlight, exc: MeshError) -> None:
        """No more answers come to it: its session is gone, or the server is."""
        if isinstance(exc, MeshUnreachable):
            if not self._stranded:  # it is the same for all of them
                self._fail(exc)
            self._stranded.append(flight)
            return
        self._under_way.discard(flight)
        revival = self._revivals.get(flight.session)
        if revival is not None and revival.lost(flight, exc):
            return
        ids = flight.left() + flight.session.first_env_id
        self._phases[ids] = _NEW
        self._fail_by(flight.session, exc, ids)

    def _fail_by(self, session: RemoteSession, exc: MeshError, ids: Indices) -> None:
        if session.is_open:  # what comes after the error that ended it (steps that were cancelled) says nothing new
            told = session.judge(exc)
            self._fail(told, ids if session.is_open else ())
        self.wake()

    def _fail(self, exc: MeshError, ids: Iterable[int] = ()) -> None:
        self.errors.append((exc, frozenset(map(int, ids))))
        self.wake()

    def next_error(self) -> MeshError:
        """The oldest of :attr:`errors`, to be raised; there is one."""
        return self.errors.popleft()[0]

    def begun_anew(self, env_ids: Indices) -> None:
        """These are reset: errors that are about none but them are out of date."""
        if not self.errors:
            return
        reset = frozenset(env_ids.tolist())
        kept = [(exc, about - reset, not about) for exc, about in self.errors]
        self.errors = deque((exc, about) for exc, about, all_ in kept if about or all_)

    def unusable(self, env_ids: Sequence[int]) -> None:
        """Their results were of no use: they have to be reset."""
        self._phases[np.array(env_ids, np.int64)] = _NEW

    def _is_waiting_for(self, session: RemoteSession) -> bool:
        return any(flight.session is session for flight in self._under_way)

    # ---------------------------------------------------------------- waiting

    @property
    def stranded(self) -> bool:
        """Whether there is something that is not on its way: its server was away for too long, or its shard is lost."""
        return bool(self._stranded or self._failed)

    def take_up(self) -> None:
        """Send again what was given up because the server was away, once the user was told of it."""
        if self._failed and not self.errors:
            failed, self._failed = self._failed, set()
            for shard in failed:
                shard.bring_back()
        if self._stranded and not self.errors:
            stranded, self._stranded = self._stranded, []
            for flight in stranded:
                flight.relaunch()

    def check_alone(self) -> None:
        """Whether nobody waits.

        Raises:
            ConcurrentStep: somebody does.
        """
        if self._changed is not None:
            raise ConcurrentStep(f"{self._name}: another recv or reset of this pool is waiting; await it first")

    async def change(self, timeout: float | None, wanted: int = 0) -> None:
        """Wait until ``wanted`` results are ready or something has gone wrong, or for ``timeout`` seconds.

        Raises:
            ConcurrentStep: somebody waits already.
        """
        self.check_alone()
        loop = asyncio.get_running_loop()
        self._wanted = wanted
        self._changed = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self.wake)
        try:
            await self._changed
        finally:
            self._changed = None
            self._wanted = 0
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Have who waits look again."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def end(self) -> None:
        """Expect nothing more."""
        for flight in list(self._under_way):
            self._flights.landed(flight)
        self._under_way.clear()
        self._stranded.clear()
        self._phases[self._phases == _UNDER_WAY] = _NEW
