"""``RemotePool``: many leased envs, each stepped when its action is there and handed out when its result is (R2).

Each sub-environment is a lane of its own. :meth:`RemotePool.send` gives some of them their actions, and
:meth:`RemotePool.recv` gives back whichever are ready first, so that slow ones hold nobody up.

    held        the caller's turn          send, reset       -> under way
    under way   its worker's turn          its answer        -> ready
    ready       waits to be received       recv              -> held
"""

from __future__ import annotations

import asyncio
import operator
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from meshrl.client.batched_actions import batched_checker
from meshrl.client.lane_flight import LaneFlight
from meshrl.client.ready import PoolBatch, Ready, Results
from meshrl.client.seeds import Seeds
from meshrl.client.shards import ShardSession
from meshrl.errors import (
    ConcurrentStep,
    MalformedMessage,
    MeshError,
    MeshUnreachable,
    NothingUnderWay,
    RequestTimeout,
    ResetNeeded,
    UsageError,
    from_wire,
)
from meshrl.wire import spaces
from meshrl.wire.batches import batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame, Indices, check_lanes
from meshrl.wire.messages import Seeding

if TYPE_CHECKING:
    from meshrl.client.flights import Flights

# The fields of a request for some of its lanes, by their positions in what the user gave, and by env_id.
_FieldsOf = Callable[[Indices, Indices], Frame]
_NEW, _HELD, _UNDER_WAY, _READY = range(4)
_PHASES = ("was never reset", "", "is under way", "has a result that was not received")


