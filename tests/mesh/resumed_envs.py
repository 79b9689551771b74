"""Envs whose sessions are lost in tests: slow ones, tunable ones, one that never does the same twice."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Tuned(gymnasium.Env[Any, Any]):
    """Counts its actions, times a gain that outlives its resets."""

    def __init__(self) -> None:
        self.observation_space = spaces.Discrete(2**31)
        self.action_space = spaces.Discrete(1000)
        self.gain = 1
        self.label = "tuned"
        self._count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return self._count, {}

    def step(self, action: int) -> Step:
        self._count += self.gain * action
        return self._count, 1.0, False, False, {}

    def double(self) -> int:
        """The gain, which is twice as large from now on."""
        self.gain *= 2
        return self.gain


class TunedOtherwise(Tuned):
    """The same by its spaces, and another env."""


class Slow(Tuned):
    """Takes 20 ms a step."""

    def step(self, action: int) -> Step:
        time.sleep(0.02)
        return super().step(action)


class Random(Tuned):
    """Never does the same twice."""

    def step(self, action: int) -> Step:
        return int.from_bytes(os.urandom(3), "big"), 1.0, False, False, {}


class Breaks(Tuned):
    """Cannot be stepped."""

    def step(self, action: int) -> Step:
        raise RuntimeError("broken")


class Awaited(Tuned):
    """Steps in a coroutine."""

    async def step(self, action: int) -> Step:  # type: ignore[override]
        await asyncio.sleep(0.001)
        return super().step(action)


class Draws(Tuned):
    """Adds what its generator draws, which is all that outlives a reset."""

    metadata = {"outlives_reset": "generator"}

    def step(self, action: int) -> Step:
        obs, reward, _, _, info = super().step(action + int(self.np_random.integers(100)))
        return obs, reward, obs > 700, False, info


class Unresumable(Tuned):
    """Could be resumed, and says that it cannot."""

    metadata = {"outlives_reset": "unknown"}


class Reused(gymnasium.Env[Any, Any]):
    """Gives the same array again and again, with what it holds now."""

    observation_space = spaces.Box(0, 1e9, (3,), np.float64)
    action_space = spaces.Discrete(1000)

    def __init__(self) -> None:
        self._obs = np.zeros(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._obs[:] = 0
        return self._obs, {}

    def step(self, action: int) -> Step:
        self._obs += action
        return self._obs, 1.0, False, False, {}


class SlowReset(Random):
    """Takes half a second to begin, and never does the same twice."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        time.sleep(0.5)
        return super().reset(seed=seed)


class Pictures(gymnasium.Env[Any, Any]):
    """Tells one picture an episode, with what its generator draws now; large enough to be counted by its worker."""

    metadata = {"outlives_reset": "generator"}
    action_space = spaces.Discrete(1000)

    def __init__(self, size: int = 64) -> None:
        self.observation_space = spaces.Box(0, 255, (size, size), np.uint8)
        self._size = size

    def _drawn(self) -> Any:
        self._obs[:] = self.np_random.integers(256, size=len(self._obs))
        return self._obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._obs = np.zeros((self._size, self._size), np.uint8)
        self._steps = 0
        return self._drawn(), {}

    def step(self, action: int) -> Step:
        self._steps += 1
        return self._drawn(), 1.0, self._steps == 9, False, {}


class Posters(Pictures):
    """Larger ones: a few of them are sent as they lie in memory, and read in several parts."""

    def __init__(self) -> None:
        super().__init__(200)


class Mural(Pictures):
    """A picture that can be so large that it is joined of several reads, and is told anew with each step."""

    def __init__(self, size: int = 550) -> None:
        super().__init__(size)

    def _drawn(self) -> Any:
        return self.np_random.integers(256, size=self._obs.shape, dtype=np.uint8)


class Labelled(gymnasium.Env[Any, Any]):
    """Large observations with a text; told to, one that is none."""

    metadata = {"outlives_reset": "generator"}
    observation_space = spaces.Dict({"picture": spaces.Box(0, 255, (64, 64), np.uint8), "label": spaces.Text(20)})
    action_space = spaces.Discrete(2)

    def _shown(self, label: Any) -> dict[str, Any]:
        return {"picture": self.np_random.integers(256, size=(64, 64), dtype=np.uint8), "label": label}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._shown("begun"), {}

    def step(self, action: int) -> Step:
        return self._shown(object() if action else "going on"), 1.0, False, False, {}
