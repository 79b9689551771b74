"""What learners do: a fixed rule of the observation, and now and then at random, from a generator of (seed, env_id).

The rules let episodes get long, so that there is a journal to be done again when a worker is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np

from tests.mesh.resumed_envs import Posters

CARTPOLE, FROZENLAKE, LUNARLANDER = "CartPole-v1", "FrozenLake-v1", "LunarLander-v3"
POSTERS = "Posters"
# Box2D is an extra: where it is missing, CartPole stands in, and the report says so.
HAS_BOX2D = find_spec("Box2D") is not None
NAMES = (CARTPOLE, FROZENLAKE, LUNARLANDER) if HAS_BOX2D else (CARTPOLE, FROZENLAKE)
SERVED = {**{name: name for name in NAMES}, POSTERS: "tests.mesh.resumed_envs:Posters"}

Rule = Callable[[Any], int]


def make(name: str) -> Any:
    """What workers serve by that name, here."""
    return Posters() if name == POSTERS else gymnasium.make(name)


class Policy:
    """Of one sub-environment.

    Args:
        name: of the env.
        seed: of the learner.
        env_id: of the sub-environment.
    """

    def __init__(self, name: str, seed: int, env_id: int) -> None:
        self._rule, self._at_random, self._actions = _RULES[name]
        self._rng = np.random.default_rng([seed, env_id])

    def __call__(self, obs: Any) -> int:
        """The action after an observation."""
        drawn = int(self._rng.integers(self._actions))
        return drawn if self._rng.random() < self._at_random else self._rule(obs)


def _balance(obs: Any) -> int:
    """A pole that leans and turns to the right is caught by going there."""
    return int(obs[2] + 0.5 * obs[3] > 0.0)


def _nowhere(_: Any) -> int:
    return 0


def _land(obs: Any) -> int:
    """Gymnasium's own heuristic for the lander, in short."""
    x, y, vx, vy, angle, turning = (float(value) for value in obs[:6])
    lean = (float(np.clip(0.5 * x + vx, -0.4, 0.4)) - angle) * 0.5 - turning
    lift = (0.55 * abs(x) - y) * 0.5 - vy * 0.5
    if obs[6] or obs[7]:
        lean, lift = 0.0, -vy * 0.5
    if lift > max(abs(lean), 0.05):
        return 2
    return 3 if lean < -0.05 else 1 if lean > 0.05 else 0


# Of each env its rule, how often an action is drawn in place of it, and how many actions there are.
_RULES: dict[str, tuple[Rule, float, int]] = {
    CARTPOLE: (_balance, 0.3, 2),
    FROZENLAKE: (_nowhere, 1.0, 4),
    LUNARLANDER: (_land, 0.2, 4),
    POSTERS: (_nowhere, 1.0, 4),
}
