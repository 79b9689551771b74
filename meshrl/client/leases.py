"""Leases: what one client holds, renewed on receipt by itself and from then on by the keeper of its login (R3, R4)."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.client.keeper import Keeper, Key
from meshrl.errors import MeshError
from meshrl.wire.messages import MAX_BATCH, Renew, Renewed, parse
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.client")

# An answer to a first renewal that takes longer says nothing new: the keeper has asked again.
ANSWER_S = 10.0

# Gets the worker, the session, and why.
OnLost = Callable[[str, str, str], None]
# Process (a forked one has no thread of its parent's), address, login, its user and the mesh.
_Login = tuple[int, str, object, str, Subjects]


class _Keepers:
    """The keepers of this process, each for as long as a client needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[_Login, tuple[Keeper, int]] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it
        self._shared = {}

    def join(self, login: _Login) -> Keeper:
        """The keeper of that login, for one client more."""
        with self._lock:
            _, url, credentials, _, subjects = login
            keeper, clients = self._shared.get(login) or (Keeper(url, credentials, subjects, _nobody), 0)  # type: ignore[arg-type]
            self._shared[login] = (keeper, clients + 1)
            return keeper

    def leave(self, login: _Login, keeper: Keeper) -> bool:
        """One client less; whether it was the last, and the keeper is this one's to stop."""
        with self._lock:
            shared, clients = self._shared.get(login, (None, 0))
            if shared is not keeper:
                return False
            if clients > 1:
                self._shared[login] = (keeper, clients - 1)
                return False
            del self._shared[login]
            return True


_KEEPERS = _Keepers()  # by the process and not by the Mesh: a thousand of them are to be one thread


def _nobody(_session: str, _reason: str) -> None:
    return None


class Leases:
    """The leases of one client.

    The first renewal goes over the client's own connection, at once: one for all that were granted in one turn of the
    event loop. Whatever keeps it away (the caller blocks the loop from here on), the keeper makes up for.

    Args:
        connection: the client's.
        url: of the server, for the keeper's own connection.
        credentials: of the login.
        subjects: of the mesh.
        on_lost: is told, on the client's loop, of a session that its worker does not hold any more.
    """

    def __init__(
        self,
        connection: Connection,
        url: str,
        credentials: str | Path | Credentials | None,
        subjects: Subjects,
        on_lost: OnLost,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._subjects = subjects
        self._on_lost = on_lost
        self._login: _Login = (os.getpid(), url, credentials, connection.user, subjects)
        self._keeper: Keeper | None = _KEEPERS.join(self._login)
        self._last: Keeper | None = None  # to be stopped by this client
        self._held: dict[Key, int] = {}  # and in which epoch
        self._granted: dict[str, list[tuple[str, int]]] = {}  # by worker: in this turn of the loop, not renewed yet
        self._renewing = False

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, worker: str, session: str, epoch: int, lease_s: float) -> None:
        """Renew this lease now and from now on."""
        if self._keeper is None:
            return
        self._held[worker, session] = epoch
        self._granted.setdefault(worker, []).append((session, epoch))
        self._keeper.hold(worker, session, epoch, lease_s, partial(self._lost_on_thread, worker, epoch))
        if not self._renewing:
            self._renewing = True
            self._loop.call_soon(self._turn_over)
            self._renew()  # now: this may be the last that the loop does for a long time

    def release(self, worker: str, session: str) -> None:
        """Renew it no more."""
        self._held.pop((worker, session), None)
        if self._keeper is not None:
            self._keeper.release((worker, session))

    def end(self) -> None:
        """Renew nothing any more."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.release(*self._held)
        self._held.clear()
        self._granted.clear()
        if _KEEPERS.leave(self._login, keeper):
            keeper.end()
            self._last = keeper

    async def stop(self) -> None:
        """Wait for the end of the keeper's thread, where no other client needs it."""
        self.end()
        if self._last is not None:
            await self._last.stop()

    def _turn_over(self) -> None:
        self._renewing = False
        self._renew()

    def _renew(self) -> None:
        granted, self._granted = self._granted, {}
        if self._keeper is None or not self._connection.connected:
            return  # it is the keeper's now, as soon as there is a server again
        for worker, sessions in granted.items():
            for at in range(0, len(sessions), MAX_BATCH):
                self._send(worker, sessions[at : at + MAX_BATCH])

    def _send(self, worker: str, sessions: list[tuple[str, int]]) -> None:
        def answered(data: bytes | None) -> None:
            timer.cancel()
            self._connection.forget(rid)
            if data is None:
                return  # nobody listens: a request, or the next renewal, will tell more
            try:
                lost = parse(Renewed, data).lost
            except MeshError as exc:
                log.warning("worker %s answered a renewal with %s", worker, exc)
                return
            if self._keeper is not None:
                self._keeper.renewed([(worker, session) for session, _ in sessions])
            epochs = dict(sessions)
            for session, reason in lost:
                if session in epochs:
                    self._was_lost(worker, epochs[session], session, reason)

        subject = self._subjects.worker(worker, "renew", self._connection.user)
        rid = self._connection.request(subject, Renew(sessions=sessions).to_wire(), answered)
        timer = self._loop.call_later(ANSWER_S, self._connection.forget, rid)

    def _lost_on_thread(self, worker: str, epoch: int, session: str, reason: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._was_lost, worker, epoch, session, reason)
        except RuntimeError:
            return  # the loop has ended, and the session with it

    def _was_lost(self, worker: str, epoch: int, session: str, reason: str) -> None:
        if self._held.get((worker, session)) == epoch:  # else it was opened again since
            self._on_lost(worker, session, reason)
