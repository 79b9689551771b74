"""The journal of a lane: what brought it into its state, for a worker that has to do it again (R8).

It holds every request that changed something and was answered; what was refused or raised is not in it. A seeded reset
makes an env forget its episodes, so the journal begins anew there, as it does where the worker said what outlives a
reset without a seed. It does not make it forget its attributes, so what
was set stays; and what a method did nobody knows, so nothing is dropped any more once one was called.

    in it        reset, step, call, set_attr
    not in it    render, state, get_attr, is_wrapped
    bounded by   MAX_ENTRIES and MAX_BYTES; beyond them it is given up until it begins anew

With it goes what a replay must come to: the digest that the worker said last, or the answers from which it can be
counted, which is done when somebody needs it. Steps are only put aside as they are answered, and noted some at a time:
what runs once between two messages finds its code and data in no cache, and costs some times as much (measured: 3 x).
"""

from __future__ import annotations

from typing import Any

from meshrl.errors import MalformedMessage
from meshrl.protocol.digest import Digest
from meshrl.protocol.uncounted import Uncounted
from meshrl.wire.codec import unpack
from meshrl.wire.kept import Kept, whole

CHANGING = frozenset({"reset", "step", "call", "set_attr"})
# The part of those whose effect a seeded reset undoes.
_OF_EPISODES = frozenset({"reset", "step"})
# Why a journal cannot be replayed, and never again: what was set or called is not in it.
LASTING_LOST = "attributes_lost"
MAX_ENTRIES = 1_000_000
MAX_BYTES = 32 * 1024 * 1024
# Of answers that are in no digest yet: some hundred steps of an env whose observations are small.
UNCOUNTED_BYTES = 256 * 1024
# Steps that are noted together.
TOGETHER = 32


