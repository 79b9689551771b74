"""Envs whose episodes are not easy to keep."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.mesh.envs import Sampled


class Odd(gymnasium.Env[Any, Any]):
    """Rewards and observations that are no finite numbers, and observations of float64, which its space is not."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self._dtype = dtype
        self._count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return self._told(), {"at": 0}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._count += 1
        reward = (np.nan, np.inf, -np.inf, -0.0, 1e-320, 0.1)[self._count % 6]
        return self._told(), reward, self._count == 8, False, {"at": self._count, "late": np.float32(0.1)}

    def _told(self) -> Any:
        third = self.np_random.random()
        return np.array([(np.nan, -np.inf, np.inf, -0.0)[self._count % 4], 1 / 3, third], self._dtype)


class Wide(Odd):
    def __init__(self) -> None:
        super().__init__(np.float64)


class Falls(Odd):
    """Its third step raises."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        told = super().step(action)
        if self._count == 3:
            raise RuntimeError("it fell")
        return told


def lists() -> Sampled:
    return Sampled(spaces.Sequence(spaces.Box(-1, 1, (2,))), spaces.Discrete(3), ends=0.1)


def graphs() -> Sampled:
    space = spaces.Dict({"map": spaces.Graph(spaces.Box(-1, 1, (2,)), spaces.Discrete(3)), "at": spaces.Discrete(4)})
    return Sampled(space, spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (2,))]), ends=0.1)
