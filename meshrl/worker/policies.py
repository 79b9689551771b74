"""Policies that every mesh can serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from meshrl.errors import UsageError
from meshrl.protocol.seeds import derive


def random_policy(
    obs: Any,  # noqa: ARG001  # a policy's first argument
    *,
    info: Mapping[str, Any] | None = None,
    seed: int | None = None,
    env_id: int = 0,
    step: int = 0,
    action_space: gymnasium.Space[Any] | None = None,
) -> Any:
    """A sample of the action space, legal where ``info["action_mask"]`` says what is.

    With a seed, the answer depends on (seed, env_id, step) alone (R12).

    Raises:
        UsageError: it was not told the action space.
    """
    if action_space is None:
        raise UsageError("agent random acts in any env and must be told which: m.agent('random', env=env)")
    action_space.seed(None if seed is None else derive(int(seed), int(env_id), int(step)))
    mask = (info or {}).get("action_mask")
    if mask is not None and isinstance(action_space, gymnasium.spaces.Discrete):
        return action_space.sample(mask=np.asarray(mask, dtype=np.int8))
    return action_space.sample()