class RemotePool:
    """Envs that live on workers, each stepped by itself; made by :meth:`meshrl.Mesh.pool`.

    An episode that ends is followed by the next at once: the step's row has the new episode's first observation, and
    ``infos["final_obs"]`` the last of the old one. Every call may raise ``SessionLost`` (a shard is gone: open a new
    pool), ``EnvError`` (a sub-environment's code raised; its shard's session has ended) and ``SessionClosed``; results
    that are ready are handed out first. ``MeshUnreachable`` says that the server has been away for too long; what was
    under way still is, and the next ``recv`` or ``reset`` goes on waiting for it.

    Attributes:
        num_envs: how many sub-environments there are.
        seeding: ``gymnasium`` (seed + env_id, and later episodes go on) or ``derived``.
    """

    def __init__(
        self,
        sessions: Sequence[ShardSession],
        flights: Flights,
        *,
        seeding: Seeding,
        fair: bool,
        check_actions: Literal["normal", "strict"],
    ) -> None:
        description = sessions[0].grant.description
        self.num_envs = sum(session.num_envs for session in sessions)
        self.seeding: Seeding = seeding
        self._sessions = list(sessions)
        self._flights = flights
        self._description = description
        self._single_observation_space = spaces.rebuild(description.observation_space)
        self._single_action_space = spaces.rebuild(description.action_space)
        self._action_batches = batching(self._single_action_space)
        self._check = batched_checker(
            self._single_action_space, self.num_envs, description.name, strict=check_actions == "strict"
        )
        self._seeds = Seeds(seeding, self.num_envs, description.name)
        self._results = Results(self._single_observation_space, self.num_envs, fair=fair)
        self._phases: NDArray[np.int8] = np.full(self.num_envs, _NEW, np.int8)
        self._seqs: Indices = np.zeros(self.num_envs, np.int64)
        self._bounds = [(s.first_env_id, s.first_env_id + s.num_envs) for s in sessions]
        self._rooted: NDArray[np.bool_] = np.zeros(self.num_envs, np.bool_)  # seeded with the root of derived seeding
        self._under_way: set[LaneFlight] = set()
        self._stranded: list[LaneFlight] = []  # of those, what a server that was away for too long may not have got
        self._errors: deque[MeshError] = deque()
        self._wanted = 0  # results that recv waits for; 0 while it does not
        self._changed: asyncio.Future[None] | None = None
        for session in sessions:
            session.watched_by(self._is_waiting_for, self._fail)

    def __repr__(self) -> str:
        workers = len({session.grant.worker for session in self._sessions})
        return (
            f"<RemotePool of {self.num_envs} {self.name} at {workers} workers: {self.under_way} under way, "
            f"{self.ready} ready>"
        )

    def __del__(self, _warn: Any = warnings.warn) -> None:
        left = [session for session in getattr(self, "_sessions", ()) if session.abandoned]
        for session in left:
            session.let_go()
        if left:
            _warn(f"unclosed {self!r}: `await pool.close()` frees its slots", ResourceWarning, source=self)

    # ---------------------------------------------------------------- facts

    @property
    def name(self) -> str:
        """As served."""
        return self._description.name

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The worker and the number of sub-environments of each shard, in the order of env_ids."""
        return [(session.grant.worker, session.num_envs) for session in self._sessions]

    @property
    def under_way(self) -> int:
        """How many sub-environments were sent something and have not answered."""
        return int(np.count_nonzero(self._phases == _UNDER_WAY))

    @property
    def ready(self) -> int:
        """How many have a result that was not received."""
        return self._results.count

    @property
    def single_observation_space(self) -> gymnasium.Space[Any]:
        """Of one sub-environment."""
        return self._single_observation_space

    @property
    def single_action_space(self) -> gymnasium.Space[Any]:
        """Of one sub-environment."""
        return self._single_action_space

    @cached_property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of all of them: ``batch_space(single_observation_space, num_envs)``."""
        return batch_space(self._single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of all of them: ``batch_space(single_action_space, num_envs)``."""
        return batch_space(self._single_action_space, self.num_envs)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The remote envs', without what cannot travel."""
        return dict(self._description.metadata)

    @cached_property
    def remote_spec(self) -> EnvSpec | None:
        """One sub-environment's ``EnvSpec``; None where it has none that can be written down."""
        return None if self._description.spec is None else EnvSpec.from_json(self._description.spec)

    # ---------------------------------------------------------------- a pool's calls

    async def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
        env_ids: Sequence[SupportsIndex] | Indices | None = None,
    ) -> None:
        """Begin episodes; their first observations are received like any other result, with ``first`` set.

        Waits for what is under way in the sub-environments that it resets, and drops their results. Cancelling it
        sends nothing and drops nothing.

        Args:
            seed: env_id i gets ``seed + i``; a list has one for each of the pool's. With ``seeding="derived"``, the
                root of all seeds to come.
            options: for the sub-environments' ``reset``.
            env_ids: which; None for all.

        Raises:
            InvalidSeed: seeds of another kind or number.
            UnencodableValue: the options cannot travel; nothing was sent.
            ConcurrentStep: it has to wait, and a recv or another reset is waiting.
        """
        ids = self._ids(env_ids)
        self._check_open()
        while (self._phases[ids] == _UNDER_WAY).any():
            self._take_up()
            await self._change(None)
            self._check_open()
            if self._stranded and self._errors:
                raise self._errors.popleft()
        if not len(ids):
            return
        seeds = self._seeds.of_reset(seed)
        rooted = self._rooted
        if self.seeding == "derived":
            if seeds is not None:
                rooted = np.zeros(self.num_envs, np.bool_)
            seeds = [None if known else self._seeds.root for known in rooted.tolist()]
        fields: Frame = {} if options is None else {"options": dict(options)}

        def fields_of(_: Indices, which: Indices) -> Frame:
            return fields if seeds is None else {**fields, "seeds": [seeds[i] for i in which.tolist()]}

        flights = self._flights_of("reset", ids, fields_of)
        self._results.drop(ids)
        self._launch(flights)
        self._rooted = rooted
        self._rooted[ids] = True

    async def send(self, actions: Any, env_ids: Sequence[SupportsIndex] | Indices) -> None:
        """Give sub-environments their next actions. Nothing is waited for.

        Args:
            actions: a batch, one for each of ``env_ids``; checked against the action space before anything is sent.
            env_ids: whose turn is the caller's: each was received since it was last sent something.

        Raises:
            InvalidAction: the action of one is of a wrong shape, structure, dtype or discrete range; the error names
                its env_id, and nothing was sent.
            ConcurrentStep: one of them is under way, or has a result that was not received.
            ResetNeeded: one of them was never reset.
        """
        self._check_open()
        ids = self._ids(env_ids)
        if not len(ids):
            return
        actions = self._check(actions, ids)
        phases = self._phases[ids]
        if not (phases == _HELD).all():
            raise self._not_held(ids, phases)
        pick = self._action_batches.pick

        def fields_of(rows: Indices, _: Indices) -> Frame:
            return {"actions": actions if len(rows) == len(ids) else pick(actions, rows)}

        self._launch(self._flights_of("step", ids, fields_of))

    async def recv(self, min: int = 1, max: int | None = None, timeout: float | None = None) -> PoolBatch:  # noqa: A002
        """Results, as soon as ``min`` are ready.

        Cancelling it loses no result.

        Args:
            min: how many to wait for.
            max: how many to take at most; None for all that are ready.
            timeout: seconds for the whole call; when they are over, what is ready is given, even if it is less than
                ``min``. 0 looks and does not wait; None waits as long as a worker works on it.

        Raises:
            TimeoutError: nothing was ready in time (a :class:`~meshrl.errors.RequestTimeout`).
            NothingUnderWay: fewer than ``min`` are ready or under way, so that waiting would be in vain.
            ConcurrentStep: another recv or reset is waiting.
            UsageError: ``min`` is not from 1 to ``max``.
        """
        limit = self.num_envs if max is None else max
        if not 1 <= min <= limit:
            raise UsageError(f"recv takes from min=1 to max results, not min={min}, max={max}")
        self._check_alone()
        self._take_up()
        if timeout is not None and timeout <= 0 and self._results.count < min:
            await asyncio.sleep(0)  # or who does nothing but poll would keep the answers from coming in
            self._check_alone()
        end = None if timeout is None else time.monotonic() + timeout
        results = self._results
        while results.count < min and not self._errors and self._is_open():
            coming = results.count + self.under_way
            if coming < min:
                raise NothingUnderWay(
                    f"{self.name}: recv(min={min}) would wait for ever: {results.count} results are ready and "
                    f"{coming - results.count} under way; send actions first, or ask for fewer",
                    ready=results.count,
                    under_way=coming - results.count,
                )
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            await self._change(left, min)
        if results.count:
            batch = results.take(limit)
            self._phases[batch.env_ids] = _HELD
            return batch
        if self._errors:
            raise self._errors.popleft()
        self._check_open()
        raise RequestTimeout(
            f"{self.name}: none of {self.under_way} sub-environments under way was ready within {timeout:g} s",
            timeout_s=timeout,
        )

    async def stream(self, min: int = 1, max: int | None = None) -> AsyncIterator[PoolBatch]:  # noqa: A002
        """Batches for as long as anything is ready or under way: ``async for batch in pool.stream(min=16): ...``.

        What the loop's body sends is streamed as well. Less than ``min`` is left at the end: then all of it is given.

        Raises:
            MeshError: as :meth:`recv`.
        """
        while (coming := self._results.count + self.under_way) or self._errors:
            at_least = min if min <= coming else coming or 1
            yield await self.recv(at_least, max)

    async def close(self) -> None:
        """Close all sub-environments and free their slots. Safe to call twice."""
        for flight in list(self._under_way):
            self._flights.landed(flight)
        self._under_way.clear()
        self._stranded.clear()
        self._phases[self._phases == _UNDER_WAY] = _NEW
        for session in self._sessions:
            asyncio.get_running_loop().call_soon(self._wake)  # as soon as the first is closed, who waits is told
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ---------------------------------------------------------------- requests

    def _flights_of(self, op: str, ids: Indices, fields_of: _FieldsOf) -> list[LaneFlight]:
        """A request for each shard that has some of ``ids``; none of them is sent yet.

        Raises:
            UnencodableValue: what is to be sent cannot travel.
        """
        flights = []
        for session, (start, stop) in zip(self._sessions, self._bounds, strict=True):
            rows = np.flatnonzero((ids >= start) & (ids < stop))
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
                    lost=self._flight_lost,
                    now=time.monotonic(),
                )
                flights.append(flight)
        return flights

    def _launch(self, flights: list[LaneFlight]) -> None:
        for flight in flights:
            self._flights.send(flight)
            ids = flight.lanes + flight.session.first_env_id
            self._under_way.add(flight)
            self._seqs[ids] = flight.seqs
            self._phases[ids] = _UNDER_WAY

    def _some_of(self, op: str, frame: Frame, rows: Indices) -> Frame:
        """A request's own fields for some of its lanes, out of the request itself."""
        if op == "step":
            return {"actions": self._action_batches.pick(frame["actions"], rows)}
        some: Frame = {name: frame[name] for name in ("seeds", "options") if name in frame}
        if "seeds" in some:
            some["seeds"] = [some["seeds"][row] for row in rows.tolist()]
        return some

    def _received(self, flight: LaneFlight, data: bytes) -> None:
        session = flight.session
        try:
            frame = unpack(data)
            if type(frame) is dict and "lanes" in frame:
                _, lanes, seqs = check_lanes(frame, session.num_envs)
            elif type(frame) is dict and "error" in frame:
                raise from_wire(frame["error"])
            else:
                raise MalformedMessage("a pool's answer names no lanes")
        except MeshError as exc:
            flight.failed(exc)
            return
        ids = lanes + session.first_env_id
        # A second answer to the same request (it was sent again) or one that came late changes nothing.
        awaited = (self._seqs[ids] == seqs) & (self._phases[ids] == _UNDER_WAY) & np.isin(lanes, flight.left())
        rows = np.flatnonzero(awaited)
        if not len(rows):
            return
        ids = ids[rows]
        flight.land(lanes[rows])
        if flight.landed:
            self._under_way.discard(flight)
        if "error" in frame:
            self._phases[ids] = _HELD if flight.op == "step" else _NEW
            self._fail_by(session, from_wire(frame["error"]))
            return
        try:
            self._results.add(Ready(frame, len(lanes), rows, ids))
        except MeshError as exc:
            self._phases[ids] = _NEW
            self._fail_by(session, exc)
            return
        self._phases[ids] = _READY
        if self._results.count >= self._wanted:
            self._wake()

    def _flight_lost(self, flight: LaneFlight, exc: MeshError) -> None:
        """No more answers come to it: its session is gone, or the server is."""
        if isinstance(exc, MeshUnreachable):
            if not self._stranded:  # it is the same for all of them
                self._fail(exc)
            self._stranded.append(flight)
            return
        self._under_way.discard(flight)
        self._phases[flight.left() + flight.session.first_env_id] = _NEW
        self._fail_by(flight.session, exc)

    def _fail_by(self, session: ShardSession, exc: MeshError) -> None:
        if session.is_open:  # what comes after the error that ended it (steps that were cancelled) says nothing new
            self._fail(session.judge(exc))
        self._wake()

    def _fail(self, exc: MeshError) -> None:
        self._errors.append(exc)
        self._wake()

    def _is_waiting_for(self, session: ShardSession) -> bool:
        return any(flight.session is session for flight in self._under_way)

    # ---------------------------------------------------------------- waiting

    def _take_up(self) -> None:
        """Send again what was given up because the server was away, once the user was told of it."""
        if self._stranded and not self._errors:
            stranded, self._stranded = self._stranded, []
            for flight in stranded:
                flight.relaunch()

    def _check_alone(self) -> None:
        if self._changed is not None:
            raise ConcurrentStep(f"{self.name}: another recv or reset of this pool is waiting; await it first")

    async def _change(self, timeout: float | None, wanted: int = 0) -> None:
        """Wait until ``wanted`` results are ready or something has gone wrong, or for ``timeout`` seconds."""
        self._check_alone()
        loop = asyncio.get_running_loop()
        self._wanted = wanted
        self._changed = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._wake)
        try:
            await self._changed
        finally:
            self._changed = None
            self._wanted = 0
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # ---------------------------------------------------------------- checks

    def _check_open(self) -> None:
        for session in self._sessions:
            session.check_open()

    def _is_open(self) -> bool:
        return all(session.is_open for session in self._sessions)

    def _ids(self, env_ids: Sequence[SupportsIndex] | Indices | None) -> Indices:
        if env_ids is None:
            return np.arange(self.num_envs)
        if isinstance(env_ids, np.ndarray) and env_ids.dtype.kind in "iu":
            ids: Indices = env_ids.astype(np.int64)
        else:
            ids = np.array([operator.index(i) for i in env_ids], np.int64)
        if ids.ndim != 1 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_envs):
            raise UsageError(f"{self.name}: env_ids are from 0 to {self.num_envs - 1}, not {env_ids}")
        if len(set(ids.tolist())) != len(ids):
            raise UsageError(f"{self.name}: each env_id stands once, not as in {env_ids}")
        return ids

    def _not_held(self, ids: Indices, phases: NDArray[np.int8]) -> MeshError:
        at = int(np.flatnonzero(phases != _HELD)[0])
        env_id, phase = int(ids[at]), int(phases[at])
        facts: dict[str, Any] = {"env_id": env_id}
        if phase == _NEW:
            return ResetNeeded(f"{self.name}: sub-environment {env_id} {_PHASES[phase]}; call reset first", **facts)
        return ConcurrentStep(f"{self.name}: sub-environment {env_id} {_PHASES[phase]}; call recv first", **facts)
