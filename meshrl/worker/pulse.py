"""The pulse: a worker's second thread, with a connection of its own, that is never blocked (R10).

Whatever the first thread is doing (a step of a minute, a constructor that downloads), this one advertises, renews
leases, answers probes and asks, finds the leases that ran out, and says what is for the audit.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from meshrl.bus.answering import answer
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.bus.micro import MicroService, advertise_service
from meshrl.errors import BusClosed, MeshError, MeshUnreachable, WorkerError
from meshrl.protocol.session import Session, SessionTable
from meshrl.wire.codec import pack
from meshrl.wire.frames import error_reply
from meshrl.wire.messages import (
    Advertisement,
    Ask,
    Description,
    Drain,
    Drained,
    Kind,
    Known,
    Probe,
    Probed,
    Renew,
    Renewed,
    parse,
)
from meshrl.wire.subjects import Subjects
from meshrl.worker.audit import Audit
from meshrl.worker.threads import Threads

log = logging.getLogger("meshrl.worker")

ADVERTISE_S = 1.0
SWEEP_S = 0.25
KNOWN_A_MESSAGE = 16
# A server takes a second connection within this, or the worker does not start.
START_S = 15.0
# Something that is made on demand is said to be in the making after this long, then each second.
MAKING_AT_ONCE_S = 0.05
MAKING_S = 1.0


class Beating(Protocol):
    """What the pulse reads of its worker; every method may be called from its thread."""

    id: str
    table: SessionTable
    subjects: Subjects
    audit: Audit

    @property
    def kind(self) -> Kind:
        """``env`` or ``agent``."""
        ...

    def descriptions(self) -> list[Description]:
        """Of everything served now."""
        ...

    def waiting_count(self) -> int:
        """Parked opens."""
        ...

    def is_parked(self, user: str, session: str) -> bool:
        """Whether an open of that session is parked."""
        ...

    @property
    def draining_s(self) -> float | None:
        """Seconds until a draining worker goes; None while it stays."""
        ...

    def leave(self, seconds: float) -> None:
        """Go within so many seconds."""

    def provide(self, name: str) -> Description | None:
        """Begin to serve ``name`` if that is possible on demand; may take as long as constructing it.

        Raises:
            MeshError: it serves on demand, and why it cannot serve this.
        """
        ...

    def expire(self, sessions: list[Session]) -> None:
        """End these; called from the pulse's thread."""
        ...

    def overdue(self, now: float) -> list[tuple[str, bytes]]:
        """Look for requests over their deadline; gives the answers to be sent, each with its reply subject."""
        ...


