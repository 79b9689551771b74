"""Recovery: a lost session opened again elsewhere, in the state that it had (R8)."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from meshrl.client.opening import Opening
from meshrl.errors import MeshError, SessionLost
from meshrl.protocol.journal import CHANGING, LASTING_LOST, Journal
from meshrl.protocol.seeds import is_seed
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame
from meshrl.wire.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.client.context import Context
    from meshrl.wire.messages import Description, Kind

OnLoss = Literal["raise", "truncate", "resume"]
ON_LOSS: tuple[OnLoss, ...] = get_args(OnLoss)
# What became of the worker that held it: it is not asked again before it says that it is there.
GONE = frozenset({"worker_lost", "worker_frozen"})
# Of all that could have taken it, none was there, or had room, or an equal env.
NO_WORKER = "no_worker"
# Errors of requests that changed nothing; after any other nobody knows.
REFUSALS = frozenset({"not_allowed", "reset_needed", "invalid_seed", "malformed_message"})
# It would be the same again.
HOPELESS = frozenset({"step_deadline"})


@dataclass(slots=True, eq=False)
class Recovery:
    """What is needed to open a session again.

    Attributes:
        context: of the mesh.
        kind: of what it holds.
        asked: its name, as the user wrote it.
        where: capabilities that the worker must have.
        request: the open's own fields.
        wait_s: how long a worker and a slot are looked for.
        resumes: whether the state is brought back; else it is only opened again, for the next reset.
        journal: of its lane.
        seed: the last of a reset.
        told: the last answer to a reset or a step, as it arrived.
        anew: the state is gone: what is opened next begins with nothing but the attributes that were set.
        untold: why, until somebody was told.
        first: the loss that it was.
        called: whether a method was called: nobody knows what that did.
    """

    context: Context
    kind: Kind
    asked: str
    where: Mapping[str, Any] | None
    request: dict[str, Any]
    wait_s: float
    resumes: bool
    journal: Journal = field(default_factory=Journal)
    seed: int | None = None
    told: Kept = b""
    anew: bool = False
    untold: SessionLost | None = None
    first: SessionLost | None = None
    called: bool = False

    def copy(self) -> Recovery:
        """That of another session in the same state."""
        return replace(self, journal=self.journal.copy())

    def opening(self, session: str, epoch: int, avoid: Collection[str], deadline: float) -> Opening:
        """An open of the session's next epoch."""
        return Opening(
            self.context,
            self.kind,
            self.asked,
            wait=max(0.0, deadline - time.monotonic()),
            where=self.where,
            request=self.request,
            session=session,
            epoch=epoch,
            avoid=avoid,
        )

    def note(self, op: str, body: bytes, answer: Kept, frame: Frame, seconds: float) -> None:
        """A request of the lane was answered, in so many seconds."""
        if op not in CHANGING:
            return
        if op == "step":
            self.told = answer
            if self.resumes:
                self.journal.note(op, body, answer, seconds, digest=frame.get("digest"))
            return
        if op == "reset":
            self.told = answer
        self.called = self.called or op == "call"
        if not self.resumes and op != "set_attr":
            return
        seeded = op == "reset" and (frame.get("seed") is not None or "state" in frame)
        told = {"nth": frame["nth"]} if "nth" in frame else {}
        if seeded and "state" in frame:
            body = pack({**unpack(body), "state": frame["state"], "last_seed": self.seed, **told})
        elif seeded:  # the seed may be one that the worker drew
            self.seed = frame["seed"]
            body = pack({**unpack(body), "seed": self.seed, **told})
        self.journal.note(op, body, answer, seconds, seeded=seeded, digest=frame.get("digest"))

    def begins_anew(self, body: bytes) -> bool:
        """Whether a reset leaves nothing of what was before, but what was set and can be set again."""
        return self._may_begin_anew and is_seed(unpack(body).get("seed"))

    @property
    def _may_begin_anew(self) -> bool:
        return not self.called and self.journal.lacking != LASTING_LOST

    def refused(self, op: str, exc: MeshError) -> None:
        """A request was answered with an error."""
        if op in CHANGING and exc.code not in REFUSALS:
            self.journal.unsure(op)

    def lacking(self, lost: SessionLost) -> str:
        """Why the state cannot be brought back; empty if it can."""
        if self.anew:
            return ""
        if not self.resumes:
            return "not_asked_for"
        return str(lost.details["reason"]) if lost.details.get("reason") in HOPELESS else self.journal.lacking

    def give_up(self, lost: SessionLost, why: str, detail: str = "") -> SessionLost:
        """The state is gone; gives what the user is to be told."""
        self.journal.forget()
        if not self.anew:
            self.first, self.anew = lost, True
        first = self.first or lost
        text = f"{first.message}. It was not resumed ({why}){': ' if detail else ''}{detail}"
        self.untold = SessionLost(text, **{**first.details, "not_resumed": why})
        return self.untold


def same(one: Description, other: Description, *, exactly: bool) -> bool:
    """Whether sessions of these can follow one another.

    Args:
        one: of the session that was lost.
        other: of the one in its place.
        exactly: whether the state is to be the same; else it only has to look like it to its user.
    """
    if exactly:
        return bool(one.fingerprint) and one.fingerprint == other.fingerprint
    return one.observation_space == other.observation_space and one.action_space == other.action_space
