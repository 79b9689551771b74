"""Envs that do to their worker what broke another system."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Step = tuple[Any, Any, bool, bool, dict[str, Any]]

# Of Hangs: its step never returns, as far as a test is concerned.
HANGS = 7
# Of Odd: its step raises.
RAISES = 7


class Told(gymnasium.Env[Any, Any]):
    """Tells which instance it is, and how many steps that has executed; the reward is the action."""

    observation_space = spaces.Discrete(1 << 40)
    action_space = spaces.Discrete(1 << 40)

    def __init__(self) -> None:
        self.instance = uuid.uuid4().hex
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.steps = 0
        return 0, {"instance": self.instance}

    def step(self, action: int) -> Step:
        self.steps += 1
        return self.steps, float(action), False, False, {"instance": self.instance}


class Hangs(Told):
    """Its step with the action ``HANGS`` waits for ever, where it can be cancelled: it is a coroutine env."""

    async def step(self, action: int) -> Step:  # type: ignore[override]
        await asyncio.sleep(3600 if action == HANGS else 0)
        return super().step(action)


class Sleeps(Told):
    """Each step takes as many milliseconds as the action says, of its thread."""

    def step(self, action: int) -> Step:
        time.sleep(action / 1000)
        return super().step(action)


class Blocks(Told):
    """The same in a coroutine function, which it has no right to."""

    async def step(self, action: int) -> Step:  # type: ignore[override]
        time.sleep(action / 1000)  # noqa: ASYNC251  # the fault
        return super().step(action)


def odd_observation() -> Any:
    """What JSON cannot say."""
    return np.array([math.nan, math.inf, -math.inf, -0.0], np.float32)


def odd_info() -> dict[str, Any]:
    """The same, of every kind of value that envs tell."""
    return {
        "nan": math.nan,
        "inf": -math.inf,
        "number": np.float64(math.inf),
        "count": np.int64(1 << 60),
        "flag": np.bool_(True),
        "array": np.array([[math.nan, 1.5]]),
        "deep": {"bytes": b"\x00\xff", "pair": (1, np.uint8(2))},
    }


class Odd(gymnasium.Env[Any, Any]):
    """Tells what is no JSON, and raises at ``RAISES``."""

    observation_space = spaces.Box(-math.inf, math.inf, (4,), np.float32)
    action_space = spaces.Discrete(10)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return odd_observation(), odd_info()

    def step(self, action: int) -> Step:
        if action == RAISES:
            raise ZeroDivisionError("the pole has no length")
        return odd_observation(), math.nan, False, False, odd_info()
