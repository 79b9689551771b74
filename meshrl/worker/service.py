"""A worker's life: it connects, describes what it serves, advertises, serves, drains, says goodbye.

What is the same for envs and agents is here; :mod:`~meshrl.worker.admission` gives out slots,
:mod:`~meshrl.worker.execution` runs requests, :mod:`~meshrl.worker.pulse` keeps the worker alive for others meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from meshrl.bus.connect import dial
from meshrl.bus.connection import Connection
from meshrl.bus.locate import locate
from meshrl.bus.login import Credentials
from meshrl.bus.subscription import Subscription
from meshrl.errors import InvalidName, MeshError, UsageError, WorkerCondemned, WorkerError
from meshrl.protocol.session import GRANT_S, LEASE_S, Session, SessionTable, State
from meshrl.wire.messages import Description, Kind, Open
from meshrl.wire.subjects import Subjects
from meshrl.worker.admission import Admission
from meshrl.worker.audit import Audit
from meshrl.worker.execution import Execution
from meshrl.worker.hold import CLOSE_S, Held
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.on_loop import OnLoop
from meshrl.worker.pulse import Pulse
from meshrl.worker.replies import Replies
from meshrl.worker.threads import Threads

log = logging.getLogger("meshrl.worker")

# What a condemned worker gives its other sessions to finish what they run; then its clients find them gone.
CONDEMNED_S = 5.0
# Between looks whether the last session of a worker that leaves has gone.
LEFT_S = 0.02
# What it has to end by itself after that: to say goodbye (3 s at most), and to close its envs (5 s at most).
LAST_RESORT_S = 15.0


class Service(ABC):
    """A worker of either kind; used as an async context manager.

    Attributes:
        id: the worker's id, new at every start.
        url: where it serves, without a password; known inside ``async with``.
        table: its sessions.
        audit: what was opened, and how it ended.
        on_leaving: is called on its event loop when it is told to leave, with the seconds that it has.
    """

    kind: ClassVar[Kind]
    crash: ClassVar[type[WorkerError]]

    def __init__(
        self,
        *,
        url: str | None,
        namespace: str,
        credentials: str | Path | Credentials | None,
        slots: int,
        capabilities: Mapping[str, Any] | None,
        max_slots_per_user: int | None = None,
        lease_s: float = LEASE_S,
        grant_s: float = GRANT_S,
        inline: bool = False,
        last_resort: Callable[[], None] | None = None,
    ) -> None:
        if slots < 1:
            raise UsageError(f"a worker has at least one slot, not {slots}; give slots=1 or more", slots=slots)
        if max_slots_per_user is not None and max_slots_per_user < 1:
            raise UsageError(
                f"a user's share is at least one slot, not {max_slots_per_user}; give max_slots_per_user=1 or more, or "
                "None for all slots",
                max_slots_per_user=max_slots_per_user,
            )
        self.id = f"{self.kind[0]}{secrets.token_hex(5)}"
        self.url = url
        self.subjects = Subjects(namespace)
        self.table = SessionTable(slots, max_slots_per_user=max_slots_per_user, lease_s=lease_s, grant_s=grant_s)
        self.capabilities = dict(capabilities or {})
        self._credentials = credentials
        self._threads = Threads(f"{self.kind}-{self.id}")
        self._code_threads = OnLoop(f"{self.kind}-{self.id}") if inline else self._threads  # where served code runs
        self._replies = Replies()
        self.audit = Audit(self.id)
        self.table.on_ending = self.audit.ended
        self._admission = Admission(
            self.id, self.kind, self.table, self._replies, self._code_threads, self._construct, self.audit
        )
        self._execution = Execution(
            self.id,
            self.table,
            self._replies,
            self._code_threads,
            self.crash,
            parked=self._admission.take_back,
            freed=self._admission.slot_freed,
        )
        self._admission.execution = self._execution
        self._pulse: Pulse | None = None
        self._address = ""  # of the server, with its password
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._last_resort = last_resort
        self._condemned = False
        self._shared: list[Subscription] = []  # requests that others can answer as well
        self._leaving: asyncio.Task[None] | None = None
        self._ending = False
        self.on_leaving: Callable[[float], None] = _nobody

    def __repr__(self) -> str:
        names = ", ".join(self._admission.served)
        return f"<{type(self).__name__} {self.id} serving {names}: {len(self.table)} of {self.table.slots} slots taken>"

    # ---------------------------------------------------------------- what the kinds of worker say

    @abstractmethod
    async def _describe_all(self) -> dict[str, Description]:
        """The descriptions of everything served from the start, by name."""

    @abstractmethod
    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[Held | HostedPool, Description]:
        """Make what an open asks for, on a thread; gives it with its own description."""

    async def _subscribe(self, connection: Connection) -> list[Subscription]:  # noqa: ARG002  # as below
        """Subscribe to what only this kind of worker answers; gives what one that leaves answers no more."""
        return []

    def _stop(self) -> None:  # noqa: B027  # as above
        """Answer nothing of that any more."""

    def _let_all_go(self) -> None:  # noqa: B027  # as above
        """Let go of what was started for all sessions; on a thread, when no session is left."""

    def provide(self, name: str) -> Description | None:
        """The description of ``name``; a worker that serves on demand begins to here. Called on any thread."""
        return self._admission.served.get(name)

    # ---------------------------------------------------------------- life

    async def __aenter__(self) -> Self:
        """Connect, describe what is served, advertise.

        Raises:
            MeshUnreachable: no NATS server answers.
            LoginRefused: it refuses the login.
            InvalidName, EnvError: something served cannot be made.
        """
        self._threads.loop = self._code_threads.loop = asyncio.get_running_loop()
        url = await locate(self.url, credentials=self._credentials, namespace=self.subjects.namespace)
        try:
            self._admission.served = await self._describe_all()
            self._connection = await self._begin(url)
        except BaseException:
            await self._threads.call(self._let_all_go)
            raise
        log.info("%s worker %s serves %s at %s", self.kind, self.id, ", ".join(self._admission.served), self.url)
        return self

    async def _begin(self, url: str) -> Connection:
        self._address = url
        connection = await dial(
            url, name=f"{self.kind} worker {self.id}", credentials=self._credentials, on_error=self._bus_error
        )
        self._replies.connection = connection
        self.url = connection.url
        try:
            connection.on_close.append(self._die)
            self._execution.cut = len(self.subjects.session_prefix(self.id))
            await connection.subscribe(self.subjects.at_worker(self.id, "open"), self._admission.on_open)
            await connection.subscribe(self.subjects.sessions(self.id), self._execution.on_session)
            self._shared = await self._subscribe(connection)
            self._pulse = Pulse(self, url, self._credentials, self._pulse_died)
            await self._threads.call(self._pulse.start)
        except BaseException:
            try:
                if self._pulse is not None:  # a start that was cancelled would go on by itself
                    await self._threads.call(self._pulse.stop)
            finally:
                await connection.close()
            raise
        return connection

    async def __aexit__(self, *_exc: object) -> None:
        """Say goodbye, close every env, disconnect. An env that hangs is left behind after 5 s."""
        self._ending = True
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.wait({self._leaving})
        self.drain(0.0)
        self.audit.stop()  # before the pulse, which has still to say it
        if self._pulse is not None:
            await self._threads.call(self._pulse.stop)
        self._admission.stop()
        self._admission.idle.clear()
        self._execution.stop()
        self._stop()
        if len(self.table):
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._admission.idle.wait()
            except TimeoutError:
                log.warning("worker %s leaves %d envs behind that did not close", self.id, len(self.table))
                self._execution.abandon()
        await self._threads.call(self._let_all_go)
        await self._connection.close()

    async def serve_forever(self) -> None:
        """Serve until :meth:`stop` is called.

        Raises:
            WorkerCondemned: it was condemned.
            MeshError: the connection ended for good (a refused login after a reconnect).
        """
        await self._stopped.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make ``serve_forever`` return; from the worker's own event loop, a signal handler for instance."""
        self._stopped.set()

    def leave(self, seconds: float) -> None:
        """Go, within ``seconds``, without cutting anybody short (R11).

        No new sessions are taken, clients are told and move to other workers, and ``serve_forever`` returns when nobody
        is left, or the time is over. Called again, the new time counts. To be called on any thread, once it serves.

        Raises:
            UsageError: it does not serve yet.
        """
        if self._threads.loop is None:
            raise UsageError("a worker leaves once it serves: inside `async with`")
        if self._condemned or self._ending:
            return  # it goes sooner
        self._admission.draining_until = time.monotonic() + seconds  # for the pulse, which says it to everybody
        if self._pulse is not None:
            self._pulse.nudge()
        self._threads.back(self._leave, seconds)

    def _leave(self, seconds: float) -> None:
        if self._ending:
            return
        if self._leaving is not None:
            self._leaving.cancel()
        self.drain(seconds)
        self.on_leaving(seconds)
        self._leaving = asyncio.get_running_loop().create_task(self._until_left(seconds))

    async def _until_left(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                for shared in self._shared:
                    await shared.drain()
                while not self._is_idle():  # noqa: ASYNC110  # for some seconds in a worker's life
                    await asyncio.sleep(LEFT_S)
        except TimeoutError:
            log.warning("worker %s leaves; sessions that did not move: %d", self.id, len(self.table))
        except MeshError as exc:  # of its connection, which ends it otherwise
            log.warning("worker %s leaves: %s", self.id, exc.message)
        self.stop()

    def _is_idle(self) -> bool:
        """Whether nobody needs this worker any more."""
        return not len(self.table)

    def drain(self, seconds: float) -> None:
        """Take no new sessions any more, and advertise at once that the worker goes in ``seconds``.

        It goes when its ``async with`` is left, not by itself: see :meth:`leave`. To be called on the worker's own
        event loop.
        """
        self._admission.drain(time.monotonic() + seconds)
        if self._pulse is not None:
            self._pulse.nudge()

    def overdue(self, now: float) -> list[tuple[str, bytes]]:  # noqa: ARG002  # not every kind has deadlines
        """Look for requests over their deadline; on the pulse's thread."""
        return []

    def condemn(self, message: str) -> None:
        """End this worker, so that it is replaced: ``serve_forever`` raises a :class:`WorkerCondemned`.

        It takes no new sessions from now on, and goes in 5 s; at once if it has no session but those that end. If that
        does not end the process, ``last_resort`` does. To be called on any thread, also while the event loop hangs.

        Args:
            message: why, in one line.
        """
        if self._condemned:
            return
        self._condemned = True
        seconds = CONDEMNED_S if any(session.state is not State.ENDING for session in self.table) else 0.0
        why = WorkerCondemned(f"worker {self.id} ends, to be started again: {message}", worker=self.id)
        log.error("%s", why.message)
        self._admission.draining_until = time.monotonic() + seconds  # for the pulse, which says it to everybody
        if self._pulse is not None:
            self._pulse.nudge()
        self._threads.back(self.drain, seconds)
        _later(seconds, lambda: self._threads.back(self._die, why))
        if self._last_resort is not None:
            _later(seconds + LAST_RESORT_S, self._last_resort)

    def _die(self, why: BaseException) -> None:
        self._failure = why
        self.stop()

    def _pulse_died(self, why: BaseException) -> None:
        log.error("worker %s lost its pulse: %s", self.id, why)
        self._threads.back(self._die, why)

    def _bus_error(self, exc: Exception) -> None:
        log.warning("worker %s: %s: %s", self.id, type(exc).__name__, exc, exc_info=exc)

    # ---------------------------------------------------------------- what the pulse reads

    def descriptions(self) -> list[Description]:
        """Of everything served now."""
        return list(self._admission.served.values())

    def waiting_count(self) -> int:
        """Parked opens."""
        return self._admission.waiting_count()

    def is_parked(self, user: str, session: str) -> bool:
        """Whether an open of that session is parked."""
        return self._admission.is_parked((user, session))

    @property
    def draining_s(self) -> float | None:
        """Seconds until a draining worker goes; None while it stays."""
        until = self._admission.draining_until
        return None if until is None else max(0.0, until - time.monotonic())

    def expire(self, sessions: list[Session]) -> None:
        """End sessions whose lease ran out; from the pulse's thread."""
        self._threads.back(self._expire, sessions)

    def _expire(self, sessions: list[Session]) -> None:
        now = time.monotonic()
        for session in sessions:
            if session.lease_until < now and session.state is State.OPEN:
                log.info("worker %s: the lease of session %s of %s ran out", self.id, session.id, session.user)
                self._execution.end(session, "session_expired")


def _nobody(_seconds: float) -> None:
    return None


def _later(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def valid_names(names: Mapping[str, object]) -> None:
    """Refuse an empty table of names at once.

    Raises:
        InvalidName: there is none, or one of them is no text or an empty one.
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidName(
            'a worker serves at least one name, and each is a text that is not empty: {"cartpole": "CartPole-v1"}'
        )
