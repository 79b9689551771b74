"""Placement: which worker a client asks for a slot (R5).

The rules:

- The least loaded worker is asked, by the fraction of its slots that is taken; ties are broken by a random
  draw, so that clients which see the same do not all do the same. When none has room, the shortest queue for
  its size.
- What a worker advertised is old by up to an interval. The client adds what it did itself since: opens under
  way, sessions granted, sessions closed. Each counts until an advertisement arrives that must have been sent
  after it. One that arrives within half an interval may have been sent before it, on another connection;
  counting a grant twice for that long makes a worker look busier, counting it not at all would overfill it.
- A worker's answer to an open carries its load. It left the worker together with that answer, so it holds
  exactly what was granted to this client before it, and it stands until a younger advertisement.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshrl.protocol.directory import Entry
    from meshrl.wire.messages import Load

# An advertisement heard this many intervals after something holds it; half of one is 500 ms, far above any
# transit time.
REFLECTED_INTERVALS = 0.5

# Marks are dropped only some intervals later still: a worker's names are heard one after another, and a mark
# that the first already holds is needed for the last.
_FORGOTTEN_INTERVALS = 3.0


@dataclass(frozen=True)
class Choice:
    """Which worker to ask.

    Attributes:
        worker: its id.
        believed_free: free slots the client believes in, this open not counted; travels as
            ``Open.believed_free``. 0 when the open is to be parked.
    """

    worker: str
    believed_free: int


@dataclass(frozen=True)
class _Mark:
    """A slot this client took (1) or gave back (-1); ``order`` tells what came before an answer's load."""

    at: float
    order: int
    slots: int


@dataclass(frozen=True)
class _Answer:
    """The load that came with an answer."""

    at: float
    order: int
    load: Load


@dataclass
class _Own:
    """What this client did at one worker."""

    asks: deque[float] = field(default_factory=deque)  # when each open under way was sent
    marks: list[_Mark] = field(default_factory=list)
    answer: _Answer | None = None


@dataclass(frozen=True)
class _View:
    """A worker as believed now; ``room`` below 0 is demand of this client's that will have to queue."""

    worker: str
    slots: int
    room: int
    waiting: int
    draining: bool

    @property
    def free(self) -> int:
        return min(max(self.room, 0), self.slots)

    @property
    def taken(self) -> float:
        """The fraction of its slots that is taken, 0 to 1."""
        return (self.slots - self.free) / self.slots

    @property
    def queue(self) -> float:
        """Opens that wait, for each of its slots."""
        return (self.waiting + max(-self.room, 0)) / self.slots