class Journal:
    """What one lane was asked, as it was sent, and what it told."""

    __slots__ = (
        "_aside",
        "_aside_bytes",
        "_begun",
        "_bytes",
        "_called",
        "_digest",
        "_entries",
        "_lacking",
        "_said",
        "_seconds",
        "_uncounted",
    )

    def __init__(self) -> None:
        self._aside: list[tuple[bytes, Kept, float, bytes | None]] = []
        self._aside_bytes = 0
        self._entries: list[tuple[str, bytes]] = []
        self._lacking = ""
        self._seconds = 0.0
        self._bytes = 0
        self._called = False
        self._begun = False  # with a reset of which its worker said how to do it again
        self._digest: Digest | None = None
        self._said: bytes | None = None  # by a worker that counts itself
        self._uncounted: Uncounted[tuple[int, Kept]] = Uncounted(UNCOUNTED_BYTES)

    def __repr__(self) -> str:
        why = f", {self._lacking}" if self._lacking else ""
        return f"<Journal of {len(self._entries) + len(self._aside)} requests{why}>"

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def entries(self) -> list[tuple[str, bytes]]:
        """Pairs (op, the request's body), the oldest first."""
        self._note_all()
        return self._entries

    @property
    def lacking(self) -> str:
        """Why it cannot be replayed; empty if it can."""
        self._note_all()
        return self._lacking

    @property
    def seconds(self) -> float:
        """How long its requests took."""
        self._note_all()
        return self._seconds

    def copy(self) -> Journal:
        """Another one, with the same in it."""
        self._note_all()
        other = Journal()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other._entries = list(self._entries)
        other._digest = None if self._digest is None else self._digest.copy()
        other._uncounted = self._uncounted.copy()
        other._aside = []  # it is empty, and its own
        return other

    @property
    def digest(self) -> bytes | None:
        """Of what the worker told since the last seeded reset; None before anything.

        Raises:
            MalformedMessage: an answer cannot be counted.
        """
        self._note_all()
        try:
            while len(self._uncounted):
                self._count(self._uncounted.take()[1])
        except Exception as exc:  # whatever comes of what a worker may send
            self._give_up("answer_lost")
            raise MalformedMessage("an answer cannot be counted: nobody knows what it told") from exc
        if self._said is None and self._digest is not None:
            return self._digest.value
        return self._said

    def fields(self) -> dict[str, Any]:
        """Those of the request that has it done again.

        Raises:
            MalformedMessage: an answer cannot be counted.
        """
        return {"journal": [list(entry) for entry in self.entries], "digest": self.digest}

    def forget(self) -> None:
        """The state is gone; what was set is known all the same, unless it was given up."""
        self._note_all()
        if self._lacking == LASTING_LOST:
            self._entries = []
        self._begin_anew()
        self._count_anew()
        self._called = self._begun = False

    def unsure(self, op: str) -> None:
        """Nobody knows what a request did: its answer was an error."""
        self._note_all()
        self._give_up("answer_lost" if op in _OF_EPISODES and not self._called else LASTING_LOST)

    def note(
        self,
        op: str,
        body: bytes,
        answer: Kept,
        seconds: float = 0.0,
        *,
        seeded: bool = False,
        digest: bytes | None = None,
    ) -> None:
        """A request that changed something was answered.

        Args:
            op: one of :data:`CHANGING`.
            body: as it was sent.
            answer: as it arrived; it is kept.
            seconds: how long it took.
            seeded: whether it is a reset with a seed, or with all that outlives one of such an env.
            digest: what the worker said with its answer, if it counts itself.
        """
        if op == "step":
            if digest is not None:
                answer = b""  # it was counted already
            self._aside.append((body, answer, seconds, digest))
            self._aside_bytes += len(answer)
            if len(self._aside) >= TOGETHER or self._aside_bytes > UNCOUNTED_BYTES:
                self._note_all()
        else:
            self._note_all()
            self._note(op, body, answer, seconds, digest, seeded=seeded)

    def _note_all(self) -> None:
        """Note the steps that were put aside."""
        if self._aside:
            aside, self._aside, self._aside_bytes = self._aside, [], 0
            for body, answer, seconds, digest in aside:
                self._note("step", body, answer, seconds, digest)

    def _note(
        self, op: str, body: bytes, answer: Kept, seconds: float, digest: bytes | None, *, seeded: bool = False
    ) -> None:
        if op == "reset" and seeded:
            self._begun = True
            self._count_anew()
            if not self._called and self._lacking != LASTING_LOST:
                self._begin_anew()
        elif op == "reset" and not self._begun:  # its env says that it cannot be resumed
            self._give_up("not_resumable")
        if self._lacking:
            if op == "call":
                self._give_up(LASTING_LOST)
            if op != "set_attr" or self._lacking == LASTING_LOST:
                return
        self._called = self._called or op == "call"
        self._entries.append((op, body))
        self._bytes += len(body)
        self._seconds += seconds
        if digest is not None:
            self._said = digest
        elif op != "set_attr":
            self._keep(answer)
        if self._bytes > MAX_BYTES or len(self._entries) > MAX_ENTRIES:
            lasting = self._called or any(op == "set_attr" for op, _ in self._entries)
            self._give_up(LASTING_LOST if lasting else "journal_full")

    def _keep(self, answer: Kept) -> None:
        if self._said is not None:  # half of it was counted elsewhere
            self._give_up("answer_lost")
            return
        try:
            for _, overdue in self._uncounted.add(((0, answer),)):
                self._count(overdue)
        except Exception:  # noqa: BLE001  # whatever comes of what a worker may send
            self._give_up("answer_lost")

    def _count(self, answer: Kept) -> None:
        if self._digest is None:
            self._digest = Digest()
        self._digest.add(unpack(whole(answer)))

    def _give_up(self, why: str) -> None:
        """It cannot be replayed; what was set is kept as long as it is all that lasts."""
        if self._lacking != LASTING_LOST:
            self._lacking = why
        self._uncounted.clear()
        self._entries = [] if why == LASTING_LOST else [entry for entry in self._entries if entry[0] == "set_attr"]
        self._bytes = sum(len(body) for _, body in self._entries)

    def _begin_anew(self) -> None:
        self._entries = [entry for entry in self._entries if entry[0] == "set_attr"]
        self._bytes = sum(len(body) for _, body in self._entries)
        self._seconds = 0.0
        self._lacking = ""

    def _count_anew(self) -> None:
        """As a worker does that counts itself, with every such reset."""
        self._digest = self._said = None
        self._uncounted.clear()
