"""Envs of the spaces and infos that Stable-Baselines3 meets; importable by worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


def arrays() -> dict[str, spaces.Space[Any]]:
    return {
        "where": spaces.Box(-1.0, 1.0, (3,), np.float32),
        "exact": spaces.Box(-1.0, 1.0, (2, 2), np.float64),
        "kind": spaces.Discrete(4, start=-1),
        "image": spaces.Box(0, 255, (4, 5, 1), np.uint8),
        "flags": spaces.MultiBinary(3),
        "pair": spaces.MultiDiscrete([3, 5]),
    }


class Tells(gymnasium.Env[Any, Any]):
    """Samples what it observes, and tells infos of every kind; everything comes of its own generator."""

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 7}
    action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.wind = 0.0
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {} if options is None else {"options": options, "seed": seed}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        draw = self.np_random
        reward = float(draw.random()) + self.wind + self.worth(action)
        terminated, truncated = (bool(ends) for ends in draw.random(2) < 0.08)
        return self.observation_space.sample(), reward, terminated, truncated, self._told()

    def worth(self, action: Any) -> float:
        return float(np.sum(action))

    def _told(self) -> dict[str, Any]:
        draw = self.np_random
        every: dict[str, Any] = {
            "step": self.steps,
            "reward": np.float32(draw.random()),
            "exact": np.float64(draw.random()),
            "seen": draw.integers(0, 9, (2, 2)).astype(np.int16),
            "zero-d": np.array(draw.random()),
            "sure": bool(draw.random() < 0.5),
            "np": np.bool_(draw.random() < 0.5),
            "note": "a note",
            "pair": (1, [2.0, None]),
            "deep": {"mean": float(draw.random()), "who": {"id": self.steps}},
            "TimeLimit.truncated": "of its own",
            "_hidden": b"bytes",
            "none": None,
        }
        return {key: value for key, value in every.items() if draw.random() < 0.4} if draw.random() < 0.8 else {}

    def gust(self, more: float, *, times: int = 1) -> float:
        self.wind += more * times
        return self.wind

    def render(self) -> Any:
        if self.render_mode == "ansi":
            return f"after {self.steps} steps"
        return np.full((4, 6, 3), self.steps % 256, np.uint8)


class OfDicts(Tells):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = spaces.Dict(arrays())


class OfTuples(Tells):
    action_space: spaces.Space[Any] = spaces.Discrete(5, start=2)

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = spaces.Tuple(tuple(arrays().values()))


class OfActions(OfTuples):
    """Its actions are dicts."""

    action_space = spaces.Dict({"turn": spaces.Discrete(5), "push": spaces.Box(-1.0, 1.0, (2,), np.float64)})

    def worth(self, action: Any) -> float:
        return float(action["turn"]) + float(action["push"].sum())


class Masked(gymnasium.Env[Any, Any]):
    """Allows two actions of four in each step, and ends with an exception at any other."""

    observation_space = spaces.Box(0.0, 1.0, (4,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self) -> None:
        self._allowed = np.ones(4, np.bool_)
        self._steps = 0

    def _draw(self) -> Any:
        self._allowed = np.zeros(4, np.bool_)
        self._allowed[self.np_random.permutation(4)[:2]] = True
        return self._allowed.astype(np.float32)

    def action_masks(self) -> Any:
        return self._allowed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._allowed[action]:
            raise RuntimeError("an action that was masked")
        self._steps += 1
        return self._draw(), 1.0, self._steps == 7, False, {}


class Goals(gymnasium.Env[Any, Any]):
    """Walks on a line to a goal, for hindsight experience replay."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        at = spaces.Box(-5.0, 5.0, (1,), np.float32)
        self.observation_space = spaces.Dict({"observation": at, "achieved_goal": at, "desired_goal": at})
        self._at = np.zeros(1, np.float32)
        self._goal = np.ones(1, np.float32)
        self._steps = 0

    def _observe(self) -> dict[str, Any]:
        return {"observation": self._at.copy(), "achieved_goal": self._at.copy(), "desired_goal": self._goal.copy()}

    def compute_reward(self, achieved: Any, desired: Any, _info: Any) -> Any:
        return -(np.abs(achieved - desired).sum(axis=-1) > 0.2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._at = np.zeros(1, np.float32)
        self._goal = self.np_random.uniform(-2.0, 2.0, 1).astype(np.float32)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._at = np.clip(self._at + action, -5.0, 5.0).astype(np.float32)
        self._steps += 1
        reward = float(self.compute_reward(self._at, self._goal, None))
        return self._observe(), reward, False, self._steps == 10, {}


class GatedReset(gymnasium.Env[Any, Any]):
    """Observes how often it was reset; a reset with the option ``gate`` waits at two named pipes."""

    observation_space = spaces.Discrete(1 << 20)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        if options is not None and "gate" in options:
            with Path(options["entered"]).open("w"):
                pass
            Path(options["gate"]).read_text()
        self.resets += 1
        return self.resets, {"seed": seed, "waited": options is not None}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return self.resets, 0.0, False, False, {}


def monitored() -> gymnasium.Env[Any, Any]:
    """A CartPole that a worker's own Monitor counts."""
    from stable_baselines3.common.monitor import Monitor

    watched: gymnasium.Env[Any, Any] = Monitor(gymnasium.make("CartPole-v1"))
    return watched
