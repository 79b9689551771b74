"""Verifying: an episode run again, step by step beside what was recorded of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from meshrl.client.rerunning import Rerun
from meshrl.errors import EpisodeDiverged
from meshrl.protocol.chunks import Column
from meshrl.protocol.digests import chained
from meshrl.protocol.joined import picked
from meshrl.protocol.values import hashes_of_values, numbers_of, truths_of
from meshrl.recording.episodes import RecordedEpisode
from meshrl.wire.batches import Batching
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description

Status = Literal["exact", "close", "diverged", "unverifiable"]
# Values that differ by no more than this, relative to the larger one or to 1, are close: another processor's rounding.
CLOSE = 1e-4
# Says in an env's metadata that it may do something else when asked the same.
NONDETERMINISTIC = "nondeterministic"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of running an episode again.

    Attributes:
        episode_id: of the episode.
        status: ``exact``: everything equal. ``close``: numbers differ a little, and nothing else. ``diverged``: it is
            another episode. ``unverifiable``: it is another one, and there is a reason beside the env's code.
        step: the first that differs, counted from 1; 0 is the reset. None where nothing does.
        field: what differs there: ``observation``, ``reward``, ``terminated``, ``truncated`` or ``length``.
        largest: of what was ``close``, the largest difference.
        reasons: of what is ``unverifiable``: ``versions``, ``env``, ``nondeterministic``, ``warm`` (it began with
            what earlier episodes had left, and that is not recorded) and ``imported``.
        details: of each of the reasons, for people.
    """

    episode_id: str
    status: Status
    step: int | None = None
    field: str | None = None
    largest: float | None = None
    reasons: tuple[str, ...] = ()
    details: Mapping[str, Any] | None = None

    def __bool__(self) -> bool:
        """Whether nothing differs."""
        return self.status == "exact"


def judge(episode: RecordedEpisode, again: Rerun) -> Verdict:
    """What a rerun says of a recorded episode."""
    text = str(episode.id)
    beside = Beside(episode)
    found = beside.add(again) or beside.end()
    if found is None:
        return Verdict(text, "exact")
    step, what = found
    if beside.digested and what != "length":
        return Verdict(text, "diverged", step, what)  # it does what it did, and the recording was changed
    largest = _largest(episode, again)
    if largest is not None and largest <= CLOSE:
        return Verdict(text, "close", step, what, largest)
    details = _reasons(episode, again.description)
    if details:
        return Verdict(text, "unverifiable", step, what, reasons=tuple(details), details=details)
    return Verdict(text, "diverged", step, what)


def unverifiable(episode: RecordedEpisode) -> Verdict | None:
    """What is known of an episode without running it again: of some there is no way to begin like them."""
    imported, vectors = episode.recorded.imported, episode.recorded.description.vectors
    if episode.recorded.form == "vector" and vectors is not None and vectors.implementation != "meshrl":
        details = {"implementation": "its env was one of several that a vector implementation drew for together"}
    elif imported is not None and episode.seed is None:
        details = {"imported": f"from {imported}, which does not say how it was reset"}
    else:
        return None
    return Verdict(str(episode.id), "unverifiable", reasons=tuple(details), details=details)


def diverged(
    verdict: Verdict, remedy: str = "a recording with observations (record='full') needs no rerun"
) -> EpisodeDiverged:
    """The error of an episode that was run again for what was not recorded, and went another way."""
    why = f" ({', '.join(verdict.reasons)})" if verdict.reasons else ""
    return EpisodeDiverged(
        f"episode {verdict.episode_id} was run again, and its {verdict.field} of step {verdict.step} is another than "
        f"the recorded one{why}; {remedy}",
        episode_id=verdict.episode_id,
        status=verdict.status,
        step=verdict.step,
        field=verdict.field,
        reasons=list(verdict.reasons),
    )


def prefix_differs(episode: RecordedEpisode, again: Rerun) -> tuple[int, str] | None:
    """The first step that differs, and in what, of those that were run again."""
    return Beside(episode).add(again)


class Beside:
    """A recorded episode, and beside it what a rerun tells, part by part: whether they are equal, and where not first.

    Args:
        episode: as it was recorded.
        after: how many steps are known to be equal, the reset before them too; None for not even that.

    Attributes:
        digested: whether the digests of all that was told are the recorded ones.
    """

    def __init__(self, episode: RecordedEpisode, after: int | None = None) -> None:
        self.digested = True
        self._episode = episode
        self._rows = 0 if after is None else after + 1  # that were told: the reset's, and one a step
        self._digest = np.zeros(1, np.uint64) if after is None else episode.digests[after : after + 1]

    def add(self, again: Rerun) -> tuple[int, str] | None:
        """The next part; gives the first step of it that differs, counted from 1 (0: the reset), and in what."""
        if not again.obs:
            return None
        episode, batches, first = self._episode, self._episode.described.observations, self._rows
        self._rows += len(again.obs)
        step = max(0, first - 1)  # so many were told before
        rewards, terminations, truncations = (
            numbers_of(again.rewards),
            truths_of(again.terminated),
            truths_of(again.truncated),
        )
        begun: list[int] = [] if first else [0]
        zero, flag = [0.0] * len(begun), [False] * len(begun)
        hashes = hashes_of_values(
            batches, again.obs, zero + again.rewards, flag + again.terminated, flag + again.truncated, begun
        )
        digests = chained(hashes, np.zeros(1, np.int64), self._digest)
        self._digest = digests[-1:]
        recorded = episode.digests[first : first + len(digests)]
        differ = []
        # The digest tells that something differs, also where rewards and flags do not.
        at = _first(digests[: len(recorded)], recorded)
        if at is not None:
            self.digested = False
            differ.append((first + at, "observation"))
        for what, one, column in (
            ("reward", rewards, episode.rewards),
            ("terminated", terminations, episode.terminations),
            ("truncated", truncations, episode.truncations),
        ):
            other = column[step : step + len(one)]
            at = _first(one[: len(other)], other)
            if at is not None:
                differ.append((step + at + 1, what))
        at = _first_observation(batches, episode, again, first)
        if at is not None:
            differ.append((first + at, "observation"))
        if not differ:
            return None
        earliest = min(at for at, _ in differ)
        named = [what for at, what in differ if at == earliest]
        return earliest, next((what for what in named if what != "observation"), "observation")

    def end(self) -> tuple[int, str] | None:
        """Nothing more is told; gives the first step that only one of the two has."""
        told, recorded = self._rows, len(self._episode.digests)
        return None if told == recorded else (min(told, recorded), "length")


