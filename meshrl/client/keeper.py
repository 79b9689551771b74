"""The keeper: renews leases from a thread and a connection of its own (R3).

A trainer that blocks its event loop for a minute, in a PPO update say, keeps its envs. All clients of one process and
login share a keeper (:mod:`meshrl.client.leases`), so that a thousand of them are one thread and one more connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.errors import MeshError
from meshrl.wire.messages import MAX_BATCH, Renew, Renewed, parse
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.client")

# Three renewals a lease: two may be lost.
RENEWALS_A_LEASE = 3
# As long as workers grant; without any lease, how often it looks for one.
LEASE_S = 15.0
STOP_S = 2.0
# While there are leases, it looks this often whether one is new and its client has not renewed it itself since the look
# before: within the two seconds for which a grant waits to be renewed.
LOOK_S = 0.5
# Between attempts to renew again after an error; leases are three times as long at the least.
PAUSE_S = 1.0

OnLost = Callable[[str, str], None]
# (worker, session)
Key = tuple[str, str]


class _Lease(NamedTuple):
    epoch: int
    lease_s: float
    on_lost: OnLost


class Keeper:
    """Renews what it holds; its thread starts with the first lease and ends with :meth:`stop`.

    Args:
        url: of the server.
        credentials: of the login; the renewals carry its user.
        subjects: of the mesh.
        on_lost: is told, on the keeper's thread, of a session (and why) that its worker does not hold any more, where
            :meth:`hold` named nobody.
    """

    def __init__(
        self, url: str, credentials: str | Path | Credentials | None, subjects: Subjects, on_lost: OnLost
    ) -> None:
        self._url = url
        self._credentials = credentials
        self._subjects = subjects
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._leases: dict[Key, _Lease] = {}
        # Not renewed yet by anyone, as far as is known: since its last look, and since the one before.
        self._new: set[Key] = set()
        self._waiting: set[Key] = set()
        self._shortest_s = math.inf  # of the leases, or shorter than that
        self._all_now = False
        self._sleeps_until = math.inf  # in monotonic seconds
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stopping = threading.Event()
        self._ended = False
        self._on_end: Callable[[], object] | None = None

    def hold(self, worker: str, session: str, epoch: int, lease_s: float, on_lost: OnLost | None = None) -> None:
        """Renew this lease soon and from now on; from any thread. Who holds it renews it at once, or lets it be done.

        Args:
            worker: which granted it.
            session: whose lease it is.
            epoch: of the session.
            lease_s: the lease's length in seconds.
            on_lost: is told, on the keeper's thread, that the session is gone.
        """
        key = (worker, session)
        with self._lock:
            self._leases[key] = _Lease(epoch, lease_s, on_lost or self._on_lost)
            self._new.add(key)
            self._shortest_s = min(self._shortest_s, lease_s)
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="meshrl-keeper", daemon=True)
                self._thread.start()
            needed_at = time.monotonic() + min(LOOK_S, lease_s / RENEWALS_A_LEASE)
            # Waking a thread costs more than all the rest of a hold, and it looks by itself soon enough.
            rouse = self._sleeps_until > needed_at
            if rouse:
                self._sleeps_until = needed_at
        if rouse:
            self._rouse()

    def renewed(self, keys: Collection[Key]) -> None:
        """Who holds these has renewed them for the first time; from any thread."""
        with self._lock:
            self._new.difference_update(keys)
            self._waiting.difference_update(keys)

    def release(self, *keys: Key) -> None:
        """Renew these, each a worker and a session, no more; from any thread."""
        with self._lock:
            for key in keys:
                self._leases.pop(key, None)
                self._new.discard(key)
                self._waiting.discard(key)

    def end(self) -> None:
        """Renew nothing any more; the thread ends soon."""
        self._stopping.set()
        self._rouse()

    async def stop(self) -> None:
        """End the thread; returns when it has ended, or after 2 s. Starts no thread, so it works at the exit too."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            running = self._thread is not None and not self._ended
            self._on_end = lambda: loop.call_soon_threadsafe(ended.set)
        self.end()
        if running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await ended.wait()

    def _rouse(self) -> None:
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            try:
                loop.call_soon_threadsafe(wake.set)
            except RuntimeError:
                return  # its loop has ended

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._try()
        finally:
            with self._lock:
                self._ended = True
                told = self._on_end
            with contextlib.suppress(RuntimeError):  # its loop has ended
                if told is not None:
                    told()

    def _try(self) -> None:
        """Renew until told to stop, or until something is wrong; whatever that is, leases are at stake."""
        try:
            asyncio.run(self._main())
        except MeshError as exc:
            # The client's own connection tells the user.
            log.warning("leases cannot be renewed: %s; trying again", exc)
        except Exception:
            # asyncio.run ends with a thread of its own (for the resolver's), which the interpreter's exit forbids.
            if self._stopping.is_set():
                return
            log.exception("leases cannot be renewed; trying again")
        self._stopping.wait(PAUSE_S)

    async def _main(self) -> None:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            async with connect(self._url, name="meshrl keeper", credentials=self._credentials) as connection:
                ended: list[MeshError] = []
                connection.on_close.append(ended.append)
                connection.on_close.append(lambda _why: self._rouse())
                connection.on_reconnect.append(self._renew_all_soon)
                due = time.monotonic()
                while not self._stopping.is_set():
                    if ended:
                        raise ended[0]
                    now = time.monotonic()
                    everything = now >= due or self._all_now
                    self._renew(connection, everything=everything)
                    due = await self._sleep(math.inf if everything else due)
        finally:
            self._loop = None

    async def _sleep(self, due: float) -> float:
        """Wait until there may be something to do; gives when all leases are due, which is ``due`` or before."""
        assert self._wake is not None
        with self._lock:  # a lease that is held after this sees until when, and comes in time to be counted otherwise
            now = time.monotonic()
            due = min(due, now + min(self._shortest_s, LEASE_S) / RENEWALS_A_LEASE)
            until = self._sleeps_until = min(due, now + LOOK_S) if self._leases else due
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - now)):
                await self._wake.wait()
        self._wake.clear()
        return due

    def _renew_all_soon(self) -> None:
        self._all_now = True
        self._rouse()

    def _renew(self, connection: Connection, *, everything: bool) -> None:
        """Renew all leases, or those that nobody has renewed yet though their client had the time."""
        with self._lock:
            if everything:
                self._all_now = False
                self._shortest_s = min((lease.lease_s for lease in self._leases.values()), default=math.inf)
            keys = list(self._leases if everything else self._waiting)
            self._waiting = set() if everything else self._new
            self._new = set()
            by_worker: dict[str, list[tuple[str, int]]] = defaultdict(list)
            for worker, session in keys:
                by_worker[worker].append((session, self._leases[worker, session].epoch))
        for worker, sessions in by_worker.items():
            for at in range(0, len(sessions), MAX_BATCH):
                self._send(connection, worker, sessions[at : at + MAX_BATCH])

    def _send(self, connection: Connection, worker: str, sessions: list[tuple[str, int]]) -> None:
        def answered(data: bytes | None) -> None:
            timer.cancel()
            connection.forget(rid)
            if data is None:
                return  # nobody listens: a request, or the next renewal, will tell more
            try:
                lost = parse(Renewed, data).lost
            except MeshError as exc:
                log.warning("worker %s answered a renewal with %s", worker, exc)
                return
            epochs = dict(sessions)
            for session, reason in lost:
                with self._lock:
                    held = self._leases.get((worker, session))
                    if held is None or held.epoch != epochs.get(session):
                        continue  # it was opened again since
                    del self._leases[worker, session]
                    self._new.discard((worker, session))
                    self._waiting.discard((worker, session))
                held.on_lost(session, reason)

        subject = self._subjects.worker(worker, "renew", connection.user)
        rid = connection.request(subject, Renew(sessions=sessions).to_wire(), answered)
        timer = asyncio.get_running_loop().call_later(10.0, connection.forget, rid)
