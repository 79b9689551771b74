"""``Episode``: a recorded episode, as its reader has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meshrl.client.rerunning import Rerun
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import batched
from meshrl.recording.episodes import RecordedEpisode
from meshrl.wire import spaces
from meshrl.wire.batches import Batching, batching
from meshrl.wire.recorded import Recorded


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of an episode.

    Attributes:
        step: which, counted from 0.
        observation: that the action was chosen by.
        action: that was taken.
        reward: for it.
        terminated: whether the episode ended with it.
        truncated: whether it was cut off with it.
        next_observation: that it led to.
        info: that came with that.
        policy_version: of whoever chose the action; None where nobody said.
        remade: whether observations and info were not recorded, but made by running the episode again.
    """

    step: int
    observation: Any
    action: Any
    reward: float
    terminated: bool
    truncated: bool
    next_observation: Any
    info: dict[str, Any]
    policy_version: int | None
    remade: bool = False


@dataclass(frozen=True, slots=True)
class Episode:
    """A recorded episode of ``T`` steps.

    Attributes:
        episode_id: what it is asked for by.
        env: the served name.
        env_id: which sub-environment's it is, over all shards of its vector or pool.
        observations: T + 1 of them, as a batch of their space (for a Box an array of shape ``(T + 1, *shape)``); a list
            where its env did not keep to its space.
        actions: T of them, likewise.
        rewards: float64, of shape ``(T,)``.
        terminations: bool, of shape ``(T,)``.
        truncations: bool, of shape ``(T,)``.
        infos: T + 1 of them.
        seed: that it was reset with; None where the env's generator went on.
        options: of that reset.
        reason: why it ended: ``terminated``, ``truncated``, ``reset`` before that, ``closed`` or ``crashed``.
        ended_at: when that was stored, on the server's clock.
        at_s: float64, of shape ``(T,)``: when each step was told, in seconds since the reset.
        policy_versions: int64, of shape ``(T,)``: of whoever chose each action; -1 where nobody said.
        remade: whether observations and infos were not recorded, but made by running it again, with the same rewards,
            flags and digests.
        recorded: what the recording says of itself: env, versions, user, labels.
    """

    episode_id: str
    env: str
    env_id: int
    observations: Any
    actions: Any
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    infos: Sequence[dict[str, Any]]
    seed: int | None
    options: Mapping[str, Any] | None
    reason: str
    ended_at: datetime
    at_s: NDArray[np.float64]
    policy_versions: NDArray[np.int64]
    remade: bool
    recorded: Recorded

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """The sum of its rewards."""
        return float(sum(self.rewards.tolist()))

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one observation."""
        return spaces.rebuild(self.recorded.description.observation_space)

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one action."""
        return spaces.rebuild(self.recorded.description.action_space)

    def transitions(self, start: int = 0) -> Iterator[Transition]:
        """Its steps, one after another, from ``start`` on."""
        obs = _rows(batching(self.observation_space), self.observations, len(self) + 1)
        actions = _rows(batching(self.action_space), self.actions, len(self))
        for t in range(start, len(self)):
            version = int(self.policy_versions[t])
            yield Transition(
                t,
                obs[t],
                actions[t],
                float(self.rewards[t]),
                bool(self.terminations[t]),
                bool(self.truncations[t]),
                obs[t + 1],
                self.infos[t + 1],
                None if version < 0 else version,
                self.remade,
            )


def episode_of(read: RecordedEpisode, again: Rerun | None) -> Episode:
    """As it was recorded; with what a rerun told, where observations were not."""
    observations, actions = read.described.observations, read.described.actions
    shown = read.observations if again is None else Column("items", again.obs)
    assert shown is not None, "who has no observations runs it again"
    return Episode(
        episode_id=str(read.id),
        env=read.summary.env,
        env_id=read.summary.env_id,
        observations=batched(observations, shown).values,
        actions=batched(actions, read.actions).values,
        rewards=read.rewards,
        terminations=read.terminations,
        truncations=read.truncations,
        infos=[dict(info) for info in (read.infos if again is None else again.infos)],
        seed=read.seed,
        options=read.options,
        reason=read.summary.reason,
        ended_at=read.summary.ended_at,
        at_s=read.at_s,
        policy_versions=read.policies,
        remade=again is not None,
        recorded=read.recorded,
    )


def _rows(batches: Batching, batch: Any, count: int) -> list[Any]:
    return batch if type(batch) is list else list(batches.rows(batch, count))
