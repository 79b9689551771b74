"""Placement: which worker a client asks for slots, and what of each it believes to be free (R5).

The rules:

- The least loaded worker is asked, by the fraction of its slots that is taken; ties are broken by a random
  draw, so that clients which see the same do not all do the same. When none has room, the shortest queue for
  its size. A worker where others wait comes after those where nobody does: an open that needs more slots than are
  free there is overtaken by nobody, however many are free.
- What a worker advertised is old by up to an interval. The client adds what it did itself since: opens under
  way, sessions granted, sessions closed. Each counts until an advertisement arrives that must have been sent
  after it. One that arrives within half an interval may have been sent before it, on another connection;
  counting a grant twice for that long makes a worker look busier, counting it not at all would overfill it.
- A worker's answer to an open carries its load. It left the worker together with that answer, so it holds
  exactly what was granted to this client before it, and it stands until a younger advertisement.
- How a vector is cut over several workers is said in :mod:`meshrl.protocol.cutting`.

A client opens thousands of sessions at once, and each looks at what all others do: what is counted here is found
without going through it one by one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from meshrl.errors import UsageError
from meshrl.protocol.cutting import Part, equal, levelled
from meshrl.wire.messages import MAX_NUM_ENVS

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
class Shard:
    """One shard of a plan.

    Attributes:
        worker: the id of the worker it is meant for.
        num_envs: its sub-environments, at least 1.
    """

    worker: str
    num_envs: int


@dataclass(frozen=True)
class _Answer:
    """The load that came with an answer."""

    at: float
    load: Load


@dataclass
class _Own:
    """What this client did at one worker.

    Attributes:
        asks: when opens were sent that are under way, the oldest first, by how many slots each is for.
        answer: the newest.
    """

    asks: dict[int, list[float]] = field(default_factory=dict)
    answer: _Answer | None = None
    # Slots that this client took (above 0) or gave back (below) since the newest answer, by when; the oldest first.
    marked_at: list[float] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    _sums: list[int] | None = None  # of marks, each with all after it

    def landed(self, slots: int) -> float | None:
        """Take out the oldest ask for that many slots; gives when it was sent."""
        times = self.asks.get(slots)
        if times is None:
            return None
        at = times.pop(0)
        if not times:
            del self.asks[slots]
        return at

    def mark(self, at: float, slots: int) -> None:
        """Slots were taken, or given back."""
        index = bisect_right(self.marked_at, at)
        self.marked_at.insert(index, at)
        self.marks.insert(index, slots)
        self._sums = None

    def answered(self, at: float, load: Load) -> None:
        """An answer came with the load of the worker. It holds every mark until now.

        Nor will they be needed later: an advertisement that takes the place of the answer was heard so long after it,
        and so after them, that it holds them as well.
        """
        self.answer = _Answer(at, load)
        self.marked_at, self.marks, self._sums = [], [], None

    def forget_marks(self, before: float) -> None:
        """Marks of before that are needed no more."""
        if self.marked_at and self.marked_at[0] < before:
            index = bisect_left(self.marked_at, before)
            del self.marked_at[:index], self.marks[:index]
            self._sums = None

    def marked(self, known_until: float | None, settle_s: float) -> int:
        """Slots taken on the whole, within ``settle_s`` before ``known_until`` or after it; None is all of them."""
        if self._sums is None:
            self._sums = list(accumulate(reversed(self.marks), initial=0))[::-1]
        return self._sums[0 if known_until is None else _young(self.marked_at, known_until, settle_s)]

    def asked(self, known_until: float, settle_s: float) -> int:
        """Slots of opens under way that were sent within ``settle_s`` before ``known_until``, or after it."""
        return sum(slots * (len(times) - _young(times, known_until, settle_s)) for slots, times in self.asks.items())


def _young(times: list[float], known_until: float, settle_s: float) -> int:
    """The index of the first that is not older than ``known_until`` by ``settle_s``."""
    return bisect_right(times, -settle_s, key=lambda at: at - known_until)


@dataclass(slots=True)
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
        """Opens that wait, and this client's slots asked for beyond the room, for each of its slots."""
        return (self.waiting + max(-self.room, 0)) / self.slots

    @property
    def at_once(self) -> int:
        """The slots that an open would get now: none where others wait."""
        return 0 if self.waiting else self.free

    @property
    def largest(self) -> int:
        """The largest session that it could ever hold."""
        return min(self.slots, MAX_NUM_ENVS)


