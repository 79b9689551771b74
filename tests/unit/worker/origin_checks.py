"""Whether a fresh env goes on as another one would, from what outlives that one's resets."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from meshrl.worker.origins import outliving


def episode(env: Any, actions: Any, steps: int) -> list[bytes]:
    """What ``steps`` steps tell, through as many episodes as they take."""
    told = []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(actions.sample())
        told.append(np.asarray(obs).tobytes() + np.float64(reward).tobytes() + bytes([terminated, truncated]))
        if terminated or truncated:
            told.append(np.asarray(env.reset()[0]).tobytes())
    return told


def check_goes_on(name: str, steps: int = 300) -> None:
    """Of a registered env, in the middle of its life."""
    env, fresh = gymnasium.make(name), gymnasium.make(name)
    env.action_space.seed(1)
    env.reset(seed=5)
    episode(env, env.action_space, steps)
    kept, other = outliving(env), outliving(fresh)
    assert kept is not None
    assert other is not None
    other.put(kept.get())
    ours, theirs = fresh.reset()[0], env.reset()[0]
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    actions, same = gymnasium.make(name).action_space, gymnasium.make(name).action_space
    actions.seed(2)
    same.seed(2)
    assert episode(fresh, same, steps) == episode(env, actions, steps)
