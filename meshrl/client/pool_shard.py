"""A pool's shard that outlives its worker (R8): its lanes wait while it is opened again, and go on where they were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from meshrl.client.lane_flight import LaneFlight
from meshrl.client.resumable import ResumableSession
from meshrl.client.session import GONE_ERRORS
from meshrl.client.shard_recovery import ShardRecovery
from meshrl.errors import MalformedMessage, MeshError, SessionLost, from_wire
from meshrl.protocol.journal import Journal
from meshrl.protocol.journals import Journals
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame, Indices, check_lanes
from meshrl.wire.messages import Grant

if TYPE_CHECKING:
    from meshrl.client.context import Context

# Is told that the shard is open again: with an error where its state is gone and it begins with nothing, and with an
# error alone where it could not be opened.
Back = Callable[[SessionLost | None], None]


def _nobody(_: object) -> None:
    return None


def _nothing() -> None:
    return None


class PoolShard(ResumableSession):
    """The session of one shard of a pool."""

    _recovery: ShardRecovery

    def __init__(
        self, context: Context, grant: Grant, recovery: ShardRecovery, *, first_env_id: int, num_envs: int
    ) -> None:
        super().__init__(context, grant, recovery, first_env_id=first_env_id, num_envs=num_envs)
        self._back: Back = _nobody
        self._failed: Callable[[MeshError], None] = _nobody
        self._leaving: Callable[[], None] = _nothing
        self._arrived: Callable[[int | None], None] = _nobody
        self._gone: SessionLost | None = None  # with its state; of an opening that begins with nothing

    @property
    def recovery(self) -> ShardRecovery:
        """As of any session, with the journals of its lanes."""
        return self._recovery

    @property
    def is_lost(self) -> bool:
        """Whether it is not open at this moment."""
        return self._lost is not None

    @property
    def stands_still(self) -> bool:
        """Whether nothing is to be sent now: it is opened again, or its lanes wait while it moves to another worker."""
        return self._lost is not None or (self._moving is not None and self._moving.holds_back)

    @property
    def is_busy(self) -> bool:
        """Whether something of its lanes is under way."""
        return self._is_waiting()

    def told_by(
        self,
        leaving: Callable[[], None],
        back: Back,
        failed: Callable[[MeshError], None],
        arrived: Callable[[int | None], None],
    ) -> None:
        """Say who is told what becomes of it.

        Args:
            leaving: it is to be opened again; before anything else.
            back: it is open again.
            failed: it could not be opened.
            arrived: its lanes need not wait any more: it has moved to another worker, which has answered so many
                requests of each, or (None) stays.
        """
        self._leaving, self._back, self._failed, self._arrived = leaving, back, failed, arrived

    def begins_anew(self, body: bytes) -> bool:  # noqa: ARG002
        """Never: its lanes are reset one by one."""
        return False

    def moved(self, *, away: bool) -> None:
        """As of any session."""
        super().moved(away=away)
        self._arrived(int(len(self._recovery.journal) > 0) if away else None)

    def move_failed(self, exc: MeshError) -> None:
        """As of any session; it is its pool that waits."""
        self._was_told(exc)

    def lose(self, exc: MeshError) -> bool:
        """A request of its lanes came to that; whether it can be brought back, which begins now."""
        if not isinstance(exc, (SessionLost, *GONE_ERRORS)):
            return False
        self.judge(exc)
        if self._lost is None or not self._recovers or self.closed:
            return False
        self.bring_back()
        return True

    def bring_back(self) -> None:
        """Open it again, if that is not under way already."""
        if self._recovering is None:
            self._leaving()
        self._begin_recovery()

    def _was_lost(self, exc: SessionLost) -> None:  # noqa: ARG002  # its lanes go on
        if not self.closed:
            self.bring_back()

    async def _recover(self) -> None:
        if not self._recovery.anew:
            try:
                await super()._recover()
            except SessionLost as exc:
                if not self.given_up:
                    raise
                self._gone = exc
            else:
                self._back(None)
                return
        await super()._recover()
        gone, self._gone = self._gone, None
        self._back(gone)

    def _recovery_over(self, task: asyncio.Task[None]) -> None:
        super()._recovery_over(task)
        if not task.cancelled():
            exc = task.exception()
            if isinstance(exc, MeshError):
                self._failed(exc)
            elif exc is not None:
                raise exc

    async def _replay(self, journal: Journal | Journals) -> None:
        landed: asyncio.Future[None] = self._context.loop.create_future()

        def lost(_: LaneFlight, exc: MeshError) -> None:
            if not landed.done():
                landed.set_exception(exc)

        def received(flight: LaneFlight, data: bytes) -> None:
            try:
                flight.land(_lanes_of(unpack(data), self.num_envs))
            except MeshError as exc:
                lost(flight, exc)
            if flight.landed and not landed.done():
                landed.set_result(None)

        def some_of(_op: str, frame: Frame, _rows: Indices) -> Frame:
            # Who has done some of it again goes by the sequence numbers: it is of all lanes as often as it is sent.
            return {name: frame[name] for name in fields}

        fields = journal.fields()
        lanes = np.arange(self.num_envs)
        flight = LaneFlight(
            self._flights,
            self,
            "replay",
            lanes,
            np.ones_like(lanes),
            fields=fields,
            some_of=some_of,
            received=received,
            lost=lost,
            now=time.monotonic(),
        )
        flight.deadline_s += 2 * journal.seconds  # on a machine that is half as fast
        self._flights.send(flight)
        try:
            await landed
        except GONE_ERRORS as exc:
            raise SessionLost(exc.message, **exc.details) from exc
        finally:
            self._flights.landed(flight)


def _lanes_of(frame: object, count: int) -> Indices:
    """The lanes that an answer to a replay is of.

    Raises:
        MeshError: what went wrong with them.
    """
    if type(frame) is dict and "error" in frame:
        raise from_wire(frame["error"])
    if type(frame) is not dict or "lanes" not in frame:
        raise MalformedMessage("an answer to a replay names no lanes")
    return check_lanes(frame, count)[1]
