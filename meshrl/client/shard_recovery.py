"""The recovery of a shard: the journals of its sub-environments, told apart (R8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshrl.client.recovery import REFUSALS, Recovery
from meshrl.errors import MalformedMessage, MeshError
from meshrl.protocol.journal import CHANGING
from meshrl.protocol.journals import Journals, Origin
from meshrl.protocol.seeds import is_seed
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame
from meshrl.wire.kept import Kept

ALL = slice(None)
# The digests that went with an answer, None where there are none, and the origins with their rows.
Proof = tuple[Any, Sequence[tuple[int, Origin]]]
_NOTHING: Sequence[Any] = ()


@dataclass(slots=True, eq=False)
class ShardRecovery(Recovery):
    """What is needed to open a shard again.

    Attributes:
        journal: of its sub-environments.
        places: under derived seeding, by sub-environment, the origin of its last episode; else nothing.
    """

    journal: Journals = field(kw_only=True)  # type: ignore[assignment]  # that of one lane there
    places: dict[int, Origin] = field(default_factory=dict)

    def note(self, op: str, body: bytes, answer: Kept, frame: Frame, seconds: float) -> None:
        """A request of all of them was answered."""
        if op not in CHANGING:
            return
        journal = self.journal
        if op in {"step", "reset"}:
            self.told = answer
            if op == "step" and "origins" not in frame and "digests" not in frame:
                if self.resumes and not journal.hopeless:
                    journal.stepped(body, answer, seconds)
                return
            digests, origins = proof_of(frame, journal.count)
            if origins:
                self.began(origins)
            if self.resumes and not journal.hopeless:
                at = journal.asked(op, body)
                mask = None if op == "step" else unpack(body).get("mask")
                # Of a reset with a mask only those that were reset have told something.
                ids = None if mask is None else np.flatnonzero(mask)
                which = ALL if ids is None else ids
                own = digests if digests is None or ids is None else digests[ids]
                journal.told((at, answer, op, which, ids), origins, own, seconds)
            return
        self.called = self.called or op == "call"
        if op == "set_attr" or (self.resumes and not journal.hopeless):
            journal.changed(journal.asked(op, body), seconds)

    def began(self, origins: Iterable[tuple[int, Origin]]) -> None:
        """These sub-environments have begun episodes."""
        if self.request.get("seeding") == "derived":
            self.places.update(origins)

    def begins_anew(self, body: bytes) -> bool:
        """The same, of all sub-environments."""
        given = unpack(body)
        seeds = given.get("seeds")
        return self._may_begin_anew and "mask" not in given and bool(seeds) and all(map(is_seed, seeds))

    @property
    def roots(self) -> Frame:
        """Of derived seeding, where the seeds of the next episodes come from, as fields of a reset; else nothing."""
        places = [self.place(i) for i in range(self.journal.count)]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return {}
        return {"seeds": [place["root"] for place in known], "episodes": [place["episode"] for place in known]}

    def place(self, i: int) -> Frame | None:
        """Of derived seeding, the root of sub-environment ``i`` and how many of its seeds have been used."""
        origin = self.places.get(i)
        place: Any = None if origin is None else unpack(origin)
        return place if isinstance(place, dict) and {"root", "episode"} <= place.keys() else None

    def refused(self, op: str, exc: MeshError) -> None:
        """A request was answered with an error."""
        if op in CHANGING and exc.code not in REFUSALS:
            self.journal.unsure(ALL, op)


def proof_of(frame: Frame, rows: int) -> Proof:
    """The digests in an answer of so many rows (None where it has none), and the origins with their rows.

    Raises:
        MalformedMessage: they are none.
    """
    digests, origins = frame.get("digests"), frame.get("origins")
    if digests is None and origins is None:
        return None, _NOTHING
    if digests is not None and not (
        isinstance(digests, np.ndarray) and digests.dtype == np.uint64 and digests.shape == (rows,)
    ):
        raise MalformedMessage(f"the digests of an answer are {rows} of uint64")
    if origins is None:
        return digests, _NOTHING
    if not isinstance(origins, list) or len(origins) % 2:
        raise MalformedMessage("the origins of an answer are a list of rows, each with what began there")
    told = list(zip(origins[::2], origins[1::2], strict=True))
    if not all(type(row) is int and 0 <= row < rows and type(origin) is bytes for row, origin in told):
        raise MalformedMessage(f"the origins of an answer are of rows below {rows}, and packed")
    return digests, told
