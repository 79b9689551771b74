"""``RemotePool``: many leased envs, each stepped when its action is there and handed out when its result is (R2).

Each sub-environment is a lane of its own. :meth:`RemotePool.send` gives some of them their actions, and
:meth:`RemotePool.recv` gives back whichever are ready first, so that slow ones hold nobody up.
"""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np

from meshrl.client.leased_envs import LeasedEnvs
from meshrl.client.ready import PoolBatch, Results
from meshrl.client.session import RemoteSession, close_all
from meshrl.client.under_way import UnderWay
from meshrl.errors import (
    MalformedMessage,
    NothingUnderWay,
    RequestTimeout,
    UsageError,
)
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.messages import Seeding

if TYPE_CHECKING:
    from meshrl.client.flights import Flights


class RemotePool(LeasedEnvs):
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

    _freed_by = "`await pool.close()` frees its slots"

    def __init__(
        self,
        sessions: Sequence[RemoteSession],
        flights: Flights,
        *,
        seeding: Seeding,
        fair: bool,
        check_actions: Literal["normal", "strict"],
    ) -> None:
        super().__init__(sessions, seeding=seeding, check_actions=check_actions)
        self._results = Results(self._single_observation_space, self.num_envs, fair=fair)
        self._under_way = UnderWay(self._sessions, flights, self._results, self._action_batches)

    def __repr__(self) -> str:
        return (
            f"<RemotePool of {self.num_envs} {self.name}: {self.whereabouts}, {self.under_way} under way, "
            f"{self.ready} ready>"
        )

    @property
    def under_way(self) -> int:
        """How many sub-environments were sent something and have not answered."""
        return self._under_way.lanes

    @property
    def ready(self) -> int:
        """How many have a result that was not received."""
        return self._results.count

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
                root of all seeds to come, also of those that are not reset now, from their next reset on.
            options: for the sub-environments' ``reset``.
            env_ids: which; None for all.

        Raises:
            InvalidSeed: seeds of another kind or number.
            UnencodableValue: the options cannot travel; nothing was sent.
            ConcurrentStep: it has to wait, and a recv or another reset is waiting.
        """
        ids = self._ids(env_ids)
        self._check_open()
        under_way = self._under_way
        while under_way.holds(ids):
            if under_way.stranded and under_way.errors:
                raise under_way.next_error()
            under_way.take_up()
            await under_way.change(None)
            self._check_open()
        if not len(ids):
            return
        seeds = self._seeds.of_reset(seed)
        fields: Frame = {} if options is None else {"options": dict(options)}

        def fields_of(_: Indices, which: Indices) -> Frame:
            return fields if seeds is None else {**fields, "seeds": [seeds[i] for i in which.tolist()]}

        flights = under_way.flights_of("reset", ids, fields_of)
        self._results.drop(ids)
        under_way.begun_anew(ids)
        under_way.launch(flights)
        which = ids.tolist()
        self._seeds.sent(seeds, which)
        if self.seeding == "derived" and isinstance(seed, SupportsIndex):
            self._seeds.due(operator.index(seed), which)

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
        self._under_way.check_held(ids)
        pick = self._action_batches.pick

        def fields_of(rows: Indices, _: Indices) -> Frame:
            return self._said({"actions": actions if len(rows) == len(ids) else pick(actions, rows)})

        self._under_way.launch(self._under_way.flights_of("step", ids, fields_of))

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
            MalformedMessage: a worker's answer is none, or infos cannot be merged. With ``env_ids`` in its details it
                has cost the results of those, which have to be reset; without them nothing is lost, and rows whose
                infos do not go together can be received one by one, with ``max=1``.
            UsageError: ``min`` is not from 1 to ``max``.
        """
        limit = self.num_envs if max is None else max
        if not 1 <= min <= limit:
            raise UsageError(f"recv takes from min=1 to max results, not min={min}, max={max}")
        results, under_way = self._results, self._under_way
        under_way.check_alone()
        under_way.take_up()
        if timeout is not None and timeout <= 0 and results.count < min:
            await asyncio.sleep(0)  # or who does nothing but poll would keep the answers from coming in
            under_way.check_alone()
        end = None if timeout is None else time.monotonic() + timeout
        while results.count < min and not under_way.errors and self._is_open():
            coming = results.count + under_way.lanes
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
            await under_way.change(left, min)
        if results.count:
            try:
                batch = results.take(limit)
            except MalformedMessage as exc:
                under_way.unusable(exc.details.get("env_ids", ()))
                raise
            under_way.handed_out(batch.env_ids)
            return batch
        if under_way.errors:
            raise under_way.next_error()
        self._check_open()
        raise RequestTimeout(
            f"{self.name}: none of {under_way.lanes} sub-environments under way was ready within {timeout:g} s",
            timeout_s=timeout,
        )

    async def stream(self, min: int = 1, max: int | None = None) -> AsyncIterator[PoolBatch]:  # noqa: A002
        """Batches for as long as anything is ready or under way: ``async for batch in pool.stream(min=16): ...``.

        What the loop's body sends is streamed as well. Less than ``min`` is left at the end: then all of it is given.

        Raises:
            MeshError: as :meth:`recv`.
        """
        while (coming := self._results.count + self.under_way) or self._under_way.errors:
            at_least = min if min <= coming else coming or 1
            yield await self.recv(at_least, max)

    async def close(self) -> None:
        """Close all sub-environments and free their slots. Safe to call twice; cancelled, it does so all the same."""
        self._under_way.end()
        await close_all(self._sessions, self._under_way.wake)  # who waits is told at once

    # ---------------------------------------------------------------- checks

    def _check_open(self) -> None:
        for session in self._sessions:
            session.check_open()

    def _is_open(self) -> bool:
        return all(session.is_open for session in self._sessions)

    def _ids(self, env_ids: Sequence[SupportsIndex] | Indices | None) -> Indices:
        ids = super()._ids(env_ids)
        once = np.zeros(self.num_envs, np.bool_)
        once[ids] = True
        if np.count_nonzero(once) != len(ids):
            raise UsageError(f"{self.name}: each env_id stands once, not as in {env_ids}")
        return ids
