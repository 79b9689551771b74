"""A session that is opened again elsewhere when it is lost, and brought into the state that it had (R8).

lost            -> recovering    when it is next asked for something, or was under way
recovering      -> open          with an equal digest: the request under way is sent again
                -> given up      nobody could take it, or it came to another state: its user is told so once
given up        -> recovering    at the next reset, which begins with nothing
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from meshrl.client.movable import MovableSession
from meshrl.client.recovery import GONE, NO_WORKER, Recovery, same
from meshrl.errors import (
    BusClosed,
    MeshError,
    MeshFull,
    MeshUnreachable,
    SessionClosed,
    SessionLost,
    UnknownName,
)
from meshrl.protocol.turn import Phase
from meshrl.wire.frames import Frame
from meshrl.wire.kept import Kept, kept
from meshrl.wire.messages import Grant

if TYPE_CHECKING:
    from meshrl.client.context import Context

log = logging.getLogger("meshrl.client")

# What goes wrong at this client says nothing about the session.
_OURS = (MeshUnreachable, BusClosed, SessionClosed)


class ResumableSession(MovableSession):
    """A session of one lane that outlives its worker; as of any that can be moved."""

    def __init__(
        self, context: Context, grant: Grant, recovery: Recovery, *, first_env_id: int = 0, num_envs: int = 1
    ) -> None:
        super().__init__(context, grant, recovery, first_env_id=first_env_id, num_envs=num_envs)
        self._recovering: asyncio.Task[None] | None = None
        self._resumed: dict[str, Any] | None = None  # what is told of it once what was under way has been sent again

    @property
    def given_up(self) -> bool:  # type: ignore[override]  # there it is nothing
        """Whether its state is gone, so that the next reset begins with nothing."""
        return self._recovery.anew

    @property
    def told(self) -> Kept:  # type: ignore[override]  # there it is nothing
        """The last answer to a reset or a step."""
        return self._recovery.told

    @property
    def is_open(self) -> bool:
        """Whether it can still be used, if need be after it was opened again."""
        return not self.closed and (self._lost is None or self._recovers)

    @property
    def _recovers(self) -> bool:
        # What an env raised it would raise again.
        return self._lost is not None and self._lost.details.get("reason") != "ended"

    @property
    def abandoned(self) -> bool:
        """Whether nobody closed it although its slot is still held, or will be."""
        return super().abandoned or (self._recovering is not None and not self.closed and not self._connection.closed)

    def launch(self, op: str, body: bytes) -> None:
        """As of any session; of one that is lost, it is sent by what opens it again, also when nobody waits for it."""
        if self._lost is None and (self._moving is None or not self._moving.takes(op, body)):
            super().launch(op, body)
            assert self._flight is not None, "it was sent"
            self._flight.on_fail, self._flight.owner = self._flight_failed, self
        else:
            self._turn.begin(op)
            self._turn.seq -= 1  # it gets its number when it is sent
            self._body, self._waits = body, True

    def _flight_failed(self, exc: MeshError) -> None:
        """Where others are waited for first, it is brought back meanwhile."""
        if isinstance(exc, SessionLost) and not self.closed:
            self._lose(exc)
            if self._recovers and not self._recovery.lacking(exc):
                self._begin_recovery()

    async def landing(self) -> Frame:
        """As of any session; where it is lost meanwhile, the answer is that of its next incarnation."""
        while True:
            if self._lost is None and not self._waits:
                flight, op = self._flight, self._turn.op
                try:
                    frame = await self._landing()
                except SessionLost:
                    if not self._recovers or self.closed:
                        self._turn.answered()
                        raise
                except MeshError as exc:
                    if self._turn.phase is Phase.FREE:  # it was answered
                        self._recovery.refused(op, exc)
                    raise
                else:
                    assert flight is not None, "launch comes first"
                    seconds = time.monotonic() - flight.sent_at
                    answer, flight.reads = kept(flight.future.result(), flight.reads), None
                    self._recovery.note(op, self._body, answer, frame, seconds)
                    return frame
            try:
                if self._lost is None:
                    await self._moved()
                else:
                    await self._recovered(self._turn.op)
            except (asyncio.CancelledError, MeshUnreachable):
                self._turn.cancelled()
                raise
            except BaseException:
                self._turn.answered()
                self._waits = False
                raise

    async def _landing_again(self) -> Frame:
        here = self._lost is None and not self._waits
        return await (super()._landing_again() if here else self.landing())

    def take_untold(self) -> SessionLost | None:
        """A loss that ended an episode and was told nobody; once."""
        untold, self._recovery.untold = self._recovery.untold, None
        return untold

    async def close(self) -> None:
        """As of any session."""
        if not self.closed:
            self._closing = True
            under_way = self._stopped()
            if under_way:
                try:
                    await asyncio.wait(under_way)
                finally:
                    await super().close()
                return
        await super().close()

    def _let_go(self) -> None:
        moving = None if self._moving is None else self._moving.stop()
        if moving is not None:  # until it has ended, what is to be closed may be at two workers
            moving.add_done_callback(lambda _: self._let_go())
            return
        self._stopped()
        super()._let_go()

    def _stopped(self) -> set[asyncio.Task[None]]:
        """Go nowhere any more; gives what has to be waited for."""
        if self._recovering is not None:
            self._recovering.cancel()  # its opening says close to whom it has asked
        moving = None if self._moving is None else self._moving.stop()
        return {task for task in (self._recovering, moving) if task is not None}

    # ---------------------------------------------------------------- opened again

    async def _recovered(self, op: str) -> None:
        """Wait until it is open again, in the state that it had; a request under way has been sent again by then.

        Cancelling stops the waiting only.

        Raises:
            SessionLost: its state is gone.
            SessionClosed: it was closed meanwhile.
            MeshUnreachable: the server is away.
        """
        if self._recovery.anew and op != "reset":
            raise self._ended()
        recovering = self._begin_recovery()
        try:
            await asyncio.shield(recovering)
        except asyncio.CancelledError:
            if self._closing and recovering.cancelled():  # the session was closed, and not the waiting cancelled
                raise SessionClosed(f"{self.grant.description.name}: it was closed while it was resumed") from None
            raise
        except SessionLost:
            self._recovery.untold = None
            raise

    def _begin_recovery(self) -> asyncio.Task[None]:
        if self._recovering is None:
            self._recovering = asyncio.get_running_loop().create_task(self._recover())
            self._recovering.add_done_callback(self._recovery_over)
            self._context.recovering.add(self)
        return self._recovering

    def _recovery_over(self, task: asyncio.Task[None]) -> None:
        self._recovering = None
        self._context.recovering.discard(self)
        if not task.cancelled():
            task.exception()  # who waits is told; when nobody does any more, there is nothing to log
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resumed["under_way"] = self._is_waiting()
            text = "session %(session)s was resumed at worker %(worker)s in %(seconds).2f s"
            log.info(text, resumed, extra={"resumed": resumed})

    async def _recover(self) -> None:
        if self._moving is not None and (moving := self._moving.stop()) is not None:
            await asyncio.wait({moving})
        self._moving = None
        lost, recovery = self._lost, self._recovery
        assert lost is not None
        lacking = recovery.lacking(lost)
        if lacking:
            raise self._give_up(lost, lacking)
        began, anew = time.monotonic(), recovery.anew
        deadline = began + recovery.wait_s
        if lost.details.get("reason") in GONE:
            self._context.registry.gone(self.grant.worker)  # until it says that it is there after all
        avoid: set[str] = set()  # those that had the chance
        while not await self._opened_again(lost, avoid, deadline):
            if time.monotonic() >= deadline:
                raise self._give_up(lost, NO_WORKER, f"nobody could take it within {recovery.wait_s:g} s")
        self._lost = None
        if not anew:
            self._resumed = {
                "session": self.grant.session,
                "lost_worker": lost.details.get("worker"),
                "reason": lost.details.get("reason"),
                "worker": self.grant.worker,
                "replayed": len(recovery.journal),
                "seconds": time.monotonic() - began,
            }
        if self._turn.phase is not Phase.FREE:
            self._send_again()

    async def _opened_again(self, lost: SessionLost, avoid: set[str], deadline: float) -> bool:
        """Try one worker; one that cannot have it, or is lost as well, is in ``avoid`` from then on."""
        recovery, before = self._recovery, self.grant
        self._epoch += 1
        try:
            grant = await recovery.opening(before.session, self._epoch, avoid, deadline).run()
        except _OURS:
            raise
        except MeshError as exc:
            nobody = isinstance(exc, (MeshFull, UnknownName))
            raise self._give_up(lost, NO_WORKER if nobody else exc.code, exc.message) from exc
        self.go_to(grant, 0)
        self._held = True
        try:
            self._context.adopt(self, self.num_envs)
        except MeshError:  # the mesh was closed meanwhile
            await self._back_out()
            raise
        if not same(before.description, grant.description, exactly=len(recovery.journal) > 0 and not recovery.anew):
            avoid.add(grant.worker)
            await self._back_out()
            self.grant = before
            return False
        if len(recovery.journal):
            try:
                await self._replay(recovery.journal)
            except SessionLost as exc:
                avoid.add(grant.worker)
                told = {"session": grant.session, "worker": grant.worker, "reason": exc.details.get("reason")}
                text = "session %(session)s: its replay at worker %(worker)s was lost (%(reason)s)"
                log.info(text, told, extra={"replay_lost": told})
                if exc.details.get("reason") in GONE:
                    self._release()
                else:
                    await self._back_out()  # it may be at it still
                return False
            except _OURS:
                self._release()  # its lease ends it
                raise
            except MeshError as exc:
                await self._back_out()
                raise self._give_up(lost, exc.code, exc.message) from exc
        recovery.anew = False
        return True

    async def _back_out(self) -> None:
        """What was granted is of no use."""
        self._release()
        await self._say_close(moved=True)

    def _give_up(self, lost: SessionLost, why: str, detail: str = "") -> MeshError:
        self._lost = self._recovery.give_up(lost, why, detail)
        return self._ended()