def _first(one: Any, other: Any) -> int | None:
    """Where two columns differ first, by their bits."""
    differs = np.flatnonzero(np.ascontiguousarray(one).view(np.uint8) != np.ascontiguousarray(other).view(np.uint8))
    return None if not len(differs) else int(differs[0]) // int(one.itemsize)


def _first_observation(batches: Batching, episode: RecordedEpisode, again: Rerun, first: int) -> int | None:
    if episode.observations is None:
        return None
    count = max(0, min(len(again.obs), len(episode.digests) - first))
    column = picked(batches, episode.observations, np.arange(first, first + count))
    for at, (one, other) in enumerate(zip(_values(batches, column, count), again.obs, strict=False)):
        told = other if column.form == "items" else _as_row(batches, other)
        if pack(one) != pack(told):
            return at
    return None


def values_of(batches: Batching, episode: RecordedEpisode) -> list[Any]:
    """The recorded observations, one by one."""
    assert episode.observations is not None, "they were recorded"
    return _values(batches, episode.observations, len(episode.digests))


def _values(batches: Batching, column: Column, count: int) -> list[Any]:
    return list(column.values) if column.form == "items" else list(batches.rows(column.values, count))


def _as_row(batches: Batching, value: Any) -> Any:
    try:
        return next(batches.rows(batches.stack([value]), 1))
    except Exception:  # noqa: BLE001  # it does not keep to its space: then it differs
        return None


def _largest(episode: RecordedEpisode, again: Rerun) -> float | None:
    """The largest difference, relative to the larger value or to 1; None where more than numbers differs."""
    if len(again.rewards) != len(episode.rewards) or episode.observations is None:
        return None
    flags = truths_of(again.terminated), truths_of(again.truncated)
    if not (np.array_equal(flags[0], episode.terminations) and np.array_equal(flags[1], episode.truncations)):
        return None
    batches = episode.described.observations
    try:
        shown = batches.stack(values_of(batches, episode))
        told = batches.stack(again.obs)
    except Exception:  # noqa: BLE001  # what is no batch has no numbers to compare
        return None
    count = len(again.obs)
    pairs = [(episode.rewards, numbers_of(again.rewards))]
    for one, other in zip(batches.leaves(shown, count), batches.leaves(told, count), strict=True):
        if not isinstance(one, np.ndarray) or one.dtype.kind != "f":
            if pack(one) != pack(other):
                return None
            continue
        pairs.append((one, other))
    return max((_difference(*pair) for pair in pairs), default=0.0)


def _difference(one: Any, other: Any) -> float:
    both = np.asarray(one, np.float64), np.asarray(other, np.float64)
    with np.errstate(invalid="ignore"):
        equal = (both[0] == both[1]) | (np.isnan(both[0]) & np.isnan(both[1]))
        apart = np.where(equal, 0.0, np.abs(both[0] - both[1]) / np.maximum(1.0, np.maximum(*map(np.abs, both))))
    largest = float(apart.max(initial=0.0))
    return math.inf if math.isnan(largest) else largest


def _reasons(episode: RecordedEpisode, now: Description) -> dict[str, Any]:
    """Why an env that is asked the same may do something else, although nobody changed its code."""
    then = episode.recorded.description
    reasons: dict[str, Any] = {}
    if episode.recorded.imported is not None:
        reasons["imported"] = f"from {episode.recorded.imported}, and not recorded by an env of this mesh"
    versions = {
        name: (then.versions.get(name), now.versions.get(name))
        for name in sorted({*then.versions, *now.versions} - {"meshrl"})
        if then.versions.get(name) != now.versions.get(name)
    }
    if versions:
        reasons["versions"] = versions
    elif then.fingerprint != now.fingerprint:
        reasons["env"] = "it was made in another way, or on another kind of processor"
    if any(description.metadata.get(NONDETERMINISTIC) for description in (then, now)) or _spec_says(then.spec):
        reasons["nondeterministic"] = "it says so"
    if episode.changed:
        reasons["warm"] = "methods of it were called, or attributes set, and this is not done again"
    elif episode.id.number and not episode.recorded.forgets:
        reasons["warm"] = f"its env had {episode.id.number} episodes before, and whether it forgets them is not known"
    return reasons


def _spec_says(spec: str | None) -> bool:
    return spec is not None and '"nondeterministic": true' in spec