class Placement:
    """One client's choice of workers, and its own doings that the directory cannot know yet.

    Workers are named by id; one that was forgotten is known again by a new ask or a grant alone. Times are the
    client's monotonic seconds; draws are uniform in [0, 1).
    """

    def __init__(self) -> None:
        self._own: dict[str, _Own] = {}

    # what happened

    def asked(self, worker: str, now: float, slots: int = 1) -> None:
        """An open was sent; exactly one of :meth:`granted`, :meth:`busier`, :meth:`withdrawn` follows.

        Args:
            worker: where to.
            now: when.
            slots: how many it is for; to be said again in what follows.
        """
        self._at(worker).asks.setdefault(slots, []).append(now)

    def granted(self, worker: str, now: float, load: Load | None = None, slots: int = 1) -> None:
        """An open was granted; ``load`` came with the grant, and holds it."""
        own = self._at(worker)
        # The slots were taken between the ask and now. A slow constructor delays the answer by seconds, in
        # which advertisements hold the slots already: so the mark is as old as the ask. A parked ask is older
        # than its slots, but until then the worker said it was full.
        asked_at = own.landed(slots)
        if load is None:
            own.mark(now if asked_at is None else asked_at, slots)
        else:
            own.answered(now, load)

    def released(self, worker: str, now: float, slots: int = 1) -> None:
        """A session of this client's ended, and its slots are free or soon will be."""
        own = self._own.get(worker)
        if own is not None:
            own.mark(now, -slots)

    def busier(self, worker: str, load: Load, now: float, slots: int = 1) -> None:
        """An open was answered with the worker's load and no grant: busier than believed, or full."""
        self.withdrawn(worker, slots)
        own = self._own.get(worker)
        if own is not None:
            own.answered(now, load)

    def withdrawn(self, worker: str, slots: int = 1) -> None:
        """An open came to nothing: the client gave it up, or it was answered with an error."""
        own = self._own.get(worker)
        if own is not None:
            own.landed(slots)

    def forget(self, worker: str) -> None:
        """The worker left."""
        self._own.pop(worker, None)

    # what to do

    def believed_free(self, entry: Entry) -> int:
        """The slots believed free at a worker, from 0 to all of them."""
        return self._view(entry).free

    def choose(
        self, entries: Iterable[Entry], *, draw: float, exclude: Collection[str] = (), num_envs: int = 1
    ) -> Choice | None:
        """The worker to ask for ``num_envs`` slots.

        Args:
            entries: the candidates, one for each worker.
            draw: breaks ties.
            exclude: workers not to ask.
            num_envs: slots that are needed at one worker.

        Returns:
            the least loaded worker that has room for all of them, if there is one where nobody waits; when none
            has, the one with the shortest queue for its slots among those with so many slots, where the open
            will be parked; None when nobody is left to ask.
        """
        views = [view for view in self._usable(entries) if view.largest >= num_envs and view.worker not in exclude]
        if not views:
            return None
        roomy = [view for view in views if view.at_once >= num_envs]
        roomy = roomy or [view for view in views if view.free >= num_envs]
        if roomy:
            least = min(view.taken for view in roomy)
            ties = [view for view in roomy if view.taken == least]
        else:
            shortest = min(view.queue for view in views)
            ties = [view for view in views if view.queue == shortest]
        chosen = _drawn(ties, [1] * len(ties), draw)
        return Choice(chosen.worker, chosen.free if roomy else 0)

    def spread(
        self,
        entries: Iterable[Entry],
        num_envs: int,
        shards: int | None = None,
        *,
        draw: float = 0.0,
        within_room: bool = False,
        parked_at: str | None = None,
    ) -> list[Shard]:
        """How to cut a vector over workers.

        Without ``shards``, every worker with room gets one (the least loaded ones, where they are more than
        sub-environments), all of nearly the same size as far as there is room, the larger ones at the least
        loaded. With it, there are just so many, whose sizes differ by at most one, on the least loaded workers
        with room; several on one where there are fewer workers than shards. What the workers have no room for is
        laid upon them by the same rules, to wait there.

        Args:
            entries: the candidates, one for each worker.
            num_envs: sub-environments of the vector, at least 1.
            shards: how many; None for as many as fit.
            draw: in [0, 1); breaks ties.
            within_room: no shard is to wait.
            parked_at: where an open of this client's waits that the plan is to replace: it is not in its way.

        Returns:
            the shards, in the order of their sub-environments; empty when the workers do not have the slots
            (or, ``within_room``, the room).

        Raises:
            UsageError: there are fewer sub-environments than 1 or than shards, or fewer shards than 1.
        """
        if num_envs < 1 or (shards is not None and not 1 <= shards <= num_envs):
            raise UsageError(
                f"a vector of {num_envs} sub-environments cannot be cut into {shards or 'any'} shards; give num_envs "
                "of 1 or more, and shards from 1 to num_envs, or none",
                num_envs=num_envs,
                shards=shards,
            )
        views = self._usable(entries)
        turn = int(draw * len(views))
        views = views[turn:] + views[:turn]
        workers = []
        for index, view in enumerate(views):
            in_the_way = view.waiting - (view.worker == parked_at)
            room = 0 if in_the_way > 0 else min(view.free, view.largest)
            limit = room if within_room else view.largest
            workers.append(Part(index, view.slots, view.slots - view.free, room, limit))
        cut = levelled(workers, num_envs) if shards is None else equal(workers, num_envs, shards)
        return [Shard(views[index].worker, size) for index, size in cut]

    def should_move(self, entries: Iterable[Entry], parked_at: str, draw: float, num_envs: int = 1) -> str | None:
        """Whether an open that is parked at a full worker had better ask another one.

        Another worker with room for it and nobody waiting is worth a move with probability (how often its free
        slots hold such an open) / (all that wait anywhere): on average as many move as there is room for, so that
        one freed slot does not wake every waiter. To be asked once for each parked open each time the directory
        has changed, not more often.

        Args:
            entries: the candidates, the one it is parked at among them.
            parked_at: where it waits.
            draw: decides both whether and where to.
            num_envs: the slots it needs.

        Returns:
            the worker to ask; None to stay.
        """
        views = [view for view in map(self._view, entries) if view.slots]
        targets = [
            view
            for view in views
            if view.worker != parked_at and min(view.at_once, view.largest) >= num_envs and not view.draining
        ]
        room = sum(view.free // num_envs for view in targets)
        # At least this one waits, even where no advertisement says so yet.
        chance = min(room / max(sum(view.waiting for view in views), 1), 1.0)
        if draw >= chance:
            return None
        # Below the chance, the draw is uniform again: it is used once more, to spread by free slots.
        return _drawn(targets, [view.free // num_envs for view in targets], draw / chance).worker

    # beliefs

    def _usable(self, entries: Iterable[Entry]) -> list[_View]:
        return [view for view in map(self._view, entries) if view.slots and not view.draining]

    def _at(self, worker: str) -> _Own:
        return self._own.setdefault(worker, _Own())

    def _view(self, entry: Entry) -> _View:
        ad = entry.advertisement
        own = self._own.get(entry.worker)
        if own is None:
            return _View(entry.worker, ad.slots, ad.free, ad.waiting, ad.draining)
        settle_s = REFLECTED_INTERVALS * ad.interval_s
        own.forget_marks(entry.heard_at - settle_s - _FORGOTTEN_INTERVALS * ad.interval_s)
        answer = own.answer
        if answer is not None and entry.heard_at - answer.at < settle_s:
            # 1. The worker's own answer is younger. Opens under way are not in it, unless they have long been
            # parked.
            load = answer.load
            slots, free, waiting, draining = load.slots, load.free, load.waiting, load.draining
            known_until, marked = answer.at, own.marked(None, settle_s)
        else:
            # 2. The advertisement is; what is younger than it, or about as old, comes on top.
            slots, free, waiting, draining = ad.slots, ad.free, ad.waiting, ad.draining
            known_until, marked = entry.heard_at, own.marked(entry.heard_at, settle_s)
        room = free - own.asked(known_until, settle_s) - marked
        return _View(entry.worker, slots, room, waiting, draining or ad.draining)


def _drawn(views: list[_View], weights: list[int], draw: float) -> _View:
    """One of ``views``, by a draw in [0, 1) over their weights."""
    left = draw * sum(weights)
    for view, weight in zip(views, weights, strict=True):
        left -= weight
        if left < 0:
            return view
    return views[-1]  # a product just below the sum may round up to it
