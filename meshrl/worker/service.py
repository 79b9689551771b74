"""A worker at work: opens, sessions and their requests, from the wire to what is held and back.

What is held (an env, a stateful agent) is the business of :mod:`meshrl.worker.env_worker` and ``agent_worker``; the
rules are those of :mod:`meshrl.protocol`; this file ties them to the bus and to threads.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from meshrl.bus.connection import Connection, dial
from meshrl.bus.locate import locate
from meshrl.bus.login import Credentials
from meshrl.errors import (
    KwargsNotAllowed,
    MalformedMessage,
    MeshError,
    SessionExpired,
    SessionUnknown,
    UnencodableValue,
    UnknownName,
    WorkerDraining,
    WorkerError,
    WrongEpoch,
)
from meshrl.protocol.lane import Lane, Verdict
from meshrl.protocol.names import near
from meshrl.protocol.pace import Pace
from meshrl.protocol.session import GRANT_S, LEASE_S, Key, Opening, Session, SessionTable, State
from meshrl.protocol.waiting import Waiting
from meshrl.wire.codec import Codec, pack, unpack
from meshrl.wire.frames import Frame, check_request, error_reply
from meshrl.wire.messages import Close, Closed, Description, Full, Grant, Kind, Load, Open, check, parse
from meshrl.wire.subjects import Subjects, is_id
from meshrl.worker.pulse import Pulse
from meshrl.worker.threads import Threads

log = logging.getLogger("meshrl.worker")

# How often parked opens are looked at whose time is over.
PARKED_S = 0.1


class Held(Protocol):
    """What a session holds."""

    pace: Pace
    coroutine: bool

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op."""
        ...

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same where it must be awaited."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class _Hold:
    """What the worker keeps with a session: the env, how its client wants arrays, and the coroutine it runs."""

    __slots__ = ("codec", "held", "task")

    def __init__(self, held: Held, codec: Codec) -> None:
        self.held = held
        self.codec = codec
        self.task: asyncio.Task[None] | None = None


