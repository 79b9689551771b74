"""Moving: a session goes to another worker before its own leaves (R11).

    opening    it is granted a place elsewhere, and goes on here meanwhile
    settling   what is under way here is waited for; what is asked for from now on waits
    arriving   there it is brought, by its journal, into the state that it has here
    moved      it is closed here, and what waited is sent there
    stays      any of that failed, and nothing has happened: what waited is sent here

A journal that cannot be replayed (it grew too long, say) is in the way only as long as its state is needed: such a
session moves with the next reset of all of it that brings a seed of its own. What cannot move in time is lost with its
worker, and told as any other loss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from meshrl.client.recovery import same
from meshrl.errors import MeshError

if TYPE_CHECKING:
    from meshrl.client.resumable import ResumableSession
    from meshrl.wire.messages import Grant

log = logging.getLogger("meshrl.client")

# Between looks whether what is under way has been answered: soon, then as rarely as nobody notices.
FIRST_LOOK_S = 0.001
LOOK_S = 0.02


class Moving:
    """One session's way from a worker that leaves.

    Args:
        session: which has it.

    Attributes:
        holds_back: whether what is asked for waits until it has moved, or stays.
        arriving: whether its grant is that of a worker at which it may not stay.
    """

    def __init__(self, session: ResumableSession) -> None:
        self.holds_back = False
        self.arriving = False
        self._session = session
        self._deadline = 0.0
        self._unfit: set[str] = set()  # workers at which it came to another state
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        what = "arriving" if self.arriving else "settling" if self.holds_back else "opening"
        return f"<Moving of {self._session!r}: {what if self._task else 'stays'}>"

    def worker_drains(self, seconds: float) -> None:
        """Its worker leaves in so many seconds: it moves as soon as it can."""
        self._deadline = time.monotonic() + seconds
        if self._task is None and not self._session.journal_lacks and not self._unfit:
            self._begin(anew=False)

    def takes(self, op: str, body: bytes) -> bool:
        """Whether a request, about to be sent, waits; a reset may begin a move."""
        if self._task is None and op == "reset" and self._session.begins_anew(body) and self._left_s() > 0:
            self.holds_back = True
            self._begin(anew=True)
        return self.holds_back

    def stop(self) -> asyncio.Task[None] | None:
        """Give it up; gives what has to be waited for then."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def over(self) -> None:
        """Wait until it has moved, or stays, or was stopped.

        Raises:
            MeshError: what had waited could not be sent.
        """
        task = self._task
        if task is not None:
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _begin(self, *, anew: bool) -> None:
        self._task = asyncio.get_running_loop().create_task(self._move(anew=anew))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self.holds_back = False
        if not task.cancelled() and (exc := task.exception()) is not None and not isinstance(exc, MeshError):
            raise exc

    async def _move(self, *, anew: bool) -> None:
        session, here = self._session, self._session.grant.worker
        avoid = {here, *self._unfit}
        moved = False
        while not moved and (grant := await self._granted(avoid)) is not None:
            avoid.add(grant.worker)
            moved = await self._moved_to(grant, anew=anew)
            if not anew and session.journal_lacks:
                break
        self.holds_back = False
        if moved:
            told = {"session": session.grant.session, "worker": session.grant.worker, "left": here}
            log.info(
                "session %(session)s moved to worker %(worker)s, since %(left)s leaves", told, extra={"moved": told}
            )
        session.moved(away=moved)

    async def _granted(self, avoid: set[str]) -> Grant | None:
        """A place elsewhere, if there is one in time."""
        try:
            return await self._session.opened_beside(avoid, self._deadline)
        except MeshError as exc:
            log.info("%r stays at its worker, which leaves: %s", self._session, exc.message)
            return None

    async def _moved_to(self, grant: Grant, *, anew: bool) -> bool:
        """Go to where it was granted a place; else that is given back."""
        session, context = self._session, self._session.context
        here, seq, moved = session.grant, session.seq, False
        try:
            context.hold(grant)
            exactly = not anew and len(session.recovery.journal) > 0
            if not same(here.description, grant.description, exactly=exactly):
                return False
            await self._settled()
            seq = session.seq
            if anew:
                session.forget_state()
            elif session.journal_lacks:
                return False
            self.arriving = True
            session.go_to(grant, 0)
            await session.become(session.recovery.journal)
            moved = True
        except MeshError as exc:
            log.info("%r stays at its worker, which leaves: %s", session, exc.message)
            self._unfit.add(grant.worker)
        finally:
            if self.arriving and not moved:
                session.go_to(here, seq)
                if anew:
                    session.state_unsure()
            self.arriving = False
            context.give_back(here if moved else grant, session.num_envs)
        return moved

    async def _settled(self) -> None:
        self.holds_back = True
        look_s = FIRST_LOOK_S
        while self._session.is_busy:
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, LOOK_S)
