"""The journal of a lane: what brought it into its state, for a worker that has to do it again (R8).

It holds every request that changed something and was answered; what was refused or raised is not in it. A seeded reset
makes an env forget its episodes, so the journal begins anew there, as it does where the worker said what outlives a
reset without a seed. It does not make it forget its attributes, so what
was set stays; and what a method did nobody knows, so nothing is dropped any more once one was called.

    in it        reset, step, call, set_attr
    not in it    render, state, get_attr, is_wrapped
    bounded by   MAX_ENTRIES and MAX_BYTES; beyond them it is given up until it begins anew
"""

from __future__ import annotations

from typing import Any

CHANGING = frozenset({"reset", "step", "call", "set_attr"})
# The part of those whose effect a seeded reset undoes.
_OF_EPISODES = frozenset({"reset", "step"})
# Why a journal cannot be replayed, and never again: what was set or called is not in it.
LASTING_LOST = "attributes_lost"
MAX_ENTRIES = 1_000_000
MAX_BYTES = 32 * 1024 * 1024


class Journal:
    """What one lane was asked, as it was sent.

    Attributes:
        entries: pairs (op, the request's body), the oldest first.
        digest: what the worker said last of what it told since the last seeded reset; None before anything.
        lacking: why it cannot be replayed; empty if it can.
        seconds: how long its requests took.
    """

    __slots__ = ("_bytes", "_called", "digest", "entries", "lacking", "seconds")

    def __init__(self) -> None:
        self.entries: list[tuple[str, bytes]] = []
        self.digest: bytes | None = None
        self.lacking = ""
        self.seconds = 0.0
        self._bytes = 0
        self._called = False

    def __repr__(self) -> str:
        why = f", {self.lacking}" if self.lacking else ""
        return f"<Journal of {len(self.entries)} requests, {self._bytes} bytes{why}>"

    def __len__(self) -> int:
        return len(self.entries)

    def copy(self) -> Journal:
        """Another one, with the same in it."""
        other = Journal()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other.entries = list(self.entries)
        return other

    def fields(self) -> dict[str, Any]:
        """Those of the request that has it done again."""
        return {"journal": [list(entry) for entry in self.entries], "digest": self.digest}

    def forget(self) -> None:
        """The state is gone; what was set is known all the same, unless it was given up."""
        if self.lacking == LASTING_LOST:
            self.entries = []
        self._begin_anew()
        self.digest = None
        self._called = False

    def unsure(self, op: str) -> None:
        """Nobody knows what a request did: its answer was an error."""
        self._give_up("answer_lost" if op in _OF_EPISODES and not self._called else LASTING_LOST)

    def note(self, op: str, body: bytes, digest: bytes | None, seconds: float = 0.0, *, seeded: bool = False) -> None:
        """A request that changed something was answered.

        Args:
            op: one of :data:`CHANGING`.
            body: as it was sent.
            digest: what the worker said with its answer.
            seconds: how long it took.
            seeded: whether it is a reset with a seed, or with all that outlives one of such an env.
        """
        if digest is not None:
            self.digest = digest
        elif op in _OF_EPISODES:  # nothing could be proved
            self._give_up("not_resumable")
        if seeded and not self._called and self.lacking != LASTING_LOST:
            self._begin_anew()
        if self.lacking:
            return
        self._called = self._called or op == "call"
        self.entries.append((op, body))
        self._bytes += len(body)
        self.seconds += seconds
        if self._bytes > MAX_BYTES or len(self.entries) > MAX_ENTRIES:
            lasting = self._called or any(op == "set_attr" for op, _ in self.entries)
            self._give_up(LASTING_LOST if lasting else "journal_full")

    def _give_up(self, why: str) -> None:
        """It cannot be replayed; what was set is kept as long as it is all that lasts."""
        if self.lacking != LASTING_LOST:
            self.lacking = why
        self.entries = [] if why == LASTING_LOST else [entry for entry in self.entries if entry[0] == "set_attr"]
        self._bytes = sum(len(body) for _, body in self.entries)

    def _begin_anew(self) -> None:
        self.entries = [entry for entry in self.entries if entry[0] == "set_attr"]
        self._bytes = sum(len(body) for _, body in self.entries)
        self.seconds = 0.0
        self.lacking = ""
