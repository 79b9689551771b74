"""Enforcing deadlines on code that cannot be interrupted: its client is told, its session ends, and maybe the worker.

A thread cannot be killed. So a request over its deadline is answered by the pulse, which nothing blocks, and its
session is over; a coroutine is cancelled. Where the slot is still held a moment later, the worker is stuck with code
that never ends, and condemns itself if somebody replaces it (:meth:`meshrl.worker.service.Service.condemn`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from meshrl.errors import DeadlineExceeded
from meshrl.protocol.session import Session, SessionTable
from meshrl.wire.codec import pack
from meshrl.wire.frames import Indices, error_reply
from meshrl.worker.child import late_message
from meshrl.worker.isolation import Deadlines
from meshrl.worker.overdue import Late, Overdue

log = logging.getLogger("meshrl.worker")

# Ends the session of a late request, given its lanes (of a pool) and its answer; on any thread.
EndLate = Callable[[Session, Indices | None, bytes], None]


class Enforcing:
    """Enforces them on one worker; used by its pulse.

    Args:
        worker: its id.
        table: its sessions.
        deadlines: the operator's.
        interval_s: between looks.
        end_late: ends the session of a late request.
        condemn: ends the worker, and why; None where nobody would replace it.
    """

    def __init__(
        self,
        worker: str,
        table: SessionTable,
        deadlines: Deadlines,
        interval_s: float,
        *,
        end_late: EndLate,
        condemn: Callable[[str], None] | None,
    ) -> None:
        self._worker = worker
        self._table = table
        self._overdue = Overdue(deadlines, interval_s)
        self._end_late = end_late
        self._condemn = condemn
        self._messages: dict[Session, str] = {}

    def look(self, now: float) -> list[tuple[str, bytes]]:
        """The answers to what has become late, each with its reply subject."""
        answers: list[tuple[str, bytes]] = []
        for late in self._overdue.look(self._table, now):
            error = self._error(late)
            log.error("worker %s: %s", self._worker, error.message)
            self._messages[late.session] = error.message
            answers += self._answers(late, error)
        stuck = self._overdue.stuck(now)
        if stuck is not None and self._condemn is not None:
            self._condemn(self._messages[stuck])
        for session in [one for one in self._messages if self._table.get(one.key) is not one]:
            del self._messages[session]
        return answers

    def _error(self, late: Late) -> DeadlineExceeded:
        what_then = "its session is over, open a new one; a call that hangs on a thread cannot be ended, so "
        what_then += (
            "its worker ends, and is replaced"
            if self._condemn is not None
            else 'its slot stays taken (isolation="process" could free it)'
        )
        facts: dict[str, Any] = {"env_id": int(late.lanes[0])} if late.lanes is not None else {}
        name = f"session {late.session.id}"
        return DeadlineExceeded(
            late_message(name, late.op, late.which, late.deadline_s, what_then),
            deadline=late.which,
            deadline_s=late.deadline_s,
            op=late.op,
            worker=self._worker,
            **facts,
        )

    def _answers(self, late: Late, error: DeadlineExceeded) -> list[tuple[str, bytes]]:
        session = late.session
        if late.lanes is not None:
            assert session.lanes is not None, "a pool has lanes"
            self._end_late(session, late.lanes, pack(error_reply(error)))
            seqs = session.lanes.seqs[late.lanes]
            packed = pack({"lanes": late.lanes, "seqs": seqs, **error_reply(error)})
            return [(to, packed) for to in session.lanes.reply_to(late.lanes) if to]
        if late.op == "constructor":
            packed, to = pack(error_reply(error)), session.reply_to
        else:
            assert session.lane is not None, "any other has one lane"
            packed, to = pack(error_reply(error, session.lane.seq)), session.lane.reply_to
        self._end_late(session, None, packed)
        return [(to, packed)] if to else []
