"""Atari envs whose episodes are short, so that many of them begin without a seed."""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

gymnasium.register_envs(ale_py)

# With sticky actions, as ALE's v5 envs have them.
EPISODE_FRAMES = 240


def make(game: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """One of ALE's own."""
    return gymnasium.make(f"ALE/{game}-v5", **{"max_num_frames_per_episode": EPISODE_FRAMES, **kwargs})


def breakout(obs_type: str = "ram") -> gymnasium.Env[Any, Any]:
    """Breakout, to be served."""
    return make("Breakout", obs_type=obs_type)


def pong(obs_type: str = "grayscale") -> gymnasium.Env[Any, Any]:
    """Pong with frame skips that its env draws, to be served."""
    return make("Pong", obs_type=obs_type, frameskip=(2, 5))


def preprocessed(game: str = "Breakout") -> gymnasium.Env[Any, Any]:
    """As DQN plays it: up to 30 times nothing at first, which the env's generator decides."""
    return FrameStackObservation(AtariPreprocessing(make(game, frameskip=1), noop_max=30), 4)
