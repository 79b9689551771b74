"""Small environments whose every step can be accounted for."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.mesh.gymnasium_ids import TAXI


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


class Hooked(Counter):
    """Calls ``hook`` with what it is about to do, ``reset`` or ``step``, and the action; renders its ``tag``."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, hook: Callable[[str, int], None] = lambda *_: None, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.hook = hook
        self.tag = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.hook("reset", 0)
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.hook("step", int(action))
        return super().step(action)

    def render(self) -> Any:
        return np.full((2, 4, 3), self.tag, np.uint8)


# Gymnasium's own, of episodes that end often.
short_acrobot = partial(gymnasium.make, "Acrobot-v1", max_episode_steps=40)
short_pendulum = partial(gymnasium.make, "Pendulum-v1", max_episode_steps=30)
short_taxi = partial(gymnasium.make, TAXI, max_episode_steps=30)


class Sampled(gymnasium.Env[Any, Any]):
    """Samples what it tells from its spaces, and everything else from its own generator: an env of any spaces.

    A step looks at the action's type and bytes, so that an action which arrives as another one shows in the reward.

    Args:
        observation_space: copied, since sampling changes it.
        action_space: copied.
        infos: gives the info of a step or reset, of the env's generator.
        ends: the probability of each step to end the episode.
    """

    metadata = {"render_modes": ["ansi"]}

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        infos: Callable[[np.random.Generator], dict[str, Any]] = lambda _: {},
        ends: float = 0.2,
        render_mode: str | None = None,
    ) -> None:
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.render_mode = render_mode
        self.wind: Any = 0.0
        self.steps = 0
        self._infos = infos
        self._ends = ends

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.steps = 0 if options is None else int(options.get("steps", -1))
        return self.observe(), self._infos(self.np_random)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        seen = zlib.crc32(repr(_plain(action)).encode()) % 1000
        reward = np.float32(self.np_random.random() + seen + float(self.wind))
        ends, late = self.np_random.random(2) < (self._ends, 0.5)
        terminated, truncated = bool(ends and not late), np.bool_(ends and late)
        return self.observe(), reward, terminated, truncated, self._infos(self.np_random)

    def observe(self) -> Any:
        return self.observation_space.sample()

    def render(self) -> str:
        return f"after {self.steps} steps, wind {self.wind}"

    def gust(self, more: float, *, times: int = 1) -> float:
        self.wind += more * times
        return float(self.wind)


def _plain(value: Any) -> Any:
    """Types, and bits as text."""
    if isinstance(value, (np.ndarray, np.generic)):
        return type(value).__name__, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(item) for item in value]
    return type(value).__name__, value


class Nested(Sampled):
    """Dicts of Dicts and Tuples both ways, with infos of every kind: some now and then, nested, arrays, text.

    The info is one dict for ever, and so are the array and the dict in it: what they hold changes.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        inner = spaces.Dict({"mode": spaces.Discrete(3, start=-1), "at": spaces.Box(-1, 1, (2, 3), np.float32)})
        pair = spaces.Tuple((spaces.MultiBinary(3), spaces.Box(0, 255, (4, 4, 1), np.uint8)))
        observations = spaces.Dict({"pair": pair, "inner": inner, "said": spaces.Text(5)})
        actions = spaces.Dict({"turn": spaces.Discrete(5), "push": spaces.Box(-1, 1, (2,), np.float32), "pair": pair})
        super().__init__(observations, actions, self._told, ends=0.03, render_mode=render_mode)
        self._info: dict[str, Any] = {"seen": np.zeros(2, np.int16), "sums": {"all": 0, "deep": {"mean": 0.0}}}

    def observe(self) -> Any:
        chance = self.np_random  # the spaces' own ways take ten times as long
        inner = {"mode": chance.integers(-1, 2), "at": chance.random((2, 3), np.float32)}
        pair = (chance.integers(0, 2, 3, np.int8), chance.integers(0, 256, (4, 4, 1), np.uint8))
        return {"inner": inner, "pair": pair, "said": "abcde"[: chance.integers(6)]}

    def _told(self, chance: np.random.Generator) -> dict[str, Any]:
        info = self._info
        info["seen"][:] = chance.integers(-100, 100, 2)
        info["sums"]["all"] += 1
        info["sums"]["deep"]["mean"] = float(chance.random())
        info["lucky"] = bool(chance.random() < 0.5)
        for key, value in (("note", "a note"), ("np", np.float32(chance.random())), ("list", [1, "two"]), ("no", None)):
            info.pop(key, None)
            if chance.random() < 0.3:
                info[key] = value
        return info
