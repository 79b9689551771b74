"""Moving: a session goes to another worker before its own leaves (R11).

    opening    it is granted a place elsewhere, and goes on here meanwhile
    settling   what is under way here is waited for; what is asked for from now on waits
    arriving   there it is brought, by its journal, into the state that it has here
    moved      it is closed here, and what waited is sent there
    stays      any of that failed, and nothing has happened: what waited is sent here

One that stays tries again when its worker next says that it leaves, but not after a replay that came to another state.

A journal that cannot be replayed (it grew too long, or nobody else has an equal env) is in the way only as long as its
state is needed: such a session moves with the next reset of all of it that brings a seed of its own. What cannot move
in time is lost with its worker, and told as any other loss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from meshrl.client.recovery import same
from meshrl.errors import MeshError, ReplayDiverged

if TYPE_CHECKING:
    from meshrl.client.movable import MovableSession
    from meshrl.wire.messages import Grant

log = logging.getLogger("meshrl.client")

# Between looks whether what is under way has been answered: soon, then ever more rarely.
FIRST_LOOK_S = 0.001
LOOK_S = 0.25
# Who has room says so at once; who waits in a queue meanwhile would not be served here.
OPEN_S = 0.25


class Moving:
    """One session's way from a worker that leaves.

    Args:
        session: which has it.

    Attributes:
        holds_back: whether what is asked for waits until it has moved, or stays.
        arriving: whether its grant is that of a worker at which it may not stay.
    """

    def __init__(self, session: MovableSession) -> None:
        self.holds_back = False
        self.arriving = False
        self._session = session
        self._deadline = 0.0
        self._unfit: set[str] = set()  # workers that could not make it
        self._unequal: set[str] = set()  # whose env is another one
        self._diverged = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        what = "arriving" if self.arriving else "settling" if self.holds_back else "opening"
        return f"<Moving of {self._session!r}: {what if self._task else 'stays'}>"

    def worker_drains(self, seconds: float) -> None:
        """Its worker leaves in so many seconds: it moves as soon as it can."""
        self._deadline = time.monotonic() + seconds
        if self._task is None and not self._by_reset and self._session.others(self._unfit | self._unequal):
            self._begin(anew=False)

    def takes(self, op: str, body: bytes) -> bool:
        """Whether a request, about to be sent, waits; a reset may begin a move."""
        if self.holds_back:
            return True
        if op != "reset" or self._task is not None or not self._session.begins_anew(body):
            return False
        if not (self._by_reset or self._unequal) or self._left_s() <= 0 or not self._session.others(self._unfit):
            return False
        self.holds_back = True
        self._begin(anew=True)
        return True

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

    @property
    def under_way(self) -> bool:
        """Whether it moves."""
        return self._task is not None

    @property
    def _by_reset(self) -> bool:
        """Whether its journal is of no use."""
        return self._diverged or bool(self._session.journal_lacks)

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _begin(self, *, anew: bool) -> None:
        self._task = asyncio.get_running_loop().create_task(self._move(anew=anew))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self.holds_back = False
        exc = None if task.cancelled() else task.exception()
        if isinstance(exc, MeshError):
            self._session.move_failed(exc)
        elif exc is not None:
            raise exc

    async def _move(self, *, anew: bool) -> None:
        session, here = self._session, self._session.grant
        moved = False
        while (grant := await self._granted(anew=anew)) is not None:
            if same(here.description, grant.description, exactly=not anew and len(session.recovery.journal) > 0):
                moved = await self._moved_to(grant, anew=anew)
                break
            (self._unfit if anew else self._unequal).add(grant.worker)
            session.context.give_back(grant, session.num_envs)
        self.holds_back = False
        if moved:
            told = {"session": session.grant.session, "worker": session.grant.worker, "left": here.worker}
            text = "session %(session)s moved to worker %(worker)s, since %(left)s leaves"
            log.info(text, told, extra={"moved": told})
        session.moved(away=moved)

    async def _granted(self, *, anew: bool) -> Grant | None:
        """A place elsewhere, if somebody has room."""
        session = self._session
        avoid = {session.grant.worker, *self._unfit, *(() if anew else self._unequal)}
        if not session.others(avoid):
            return None
        try:
            return await session.opened_beside(avoid, min(self._deadline, time.monotonic() + OPEN_S))
        except MeshError as exc:
            log.info("%r stays at its worker, which leaves: %s", session, exc.message)
            if isinstance(worker := exc.details.get("worker"), str):
                self._unfit.add(worker)
            return None

    async def _moved_to(self, grant: Grant, *, anew: bool) -> bool:
        """Go to where it was granted a place; else that is given back."""
        session, context = self._session, self._session.context
        here, seq, moved = session.grant, session.seq, False
        try:
            context.hold(grant)
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
            self._diverged = self._diverged or isinstance(exc, ReplayDiverged)
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
