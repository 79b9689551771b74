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
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from meshrl.client.flights import Entry
from meshrl.client.moving import Moving
from meshrl.client.recovery import GONE, NO_WORKER, Recovery, same
from meshrl.client.session import GONE_ERRORS, RemoteSession
from meshrl.errors import (
    BusClosed,
    MeshError,
    MeshFull,
    MeshUnreachable,
    SessionClosed,
    SessionLost,
    UnknownName,
)
from meshrl.protocol.doubt import GRACE_S, RESUMED_GRACE_S
from meshrl.protocol.journal import Journal
from meshrl.protocol.journals import Journals
from meshrl.protocol.turn import Phase
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, check_reply
from meshrl.wire.messages import Grant

if TYPE_CHECKING:
    from meshrl.client.context import Context

log = logging.getLogger("meshrl.client")

# What goes wrong at this client says nothing about the session.
_OURS = (MeshUnreachable, BusClosed, SessionClosed)


class ResumableSession(RemoteSession):
    """A session of one lane that outlives its worker.

    Args:
        context: of the mesh.
        grant: the first.
        recovery: how it is opened again.
    """

    def __init__(
        self, context: Context, grant: Grant, recovery: Recovery, *, first_env_id: int = 0, num_envs: int = 1
    ) -> None:
        super().__init__(context, grant, first_env_id=first_env_id, num_envs=num_envs)
        self._recovery = recovery
        self._epoch = grant.epoch
        self._recovering: asyncio.Task[None] | None = None
        self._moving: Moving | None = None  # since its worker said that it leaves
        self._waits = False  # the request that was launched: nothing of it has been sent
        self._closing = False
        self._resumed: dict[str, Any] | None = None  # what is told of it once what was under way has been sent again

    @property
    def recovery(self) -> Recovery:
        """How it is opened again."""
        return self._recovery

    async def become(self, journal: Journal) -> None:
        """Bring a fresh one into the state that this led to.

        Raises:
            SessionLost: it is lost.
            ReplayDiverged: it came to another state.
            MeshError: as of any request.
        """
        if len(journal):
            await self._replay(journal)

    @property
    def given_up(self) -> bool:  # type: ignore[override]  # there it is nothing
        """Whether its state is gone, so that the next reset begins with nothing."""
        return self._recovery.anew

    @property
    def told(self) -> bytes:  # type: ignore[override]  # there it is nothing
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
                    self._recovery.note(op, self._body, flight.future.result(), frame, seconds)
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

    # ---------------------------------------------------------------- moved before its worker leaves

    def worker_drains(self, seconds: float) -> None:
        """Its worker leaves in so many seconds: it moves to another, if it can."""
        if self._lost is None and not self.closed and not self._closing:
            if self._moving is None:
                self._moving = Moving(self)
            self._moving.worker_drains(seconds)

    def lost(self, reason: str) -> None:
        """As of any session; one that arrives elsewhere finds out by itself, and is not lost by it."""
        if self._moving is None or not self._moving.arriving:
            super().lost(reason)

    def _lose(self, exc: SessionLost) -> None:
        super()._lose(exc)
        if self._moving is not None:
            self._moving.stop()

    @property
    def context(self) -> Context:
        """Of its mesh."""
        return self._context

    @property
    def seq(self) -> int:
        """Of the last request that was sent."""
        return self._turn.seq

    @property
    def journal_lacks(self) -> str:
        """Why its state cannot be brought to another worker; empty if it can."""
        return self._recovery.journal.lacking if self._recovery.resumes else "not_asked_for"

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return self._turn.phase is not Phase.FREE and not self._waits

    @property
    def grace_s(self) -> float:  # type: ignore[override]  # there it is the same for all
        """As of any session; shorter where a mistake costs no more than a replay."""
        return GRACE_S if self.journal_lacks else RESUMED_GRACE_S

    def others(self, avoid: Collection[str]) -> bool:
        """Whether some other worker than these serves what it holds, and does not leave as well."""
        registry, recovery = self._context.registry, self._recovery
        served = registry.directory.candidates(recovery.kind, self.grant.description.name, recovery.where or {})
        return any(entry.worker != self.grant.worker and entry.worker not in avoid for entry in served)

    def begins_anew(self, body: bytes) -> bool:
        """Whether after this reset nothing of what was before matters; it could be another env's."""
        return self._recovery.begins_anew(body)

    async def opened_beside(self, avoid: set[str], deadline: float) -> Grant:
        """What another worker grants, beside what this has; it has to be held, or given back.

        Raises:
            MeshError: nobody could have it in time.
        """
        self._epoch += 1
        return await self._recovery.opening(self.grant.session, self._epoch, avoid, deadline).run()

    def go_to(self, grant: Grant, seq: int) -> None:
        """What is asked for from now on is asked of that worker, which has answered so many requests."""
        self.grant = grant
        self._subject = self._context.subjects.session(grant.worker, self._connection.user, grant.session, "")
        self._turn.seq = seq

    def forget_state(self) -> None:
        """A reset that :meth:`begins_anew` is about to be sent: all that counts is the attributes that were set."""
        self._recovery.journal.forget()

    def state_unsure(self) -> None:
        """It was forgotten, and there still: until the next such reset, nobody can bring it back."""
        if self._recovery.resumes:
            self._recovery.journal.unsure("reset")

    def moved(self, *, away: bool) -> None:
        """It went to another worker, or stays: what waited is sent."""
        if away:
            self._moving = None
        if self._waits:
            self._send_again()

    def move_failed(self, exc: MeshError) -> None:
        """What waited could not be sent, neither here nor there; who waits for it is told."""

    async def _moved(self) -> None:
        """Wait until what was launched has been sent, or its session was lost meanwhile.

        Raises:
            SessionClosed: it was closed meanwhile.
            MeshError: it cannot be sent.
        """
        moving = self._moving
        if moving is not None:
            await moving.over()
        if self.closed or self._closing:
            raise SessionClosed(f"{self.grant.description.name}: it was closed while it moved to another worker")
        if self._waits and self._lost is None and (self._moving is None or not self._moving.under_way):
            self._send_again()  # the move has ended before that

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

    async def _replay(self, journal: Journal | Journals) -> None:
        grant = self.grant
        packed = pack({"epoch": grant.epoch, "lane": 0, "seq": 1, **journal.fields()})
        entry = Entry(grant.session, grant.epoch, 0, 1)
        deadline_s = grant.step_deadline_s + 2 * journal.seconds  # on a machine that is half as fast
        flight = self._flights.launch(grant.worker, entry, self._subject + "replay", packed, deadline_s)
        flight.owner = self
        try:
            check_reply(unpack(await flight.future), 1)
        except GONE_ERRORS as exc:
            raise SessionLost(exc.message, **exc.details) from exc
        finally:
            self._flights.landed(flight)
        self._turn.seq = 1

    def _send_again(self) -> None:
        """The request under way, to where the session is now: no answer to it was ever heard."""
        grant, turn = self.grant, self._turn
        turn.seq += 1
        self._body = pack({**unpack(self._body), "epoch": grant.epoch, "seq": turn.seq})
        entry = Entry(grant.session, grant.epoch, 0, turn.seq)
        subject = self._subject + turn.op
        self._flight = self._flights.launch(grant.worker, entry, subject, self._body, grant.step_deadline_s)
        self._flight.on_fail, self._flight.owner = self._flight_failed, self
        self._waits = False

    async def _back_out(self) -> None:
        """What was granted is of no use."""
        self._release()
        await self._say_close()

    def _give_up(self, lost: SessionLost, why: str, detail: str = "") -> MeshError:
        self._lost = self._recovery.give_up(lost, why, detail)
        return self._ended()
