"""The audit: who opened what, with which kwargs, and how it ended, to be said on a subject of its own.

Opens and ends are noted by the worker's first thread, which only appends, and said by the pulse at its next look: no
step and no open waits for it. Entries are numbered, so that whoever keeps them sees whether one is missing; while
the server is away they wait here, within bounds. Only sessions are noted, not their steps, nor stateless acts.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from meshrl.errors import MeshError
from meshrl.protocol.session import Key, Last, Session
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Open
from meshrl.wire.subjects import VERSION

# While the server is away, as many wait; the oldest goes first, and its number is missing then.
MAX_HELD = 10_000
# Anybody can be refused without end, and is not to push out what others have opened.
MAX_REFUSED = 1_000
# An entry is a line in a log: of kwargs beyond this, sizes alone are told.
MAX_KWARGS_BYTES = 4096
MAX_KWARGS_NAMES = 64
MAX_TYPE_CHARS = 128


class Audit:
    """The entries of one worker that are still to be said.

    Args:
        worker: its id.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._numbers = itertools.count(1)
        self._entries: deque[tuple[float, dict[str, Any]]] = deque(maxlen=MAX_HELD)
        self._open: dict[Key, tuple[float, dict[str, Any]]] = {}  # since when, and who and what

    def opened(self, user: str, open_: Open) -> None:
        """Slots were given to an open; its env is about to be constructed."""
        now = time.monotonic()
        what = self._what(user, open_)
        self._open[user, open_.session] = now, what
        self._note(now, "opened", {**what, **_asked(open_)})

    def refused(self, user: str, open_: Open, exc: MeshError) -> None:
        """An open was answered with an error."""
        if len(self._entries) >= MAX_REFUSED:
            next(self._numbers)
            return
        self._note(time.monotonic(), "refused", {**self._what(user, open_), **_asked(open_), **_error(exc)})

    def failed(self, session: Session, exc: MeshError) -> None:
        """What was opened was not constructed."""
        self._end(session.key, {"reason": "not_constructed", **_error(exc)})

    def ended(self, session: Session, reason: str, last: Last | None) -> None:
        """A session has ended; ``last`` is the answer with which it did, of one whose env raised."""
        self._end(session.key, {"reason": reason, **({} if last is None else {"last": last[3]})})

    def stop(self) -> None:
        """The worker ends: so does what is open."""
        for key in list(self._open):
            self._end(key, {"reason": "worker_stopped"})

    def _end(self, key: Key, facts: dict[str, Any]) -> None:
        began = self._open.pop(key, None)
        if began is not None:  # its end was noted before, with more of why
            now = time.monotonic()
            self._note(now, "ended", {**began[1], **facts, "lasted_s": max(0.0, now - began[0])})

    def _note(self, now: float, event: str, facts: dict[str, Any]) -> None:
        self._entries.append((now, {"v": VERSION, "n": next(self._numbers), "event": event, **facts}))

    def _what(self, user: str, open_: Open) -> dict[str, Any]:
        what: dict[str, Any] = {
            "worker": self._worker,
            "user": user,
            "session": open_.session,
            "epoch": open_.epoch,
            "kind": open_.kind,
            "name": open_.name,
        }
        if open_.form != "single":
            what |= {"form": open_.form, "num_envs": open_.num_envs}
        return what

    def taken(self, now: float) -> Iterator[bytes]:
        """The entries that wait, as they are sent (:class:`~meshrl.wire.audited.Audited`), on the pulse's thread.

        Args:
            now: in monotonic seconds.
        """
        while self._entries:
            at, entry = self._entries.popleft()
            last = entry.pop("last", None)
            if last is not None:
                entry |= _error_in(last)
            yield pack({**entry, "ago_s": max(0.0, now - at)})


def _asked(open_: Open) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if open_.render_mode is not None:
        asked["render_mode"] = open_.render_mode
    if open_.kwargs:
        asked["kwargs"] = _told(open_.kwargs)
    return asked


def _told(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as far as they fit into an entry."""
    if len(kwargs) <= MAX_KWARGS_NAMES and len(pack(kwargs)) <= MAX_KWARGS_BYTES:
        return kwargs
    some = itertools.islice(kwargs.items(), MAX_KWARGS_NAMES)
    return {name[:64]: f"({len(pack(value))} bytes)" for name, value in some}


def _error(exc: MeshError) -> dict[str, Any]:
    raised = exc.details.get("type")
    return {"code": exc.code, **({"type": raised[:MAX_TYPE_CHARS]} if isinstance(raised, str) else {})}


def _error_in(reply: bytes) -> dict[str, Any]:
    """What of the answer with which a session ended is told: not its message, in which there may be anything."""
    body = unpack(reply)
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return {}
    raised = (error.get("details") or {}).get("type")
    return {"code": str(error.get("code")), **({"type": raised[:MAX_TYPE_CHARS]} if isinstance(raised, str) else {})}
