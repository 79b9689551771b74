"""The envs that every peer serves."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

CARTPOLE = "CartPole-v1"
FRAME = (84, 84, 4)


def cartpole() -> gymnasium.Env[Any, Any]:
    """Gymnasium's own, with the wrappers that ``gymnasium.make`` puts around it."""
    return gymnasium.make(CARTPOLE)


class Image(gymnasium.Env[Any, Any]):
    """A fixed random picture of which a step changes one byte; it never ends."""

    observation_space = spaces.Box(0, 255, FRAME, np.uint8)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.frame = np.random.default_rng(0).integers(0, 256, FRAME, np.uint8)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.frame, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.frame.flat[self.steps % self.frame.size] ^= 0xFF
        self.steps += 1
        return self.frame, 0.0, False, False, {}