class Pulse:
    """Runs the second thread of a worker from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        worker: Beating,
        url: str,
        credentials: str | Path | Credentials | None,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._worker = worker
        self._url = url
        self._credentials = credentials
        self._on_death = on_death
        self._thread = threading.Thread(target=self._run, name=f"pulse-{worker.id}", daemon=True)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._stop_asked = False
        self._main_task: asyncio.Task[None] | None = None
        self._service: MicroService | None = None
        self._threads = Threads(f"provide-{worker.id}")
        self._tasks: set[asyncio.Task[None]] = set()
        self._digests: dict[str, tuple[Description, str]] = {}  # by served name
        self._making: dict[str, set[str]] = {}  # by name as it was asked for: the reply subjects of those who did

    def start(self) -> None:
        """Start; returns when the worker is advertised. Blocks the calling thread: call it from one that may wait.

        Raises:
            MeshError: the connection could not be made, or :meth:`stop` was called meanwhile.
        """
        self._thread.start()
        if not self._ready.wait(START_S):
            self.stop()
            raise MeshUnreachable(
                f"{self._url} did not take the second connection of worker {self._worker.id} within {START_S:g} s; "
                "start the worker again, or look at the server's load"
            )
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Say goodbye on the registry and end the thread; returns when it has ended, or after 3 s.

        May be called at any time, from any other thread: a start that is under way is given up.
        """
        self._stop_asked = True  # read by a thread that has no loop yet
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._stop_now)
            except RuntimeError:
                return  # its loop has ended on its own
        if self._thread.is_alive():
            self._thread.join(timeout=3.0)

    def _stop_now(self) -> None:
        if self._stopping is not None:
            self._stopping.set()
        if not self._ready.is_set() and self._main_task is not None:
            self._main_task.cancel()

    def nudge(self) -> None:
        """Advertise now; from any thread."""
        if self._loop is not None and self._connection is not None:
            try:
                self._loop.call_soon_threadsafe(self._advertise, self._connection)
            except RuntimeError:
                return

    _connection: Connection | None = None

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            self._failure = BusClosed(f"worker {self._worker.id} was stopped while it started; start another one")
        except BaseException as exc:  # noqa: BLE001  # told to the worker, which cannot go on without a pulse
            self._failure = exc
            if self._ready.is_set():
                self._on_death(exc)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._stopping = asyncio.Event()
        self._main_task = asyncio.current_task()
        self._loop = self._threads.loop = asyncio.get_running_loop()
        if self._stop_asked:
            raise asyncio.CancelledError
        worker, subjects = self._worker, self._worker.subjects
        async with connect(self._url, name=f"pulse of {worker.id}", credentials=self._credentials) as connection:
            fatal: asyncio.Future[MeshError] = self._loop.create_future()
            connection.on_close.append(fatal.set_result)
            connection.on_reconnect.append(lambda: self._back(connection))
            await connection.subscribe(subjects.at_worker(worker.id, "probe"), self._answering(connection, self._probe))
            await connection.subscribe(subjects.at_worker(worker.id, "renew"), self._answering(connection, self._renew))
            await connection.subscribe(subjects.at_worker(worker.id, "drain"), self._answering(connection, self._drain))
            await connection.subscribe(subjects.ask, lambda _s, reply, body: self._on_ask(connection, reply, body))
            self._service = await advertise_service(connection, worker.kind, worker.id, worker.descriptions)
            try:
                self._connection = connection
                self._advertise(connection)
                await connection.flush()
                self._ready.set()
                await self._beat(connection, fatal)
            finally:
                self._connection = None
                for task in self._tasks:
                    task.cancel()
                if connection.connected and not connection.closed:
                    self._advertise(connection, left=True)
                    self._say_audit(connection)
                    await self._service.stop()
                    await connection.flush(1.0)

    async def _beat(self, connection: Connection, fatal: asyncio.Future[MeshError]) -> None:
        assert self._stopping is not None
        stopped: asyncio.Future[Any] = asyncio.get_running_loop().create_task(self._stopping.wait())
        ended: asyncio.Future[Any] = fatal
        due = time.monotonic() + ADVERTISE_S
        try:
            while not stopped.done():
                await asyncio.wait({stopped, ended}, timeout=SWEEP_S, return_when=asyncio.FIRST_COMPLETED)
                if fatal.done():
                    raise fatal.result()
                now = time.monotonic()
                expired = self._worker.table.sweep(now, SWEEP_S, connected=connection.connected)
                if expired:
                    self._worker.expire(expired)
                self._say_audit(connection)
                for to, packed in self._worker.overdue(now):
                    answer(connection, to, packed)
                if now >= due:
                    due = now + ADVERTISE_S
                    self._advertise(connection)
        finally:
            stopped.cancel()

    def _say_audit(self, connection: Connection) -> None:
        """What has come about since the last look; while the server is away it waits."""
        if connection.closed or not connection.connected:
            return
        subject = self._worker.subjects.audit(self._worker.id)
        for entry in self._worker.audit.taken(time.monotonic()):
            connection.publish(subject, entry)

    def _back(self, connection: Connection) -> None:
        self._worker.table.grant_again(time.monotonic())
        self._advertise(connection)

    # ---------------------------------------------------------------- registry

    def _advertisement(self, description: Description, *, left: bool = False) -> Advertisement:
        worker = self._worker
        draining_s = worker.draining_s
        return Advertisement(
            kind=description.kind,
            name=description.name,
            worker=worker.id,
            slots=worker.table.slots,
            free=worker.table.free,
            waiting=worker.waiting_count(),
            draining=draining_s is not None,
            draining_s=draining_s,
            left=left,
            interval_s=ADVERTISE_S,
            description=self._digest(description),
        )

    def _digest(self, description: Description) -> str:
        """Its hash, worked out once: it is in every advertisement, and every answer to an ask."""
        kept = self._digests.get(description.name)
        if kept is None or kept[0] is not description:
            kept = self._digests[description.name] = (description, description.digest())
        return kept[1]

    def _advertise(self, connection: Connection, *, left: bool = False) -> None:
        if connection.closed or not connection.connected:
            return
        for description in self._worker.descriptions():
            subject = self._worker.subjects.advertisement(description.kind, description.name, self._worker.id)
            connection.publish(subject, self._advertisement(description, left=left).to_wire())
        if self._service is not None:
            self._service.refresh()

    def _on_ask(self, connection: Connection, reply: str, body: bytes) -> None:
        try:
            ask = parse(Ask, body)
        except MeshError as exc:
            answer(connection, reply, pack(error_reply(exc)))
            return
        if (ask.worker or self._worker.id) != self._worker.id or (ask.kind or self._worker.kind) != self._worker.kind:
            return
        if not reply:
            return
        if ask.name is None:
            self._tell(connection, {reply}, self._worker.descriptions())
        elif ask.name in self._making:
            self._making[ask.name].add(reply)
            self._say_making(connection, ask.name, {reply})
        else:
            self._making[ask.name] = {reply}
            task = asyncio.get_running_loop().create_task(self._provide(connection, ask.name))
            self._tasks.add(task)
            task.add_done_callback(self._provided)

    def _tell(self, connection: Connection, replies: set[str], told: list[Description]) -> None:
        for at in range(0, len(told), KNOWN_A_MESSAGE):
            some = told[at : at + KNOWN_A_MESSAGE]
            known = Known(advertisements=[self._advertisement(d) for d in some], descriptions=some).to_wire()
            for reply in replies:
                # All workers answer one reply subject: the lane keeps their parts apart.
                answer(connection, reply, known, mark=(crc32(self._worker.id.encode()) >> 1, at, 0))

    def _say_making(self, connection: Connection, name: str, replies: set[str]) -> None:
        making = Known(advertisements=[], descriptions=[], making=[name]).to_wire()
        for reply in replies:
            answer(connection, reply, making)

    async def _provide(self, connection: Connection, name: str) -> None:
        """Answer all who ask for ``name`` until it is there, or cannot be; meanwhile they hear that it is made."""
        replies = self._making[name]
        try:
            providing = self._threads.start(partial(self._worker.provide, name))
            timeout = MAKING_AT_ONCE_S
            while not (await asyncio.wait({providing}, timeout=timeout))[0]:
                timeout = MAKING_S
                self._say_making(connection, name, replies)
            found, exc = providing.result()
        finally:
            del self._making[name]
        if exc is not None:
            self._refuse(connection, replies, name, exc)
        elif found is not None:
            self._tell(connection, replies, [found])
            self._advertise(connection)

    def _provided(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.warning("worker %s could not tell what it provides: %s", self._worker.id, exc)

    def _refuse(self, connection: Connection, replies: set[str], name: str, exc: BaseException) -> None:
        if not isinstance(exc, MeshError):
            log.error("worker %s could not provide %s", self._worker.id, name, exc_info=exc)
            exc = WorkerError(
                f"worker {self._worker.id} could not provide {name}: {type(exc).__name__}: {exc}; its log has more"
            )
        exc.details["asked"] = [self._worker.kind, name]
        packed = pack(error_reply(exc))
        for reply in replies:
            answer(connection, reply, packed)

    # ---------------------------------------------------------------- probes and leases

    def _answering(
        self, connection: Connection, tell: Callable[[str, bytes], bytes]
    ) -> Callable[[str, str, bytes], None]:
        def deliver(subject: str, reply: str, body: bytes) -> None:
            try:
                answered = tell(subject.rpartition(".")[2], body)
            except MeshError as exc:
                answered = pack(error_reply(exc))
            answer(connection, reply, answered)

        return deliver

    def _probe(self, user: str, body: bytes) -> bytes:
        table, states = self._worker.table, []
        for session, epoch, lane, seq in parse(Probe, body).awaited:
            state = table.probe((user, session), epoch, lane, seq)
            if seq == 0 and state == "not_received" and self._worker.is_parked(user, session):
                state = "parked"
            states.append(state)
        return Probed(states=states).to_wire()

    def _drain(self, user: str, body: bytes) -> bytes:
        drain = parse(Drain, body)
        log.warning("worker %s: %s has it leave within %g s", self._worker.id, user, drain.seconds)
        self._worker.leave(drain.seconds)
        return Drained(sessions=len(self._worker.table)).to_wire()

    def _renew(self, user: str, body: bytes) -> bytes:
        table, now, lost = self._worker.table, time.monotonic(), []
        for session, epoch in parse(Renew, body).sessions:
            why = table.renew((user, session), epoch, now)
            if why is not None:
                lost.append((session, why))
        draining_s = self._worker.draining_s
        return Renewed(
            lease_s=table.lease_s, lost=lost, draining=draining_s is not None, draining_s=draining_s
        ).to_wire()
