"""Runs: the rows of a chunk to be, and those of one episode of one lane among them, which are dealt with together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.chunks import Chunk, Column, Resets
from meshrl.protocol.digests import Words
from meshrl.protocol.joined import Told, picked
from meshrl.protocol.noted import Began, Indices
from meshrl.protocol.transcript import Transcript
from meshrl.wire.codec import unpack

# Why an episode ended: it terminated, was truncated, was reset before that, its session was closed, its env raised, or
# its worker was lost with it and nobody could go on.
REASONS = ("terminated", "truncated", "reset", "closed", "crashed", "lost")
TERMINATED, TRUNCATED, RESET, CLOSED, CRASHED, LOST = range(len(REASONS))
# So many lanes are counted by a byte.
FEW = 256


class ToldRows:
    """The rows of a chunk: those that were told, and of each final two, the step and the reset.

    Attributes:
        source: of each row, which of those that were told it is; ascending.
        again: whether it is the second of that.
        shown: where its hash and its observation stand.
        began: what each reset was given, in the order of their rows.
    """

    def __init__(self, told: Told) -> None:
        self.told = told
        count = len(told.lanes)
        self.source = self.shown = np.arange(count)
        self.again = np.zeros(count, np.bool_)
        columns: tuple[NDArray[Any], ...] = (
            told.lanes,
            told.resets,
            told.rewards,
            told.terminations,
            told.truncations,
        )
        if len(told.finals):
            twice = np.ones(count, np.int64)
            twice[told.finals] = 2
            self.source = source = np.repeat(self.source, twice)
            self.again = ~firsts(source)
            columns = tuple(column[source] for column in columns)
            self.shown = source.copy()
            self.shown[np.flatnonzero(self.again) - 1] = count + np.arange(len(told.finals))
        lanes, resets, rewards, terminations, truncations = columns
        self.lanes = lanes.astype(np.int32)
        self.resets = resets | self.again
        self.rewards = np.where(self.resets, 0.0, rewards)
        self.terminations = terminations & ~self.resets
        self.truncations = truncations & ~self.resets
        self.actions = told.actions
        self.began: list[Began] = list(map(told.begun.__getitem__, self.source[self.resets].tolist()))

    def keep(self, kept: NDArray[np.bool_], transcript: Transcript) -> None:
        """Leave out all others."""
        if kept.all():
            return
        self.actions = picked(transcript.actions, self.actions, np.flatnonzero(kept[~self.resets]))
        self.began = list(itertools.compress(self.began, kept[self.resets].tolist()))
        for name in ("source", "again", "shown", "lanes", "resets", "rewards", "terminations", "truncations"):
            setattr(self, name, getattr(self, name)[kept])

    @property
    def numbers(self) -> Indices:
        """Of the episodes that began, in the order of their rows."""
        return np.fromiter(map(itemgetter(0), self.began), np.int64, len(self.began))

    def started(self) -> Resets:
        """What each reset was given, in columns."""
        columns: Iterable[list[Any]] = map(list, zip(*self.began, strict=True)) if self.began else ([], [], [], [])
        _, seeds, states, options = columns
        return Resets(self.numbers, seeds, states, options)

    @property
    def hashes(self) -> Words:
        """Of each row."""
        told = self.told.hashes
        return told if self._is_all else told[self.shown]

    @property
    def _is_all(self) -> bool:
        """Whether it is told what was told, row by row."""
        return not len(self.told.finals) and len(self.source) == len(self.told.lanes)

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
        at = self.told.at if self._is_all else self.told.at[self.source]
        since = (at - at[0]) * 1e6 if len(at) else at
        return since.clip(0, 0xFFFF_FFFF).astype(np.uint32)

    def observations(self, transcript: Transcript) -> Column:
        """Of each row."""
        kept = self.told.observations
        if kept is None:
            return Column("items", [])
        return kept if self._is_all else picked(transcript.observations, kept, self.shown)

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
    """The rows in the order of their lanes, cut where an episode begins: each run is of one episode of one lane.

    Args:
        rows: of a chunk, or of one to be.
        numbers: of the episodes that begin in it, in the order of their rows.

    Attributes:
        order: of the rows, by lane.
        begins: of each run, where in that order it begins.
        lanes: of each run, whose it is; ascending.
        resets: whether its first row is a reset; where it is not, the episode goes on.
        numbers: of the episode, where that begins.
        lengths: how many rows it has.
        steps: how many of them are steps, up to the end of the episode.
        rewards: their sum up to there.
        reasons: why the episode ended; -1 if it did not.
    """

    def __init__(self, rows: ToldRows | Chunk, numbers: Indices) -> None:
        self.order = order = by_lane(rows.lanes)
        resets, lanes = rows.resets[order], rows.lanes[order]
        self.begins = begins = np.flatnonzero(firsts(lanes) | resets)
        stops = np.append(begins[1:], len(order))
        self.lanes: NDArray[np.int32] = lanes[begins]
        self.resets: NDArray[np.bool_] = resets[begins]
        self.numbers = np.full(len(begins), -1)
        self.numbers[self.resets] = numbers[np.cumsum(rows.resets)[order[begins[self.resets]]] - 1]
        self.lengths: Indices = stops - begins
        # An episode ends with the first step that says so; what is behind it counts nothing.
        terminated = rows.terminations[order]
        flagged = np.append(np.flatnonzero(terminated | rows.truncations[order]), len(order))
        ends = flagged[np.searchsorted(flagged, begins)]
        last = np.minimum(ends, stops - 1)
        self.reasons: Indices = np.where(ends < stops, np.where(terminated[last], TERMINATED, TRUNCATED), -1)
        steps = np.append(0, np.cumsum(~resets))
        self.steps: Indices = steps[last + 1] - steps[begins]
        rewards = rows.rewards[order]
        if (last < stops - 1).any():
            rewards[np.arange(len(order)) > np.repeat(last, self.lengths)] = 0.0
        with np.errstate(invalid="ignore", over="ignore"):  # inf and -inf add up to no number
            self.rewards = np.add.reduceat(rewards, begins) if len(begins) else np.zeros(0)

    def spread(self, values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What is said of each run, of each row."""
        spread = np.zeros(len(self.order), np.bool_)
        spread[self.order] = np.repeat(values, self.lengths)
        return spread

    def spread_from(self, starts: Sequence[int]) -> NDArray[np.bool_]:
        """Of each run, the rows from that one on."""
        spread = np.zeros(len(self.order), np.bool_)
        since = np.arange(len(self.order)) - np.repeat(self.begins, self.lengths)
        spread[self.order] = since >= np.repeat(np.array(starts, np.int64), self.lengths)
        return spread


def by_lane(lanes: NDArray[np.int32]) -> Indices:
    """The order of rows by their lanes, and of each lane as they are; NumPy sorts small numbers fast."""
    few = len(lanes) > 0 and lanes.max() < FEW
    return np.argsort(lanes.astype(np.uint8 if few else np.uint16), kind="stable")


def firsts(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each differs from the one before it."""
    firsts = np.ones(len(values), np.bool_)
    firsts[1:] = values[1:] != values[:-1]
    return firsts
