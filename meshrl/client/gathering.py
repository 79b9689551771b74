"""Gathering: parts of recorded episodes on their way into batches of experience."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.client.following import Place
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import joined_columns, picked
from meshrl.protocol.noted import Indices
from meshrl.recording.episodes import Described, RecordedEpisode


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of ``n`` transitions; those of an episode are in order, and side by side.

    Attributes:
        observations: n of them, as a batch of their space; a list where an env did not keep to its space.
        actions: likewise.
        rewards: float64.
        next_observations: as ``observations``.
        terminations: bool.
        truncations: bool.
        ends: bool, whether the step behind it is not given: it is the last of its episode, with or without a flag
            (episodes end with their reset or session, too), or that one is left out.
        steps: int64, of each which step of its episode it is, from 0.
        episode_ids: of each, whose.
        policy_versions: int64, of whoever chose the action; -1 where nobody said.
        ages_s: float64, how long ago each happened, by this machine's clock and the server's.
    """

    observations: Any
    actions: Any
    rewards: NDArray[np.float64]
    next_observations: Any
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    steps: NDArray[np.int64]
    episode_ids: NDArray[np.str_]
    policy_versions: NDArray[np.int64]
    ages_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, slots=True)
class Part:
    """Some steps of an episode.

    Attributes:
        episode: with its observations.
        place: of it in the index.
        steps: which, in order.
        ends: of each, whether the step behind it is none of them, or there is none.
    """

    episode: RecordedEpisode
    place: Place
    steps: Indices
    ends: NDArray[np.bool_]

    @classmethod
    def of(cls, episode: RecordedEpisode, place: Place, wanted: NDArray[np.bool_]) -> Part:
        """Those steps from its place on that are wanted."""
        steps = place.step + np.flatnonzero(wanted[place.step :])
        return cls(episode, place, steps, ~np.append(wanted[1:], False)[steps])

    @property
    def behind(self) -> Place:
        """The place behind all of its episode."""
        return replace(self.place, row=self.place.row + 1, step=0)

    def split(self, count: int) -> tuple[Part, Part]:
        """The first steps, and the others."""
        first, others = slice(count), slice(count, None)
        return (
            replace(self, steps=self.steps[first], ends=self.ends[first]),
            replace(self, steps=self.steps[others], ends=self.ends[others]),
        )


def ages_of(episode: RecordedEpisode, now: float) -> NDArray[np.float64]:
    """How long ago each of its steps happened, in seconds."""
    ages: NDArray[np.float64] = now - episode.summary.ended_at.timestamp() + episode.at_s[-1:] - episode.at_s
    return np.maximum(0.0, ages)


class Gathered:
    """Parts of episodes whose transitions can be in one batch.

    Attributes:
        place: behind what was taken last.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._parts: list[Part] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def fits(self, episode: RecordedEpisode) -> bool:
        """Whether its transitions can be in one batch with what is here."""
        return not self._parts or _alike(self._parts[0].episode.described, episode.described)

    def add(self, part: Part) -> None:
        """One more, which fits."""
        if len(part.steps):
            self._parts.append(part)
            self._count += len(part.steps)

    def taken(self, count: int) -> Experience:
        """The first of them, one or more."""
        parts: list[Part] = []
        while count > 0:
            part = self._parts.pop(0)
            if len(part.steps) > count:
                part, rest = part.split(count)
                self._parts.insert(0, rest)
                self.place = replace(rest.place, step=int(rest.steps[0]))
            else:
                self.place = part.behind
            parts.append(part)
            count -= len(part.steps)
            self._count -= len(part.steps)
        return _batch(parts)


def _batch(parts: list[Part]) -> Experience:
    described = parts[0].episode.described
    columns: list[tuple[Column, Column, Column]] = []
    for part in parts:
        episode, steps = part.episode, part.steps
        shown = episode.observations
        assert shown is not None, "where they were not recorded, it was run again"
        columns.append(
            (
                picked(described.observations, shown, steps),
                picked(described.actions, episode.actions, steps),
                picked(described.observations, shown, steps + 1),
            )
        )
    spaces = (described.observations, described.actions, described.observations)
    obs, actions, following = (
        joined_columns(batches, column).values
        for batches, column in zip(spaces, zip(*columns, strict=True), strict=True)
    )
    now = datetime.now(UTC).timestamp()
    told = {
        name: np.concatenate([getattr(part.episode, name)[part.steps] for part in parts])
        for name in ("rewards", "terminations", "truncations", "policies")
    }
    lengths = [len(part.steps) for part in parts]
    return Experience(
        observations=obs,
        actions=actions,
        rewards=told["rewards"],
        next_observations=following,
        terminations=told["terminations"],
        truncations=told["truncations"],
        ends=np.concatenate([part.ends for part in parts]),
        steps=np.concatenate([part.steps for part in parts]),
        episode_ids=np.repeat([str(part.episode.id) for part in parts], lengths),
        policy_versions=told["policies"],
        ages_s=np.concatenate([ages_of(part.episode, now)[part.steps] for part in parts]),
    )


def _alike(one: Described, other: Described) -> bool:
    """Whether transitions of both can be in one batch."""
    descriptions = one.recorded.description, other.recorded.description
    return one is other or (
        descriptions[0].observation_space == descriptions[1].observation_space
        and descriptions[0].action_space == descriptions[1].action_space
    )
