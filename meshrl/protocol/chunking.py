"""Chunking: the chunks of one session's recording, one after another, and the episodes that end in each.

What is done for each row, and for each *run*, the rows of one episode of one lane that stand in a chunk, numpy does for
all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.chunks import Change, Chunk
from meshrl.protocol.digests import chained
from meshrl.protocol.joined import Noted, joined
from meshrl.protocol.noted import Indices
from meshrl.protocol.runs import CLOSED, CRASHED, RESET, Runs, ToldRows, firsts
from meshrl.protocol.transcript import Transcript

# By why a session ended. Of any other nobody knows whether it does not go on elsewhere.
ENDS = {"closed": CLOSED, "ended": CRASHED}


@dataclass(frozen=True, slots=True)
class Ended:
    """Episodes that ended, and have steps; those of a lane in order.

    Attributes:
        lanes: whose.
        numbers: of each, counted from 0 since its env was made.
        steps: of it.
        returns: the sum of its rewards.
        reasons: the position in :data:`~meshrl.protocol.runs.REASONS`.
        first: the number of the chunk in which it began.
    """

    lanes: Indices
    numbers: Indices
    steps: Indices
    returns: NDArray[np.float64]
    reasons: Indices
    first: Indices

    def __len__(self) -> int:
        return len(self.lanes)

    @classmethod
    def none(cls) -> Ended:
        """No episodes."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, nothing, np.zeros(0), nothing, nothing)

    def picked(self, which: Indices | slice) -> Ended:
        """Some of them."""
        return Ended(*(getattr(self, name)[which] for name in self.__slots__))

    @classmethod
    def joined(cls, parts: Sequence[Ended]) -> Ended:
        """All of these, lane after lane, and of each lane in their order."""
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__]
        return cls(*columns).picked(np.argsort(columns[0], kind="stable"))


class _Lanes:
    """Where the lanes stand behind the last chunk: the episode that each is in.

    Attributes:
        numbers: of the episode; -1 where nothing is known of any.
        steps: of it so far.
        returns: the sum of its rewards so far.
        first: the number of the chunk in which it began.
        over: whether it has ended, or there is none.
        torn: whether a part of it is missing.
    """

    def __init__(self, count: int) -> None:
        self.numbers = np.full(count, -1)
        self.steps = np.zeros(count, np.int64)
        self.returns = np.zeros(count)
        self.first = np.zeros(count, np.int64)
        self.over = np.ones(count, np.bool_)
        self.torn = np.zeros(count, np.bool_)

    def copy(self) -> _Lanes:
        """The same, of its own."""
        other = _Lanes(0)
        for name, column in vars(self).items():
            setattr(other, name, column.copy())
        return other


class Standing(NamedTuple):
    """Where a :class:`Chunker` stands; of its own making, for its own use."""

    n: int
    lanes: _Lanes
    digests: NDArray[np.uint64]
    touched: set[int]
    lost: set[int]
    policy: int | None
    stored: dict[int, _Stored]


