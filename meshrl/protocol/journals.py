"""The journals of a shard's sub-environments: what brought each into its state, for a worker that does it again (R8).

One list of requests, as they were sent, and for each sub-environment the part of it that counts. It begins with its
*origin*: what the worker said of a reset (the seed, or what outlives a reset of such an env: its generator's state, a
snapshot), so that a fresh env which is given that, and reset, is where this one was.

    request          after it, a sub-environment's journal
    told an origin   begins with this reset: of the requests before, only the attributes that were set count
    step, reset, …   is longer by this request
    call             is longer, and never begins anew: nobody knows what a method did
    refused          is what it was
    another error    cannot be replayed until it begins anew: nobody knows what the request did

What each has told is in its digest, or in the answers that are in none yet (:mod:`~meshrl.protocol.told`).

What is asked and told is only put aside, and noted some at a time, as in :mod:`~meshrl.protocol.journal`.
What no sub-environment needs any more is dropped. Beyond ``MAX_BYTES`` those whose journals go back farthest are given
up, which is told if they are lost before they begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage
from meshrl.protocol.digests import Words
from meshrl.protocol.journal import LASTING_LOST, MAX_BYTES, TOGETHER
from meshrl.protocol.told import UNCOUNTED_BYTES, Answer, Told
from meshrl.wire.batches import Batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Indices
from meshrl.wire.kept import Kept

# What a worker said of a reset, as it said it.
Origin = bytes
_ALL = slice(None)


# One entry: what was asked, and the request's body.
Request = tuple[str, bytes]
# A step of all of them that was answered, which is most there is: the request's body, the answer, and its seconds.
Stepped = tuple[bytes, Kept, float]


class Journals:
    """The journals of a number of sub-environments, whose requests may be of all or of some of them.

    Args:
        count: how many there are.
        observations: batches of theirs.

    Attributes:
        hopeless: nothing can ever be proved, so that but for attributes nothing need be kept; known when the first
            reset was answered.
    """

    __slots__ = (
        "_aside",
        "_aside_bytes",
        "_asked",
        "_begins",
        "_begun",
        "_bytes",
        "_called",
        "_dropped",
        "_ends",
        "_lacking",
        "_lasting",
        "_origins",
        "_requests",
        "_seconds",
        "_told",
        "_took",
        "hopeless",
    )

    def __init__(self, count: int, observations: Batching) -> None:
        # What notes it (None: of a step of all), and what there is to note; functions, not methods: those would hold
        # this from within.
        self._aside: list[tuple[Callable[..., None] | None, tuple[Any, ...]]] = []
        self._aside_bytes = 0
        self._asked = 0  # requests so far
        self._requests: list[Request] = []
        self._took: list[float] = []
        self._dropped = 0  # how many were there before the first of those
        self._lasting: dict[Any, tuple[int, Request]] = {}  # of the dropped, those whose attributes are set still
        self._begins: Indices = np.full(count, -1, np.int64)
        self._ends: Indices = np.full(count, -1, np.int64)
        self._origins: list[Origin | None] = [None] * count
        self._lacking = [""] * count
        self._bytes = 0
        self._called = False
        self._begun = False  # with a reset of which its worker said how to do it again
        self._told = Told(count, observations)
        self.hopeless = False
        self._seconds = 0.0

    def __repr__(self) -> str:
        return f"<Journals of {len(self._origins)}: {self._asked - self._dropped} requests>"

    def __len__(self) -> int:
        self._note_all()
        return len(self._requests) + len(self._lasting)

    @property
    def count(self) -> int:
        """How many sub-environments there are."""
        return len(self._origins)

    @property
    def lacking(self) -> str:
        """Why one of them cannot be replayed; empty if all can."""
        self._note_all()
        return "not_resumable" if self.hopeless else next(filter(None, self._lacking), "")

    @property
    def seconds(self) -> float:
        """How long the requests in it took."""
        self._note_all()
        return self._seconds

    def asked(self, op: str, body: bytes) -> int:
        """A request that changes something; gives its position. It counts for those that :meth:`told` of it."""
        self._aside.append((Journals._note_asked, (op, body)))
        self._asked += 1
        return self._asked - 1

    def stepped(self, body: bytes, data: Kept, seconds: float) -> None:
        """All were asked to step and answered, without origins or digests: :meth:`asked` and :meth:`told` in one."""
        self._asked += 1
        self._put_aside(None, (body, data, seconds), len(data))

    def told(
        self,
        answer: Answer,
        origins: Sequence[tuple[int, Origin]] = (),
        digests: Words | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Some sub-environments have answered a reset or a step.

        Args:
            answer: it is kept.
            origins: of those that were reset by it, as far as that makes their journals begin anew.
            digests: of all that it is of, before it; None where the worker does not count itself.
            seconds: how long its request took, with the last answer to it.
        """
        self._put_aside(Journals._note_told, (answer, origins, digests, seconds), len(answer[1]))
        if answer[2] == "reset" or digests is not None:  # its worker has counted the one before, which is of no use now
            self._note_all()

    def _put_aside(self, note: Callable[..., None] | None, what: tuple[Any, ...], size: int) -> None:
        self._aside.append((note, what))
        self._aside_bytes += size
        if len(self._aside) >= TOGETHER or self._aside_bytes > UNCOUNTED_BYTES:
            self._note_all()

    def _note_all(self) -> None:
        if not self._aside:
            return
        aside, self._aside, self._aside_bytes = self._aside, [], 0
        steps: list[Any] = []
        for note, what in aside:
            if note is None:
                steps.append(what)
                continue
            if steps:
                self._note_stepped(steps)
                steps = []
            note(self, *what)
        if steps:
            self._note_stepped(steps)

    def _note_stepped(self, steps: list[Stepped]) -> None:
        """Those that came one after another, together: as ``asked`` and ``told`` of each would have it."""
        at = self._dropped + len(self._requests)
        self._requests += [("step", body) for body, _, _ in steps]
        took = [seconds for _, _, seconds in steps]
        self._took += took
        self._seconds += sum(took)
        self._bytes += sum([len(body) for body, _, _ in steps])
        if self._bytes > MAX_BYTES:
            self._give_up_oldest()
        self._ends[:] = at + len(steps) - 1
        self._count(self._told.keep([(at + k, data, "step", _ALL, None) for k, (_, data, _) in enumerate(steps)]))

    def _note_asked(self, op: str, body: bytes) -> None:
        self._requests.append((op, body))
        self._took.append(0.0)
        self._bytes += len(body)
        self._called = self._called or op == "call"
        if self._bytes > MAX_BYTES:
            self._give_up_oldest()

    def _note_told(
        self, answer: Answer, origins: Sequence[tuple[int, Origin]], digests: Words | None, seconds: float
    ) -> None:
        at, _, op, which, _ = answer
        if not self._begun and op == "reset":
            self._begun = bool(origins)
            if not origins:  # their envs say that they cannot be resumed
                self._give_up()
        if self.hopeless:
            return
        self._ends[which] = at
        self._took_so_long(at, seconds)
        if digests is not None:
            self._count(self._told.take_uncounted())
            self._told.said(answer, digests)
        else:
            self._count(self._told.keep((answer,)))
        if origins and not self._called:
            for i, origin in origins:
                if self._lacking[i] != LASTING_LOST:
                    self._begins[i], self._origins[i], self._lacking[i] = at, origin, ""
            self._drop_until(int(self._begins.min()))

    def _took_so_long(self, at: int, seconds: float) -> None:
        if seconds and at >= self._dropped:
            self._took[at - self._dropped] += seconds
            self._seconds += seconds

    def changed(self, at: int, seconds: float = 0.0) -> None:
        """All of them have answered a call or a set_attr, in so many seconds."""
        self._note_all()
        self._took_so_long(at, seconds)
        if self.hopeless:
            self._drop_until(at + 1)
        else:
            self._ends[:] = at

    def unsure(self, which: Indices | slice, op: str) -> None:
        """Nobody knows what a request did to these: its answer was an error."""
        self._note_all()
        lasting = op in {"call", "set_attr"} or self._called
        self._mark(which, LASTING_LOST if lasting else "answer_lost")

    def forget(self) -> None:
        """The state is gone: nothing is left but what was set."""
        self._note_all()
        self._drop_until(self._dropped + len(self._requests))
        if LASTING_LOST in self._lacking:
            self._lasting.clear()
        self._bytes = sum(len(body) for _, (_, body) in self._lasting.values())
        self._begins[:] = self._ends[:] = -1
        self._origins = [None] * len(self._origins)
        self._lacking = [""] * len(self._origins)
        self._called = self._begun = False
        self._told.forget()

    def fields(self) -> dict[str, Any]:
        """Those of the request that has them done again.

        Returns:
            ``journal``, the requests, the oldest first; of each sub-environment ``begins``, the position of the request
            in which it was reset (-1 for the very beginning), ``ends``, that of its last request, ``origins``, what
            that reset was given (None at the very beginning), and ``digests``, what it must come to.

        Raises:
            MalformedMessage: one of them cannot be done again, since an answer is none.
        """
        self._note_all()
        self._count(self._told.take())
        lacking = next(filter(None, self._lacking), "")
        if lacking:
            raise MalformedMessage("an answer cannot be counted: nobody knows what it told", lacking=lacking)
        kept = [request for _, request in sorted(self._lasting.values(), key=itemgetter(0))]
        # Positions are those of what is sent: of the dropped only what lasts.
        shift = len(kept) - self._dropped
        return {
            "journal": [[op, body] for op, body in (*kept, *self._requests)],
            "begins": np.where(self._begins < 0, -1, self._begins + shift),
            # Of one that was asked nothing since: what lasts counts all the same.
            "ends": np.where(self._ends < self._dropped, len(kept) - 1, self._ends + shift),
            "origins": list(self._origins),
            "digests": self._told.digests,
        }

    # ---------------------------------------------------------------- what was told

    def _count(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            try:
                self._told.count(answer)
            except Exception:  # noqa: BLE001  # whatever comes of what a worker may send
                _, _, op, which, _ = answer
                self.unsure(which, op)

    # ---------------------------------------------------------------- what is dropped

    def _give_up(self) -> None:
        """Nothing can ever be proved: only attributes are kept."""
        self.hopeless = True
        self._drop_until(self._dropped + len(self._requests))
        self._begins[:] = self._ends[:] = -1

    def _mark(self, which: Indices | slice, why: str) -> None:
        ids = np.arange(len(self._lacking))[which]
        for i in ids.tolist():
            if self._lacking[i] != LASTING_LOST:
                self._lacking[i] = why

    def _drop_until(self, position: int) -> None:
        """Drop the requests before ``position``; those that set attributes are kept aside."""
        count = position - self._dropped
        if count <= 0:
            return
        for at, (op, body) in enumerate(self._requests[:count], self._dropped):
            if op == "set_attr":
                self._keep(at, (op, body))
            else:
                self._bytes -= len(body)
        self._seconds -= sum(self._took[:count])
        del self._requests[:count], self._took[:count]
        self._dropped = position
        self._told.drop_before(position)

    def _keep(self, at: int, request: Request) -> None:
        """Of what sets an attribute the last counts: one of all sub-environments, or each of the same ones."""
        body = unpack(request[1])
        name, ids = (body.get("name"), body.get("outermost", False)), body.get("ids")
        every = ids is None or sorted(ids) == list(range(len(self._origins)))
        gone = [key for key in self._lasting if key[0] == name and (every or key[1] == tuple(ids))]
        for key in gone:
            self._bytes -= len(self._lasting.pop(key)[1][1])
        self._lasting[name, None if ids is None else tuple(ids)] = (at, request)

    def _give_up_oldest(self) -> None:
        """Half of the requests are too many: who needs those cannot be replayed until its journal begins anew."""
        half = self._dropped + -(-len(self._requests) // 2)
        self._mark(np.flatnonzero(self._begins < half), LASTING_LOST if self._called else "journal_full")
        self._begins = np.maximum(self._begins, half)
        self._drop_until(half)
