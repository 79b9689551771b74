"""The envs that only this system is asked for; CartPole and the picture are :mod:`peers.served`'s."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

SLEEP_S = 0.001
MEAN_S = 0.010
SIGMA = 1.0
BUSY_S = 0.0004

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Nothing(gymnasium.Env[Any, Any]):
    """An env whose step does nothing: what is left is the path."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.observation = np.zeros(4, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation, {}

    def step(self, action: Any) -> Step:
        return self.observation, 0.0, False, False, {}


class Sleeping(Nothing):
    """A simulator that is waited for: one millisecond a step."""

    def step(self, action: Any) -> Step:
        time.sleep(SLEEP_S)
        return super().step(action)


class Lognormal(Nothing):
    """A step takes 10 ms in the mean, lognormal with sigma 1: the median is 6 ms, one in a hundred takes over 62."""

    def step(self, action: Any) -> Step:
        time.sleep(self.np_random.lognormal(math.log(MEAN_S) - SIGMA**2 / 2, SIGMA))
        return super().step(action)


class Busy(Nothing):
    """Keeps its worker for 0.4 ms a step, one env at a time, and leaves the processor to others.

    So the worker alone is what two learners compete for: with an env that computes, four processes would compete for
    the cores too.
    """

    turn = threading.Lock()

    def step(self, action: Any) -> Step:
        with self.turn:
            time.sleep(BUSY_S)
        return super().step(action)


class Waiting(Nothing):
    """OpenEnv's own scaling protocol: a step waits for a second in a coroutine."""

    async def step(self, action: Any) -> Step:  # type: ignore[override]
        await asyncio.sleep(1.0)
        return super().step(action)
