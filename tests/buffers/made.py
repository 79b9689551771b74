"""Batches of experience that are made here, and envs whose transitions can all be told from one another."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from meshrl.client.gathering import Experience
from tests.mesh.recordings import Told
from tests.sb3.envs import arrays


class Counts(gymnasium.Env[Any, Any]):
    """Episodes of two to ten steps that end in every way; each has a number of its own, which its observations show."""

    action_space: spaces.Space[Any] = spaces.Discrete(5)
    observation_space: spaces.Space[Any] = spaces.Box(0, 1e10, (2,), np.float64)

    def __init__(self) -> None:
        self.observation_space = copy.deepcopy(self.observation_space)
        self._number = 0
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._number = int(self.np_random.integers(2**31))
        self.observation_space.seed(self._number)
        self._steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        last = self._steps == 2 + self._number % 9
        way = self._number // 9 % 3  # terminated, truncated, both
        return self.observe(), float(self.np_random.random()), last and way != 1, last and way > 0, {}

    def observe(self) -> Any:
        return np.array([self._number, self._steps], np.float64)


class Parts(Counts):
    """Observations are a Dict of arrays of every kind, pictures among them."""

    observation_space = spaces.Dict({**arrays(), "count": spaces.Box(0, 1e10, (2,), np.float64)})

    def observe(self) -> Any:
        return {**self.observation_space.sample(), "count": super().observe()}


class Pictures(Counts):
    """Observations are pictures, channels last."""

    observation_space = spaces.Box(0, 255, (40, 36, 3), np.uint8)

    def observe(self) -> Any:
        return self.observation_space.sample()


def batch_of(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], count: int, seed: int = 0
) -> Experience:
    """Transitions of episodes of some steps each, which end in every way."""
    draw = np.random.default_rng(seed)
    observation_space.seed(seed)
    action_space.seed(seed)
    kinds = np.where(draw.random(count) < 0.2, draw.integers(1, 5, count), 0)  # 4: without a flag
    terminations, truncations = np.isin(kinds, (1, 3)), np.isin(kinds, (2, 3))
    return Experience(
        observations=_sampled(observation_space, count),
        actions=_sampled(action_space, count),
        rewards=draw.random(count),
        next_observations=_sampled(observation_space, count),
        terminations=terminations,
        truncations=truncations,
        ends=kinds > 0,
        steps=np.arange(count),
        episode_ids=np.array(["of.0.0"] * count),
        policy_versions=np.zeros(count, np.int64),
        ages_s=np.zeros(count),
    )


def _sampled(space: spaces.Space[Any], count: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _sampled(part, count) for key, part in space.spaces.items()}
    return np.stack([space.sample() for _ in range(count)])


def columns_of(told: list[Told]) -> dict[str, Any]:
    """All transitions of some episodes, one behind the other."""
    return {
        "obs": _joined([obs for one in told for obs in one.obs[:-1]]),
        "next_obs": _joined([obs for one in told for obs in one.obs[1:]]),
        "actions": np.array([action for one in told for action in one.actions]),
        "rewards": np.array([reward for one in told for reward in one.rewards]),
        "terminations": np.array([flag for one in told for flag in one.terminations]),
        "truncations": np.array([flag for one in told for flag in one.truncations]),
        "last": np.array([k == len(one.rewards) - 1 for one in told for k in range(len(one.rewards))]),
    }


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: np.stack([value[key] for value in values]) for key in values[0]}
    return np.stack(values)
