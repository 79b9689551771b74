"""A session that can be brought to another worker, by its journal: there it does again what it was asked (R8, R11)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from meshrl.client.flights import Entry
from meshrl.client.moving import Moving
from meshrl.client.recovery import Recovery
from meshrl.client.session import GONE_ERRORS, RemoteSession
from meshrl.errors import MeshError, SessionClosed, SessionLost
from meshrl.protocol.doubt import GRACE_S, RESUMED_GRACE_S
from meshrl.protocol.journal import Journal
from meshrl.protocol.journals import Journals
from meshrl.protocol.turn import Phase
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import check_reply
from meshrl.wire.messages import Grant

if TYPE_CHECKING:
    from meshrl.client.context import Context


class MovableSession(RemoteSession):
    """A session of one lane that goes to another worker before its own leaves.

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
        self._moving: Moving | None = None  # since its worker said that it leaves
        self._waits = False  # the request that was launched: nothing of it has been sent
        self._closing = False

    @property
    def recovery(self) -> Recovery:
        """How it is opened again."""
        return self._recovery

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

    # ---------------------------------------------------------------- done again

    async def become(self, journal: Journal) -> None:
        """Bring a fresh one into the state that this led to.

        Raises:
            SessionLost: it is lost.
            ReplayDiverged: it came to another state.
            MeshError: as of any request.
        """
        if len(journal):
            await self._replay(journal)

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

    def _flight_failed(self, exc: MeshError) -> None:
        """What was sent again is lost as well; who waits for it is told."""

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
