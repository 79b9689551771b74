"""Execution: the requests of granted sessions, each run at most once, and the end of a session (R1, R10).

The step path of a worker is :meth:`Execution.on_session`: decode, find the session and its lane, run, encode, send.
An env that has shown itself fast is stepped right there, on the event loop; any other on a thread, and a coroutine env
in a task, so that no session waits for another's step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from meshrl.errors import (
    EnvError,
    LimitExceeded,
    MalformedMessage,
    MeshError,
    MessageTooLarge,
    NotRecorded,
    SessionExpired,
    SessionUnknown,
    UnencodableValue,
    WorkerError,
    WrongEpoch,
)
from meshrl.protocol.lane import Lane, Verdict
from meshrl.protocol.pace import BatchPace, Pace
from meshrl.protocol.session import ANY_LANE, Key, Session, SessionTable, State
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, Indices, check_request, error_reply, is_of_lanes
from meshrl.wire.messages import Close, Closed, check
from meshrl.wire.parts import MAX_MESSAGE_BYTES
from meshrl.worker.drawing import DRAWING
from meshrl.worker.hold import CLOSE_S, Held, Hold
from meshrl.worker.hosted_vector import SPREAD
from meshrl.worker.limits import memory_exceeded, of_this_process
from meshrl.worker.pooling import Pooling
from meshrl.worker.raised import EndsSession, described
from meshrl.worker.replies import Replies
from meshrl.worker.sub_envs import Crashed
from meshrl.worker.threads import Threads

log = logging.getLogger("meshrl.worker")

# What of an exception travels: its message, and the end of its traceback.
MAX_MESSAGE_CHARS = 2000
MAX_TRACEBACK_CHARS = 20_000


class Execution:
    """Runs what granted sessions ask for.

    Args:
        worker: the worker's id.
        table: its sessions.
        replies: where answers go.
        threads: where env code runs that may take its time.
        crash: the error class for exceptions of what is held.
        parked: takes back an open that is still parked; gives whether there was one.
        freed: called when a session's slot is free again.
    """

    def __init__(
        self,
        worker: str,
        table: SessionTable,
        replies: Replies,
        threads: Threads,
        crash: type[WorkerError],
        *,
        parked: Callable[[Key, int], bool],
        freed: Callable[[Key], None],
    ) -> None:
        self._worker = worker
        self._table = table
        self._replies = replies
        self._threads = threads
        self._crash = crash
        self._take_back = parked
        self._freed = freed
        self._tasks: set[asyncio.Task[None]] = set()
        self._pooling = Pooling(self, table, replies)
        self.cut = 0  # where <user>.<session>.<op> begins in a session subject

    # ---------------------------------------------------------------- the step path

    def on_session(self, subject: str, reply: str, data: bytes) -> None:
        """One request of a session."""
        user, id_, op = subject[self.cut :].split(".")
        now = time.monotonic()
        try:
            body = unpack(data)
            if op == "close":
                self._on_close((user, id_), reply, check(Close, body))
                return
            if is_of_lanes(body):
                self._pooling.on_request((user, id_), op, body, reply, now)
                return
            epoch, number, seq = check_request(body)
        except MeshError as exc:
            self._replies.refuse(reply, exc)
            return
        session = self._table.get((user, id_))
        if session is None or session.state is not State.OPEN or epoch != session.epoch:
            self.refuse_gone((user, id_), session, epoch, number, seq, reply)
            return
        lane = session.lane
        if lane is None or number:
            self._replies.refuse(reply, MalformedMessage(f"session {id_} has no lane {number} alone", session=id_), seq)
            return
        self._table.used(session, now)
        verdict = lane.receive(seq, reply, now)
        if verdict is Verdict.RUN:
            self._run(session, lane, op, body, now)
        elif verdict is Verdict.REPEAT:
            self._replies.send(reply, lane.cached, 0, seq)
        elif verdict is not Verdict.JOIN:
            self._replies.refuse(reply, lane.refusal(verdict, seq, id_), seq)

    def _run(self, session: Session, lane: Lane, op: str, body: Frame, now: float) -> None:
        hold: Hold = session.held
        hold.op = op
        if hold.counts is not None:
            hold.counts()
        held = hold.held
        assert held is not None, "a session of one lane holds what has one"
        pace = hold.paces.get(op)
        if held.coroutine:
            task = self._begin(self._run_coroutine(session, lane, op, body))
            task.add_done_callback(lambda task: self._ran(task, session, lane, op))
            hold.task = task
        elif pace is not None and pace.inline:
            try:
                frame = held.run(op, body)
            except MeshError as exc:
                self._answer(session, lane, error_reply(exc))
                return
            except (Exception, SystemExit, asyncio.CancelledError) as exc:  # noqa: BLE001  # env code; its session ends
                self._end_crashed(session, lane, op, exc)
                return
            pace.took(time.monotonic() - now)
            self._answer(session, lane, frame)
        elif hold.vector is not None and op in SPREAD:
            try:
                hold.vector.spread(op, body, lambda what: self._spread(session, lane, op, what))
            except MeshError as exc:
                self._answer(session, lane, error_reply(exc))
        else:
            self._threads.submit(lambda: self._run_on_thread(session, lane, op, body, pace))

    def _spread(self, session: Session, lane: Lane, op: str, what: Frame | BaseException) -> None:
        """What came of sub-environments on threads."""
        if isinstance(what, MeshError):
            self._answer(session, lane, error_reply(what))
        elif isinstance(what, BaseException):
            self._end_crashed(session, lane, op, what)
        else:
            self._answer(session, lane, what)

    def _run_on_thread(self, session: Session, lane: Lane, op: str, body: Frame, pace: Pace | BatchPace | None) -> None:
        held: Held = session.held.held
        began = time.monotonic()
        try:
            if (op == "render" or body.get("render")) and not session.held.processes:
                with DRAWING:
                    frame = held.run(op, body)
            else:
                frame = held.run(op, body)
        except MeshError as exc:
            self._threads.back(self._answer, session, lane, error_reply(exc))
        except BaseException as exc:  # noqa: BLE001  # as above
            self._threads.back(self._end_crashed, session, lane, op, exc)
        else:
            if pace is not None:
                pace.took(time.monotonic() - began)
            self._threads.back(self._answer, session, lane, frame)

    async def _run_coroutine(self, session: Session, lane: Lane, op: str, body: Frame) -> None:
        held: Held = session.held.held
        try:
            frame = await held.run_async(op, body)
        except MeshError as exc:
            frame = error_reply(exc)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # as above; SystemExit would end the event loop
            self._end_crashed(session, lane, op, exc)
            return
        self._answer(session, lane, frame)

    def _ran(self, task: asyncio.Task[None], session: Session, lane: Lane, op: str) -> None:
        """Only here is it sure that a task was cancelled: before its first turn, nothing in it runs any more."""
        if not task.cancelled():
            return
        if session.state is State.ENDING:  # nobody waits for the answer
            lane.running = False
            self.dispose(session)
        else:
            self._end_crashed(session, lane, op, asyncio.CancelledError("the env cancelled its own step"))

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _answer(self, session: Session, lane: Lane, frame: Frame) -> None:
        hold: Hold = session.held
        if hold.withhold is not None and "error" not in frame:
            hold.withhold(partial(self._stored, session, lane, frame))
        else:
            self._send(session, lane, frame)

    def _stored(self, session: Session, lane: Lane, frame: Frame, why: str | None) -> None:
        """What an answer tells is stored, or is not: then it is never told."""
        if why is None:
            self._send(session, lane, frame)
        else:
            self._end_crashed(session, lane, session.held.op, self.unrecorded(session, why))

    def _send(self, session: Session, lane: Lane, frame: Frame) -> None:
        frame["seq"] = lane.seq
        hold: Hold = session.held
        try:
            packed = hold.pack(frame)
        except UnencodableValue as exc:
            told = exc if hold.vector is None else hold.vector.whose(exc, frame)
            packed = pack(error_reply(told, lane.seq))
        if len(packed) > MAX_MESSAGE_BYTES:
            why = f"a reply of {len(packed)} bytes is over the limit of {MAX_MESSAGE_BYTES}; send smaller observations"
            packed = pack(error_reply(MessageTooLarge(why, size_bytes=len(packed)), lane.seq))
        self._replies.send(self._table.answered(lane, packed), packed, 0, lane.seq)
        if hold.counts is not None:
            asyncio.get_running_loop().call_soon(hold.counts)
        if session.state is State.ENDING:
            self.dispose(session)

    def _end_crashed(self, session: Session, lane: Lane, op: str, exc: BaseException) -> None:
        seq = lane.seq
        packed = pack(error_reply(self.crashed(session.id, op, exc), seq))
        self._replies.send(self._table.answered(lane, packed), packed, 0, seq)
        self._table.ending(session, "ended", last=(session.epoch, 0, seq, packed))
        self.dispose(session)

    def unrecorded(self, session: Session, why: str) -> EndsSession:
        """What ends a session that is recorded strictly, and could not be."""
        text = (
            f"session {session.id} is recorded strictly, and its last step could not be: {why}; it is over, open a new "
            "one when that is mended"
        )
        return EndsSession(NotRecorded(text, session=session.id, why=why))

    def crashed(self, what: str, op: str, exc: BaseException) -> WorkerError:
        """The error for an exception of remote code, with its traceback."""
        facts: dict[str, Any] = {}
        if isinstance(exc, Crashed) and exc.__cause__ is not None:
            facts["env_id"] = exc.env_id
            op, exc = f"{op} of sub-environment {exc.env_id}", exc.__cause__
        if isinstance(exc, EndsSession):
            error = exc.error
            known = {"op": op.partition(" ")[0], **error.details, "worker": self._worker, **facts}
            return type(error)(error.message, remote_traceback=error.remote_traceback, **known)
        kind, message, text = described(exc)
        allowed = of_this_process().max_memory_bytes if isinstance(exc, MemoryError) else None
        if allowed is not None and self._crash is EnvError:
            over = memory_exceeded(what, op, allowed)
            known = {**over.details, "worker": self._worker, **facts}
            return LimitExceeded(over.message, remote_traceback=text[-MAX_TRACEBACK_CHARS:], **known)
        remedy = (
            "mend what the remote traceback shows" if op == "constructor" else "its session is over, open a new one"
        )
        return self._crash(
            f"{what}: {op} raised {kind}: {message}"[:MAX_MESSAGE_CHARS] + f"; {remedy}",
            remote_traceback=text[-MAX_TRACEBACK_CHARS:],
            type=kind,
            op=op.partition(" ")[0],
            worker=self._worker,
            **facts,
        )

    # ---------------------------------------------------------------- the end

    def _on_close(self, key: Key, reply: str, close: Close) -> None:
        session = self._table.get(key)
        if session is not None and session.epoch == close.epoch:
            existed = session.state is not State.ENDING
            self.end(session, "moved" if close.moved else "closed")
        else:
            existed = self._take_back(key, close.epoch)
        self._replies.send(reply, Closed(existed=existed).to_wire())

    def end_late(self, session: Session, lanes: Indices | None, packed: bytes) -> None:
        """End a session of which a request is over its deadline, and was answered so.

        The request itself goes on: as long as its thread does not come back, the session holds its slots.
        """
        if session.state is State.OPENING:
            self._table.ending(session, "not_constructed")
            return
        lane = session.lane
        of = (ANY_LANE, 0) if lane is None or lanes is not None else (0, lane.seq)
        if session.running and self._table.ending(session, "ended", last=(session.epoch, *of, packed)):
            session.held.cancel()

    def end(self, session: Session, reason: str) -> None:
        """End a session; its slot is free when nothing of it runs any more and its env is closed."""
        if not self._table.ending(session, reason) or session.held is None:
            return  # it was ending already, or is still being constructed
        if not session.running:
            self.dispose(session)
        else:
            session.held.cancel()

    def dispose(self, session: Session) -> None:
        """Close what a session held that is ending and of which nothing runs any more; then its slot is free."""
        self._begin(self._close(session)).add_done_callback(lambda _: self._disposed(session))

    async def _close(self, session: Session) -> None:
        try:
            await session.held.close(CLOSE_S)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # the env is going anyway
            log.warning("worker %s: closing the env of session %s raised %r", self._worker, session.id, exc)

    def _disposed(self, session: Session) -> None:
        self._table.ended(session)
        self._freed(session.key)

    def refuse_gone(self, key: Key, session: Session | None, epoch: int, number: int, seq: int, reply: str) -> None:
        """A request of a session that is not here, or not in that epoch."""
        last = self._table.last_answer(key, epoch, number, seq)
        why = self._table.why_gone(key)
        exc: MeshError
        if session is not None and session.state is State.OPEN:
            exc = WrongEpoch(
                f"session {key[1]} is in epoch {session.epoch}, not {epoch}: another open took it; open a new session",
                session=key[1],
                epoch=session.epoch,
            )
        elif last is not None:
            self._replies.send(reply, last, number, seq)
            return
        elif why == "session_expired":
            exc = SessionExpired(
                f"session {key[1]} was not renewed for {self._table.lease_s:g} s and its slot was freed; open another",
                session=key[1],
                lease_s=self._table.lease_s,
                reason=why,
            )
        else:
            exc = SessionUnknown(
                f"worker {self._worker} has no session {key[1]} of user {key[0]} ({why}); open a new session",
                session=key[1],
                reason=why,
            )
        self._replies.refuse(reply, exc, seq)

    def stop(self) -> None:
        """End every session: coroutines are cancelled, threads end by themselves; slots become free as envs close."""
        for session in self._table:
            self.end(session, "worker_stopped")

    def abandon(self) -> None:
        """Wait for nothing any more that did not end."""
        for task in self._tasks:
            task.cancel()
