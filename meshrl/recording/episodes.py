"""Recorded episodes: what one is known by, what the index tells of it, and all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import InvalidName
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import picked
from meshrl.wire import spaces
from meshrl.wire.batches import Batching, batching
from meshrl.wire.recorded import Recorded
from meshrl.wire.subjects import is_id


class EpisodeId(NamedTuple):
    """What an episode is known by.

    Attributes:
        session: whose it is.
        lane: which sub-environment's of that session.
        number: how many episodes that one had before, since it was made.
    """

    session: str
    lane: int
    number: int

    def __str__(self) -> str:
        return f"{self.session}.{self.lane}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> EpisodeId:
        """The id that a text says.

        Raises:
            InvalidName: it is none.
        """
        session, _, rest = text.partition(".") if isinstance(text, str) else ("", "", "")
        lane, _, number = rest.partition(".")
        if not is_id(session) or not all(
            part.isascii() and part.isdigit() and len(part) < 16 for part in (lane, number)
        ):
            raise InvalidName(f"{text!r} is no episode's id, which looks like 9f3a61c2d4e5b708.0.12")
        return cls(session, int(lane), int(number))


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """An episode, as the index knows it.

    Attributes:
        episode_id: what it is asked for by.
        env: the served name.
        env_id: which sub-environment's it is, over all shards of its vector or pool.
        steps: how many it has.
        episode_return: the sum of its rewards.
        reason: why it ended: ``terminated``, ``truncated``, ``reset`` before that, ``closed`` or ``crashed``.
        ended_at: when that was stored, on the server's clock.
        user: whose session it was.
        labels: of the session.
        policy: whose actions they are, by name.
        manifest: the hash of the manifest of the experiment that it is of.
    """

    episode_id: str
    env: str
    env_id: int
    steps: int
    episode_return: float
    reason: str
    ended_at: datetime
    user: str
    labels: Mapping[str, str]
    policy: str | None
    manifest: str | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """Of what a recording is.

    Attributes:
        recorded: as it says.
        observations: their batches.
        actions: the same.
    """

    recorded: Recorded
    observations: Batching
    actions: Batching

    @classmethod
    def of(cls, recorded: Recorded) -> Described:
        """With the spaces that it says.

        Raises:
            MalformedMessage: it has none.
        """
        spaces_ = (recorded.description.observation_space, recorded.description.action_space)
        observations, actions = (batching(spaces.rebuild(space)) for space in spaces_)
        return cls(recorded, observations, actions)


@dataclass(slots=True)
class RecordedEpisode:
    """An episode, as it was recorded.

    Attributes:
        id: of it.
        described: of what its recording is.
        summary: of it.
        seed: that it was reset with; None where the env's generator went on.
        state: what outlived a reset without a seed, where that is known.
        options: of the reset.
        actions: one a step, as a batch of their space, or single values.
        rewards: float64, one a step.
        terminations: bool, one a step.
        truncations: bool, one a step.
        digests: uint64, of the reset and of each step.
        observations: of the reset and of each step; None where they were not recorded.
        infos: the same; empty ones where there was nothing.
        at_s: float64, when each step was told, in seconds since the reset; to some hundredths, from chunk to chunk.
        policies: int64, the version of whoever chose each action; -1 where nobody said.
        changed: whether a method of its env was called, or an attribute set, in one of its chunks.
    """

    id: EpisodeId
    described: Described
    summary: EpisodeSummary
    seed: int | None
    state: bytes | None
    options: dict[str, Any] | None
    actions: Column
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    observations: Column | None
    infos: list[dict[str, Any]]
    at_s: NDArray[np.float64]
    policies: NDArray[np.int64]
    changed: bool = False

    @property
    def recorded(self) -> Recorded:
        """Of what its recording is, as it says."""
        return self.described.recorded

    def until(self, step: int) -> RecordedEpisode:
        """Its beginning, up to so many steps."""
        if step == len(self.rewards):
            return self
        observations, actions = self.described.observations, self.described.actions
        shown = None
        if self.observations is not None:
            shown = picked(observations, self.observations, np.arange(step + 1))
        return replace(
            self,
            actions=picked(actions, self.actions, np.arange(step)),
            rewards=self.rewards[:step],
            terminations=self.terminations[:step],
            truncations=self.truncations[:step],
            digests=self.digests[: step + 1],
            observations=shown,
            infos=self.infos[: step + 1],
            at_s=self.at_s[:step],
            policies=self.policies[:step],
        )
