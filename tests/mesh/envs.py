"""Small environments whose every step can be accounted for."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env[Any, Any]):
    """Counts its steps; the observation is the count, the reward the action. Each step takes ``slow_s``."""

    metadata = {"render_modes": ["ansi"]}

    def __init__(self, slow_s: float = 0.0, start: int = 0, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Discrete(2**31)
        self.action_space = spaces.Discrete(1_000_000)
        self.render_mode = render_mode
        self.slow_s = slow_s
        self.start = start
        self.count = 0
        self.label = "counter"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = self.start
        return self.count, {"pid": os.getpid()}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        slow_s = action / 1000 if self.slow_s < 0 else self.slow_s  # negative: the action says milliseconds
        if slow_s:
            time.sleep(slow_s)
        self.count += 1
        return self.count, float(action), False, False, {}

    def render(self) -> str:
        return f"count {self.count}"

    def add(self, a: int, b: int = 1) -> int:
        return a + b


class Breaks(gymnasium.Env[Any, Any]):
    """Raises where it is told to: ``at`` is constructor, reset or step."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def __init__(self, at: str = "") -> None:
        self.at = at
        if at == "constructor":
            raise RuntimeError("no simulator here")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        if self.at == "reset":
            raise RuntimeError("the map is missing")
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if self.at == "step":
            raise RuntimeError("the simulator diverged")
        if self.at == "exit":
            raise SystemExit(3)
        if self.at == "unencodable":
            return 0, 0.0, False, False, {"thing": object()}
        return 1, 0.0, False, False, {}


class Coroutine:
    """An env whose reset and step are coroutine functions; the action ``meet`` waits until ``parties`` have said it."""

    observation_space = spaces.Text(64)
    action_space = spaces.Text(64)
    metadata: dict[str, Any] = {}

    barrier: asyncio.Barrier | None = None

    def __init__(self, parties: int = 1) -> None:
        self.parties = parties
        self.said: list[str] = []

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        await asyncio.sleep(0)
        self.said = []
        return "hello", {}

    async def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "meet":
            if Coroutine.barrier is None:
                Coroutine.barrier = asyncio.Barrier(self.parties)
            await Coroutine.barrier.wait()
        await asyncio.sleep(3600 if action == "never" else 0)
        self.said.append(action)
        return action.upper(), 1.0, action == "bye", False, {"turns": len(self.said)}

    def close(self) -> None:
        self.said = []


class Picture(gymnasium.Env[Any, Any]):
    """Observations of ``shape``, each filled with the number of its step."""

    action_space = spaces.Discrete(2)

    def __init__(self, shape: tuple[int, ...] = (300, 300, 3)) -> None:
        self.observation_space = spaces.Box(0, 255, tuple(shape), np.uint8)
        self.count = 0

    def _observe(self) -> Any:
        return np.full(self.observation_space.shape, self.count % 256, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._observe(), 0.0, False, False, {}


class Gated(gymnasium.Env[Any, Any]):
    """Waits in what ``at`` names (constructor, step, render, close) until ``gate`` is set; says ``reached`` there."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["ansi"]}

    def __init__(
        self, at: str, reached: threading.Event, gate: threading.Event, render_mode: str | None = None
    ) -> None:
        self.at, self.reached, self.gate = at, reached, gate
        self.render_mode = render_mode
        self._pass("constructor")

    def _pass(self, where: str) -> None:
        if where == self.at:
            self.reached.set()
            self.gate.wait(60.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self._pass("step")
        return 1, 0.0, False, False, {}

    def render(self) -> str:
        self._pass("render")
        return "nothing"

    def close(self) -> None:
        self._pass("close")


class Waits(Coroutine):
    """A coroutine env: ``wait`` waits for ever, ``exit`` exits, ``stubborn`` waits and cannot be cancelled.

    It counts what it closed and what it was cancelled in.
    """

    closed = 0
    cancelled = 0

    def __init__(self) -> None:
        super().__init__()
        self.under_way = asyncio.Event()
        self.let_go = asyncio.Event()

    async def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "exit":
            raise SystemExit(3)
        if action == "cancel":
            raise asyncio.CancelledError
        while action in {"wait", "stubborn"} and not self.let_go.is_set():
            self.under_way.set()
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                type(self).cancelled += 1
                if action == "wait":
                    raise
        return await super().step(action)

    def close(self) -> None:
        type(self).closed += 1


class Rewards(gymnasium.Env[Any, Any]):
    """The reward of each step is the next of ``rewards``."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def __init__(self, rewards: list[Any]) -> None:
        self.rewards = list(rewards)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def step(self, action: int) -> tuple[int, Any, bool, bool, dict[str, Any]]:
        return 0, self.rewards.pop(0), False, False, {}
