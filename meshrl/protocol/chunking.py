"""Chunking: the chunks of one session's recording, one after another, and the episodes that end in each.

What is done for each row numpy does for all at once; what is done for each *run*, the rows of one episode of one lane
that stand in a chunk, is a turn of a loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.chunks import Change, Chunk
from meshrl.protocol.digests import chained
from meshrl.protocol.joined import Noted, joined
from meshrl.protocol.runs import CLOSED, CRASHED, RESET, Run, Runs, ToldRows, firsts
from meshrl.protocol.transcript import Began, Transcript

# By why a session ended. Of any other nobody knows whether it does not go on elsewhere.
ENDS = {"closed": CLOSED, "ended": CRASHED}


class Ended(NamedTuple):
    """An episode that ended, and has steps.

    Attributes:
        lane: whose.
        number: counted from 0 since its env was made.
        steps: of it.
        episode_return: the sum of its rewards.
        reason: the position in :data:`REASONS`.
        first: the number of the chunk in which it began.
    """

    lane: int
    number: int
    steps: int
    episode_return: float
    reason: int
    first: int


@dataclass(slots=True)
class _Lane:
    """Where a lane stands behind the last chunk."""

    number: int = -1
    steps: int = 0
    episode_return: float = 0.0
    first: int = 0
    over: bool = True  # its episode has ended, or it has none
    torn: bool = False  # a part of its episode is missing


class Standing(NamedTuple):
    """Where a :class:`Chunker` stands; of its own making, for its own use."""

    n: int
    lanes: list[_Lane]
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

    Attributes:
        n: the number of the last chunk.
    """

    def __init__(self, transcript: Transcript, every: int = 1) -> None:
        self.n = 0
        self._transcript = transcript
        self._every = every
        self._lanes = [_Lane() for _ in range(transcript.count)]
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
        self.n = last.n
        for i, lane in enumerate(self._lanes):
            lane.number, lane.steps = int(last.numbers[i]), int(last.steps[i])
            lane.episode_return, lane.over = float(last.returns[i]), bool(last.over[i])
            lane.torn = i in last.lost
        self._touched = {*last.touched, *(change.lane for change in last.changes)}
        if last.policies:
            self._policy = last.policies[-1][1]
        numbers = iter(last.started.numbers.tolist())
        began = {int(row): Began(next(numbers), None, None, None) for row in np.flatnonzero(last.resets)}
        for run in Runs(last).all(began):
            self._take(run, [])
        for lane in self._lanes:
            lane.first = 0  # before this writer's own
        self._digests[last.lanes] = last.digests
        self._stored = {
            i: _Stored(lane.number, lane.steps + 1) for i, lane in enumerate(self._lanes) if lane.number >= 0
        }

    def standing(self) -> Standing:
        """Where it stands, for :meth:`go_back`."""
        lanes, digests = [replace(lane) for lane in self._lanes], self._digests.copy()
        stored = {i: replace(one) for i, one in self._stored.items()}
        return Standing(self.n, lanes, digests, set(self._touched), set(self._lost), self._policy, stored)

    def go_back(self, to: Standing) -> None:
        """Stand where it stood then: what it was given since is given again, in other parts."""
        self.n, self._lanes, self._digests, self._touched, self._lost, self._policy, self._stored = to

    def leave_all(self, reason: int) -> list[Ended]:
        """All episodes are over; gives those that were not."""
        ended: list[Ended] = []
        for i in range(len(self._lanes)):
            self._leave(i, reason, ended)
        return ended

    @property
    def oldest(self) -> int:
        """The number of the chunk in which the oldest episode that goes on began."""
        return min((lane.first for lane in self._lanes if not lane.over), default=self.n)

    def lose(self, lanes: set[int]) -> None:
        """Something of these is missing from now on, until they are reset; it may be what they were changed by."""
        self._lost |= lanes
        self._touched |= lanes

    def chunk(self, noted: Noted, end: str = "") -> tuple[Chunk, list[Ended]] | None:
        """What was noted as the next chunk, with the episodes that ended in it; None if there is nothing to keep.

        Args:
            noted: of :meth:`~meshrl.protocol.transcript.Transcript.taken`.
            end: why the session ended, if it did.
        """
        lost, self._lost = self._lost, set()
        for i in lost:
            self._lanes[i].torn = True
        told = joined(self._transcript, noted)
        before = {name: [getattr(lane, name) for lane in self._lanes] for name in _CARRIED}
        ended: list[Ended] = []
        self.n += 1
        rows = ToldRows(told)
        if self._stored:
            rows.keep(self._not_stored(rows), self._transcript)
        torn = tuple(i for i, lane in enumerate(self._lanes) if lane.torn)
        runs = Runs(rows)
        kept = [self._take(run, ended) for run in runs.all(rows.began())]
        if end in ENDS:
            ended += self.leave_all(ENDS[end])
        rows.keep(runs.spread(kept), self._transcript)
        if not (len(rows.source) or told.asked or ended or lost or end):
            self.n -= 1
            return None
        full = self._transcript.level == "full"
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
            digests=self._digested(rows),
            at_us=rows.at_us(),
            actions=rows.actions,
            started=rows.started(),
            numbers=np.array(before["number"], np.int64),
            steps=np.array(before["steps"], np.int64),
            returns=np.array(before["episode_return"], np.float64),
            over=np.array(before["over"], np.bool_),
            first=np.array(before["first"], np.int64),
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
        runs = Runs(rows)
        seen = [self._seen(run, length) for run, length in zip(runs.all(rows.began()), runs.lengths, strict=True)]
        return runs.spread_from(seen)

    def _seen(self, run: Run, length: int) -> int:
        """How many rows of a run are stored already."""
        stored = self._stored.get(run.lane)
        if stored is None:
            return 0
        if run.began is not None:
            stored.at = run.began.number
        if stored.at < stored.number:
            return length
        lane = self._lanes[run.lane]
        if stored.at > stored.number:
            # Where the replay begins behind what is stored, the end of what is stored there is missing.
            if stored.left and not lane.over:
                lane.over = lane.torn = True
            del self._stored[run.lane]
            return 0
        seen = min(length, stored.left)
        stored.left -= seen
        return seen

    def _take(self, run: Run, ended: list[Ended]) -> bool:
        """Take in a run; gives whether its rows are recorded."""
        lane = self._lanes[run.lane]
        if run.began is not None:
            self._leave(run.lane, RESET, ended)
            lane.number, lane.first, lane.steps, lane.episode_return = run.began.number, self.n, 0, 0.0
            lane.over = lane.torn = False
        if not lane.over:  # an env that nobody resets may be stepped behind its end
            lane.steps += run.steps
            lane.episode_return += run.rewards
            if run.reason is not None:
                self._leave(run.lane, run.reason, ended)
        return self._records(lane)

    def _leave(self, i: int, reason: int, ended: list[Ended]) -> None:
        """The episode of a lane is over, if it has one."""
        lane = self._lanes[i]
        if not lane.over and lane.steps and self._records(lane):
            ended.append(Ended(i, lane.number, lane.steps, lane.episode_return, reason, lane.first))
        lane.over = True

    def _records(self, lane: _Lane) -> bool:
        return lane.number >= 0 and lane.number % self._every == 0 and not lane.torn

    def _digested(self, rows: ToldRows) -> NDArray[np.uint64]:
        """The digest at each row."""
        order = np.argsort(rows.lanes, kind="stable")
        lanes, resets = rows.lanes[order], rows.resets[order]
        begins = np.flatnonzero(firsts(lanes) | resets)
        before = np.where(resets[begins], np.uint64(0), self._digests[lanes[begins]])
        digests = np.zeros(len(order), np.uint64)
        digests[order] = chained(rows.told.hashes[rows.shown][order], begins, before)
        self._digests[rows.lanes] = digests  # of several rows of a lane, the last counts
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


# What each chunk says of where its lanes were before it.
_CARRIED = ("number", "steps", "episode_return", "over", "first")