class Placement:
    """One client's choice of workers, and its own doings that the directory cannot know yet.

    Workers are named by id; one that was forgotten is known again by a new ask or a grant alone. Times are the
    client's monotonic seconds; draws are uniform in [0, 1).
    """

    def __init__(self) -> None:
        self._own: dict[str, _Own] = {}
        self._order = itertools.count()

    # what happened

    def asked(self, worker: str, now: float) -> None:
        """An open was sent; exactly one of :meth:`granted`, :meth:`busier`, :meth:`withdrawn` follows."""
        self._at(worker).asks.append(now)

    def granted(self, worker: str, now: float, load: Load | None = None) -> None:
        """An open was granted; ``load`` came with the grant, and holds it."""
        own = self._at(worker)
        # The slot was taken between the ask and now. A slow constructor delays the answer by seconds, in
        # which advertisements hold the slot already: so the mark is as old as the ask. A parked ask is older
        # than its slot, but until then the worker said it was full.
        at = own.asks.popleft() if own.asks else now
        own.marks.append(_Mark(at, next(self._order), 1))
        if load is not None:
            own.answer = _Answer(now, next(self._order), load)

    def released(self, worker: str, now: float) -> None:
        """A session of this client's ended, and its slot is free or soon will be."""
        own = self._own.get(worker)
        if own is not None:
            own.marks.append(_Mark(now, next(self._order), -1))

    def busier(self, worker: str, load: Load, now: float) -> None:
        """An open was answered with the worker's load and no grant: busier than believed, or full."""
        self.withdrawn(worker)
        own = self._own.get(worker)
        if own is not None:
            own.answer = _Answer(now, next(self._order), load)

    def withdrawn(self, worker: str) -> None:
        """An open came to nothing: the client gave it up, or it was answered with an error."""
        own = self._own.get(worker)
        if own is not None and own.asks:
            own.asks.popleft()

    def forget(self, worker: str) -> None:
        """The worker left."""
        self._own.pop(worker, None)

    # what to do

    def believed_free(self, entry: Entry) -> int:
        """The slots believed free at a worker, from 0 to all of them."""
        return self._view(entry).free

    def choose(self, entries: Iterable[Entry], *, draw: float, exclude: Collection[str] = ()) -> Choice | None:
        """The worker to ask for one slot.

        Args:
            entries: the candidates, one for each worker.
            draw: breaks ties.
            exclude: workers not to ask.

        Returns:
            the least loaded worker that has room; when none has, the one with the shortest queue for its
            slots, where the open will be parked; None when nobody is left to ask.
        """
        views = [view for view in map(self._view, entries) if view.slots and not view.draining]
        views = [view for view in views if view.worker not in exclude]
        if not views:
            return None
        roomy = [view for view in views if view.free]
        if roomy:
            least = min(view.taken for view in roomy)
            ties = [view for view in roomy if view.taken == least]
        else:
            shortest = min(view.queue for view in views)
            ties = [view for view in views if view.queue == shortest]
        chosen = _drawn(ties, [1] * len(ties), draw)
        return Choice(chosen.worker, chosen.free)

    def should_move(self, entries: Iterable[Entry], parked_at: str, draw: float) -> str | None:
        """Whether an open that is parked at a full worker had better ask another one.

        Another worker with free slots and nobody waiting is worth a move with probability (its free slots) /
        (all that wait anywhere): on average as many move as there are slots, so that one freed slot does not
        wake every waiter. To be asked once for each parked open each time the directory has changed, not more
        often.

        Args:
            entries: the candidates, the one it is parked at among them.
            parked_at: where it waits.
            draw: decides both whether and where to.

        Returns:
            the worker to ask; None to stay.
        """
        views = [view for view in map(self._view, entries) if view.slots]
        targets = [
            view for view in views if view.worker != parked_at and view.free and not view.waiting and not view.draining
        ]
        free = sum(view.free for view in targets)
        # At least this one waits, even where no advertisement says so yet.
        chance = min(free / max(sum(view.waiting for view in views), 1), 1.0)
        if draw >= chance:
            return None
        # Below the chance, the draw is uniform again: it is used once more, to spread by free slots.
        return _drawn(targets, [view.free for view in targets], draw / chance).worker

    # beliefs

    def _at(self, worker: str) -> _Own:
        return self._own.setdefault(worker, _Own())

    def _view(self, entry: Entry) -> _View:
        ad = entry.advertisement
        own = self._own.get(entry.worker)
        if own is None:
            return _View(entry.worker, ad.slots, ad.free, ad.waiting, ad.draining)
        settle_s = REFLECTED_INTERVALS * ad.interval_s
        forget_before = entry.heard_at - settle_s - _FORGOTTEN_INTERVALS * ad.interval_s
        own.marks = [mark for mark in own.marks if mark.at >= forget_before]
        answer = own.answer
        if answer is not None and entry.heard_at - answer.at < settle_s:
            # 1. The worker's own answer is younger. Opens under way are not in it, unless they have long been
            # parked.
            load = answer.load
            slots, free, waiting, draining = load.slots, load.free, load.waiting, load.draining
            known_until = answer.at
            marks = [mark for mark in own.marks if mark.order > answer.order]
        else:
            # 2. The advertisement is; what is younger than it, or about as old, comes on top.
            slots, free, waiting, draining = ad.slots, ad.free, ad.waiting, ad.draining
            known_until = entry.heard_at
            marks = [mark for mark in own.marks if known_until - mark.at < settle_s]
        asks = sum(1 for at in own.asks if known_until - at < settle_s)
        room = free - asks - sum(mark.slots for mark in marks)
        return _View(entry.worker, slots, room, waiting, draining or ad.draining)


def _drawn(views: list[_View], weights: list[int], draw: float) -> _View:
    """One of ``views``, by a draw in [0, 1) over their weights."""
    left = draw * sum(weights)
    for view, weight in zip(views, weights, strict=True):
        left -= weight
        if left < 0:
            return view
    return views[-1]  # a product just below the sum may round up to it
