"""The keeper: renews the leases of one client from a thread and a connection of its own (R3).

A trainer that blocks its event loop for a minute, in a PPO update say, keeps its envs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from meshrl.bus.connection import Connection, connect
from meshrl.bus.login import Credentials
from meshrl.errors import MeshError
from meshrl.wire.messages import MAX_BATCH, Renew, Renewed, parse
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.client")

# Three renewals a lease: two may be lost.
RENEWALS_A_LEASE = 3
STOP_S = 2.0
# Between attempts to renew again after an error; leases are three times as long at the least.
PAUSE_S = 1.0

OnLost = Callable[[str, str], None]


class Keeper:
    """Renews what it holds; its thread starts with the first lease and ends with :meth:`stop`.

    Args:
        url: of the server.
        credentials: of the login; the renewals carry its user.
        subjects: of the mesh.
        on_lost: is told, on the keeper's thread, of a session (and why) that its worker does not hold any more.
    """

    def __init__(
        self, url: str, credentials: str | Path | Credentials | None, subjects: Subjects, on_lost: OnLost
    ) -> None:
        self._url = url
        self._credentials = credentials
        self._subjects = subjects
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._leases: dict[tuple[str, str], tuple[int, float]] = {}  # (worker, session) -> epoch, lease in seconds
        self._new: list[tuple[str, str]] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stopping = threading.Event()
        self._ended = False
        self._on_end: Callable[[], object] | None = None

    def hold(self, worker: str, session: str, epoch: int, lease_s: float) -> None:
        """Renew this lease now and from now on; from any thread."""
        with self._lock:
            self._leases[worker, session] = (epoch, lease_s)
            self._new.append((worker, session))
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="meshrl-keeper", daemon=True)
                self._thread.start()
        self._rouse()

    def release(self, worker: str, session: str) -> None:
        """Renew it no more; from any thread."""
        with self._lock:
            self._leases.pop((worker, session), None)

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
                    if now >= due:
                        self._renew(connection, everything=True)
                        due = now + self._period()
                    else:
                        self._renew(connection, everything=False)
                    try:
                        async with asyncio.timeout(max(0.0, due - time.monotonic())):
                            await self._wake.wait()
                    except TimeoutError:
                        pass
                    self._wake.clear()
                    due = min(due, time.monotonic() + self._period())
        finally:
            self._loop = None

    def _period(self) -> float:
        with self._lock:
            return min((lease_s for _, lease_s in self._leases.values()), default=15.0) / RENEWALS_A_LEASE

    def _renew_all_soon(self) -> None:
        with self._lock:
            self._new = list(self._leases)
        self._rouse()

    def _renew(self, connection: Connection, *, everything: bool) -> None:
        with self._lock:
            keys = list(self._leases) if everything else [key for key in self._new if key in self._leases]
            self._new = []
            by_worker: dict[str, list[tuple[str, int]]] = defaultdict(list)
            for worker, session in keys:
                by_worker[worker].append((session, self._leases[worker, session][0]))
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
            for session, reason in lost:
                with self._lock:
                    held = self._leases.pop((worker, session), None)
                if held is not None:
                    self._on_lost(session, reason)

        subject = self._subjects.worker(worker, "renew", connection.user)
        rid = connection.request(subject, Renew(sessions=sessions).to_wire(), answered)
        timer = asyncio.get_running_loop().call_later(10.0, connection.forget, rid)
