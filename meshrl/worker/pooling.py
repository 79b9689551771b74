"""Pooling: the requests of pools, each of several lanes, answered as the lanes finish (R1, R2)."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from meshrl.errors import MalformedMessage, MeshError, MessageTooLarge, UnencodableValue
from meshrl.protocol.session import ANY_LANE, Key, Session, SessionTable, State
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, Indices, check_lanes, error_reply
from meshrl.wire.messages import MAX_NUM_ENVS
from meshrl.wire.parts import MAX_MESSAGE_BYTES
from meshrl.worker.hosted_pool import Alone, HostedPool
from meshrl.worker.replies import Replies

if TYPE_CHECKING:
    from meshrl.worker.execution import Execution


class Pooling:
    """Runs what pools ask for.

    Args:
        execution: ends sessions.
        table: the worker's sessions.
        replies: where answers go.
    """

    def __init__(self, execution: Execution, table: SessionTable, replies: Replies) -> None:
        self._execution = execution
        self._table = table
        self._replies = replies

    def on_request(self, key: Key, op: str, body: Frame, reply: str, now: float) -> None:
        """One request of some lanes.

        Raises:
            MalformedMessage: it is none.
        """
        session = self._table.get(key)
        count = MAX_NUM_ENVS if session is None or session.lanes is None else len(session.lanes)
        epoch, lanes, seqs = check_lanes(body, count)
        if session is None or session.state is not State.OPEN or epoch != session.epoch:
            self._execution.refuse_gone(key, session, epoch, int(lanes[0]), int(seqs[0]), reply)
            return
        if session.lanes is None:
            raise MalformedMessage(f"session {key[1]} is no pool: it has one lane", session=key[1])
        self._table.used(session, now)
        received = session.lanes.receive(lanes, seqs, reply, now)
        for answer in received.repeat:
            # By its own mark: several large ones are several messages, and one under way is not sent a second time.
            self._replies.send(reply, answer.packed, answer.lane, answer.seq)
        if received.refused:
            which = np.array([at for at, _ in received.refused], np.int64)
            error = error_reply(session.lanes.refusal(received.refused, lanes, seqs, key[1]))
            refused = {**error, "lanes": lanes[which], "seqs": seqs[which]}
            self._replies.send(reply, pack(refused), int(lanes[0]), int(seqs[0]))
        if len(received.run):
            self._run(session, op, lanes, received.run, body, now)

    def _run(self, session: Session, op: str, lanes: Indices, run: Indices, body: Frame, now: float) -> None:
        pool: HostedPool = session.held.pool
        if pool.counts is not None:
            pool.counts()
        try:
            given = pool.check(op, lanes, body)
        except MeshError as exc:
            self._answer(session, lanes[run], error_reply(exc))
            return
        if len(run) < len(lanes):  # some of them ran before: it is a repeated request
            given, lanes = [given[at] for at in run.tolist()], lanes[run]

        def told(which: Indices, what: Frame | BaseException, alone: Alone | None = None) -> None:
            if isinstance(what, MeshError):
                self._answer(session, lanes[which], error_reply(what))
            elif isinstance(what, BaseException):
                self._end_crashed(session, lanes[which], op, what)
            else:
                self._answer(session, lanes[which], what, alone)

        if pool.coroutine:
            pool.start(op, lanes, given, told)
        elif op == "step" and not pool.draws and not session.held.processes and pool.pace.inline_for(len(lanes)):
            everything = np.arange(len(lanes))
            try:
                frame, alone = pool.run(op, lanes, given)
            except (Exception, SystemExit) as exc:  # noqa: BLE001  # env code; its session ends
                told(everything, exc)
                return
            pool.pace.took(time.monotonic() - now, len(lanes))
            told(everything, frame, alone)
        else:
            pool.spread(op, lanes, given, told)

    def _answer(self, session: Session, lanes: Indices, frame: Frame, alone: Alone | None = None) -> None:
        if session.held.withhold is not None and "error" not in frame:
            session.held.withhold(partial(self._stored, session, lanes, frame, alone))
        else:
            self._send(session, lanes, frame, alone)

    def _stored(self, session: Session, lanes: Indices, frame: Frame, alone: Alone | None, why: str | None) -> None:
        """What an answer tells is stored, or is not: then it is never told."""
        if why is None:
            self._send(session, lanes, frame, alone)
        else:
            self._end_crashed(session, lanes, "step", self._execution.unrecorded(session, why))

    def _send(self, session: Session, lanes: Indices, frame: Frame, alone: Alone | None = None) -> None:
        assert session.lanes is not None, "a pool has lanes"
        seqs = session.lanes.seqs[lanes]
        named: dict[str, Any] = {"lanes": lanes, "seqs": seqs}
        try:
            packed = session.held.pack({**named, **frame})
        except UnencodableValue as exc:
            if alone is not None and len(lanes) > 1:  # one lane's info must not cost the others their results
                for k in range(len(lanes)):
                    self._send(session, lanes[k : k + 1], alone(k))
                return
            env_id = session.held.pool.first + int(lanes[0])
            whose = UnencodableValue(exc.message, **{**exc.details, "env_id": env_id})
            packed = pack({**named, **error_reply(whose)})
        if len(packed) > MAX_MESSAGE_BYTES:
            why = f"a reply of {len(packed)} bytes is over the limit of {MAX_MESSAGE_BYTES}; step fewer lanes at once"
            packed = pack({**named, **error_reply(MessageTooLarge(why, size_bytes=len(packed)))})
        for to in self._table.answered_together(session.lanes, lanes, packed):
            self._replies.send(to, packed, int(lanes[0]), int(seqs[0]))
        if session.held.counts is not None:
            asyncio.get_running_loop().call_soon(session.held.counts)
        if session.state is State.ENDING and not session.running:
            self._execution.dispose(session)

    def _end_crashed(self, session: Session, lanes: Indices, op: str, exc: BaseException) -> None:
        """A sub-environment's exception ends the session; lanes that still run are answered when they finish."""
        assert session.lanes is not None, "a pool has lanes"
        error = self._ended_with(session) if isinstance(exc.__cause__, asyncio.CancelledError) else None
        if error is None:
            error = error_reply(self._execution.crashed(session.id, op, exc))
            self._table.ending(session, "ended", last=(session.epoch, ANY_LANE, 0, pack(error)))
            session.held.cancel()
        self._answer(session, lanes, error)

    def _ended_with(self, session: Session) -> Frame | None:
        """What ended a session, if an answer did: a lane that was cancelled for it has nothing else to say."""
        if session.state is not State.ENDING:
            return None
        last = self._table.last_answer(session.key, session.epoch, ANY_LANE, 0)
        return None if last is None else unpack(last)