class Service(ABC):
    """The part of a worker that is the same for envs and agents; used as an async context manager.

    Attributes:
        id: the worker's id, new at every start.
        url: where it serves, without a password; known inside ``async with``.
        table: its sessions.
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
        lease_s: float = LEASE_S,
        grant_s: float = GRANT_S,
    ) -> None:
        if slots < 1:
            raise ValueError(f"a worker has at least one slot, not {slots}")
        self.id = f"{self.kind[0]}{secrets.token_hex(5)}"
        self.url = url
        self.subjects = Subjects(namespace)
        self.table = SessionTable(slots, lease_s=lease_s, grant_s=grant_s)
        self.capabilities = dict(capabilities or {})
        self._credentials = credentials
        self._served: dict[str, Description] = {}
        self._waiting = Waiting()
        self._parked: dict[Key, tuple[Open, str]] = {}
        self._after_end: dict[Key, tuple[Open, str]] = {}
        self._threads = Threads(f"{self.kind}-{self.id}")
        self._tasks: set[asyncio.Task[None]] = set()
        self._codecs = {"str": Codec("str"), "bytes": Codec("bytes")}
        self._attempt = 0
        self._draining_until: float | None = None
        self._stopped: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._parked_timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()

    def __repr__(self) -> str:
        names = ", ".join(self._served)
        return f"<{type(self).__name__} {self.id} serving {names}: {len(self.table)} of {self.table.slots} slots taken>"

    # ---------------------------------------------------------------- what the kinds of worker say

    @abstractmethod
    async def _describe_all(self) -> dict[str, Description]:
        """The descriptions of everything served from the start, by name."""

    @abstractmethod
    def _construct(self, open_: Open, description: Description) -> tuple[Held, Description]:
        """Make what an open asks for, on a thread; gives it with its own description."""

    def provide(self, name: str) -> Description | None:
        """The description of ``name``; a worker that serves on demand begins to here. Called on any thread."""
        return self._served.get(name)

    async def _subscribe(self, connection: Connection) -> None:
        """Subscribe to what only this kind of worker answers."""

    # ---------------------------------------------------------------- life

    async def __aenter__(self) -> Self:
        """Connect, describe what is served, advertise.

        Raises:
            MeshUnreachable: no NATS server answers.
            LoginRefused: it refuses the login.
            InvalidName, EnvError: something served cannot be made.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        url = await locate(self.url)
        self._served = await self._describe_all()
        connection = await dial(
            url, name=f"{self.kind} worker {self.id}", credentials=self._credentials, on_error=self._bus_error
        )
        self._connection = connection
        self.url = connection.url
        try:
            connection.on_close.append(self._die)
            subjects, cut = self.subjects, len(self.subjects.session_prefix(self.id))
            self._cut = cut
            await connection.subscribe(subjects.at_worker(self.id, "open"), self._on_open)
            await connection.subscribe(subjects.sessions(self.id), self._on_session)
            await self._subscribe(connection)
            self._pulse = Pulse(self, url, self._credentials, self._pulse_died)
            await asyncio.to_thread(self._pulse.start)
        except BaseException:
            await connection.close()
            raise
        log.info("%s worker %s serves %s at %s", self.kind, self.id, ", ".join(self._served), self.url)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Say goodbye, close every env, disconnect. An env that hangs is left behind after 5 s."""
        self.drain(0.0)
        await asyncio.to_thread(self._pulse.stop)
        if self._parked_timer is not None:
            self._parked_timer.cancel()
        for session in self.table:
            self._end(session, "worker_stopped")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._idle.clear()
        if len(self.table):
            try:
                async with asyncio.timeout(5.0):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("worker %s leaves %d envs behind that did not close", self.id, len(self.table))
        await self._connection.close()

    async def serve_forever(self) -> None:
        """Serve until :meth:`stop` is called.

        Raises:
            MeshError: the connection ended for good (a refused login after a reconnect).
        """
        assert self._stopped is not None, "serve_forever is called inside `async with`"
        await self._stopped.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make ``serve_forever`` return; from the worker's own event loop, a signal handler for instance."""
        if self._stopped is not None:
            self._stopped.set()

    def drain(self, seconds: float) -> None:
        """Take no new sessions any more, and say so: the worker goes in ``seconds``."""
        self._draining_until = time.monotonic() + seconds
        for key, (_, reply) in list(self._parked.items()):
            self._waiting.leave(*key)
            self._refuse(reply, self._draining_error())
        self._parked.clear()

    def _die(self, why: BaseException) -> None:
        self._failure = why
        self.stop()

    def _pulse_died(self, why: BaseException) -> None:
        log.error("worker %s lost its pulse: %s", self.id, why)
        self._soon(self._die, why)

    def _bus_error(self, exc: Exception) -> None:
        log.warning("worker %s: %s: %s", self.id, type(exc).__name__, exc, exc_info=exc)

    def _soon(self, call: Callable[..., object], *args: object) -> None:
        """Call on the worker's event loop, from any thread; a loop that has ended needs nothing any more."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            log.debug("worker %s has ended", self.id)

    # ---------------------------------------------------------------- what the pulse reads

    def descriptions(self) -> list[Description]:
        """Of everything served now."""
        return list(self._served.values())

    def waiting_count(self) -> int:
        """Parked opens."""
        return len(self._parked)

    def is_parked(self, user: str, session: str) -> bool:
        """Whether an open of that session is parked."""
        return (user, session) in self._parked

    @property
    def draining_s(self) -> float | None:
        """Seconds until a draining worker goes; None while it stays."""
        until = self._draining_until
        return None if until is None else max(0.0, until - time.monotonic())

    def expire(self, sessions: list[Session]) -> None:
        """End sessions whose lease ran out; from the pulse's thread."""
        self._soon(self._expire, sessions)

    def _expire(self, sessions: list[Session]) -> None:
        now = time.monotonic()
        for session in sessions:
            if session.lease_until < now and session.state is State.OPEN:
                log.info("worker %s: the lease of session %s of %s ran out", self.id, session.id, session.user)
                self._end(session, "session_expired")

    # ---------------------------------------------------------------- open

    def _on_open(self, subject: str, reply: str, data: bytes) -> None:
        user = subject.rpartition(".")[2]
        try:
            self._take(parse(Open, data), user, reply)
        except MeshError as exc:
            self._refuse(reply, exc)

    def _take(self, open_: Open, user: str, reply: str) -> None:
        """Take an open: a new one, a repeated one, or one that a slot became free for."""
        key = (user, open_.session)
        description = self._check_open(open_)
        now = time.monotonic()
        if self.table.get(key) is None:
            if self.draining_s is not None:
                raise self._draining_error()
            # 1. Busier than the client believed: it may find better elsewhere, and asks without belief next time.
            if open_.believed_free is not None and self.table.free < open_.believed_free and key not in self._parked:
                self._reply(reply, Full(load=self.load(), bounced=True).to_wire())
                return
            # 2. Others wait already: nobody overtakes them.
            if self._parked and key not in self._parked:
                self._park(open_, user, reply, now)
                return
        opening, session = self.table.open(user, open_.session, open_.epoch, reply, now, lanes=open_.lanes)
        if opening is Opening.NEW:
            assert session is not None
            self._leave(key)
            self._begin(session, open_, description)
        elif opening is Opening.REPEAT:
            assert session is not None
            self._reply(reply, session.grant)
        elif opening is Opening.FULL:
            self._park(open_, user, reply, now)
        elif opening is Opening.WRONG_EPOCH:
            assert session is not None
            raise WrongEpoch(
                f"session {session.id} is in epoch {session.epoch}; an open of epoch {open_.epoch} comes too late",
                session=session.id,
                epoch=session.epoch,
            )
        elif opening is not Opening.JOIN:  # RAISED or WAIT: the old env is closed first
            assert session is not None
            self._after_end[key] = (open_, reply)
            self._end(session, "wrong_epoch")

    def _check_open(self, open_: Open) -> Description:
        description = self._served.get(open_.name)
        if description is None or open_.kind != self.kind:
            raise UnknownName(
                f"worker {self.id} serves no {open_.kind} {open_.name!r}; it serves {', '.join(self._served)}",
                name=open_.name,
                near=near(open_.name, self._served),
            )
        allowed = description.allow_kwargs
        refused = [] if "*" in allowed else sorted(set(open_.kwargs) - set(allowed))
        if refused:
            raise KwargsNotAllowed(
                f"{open_.name}: the worker's operator does not let clients pass {', '.join(refused)} "
                f"(allowed: {', '.join(allowed) or 'nothing'}); serve it with allow_kwargs={tuple(refused)!r}",
                refused=refused,
                allowed=list(allowed),
            )
        return description

    def _begin(self, session: Session, open_: Open, description: Description) -> None:
        def construct() -> None:
            try:
                held, own = self._construct(open_, description)
            except MeshError as exc:
                self._soon(self._not_constructed, session, exc)
            except BaseException as exc:  # noqa: BLE001  # whatever a constructor raises goes to the one who asked
                self._soon(self._not_constructed, session, self._crashed(open_.name, "constructor", exc))
            else:
                self._soon(self._constructed, session, open_, held, own)

        self._threads.submit(construct)

    def _constructed(self, session: Session, open_: Open, held: Held, description: Description) -> None:
        session.held = _Hold(held, self._codecs[open_.key_style])
        if session.state is State.ENDING:
            self._dispose(session)
            return
        grant = Grant(
            session=session.id,
            epoch=session.epoch,
            worker=self.id,
            lease_s=self.table.lease_s,
            grant_s=self.table.grant_s,
            step_deadline_s=description.step_deadline_s,
            render_mode=open_.render_mode,
            description=description,
            load=self.load(),
        )
        self._reply(self.table.granted(session, grant.to_wire(), time.monotonic()), session.grant)

    def _not_constructed(self, session: Session, exc: MeshError) -> None:
        self._refuse(session.reply_to, exc)
        self.table.ending(session, "not_constructed")
        self.table.ended(session)
        self._slot_freed(session.key)

    # ---------------------------------------------------------------- waiting

    def _park(self, open_: Open, user: str, reply: str, now: float) -> None:
        key = (user, open_.session)
        if open_.park_s > 0:
            place = self._waiting.park(user, open_.session, now, now + open_.park_s, ticket=open_.ticket)
            if place is not None:
                self._parked[key] = (open_, reply)
                if self._parked_timer is None:
                    self._parked_timer = self._loop.call_later(PARKED_S, self._look_at_parked)
                return
        self._reply(reply, Full(load=self.load()).to_wire())

    def _leave(self, key: Key) -> bool:
        if self._parked.pop(key, None) is None:
            return False
        self._waiting.leave(*key)
        return True

    def _look_at_parked(self) -> None:
        self._parked_timer = None
        for waiter in self._waiting.due(time.monotonic()):
            parked = self._parked.pop((waiter.user, waiter.session), None)
            if parked is not None:
                self._reply(parked[1], Full(load=self.load(), ticket=waiter.ticket).to_wire())
        if self._parked:
            self._parked_timer = self._loop.call_later(PARKED_S, self._look_at_parked)

    def _slot_freed(self, key: Key) -> None:
        after = self._after_end.pop(key, None)
        if after is not None:
            self._retake(*after, key[0])
        while self.table.free and self._parked:
            waiter = self._waiting.next()
            if waiter is None:
                break
            parked = self._parked.pop((waiter.user, waiter.session), None)
            if parked is not None:
                self._retake(*parked, waiter.user, first=True)
        if not len(self.table):
            self._idle.set()

    def _retake(self, open_: Open, reply: str, user: str, *, first: bool = False) -> None:
        try:
            if first:
                description = self._check_open(open_)
                opening, session = self.table.open(
                    user, open_.session, open_.epoch, reply, time.monotonic(), lanes=open_.lanes
                )
                assert opening is Opening.NEW and session is not None, "a slot was free"
                self._begin(session, open_, description)
            else:
                self._take(open_.model_copy(update={"believed_free": None}), user, reply)
        except MeshError as exc:
            self._refuse(reply, exc)

    def load(self) -> Load:
        """How busy the worker is."""
        return Load(
            slots=self.table.slots,
            free=self.table.free,
            waiting=len(self._parked),
            draining=self._draining_until is not None,
        )

    # ---------------------------------------------------------------- the step path

    def _on_session(self, subject: str, reply: str, data: bytes) -> None:
        user, id_, op = subject[self._cut :].split(".")
        now = time.monotonic()
        try:
            body = unpack(data)
            if op == "close":
                self._on_close((user, id_), reply, check(Close, body))
                return
            epoch, number, seq = check_request(body)
        except MeshError as exc:
            self._refuse(reply, exc)
            return
        session = self.table.get((user, id_))
        if session is None or session.state is not State.OPEN or epoch != session.epoch:
            self._refuse_gone((user, id_), session, epoch, number, seq, reply)
            return
        if number >= len(session.lanes):
            self._refuse(reply, MalformedMessage(f"session {id_} has no lane {number}", session=id_), seq)
            return
        self.table.used(session, now)
        lane = session.lanes[number]
        verdict = lane.receive(seq, reply, now)
        if verdict is Verdict.RUN:
            self._run(session, lane, number, op, body, now)
        elif verdict is Verdict.REPEAT:
            self._reply(reply, lane.cached, number, seq)
        elif verdict is not Verdict.JOIN:
            self._refuse(reply, lane.refusal(verdict, seq, id_), seq)

    def _run(self, session: Session, lane: Lane, number: int, op: str, body: Frame, now: float) -> None:
        held: Held = session.held.held
        if held.coroutine:
            task = self._loop.create_task(self._run_coroutine(session, lane, number, op, body))
            session.held.task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif op == "step" and held.pace.inline:
            try:
                frame = held.run(op, body)
            except MeshError as exc:
                self._answer(session, lane, number, error_reply(exc))
                return
            except (Exception, SystemExit) as exc:  # noqa: BLE001  # env code may raise anything; its session ends
                self._end_crashed(session, lane, number, op, exc)
                return
            held.pace.took(time.monotonic() - now)
            self._answer(session, lane, number, frame)
        else:
            self._threads.submit(lambda: self._run_on_thread(session, lane, number, op, body))

    def _run_on_thread(self, session: Session, lane: Lane, number: int, op: str, body: Frame) -> None:
        held: Held = session.held.held
        began = time.monotonic()
        try:
            frame = held.run(op, body)
        except MeshError as exc:
            self._soon(self._answer, session, lane, number, error_reply(exc))
        except BaseException as exc:  # noqa: BLE001  # as above
            self._soon(self._end_crashed, session, lane, number, op, exc)
        else:
            if op == "step":
                held.pace.took(time.monotonic() - began)
            self._soon(self._answer, session, lane, number, frame)

    async def _run_coroutine(self, session: Session, lane: Lane, number: int, op: str, body: Frame) -> None:
        held: Held = session.held.held
        try:
            frame = await held.run_async(op, body)
        except MeshError as exc:
            frame = error_reply(exc)
        except asyncio.CancelledError:  # the session ended meanwhile; nobody waits for the answer
            lane.running = False
            self._dispose(session)
            return
        except Exception as exc:  # noqa: BLE001  # as above
            self._end_crashed(session, lane, number, op, exc)
            return
        self._answer(session, lane, number, frame)

    def _answer(self, session: Session, lane: Lane, number: int, frame: Frame) -> None:
        frame["seq"] = lane.seq
        try:
            packed = session.held.codec.pack(frame)
        except UnencodableValue as exc:
            packed = pack(error_reply(exc, lane.seq))
        reply_to = self.table.answered(session, lane, packed)
        self._reply(reply_to, packed, number, lane.seq)
        if session.state is State.ENDING:
            self._dispose(session)

    def _end_crashed(self, session: Session, lane: Lane, number: int, op: str, exc: BaseException) -> None:
        frame = error_reply(self._crashed(session.id, op, exc), lane.seq)
        packed = pack(frame)
        seq = lane.seq
        self._reply(self.table.answered(session, lane, packed), packed, number, seq)
        self.table.ending(session, "ended", last=(session.epoch, number, seq, packed))
        self._dispose(session)

    def _crashed(self, what: str, op: str, exc: BaseException) -> WorkerError:
        text = "".join(traceback.format_exception(exc))
        return self.crash(
            f"{what}: {op} raised {type(exc).__name__}: {exc}"[:2000],
            remote_traceback=text[-20_000:],
            type=type(exc).__name__,
            op=op,
            worker=self.id,
        )

    # ---------------------------------------------------------------- the end

    def _on_close(self, key: Key, reply: str, close: Close) -> None:
        session = self.table.get(key)
        parked = self._parked.get(key)
        existed = False
        if session is not None and session.epoch == close.epoch:
            existed = True
            self._end(session, "closed")
        elif parked is not None and parked[0].epoch == close.epoch:
            existed = self._leave(key)
        self._reply(reply, Closed(existed=existed).to_wire())

    def _end(self, session: Session, reason: str) -> None:
        """End a session; its slot is free when nothing of it runs any more and its env is closed."""
        if not self.table.ending(session, reason) or session.held is None:
            return
        if not any(lane.running for lane in session.lanes):
            self._dispose(session)
        elif session.held.task is not None:
            session.held.task.cancel()

    def _dispose(self, session: Session) -> None:
        held: Held = session.held.held

        def close() -> None:
            try:
                held.close()
            except BaseException as exc:  # noqa: BLE001  # the env is going anyway
                log.warning("worker %s: closing the env of session %s raised %r", self.id, session.id, exc)
            self._soon(self._disposed, session)

        self._threads.submit(close)

    def _disposed(self, session: Session) -> None:
        self.table.ended(session)
        self._slot_freed(session.key)

    # ---------------------------------------------------------------- replies

    def _reply(self, to: str, packed: bytes, number: int = 0, seq: int = 0) -> None:
        if not to or self._connection.closed:
            return
        self._attempt += 1
        self._connection.publish(to, packed, mark=(number, seq, self._attempt))

    def _refuse(self, to: str, exc: MeshError, seq: int | None = None) -> None:
        self._reply(to, pack(error_reply(exc, seq)))

    def _refuse_gone(self, key: Key, session: Session | None, epoch: int, number: int, seq: int, reply: str) -> None:
        if session is not None and session.state is State.OPEN:
            exc: MeshError = WrongEpoch(
                f"session {key[1]} is in epoch {session.epoch}, not {epoch}", session=key[1], epoch=session.epoch
            )
        else:
            last = self.table.last_answer(key, epoch, number, seq)
            if last is not None:
                self._reply(reply, last, number, seq)
                return
            why = self.table.why_gone(key)
            if why == "session_expired":
                exc = SessionExpired(
                    f"session {key[1]} was not renewed for {self.table.lease_s:g} s and its slot was freed; open a new one",
                    session=key[1],
                    lease_s=self.table.lease_s,
                    reason=why,
                )
            else:
                exc = SessionUnknown(
                    f"worker {self.id} has no session {key[1]} of user {key[0]} ({why})", session=key[1], reason=why
                )
        self._refuse(reply, exc, seq)

    def _draining_error(self) -> WorkerDraining:
        return WorkerDraining(f"worker {self.id} is going away and takes no new sessions", worker=self.id)


def valid_names(names: Mapping[str, object]) -> None:
    """Refuse an empty table of names at once."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("a worker serves at least one name")


__all__ = ["Held", "Service", "is_id", "valid_names"]
