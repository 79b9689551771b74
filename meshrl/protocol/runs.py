"""Runs: the rows of a chunk to be, and those of one episode of one lane among them, which are dealt with together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.chunks import Chunk, Column, Resets
from meshrl.protocol.joined import Told, picked
from meshrl.protocol.transcript import Began, Transcript
from meshrl.wire.codec import unpack

# Why an episode ended: it terminated, was truncated, was reset before that, its session was closed, its env raised, or
# its worker was lost with it and nobody could go on.
REASONS = ("terminated", "truncated", "reset", "closed", "crashed", "lost")
TERMINATED, TRUNCATED, RESET, CLOSED, CRASHED, LOST = range(len(REASONS))


class Run(NamedTuple):
    """The rows of one episode of one lane.

    Attributes:
        lane: whose.
        began: what the reset was given that is the first of them; None where the episode goes on.
        steps: up to its end.
        rewards: their sum up to there.
        reason: why it ended; None if it did not.
    """

    lane: int
    began: Began | None
    steps: int
    rewards: float
    reason: int | None


class ToldRows:
    """The rows of a chunk: those that were told, and of each final two, the step and the reset.

    Attributes:
        source: of each row, which of those that were told it is; ascending.
        again: whether it is the second of that.
        shown: where its hash and its observation stand.
    """

    def __init__(self, told: Told) -> None:
        self.told = told
        count = len(told.lanes)
        twice = np.ones(count, np.int64)
        twice[told.finals] = 2
        self.source = np.repeat(np.arange(count), twice)
        self.again = ~firsts(self.source)
        self.shown = self.source.copy()
        first = np.flatnonzero(self.again) - 1
        self.shown[first] = count + np.arange(len(first))
        self.lanes = told.lanes[self.source].astype(np.int32)
        self.resets = told.resets[self.source] | self.again
        self.rewards = np.where(self.resets, 0.0, told.rewards[self.source])
        self.terminations = told.terminations[self.source] & ~self.resets
        self.truncations = told.truncations[self.source] & ~self.resets
        self.actions = told.actions

    def keep(self, kept: NDArray[np.bool_], transcript: Transcript) -> None:
        """Leave out all others."""
        if kept.all():
            return
        self.actions = picked(transcript.actions, self.actions, np.flatnonzero(kept[~self.resets]))
        for name in ("source", "again", "shown", "lanes", "resets", "rewards", "terminations", "truncations"):
            setattr(self, name, getattr(self, name)[kept])

    def began(self) -> dict[int, Began]:
        """What each reset was given, by row."""
        return {row: self.told.begun[int(self.source[row])] for row in np.flatnonzero(self.resets).tolist()}

    def started(self) -> Resets:
        """The same in columns."""
        began = list(self.began().values())
        numbers = np.array([one.number for one in began], np.int64)
        return Resets(
            numbers, [one.seed for one in began], [one.state for one in began], [one.options for one in began]
        )

    def position(self, told: int) -> int:
        """The first row that is not before one that was told."""
        return int(np.searchsorted(self.source, told))

    def policies(self, before: int | None) -> tuple[tuple[int, int], ...]:
        """The version with which the chunk begins, and each that follows, by its first row."""
        versions = {} if before is None else {0: before}
        versions |= {self.position(row): version for row, version in self.told.policies}
        return tuple((row, version) for row, version in sorted(versions.items()) if row < len(self.source))

    def at_us(self) -> NDArray[np.uint32]:
        """When each was told, in microseconds since the first."""
        at = self.told.at[self.source]
        since = (at - at[0]) * 1e6 if len(at) else at
        return since.clip(0, 0xFFFF_FFFF).astype(np.uint32)

    def observations(self, transcript: Transcript) -> Column:
        """Of each row."""
        kept = self.told.observations
        if kept is None:
            return Column("items", [])
        if len(self.shown) == len(self.told.hashes) and (self.shown == np.arange(len(self.shown))).all():
            return kept
        return picked(transcript.observations, kept, self.shown)

    def infos(self) -> list[tuple[int, dict[str, Any]]]:
        """Those that are not empty, by row."""
        finals = set(self.told.finals.tolist())
        keys = 2 * self.source + self.again
        wanted = [(2 * row + (row in finals and not is_final), info) for row, is_final, info in self.told.infos]
        infos = []
        for key, info in sorted(wanted, key=itemgetter(0)):
            row = int(np.searchsorted(keys, key))
            if row < len(keys) and keys[row] == key:
                infos.append((row, unpack(info)))
        return infos


class Runs:
    """The rows in the order of their lanes, cut where an episode begins.

    Attributes:
        lengths: of each run, in rows.
    """

    def __init__(self, rows: ToldRows | Chunk) -> None:
        self._order = order = np.argsort(rows.lanes, kind="stable")
        self._resets = resets = rows.resets[order]
        self._lanes = rows.lanes[order]
        self._begins = begins = np.flatnonzero(firsts(self._lanes) | resets)
        stops = np.append(begins[1:], len(order))
        self.lengths: list[int] = (stops - begins).tolist()
        # An episode ends with the first step that says so; what is behind it counts nothing.
        terminated = rows.terminations[order]
        flagged = np.append(np.flatnonzero(terminated | rows.truncations[order]), len(order))
        ends = flagged[np.searchsorted(flagged, begins)]
        self._finished = ends < stops
        last = np.minimum(ends, stops - 1)
        self._terminated = terminated[last]
        steps = np.append(0, np.cumsum(~resets))
        self._steps = steps[last + 1] - steps[begins]
        counts = np.arange(len(order)) <= np.repeat(last, stops - begins)
        rewards = np.where(counts, rows.rewards[order], 0.0)
        self._rewards = np.add.reduceat(rewards, begins) if len(begins) else np.zeros(0)

    def all(self, began: Mapping[int, Began]) -> Iterator[Run]:
        """Each run; those of a lane in order.

        Args:
            began: what each reset was given, by row.
        """
        begins = self._begins
        # As lists: a look into an array costs as much as all else here.
        reasons = np.where(self._finished, np.where(self._terminated, TERMINATED, TRUNCATED), -1).tolist()
        columns = (self._lanes[begins], self._resets[begins], self._order[begins], self._steps, self._rewards)
        for lane, reset, first, steps, rewards, reason in zip(*(c.tolist() for c in columns), reasons, strict=True):
            yield Run(lane, began[first] if reset else None, steps, rewards, None if reason < 0 else reason)

    def spread(self, values: Sequence[bool]) -> NDArray[np.bool_]:
        """What is said of each run, of each row."""
        spread = np.zeros(len(self._order), np.bool_)
        spread[self._order] = np.repeat(np.array(values, np.bool_), self.lengths)
        return spread

    def spread_from(self, starts: Sequence[int]) -> NDArray[np.bool_]:
        """Of each run, the rows from that one on."""
        spread = np.zeros(len(self._order), np.bool_)
        since = np.arange(len(self._order)) - np.repeat(self._begins, self.lengths)
        spread[self._order] = since >= np.repeat(np.array(starts, np.int64), self.lengths)
        return spread


def firsts(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each differs from the one before it."""
    firsts = np.ones(len(values), np.bool_)
    firsts[1:] = values[1:] != values[:-1]
    return firsts