class Chunker:
    """Makes the chunks of one session.

    Args:
        transcript: of the session.
        every: of each lane every so many episodes are recorded, the first among them.
        shows: whether observations and infos are in them; None where the level of the recording says so.

    Attributes:
        n: the number of the last chunk.
    """

    def __init__(self, transcript: Transcript, every: int = 1, *, shows: bool | None = None) -> None:
        self.n = 0
        self._transcript = transcript
        self._every = every
        self._shows = transcript.level == "full" if shows is None else shows
        self._lanes = _Lanes(transcript.count)
        self._digests = np.zeros(transcript.count, np.uint64)
        self._touched: set[int] = set()
        self._lost: set[int] = set()
        self._policy: int | None = None
        self._stored: dict[int, _Stored] = {}  # by lane, what of a replay is stored already

    def go_on(self, last: Chunk) -> None:
        """Go on with a recording that somebody else began: what is noted begins with what is stored, or some of it.

        Args:
            last: the last chunk of it that is stored.
        """
        self.n, lanes = last.n, self._lanes
        lanes.numbers, lanes.steps, lanes.returns = last.numbers.copy(), last.steps.copy(), last.returns.copy()
        lanes.over = last.over.copy()
        lanes.torn[list(last.lost)] = True
        self._touched = {*last.touched, *(change.lane for change in last.changes)}
        if last.policies:
            self._policy = last.policies[-1][1]
        self._take(Runs(last, last.started.numbers))
        lanes.first[:] = 0  # before this writer's own
        self._digests[last.lanes] = last.digests
        known = np.flatnonzero(lanes.numbers >= 0).tolist()
        self._stored = {i: _Stored(int(lanes.numbers[i]), int(lanes.steps[i]) + 1) for i in known}

    def standing(self) -> Standing:
        """Where it stands, for :meth:`go_back`."""
        lanes, digests = self._lanes.copy(), self._digests.copy()
        stored = {i: replace(one) for i, one in self._stored.items()}
        return Standing(self.n, lanes, digests, set(self._touched), set(self._lost), self._policy, stored)

    def go_back(self, to: Standing) -> None:
        """Stand where it stood then: what it was given since is given again, in other parts."""
        self.n, self._lanes, self._digests, self._touched, self._lost, self._policy, self._stored = to

    def leave_all(self, reason: int) -> Ended:
        """All episodes are over; gives those that were not."""
        left = self._left(np.arange(self._transcript.count), reason)
        self._lanes.over[:] = True
        return left

    @property
    def oldest(self) -> int:
        """The number of the chunk in which the oldest episode that goes on began."""
        return int(self._lanes.first[~self._lanes.over].min(initial=self.n))

    def lose(self, lanes: set[int]) -> None:
        """Something of these is missing from now on, until they are reset; it may be what they were changed by."""
        self._lost |= lanes
        self._touched |= lanes

    def chunk(self, noted: Noted, end: str = "") -> tuple[Chunk, Ended] | None:
        """What was noted as the next chunk, with the episodes that ended in it; None if there is nothing to keep.

        Args:
            noted: of :meth:`~meshrl.protocol.transcript.Transcript.taken`.
            end: why the session ended, if it did.
        """
        lost, self._lost = self._lost, set()
        self._lanes.torn[list(lost)] = True
        told = joined(self._transcript, noted)
        before = self._lanes.copy()
        self.n += 1
        rows = ToldRows(told)
        if self._stored:
            rows.keep(self._not_stored(rows), self._transcript)
        torn = tuple(np.flatnonzero(self._lanes.torn).tolist())
        runs = Runs(rows, rows.numbers)
        kept, ended = self._take(runs)
        whole = bool(kept.all())
        if end in ENDS:
            ended = Ended.joined([ended, self.leave_all(ENDS[end])])
        rows.keep(runs.spread(kept), self._transcript)
        if not (len(rows.source) or told.asked or len(ended) or lost or end):
            self.n -= 1
            return None
        full = self._shows and (told.observations is not None or not len(rows.source))
        touched = sorted(self._touched)
        self._touched.update(one.lane for _, one in told.asked)
        policy, self._policy = self._policy, told.policies[-1][1] if told.policies else self._policy
        chunk = Chunk(
            n=self.n,
            lanes=rows.lanes,
            resets=rows.resets,
            rewards=rows.rewards,
            terminations=rows.terminations,
            truncations=rows.truncations,
            digests=self._digested(rows, runs if whole else Runs(rows, rows.numbers)),
            at_us=rows.at_us(),
            actions=rows.actions,
            started=rows.started(),
            numbers=before.numbers,
            steps=before.steps,
            returns=before.returns,
            over=before.over,
            first=before.first,
            observations=rows.observations(self._transcript) if full else None,
            infos=rows.infos() if full else None,
            changes=tuple(Change(rows.position(row), one.lane, one.op, one.given) for row, one in told.asked),
            policies=rows.policies(policy),
            touched=tuple(touched),
            lost=torn,
            end=end,
        )
        return chunk, ended

    def _not_stored(self, rows: ToldRows) -> NDArray[np.bool_]:
        """Of rows that are done again, which of them are not stored."""
        runs = Runs(rows, rows.numbers)
        columns = (runs.lanes, runs.resets, runs.numbers, runs.lengths)
        seen = [self._seen(*run) for run in zip(*(column.tolist() for column in columns), strict=True)]
        return runs.spread_from(seen)

    def _seen(self, i: int, begins: bool, number: int, length: int) -> int:
        """How many rows of a run are stored already."""
        stored = self._stored.get(i)
        if stored is None:
            return 0
        if begins:
            stored.at = number
        if stored.at < stored.number:
            return length
        if stored.at > stored.number:
            # Where the replay begins behind what is stored, the end of what is stored there is missing.
            if stored.left and not self._lanes.over[i]:
                self._lanes.over[i] = self._lanes.torn[i] = True
            del self._stored[i]
            return 0
        seen = min(length, stored.left)
        stored.left -= seen
        return seen

    def _take(self, runs: Runs) -> tuple[NDArray[np.bool_], Ended]:
        """Take in runs; gives which are of episodes that are recorded, and the episodes that ended."""
        at, lanes, goes_on = self._lanes, runs.lanes, ~runs.resets
        # Where a lane's first run is a reset, what it did before is over with that.
        begins = lanes[firsts(lanes) & runs.resets]
        left = self._left(begins, RESET)
        # Of each run, the episode that it is of.
        numbers = np.where(goes_on, at.numbers[lanes], runs.numbers)
        first = np.where(goes_on, at.first[lanes], self.n)
        torn = goes_on & at.torn[lanes]
        over = goes_on & at.over[lanes]  # an env that nobody resets may be stepped behind its end
        steps = np.where(goes_on, at.steps[lanes], 0) + np.where(over, 0, runs.steps)
        with np.errstate(invalid="ignore", over="ignore"):  # inf and -inf add up to no number
            returns = np.where(goes_on, at.returns[lanes], 0.0) + np.where(over, 0.0, runs.rewards)
        ends = ~over & (runs.reasons >= 0)
        last = np.append(firsts(lanes)[1:], True)[: len(lanes)]
        reset = ~over & ~ends & ~last
        kept = self._recorded(numbers, torn)
        which = np.flatnonzero((ends | reset) & (steps > 0) & kept)
        reasons = np.where(ends, runs.reasons, RESET)
        ended = Ended(lanes.astype(np.int64), numbers, steps, returns, reasons, first).picked(which)
        behind = lanes[last]
        at.numbers[behind], at.steps[behind], at.returns[behind] = numbers[last], steps[last], returns[last]
        at.first[behind], at.over[behind], at.torn[behind] = first[last], (over | ends)[last], torn[last]
        return kept, Ended.joined([left, ended]) if len(left) else ended

    def _left(self, lanes: NDArray[np.integer[Any]], reason: int) -> Ended:
        """The episodes of these that go on, as ended for that reason."""
        at = self._lanes
        which = lanes[~at.over[lanes] & (at.steps[lanes] > 0) & self._recorded(at.numbers, at.torn)[lanes]]
        reasons = np.full(len(which), reason)
        return Ended(
            which.astype(np.int64), at.numbers[which], at.steps[which], at.returns[which], reasons, at.first[which]
        )

    def _recorded(self, numbers: Indices, torn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether episodes are recorded."""
        recorded: NDArray[np.bool_] = (numbers >= 0) & (numbers % self._every == 0) & ~torn
        return recorded

    def _digested(self, rows: ToldRows, runs: Runs) -> NDArray[np.uint64]:
        """The digest at each row."""
        before = np.where(runs.resets, np.uint64(0), self._digests[runs.lanes])
        by_lane = chained(rows.hashes[runs.order], runs.begins, before)
        self._digests[runs.lanes] = by_lane[runs.begins + runs.lengths - 1]  # of a lane the last
        digests = np.empty(len(by_lane), np.uint64)
        digests[runs.order] = by_lane
        return digests


@dataclass(slots=True)
class _Stored:
    """What of a lane's replay is stored.

    Attributes:
        number: of the last episode of which something is.
        left: rows of that which were not seen yet.
        at: the number of the episode at which the replay is.
    """

    number: int
    left: int
    at: int = 0
