"""Envs that tests of ``meshrl.make`` have served: importable by a worker process."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env[Any, Any]):
    """Observes how many steps it has taken since its reset."""

    observation_space = spaces.Discrete(1 << 30)
    action_space = spaces.Discrete(2)
    limit = 10

    def __init__(self) -> None:
        self._count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self._count += 1
        return self._count, 1.0, False, False, {}

    def doubled(self, value: int, *, plus: int = 0) -> int:
        return 2 * value + plus


class Gated(Counter):
    """The action 1 waits at a gate: it opens ``options["entered"]`` to write, then reads ``options["gate"]``.

    Both are named pipes, so that each side's opening waits for the other's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pipes: dict[str, str] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self._pipes = dict(options or self._pipes)
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if action == 1:
            with Path(self._pipes["entered"]).open("w"):
                pass
            Path(self._pipes["gate"]).read_text()
        return super().step(action)


class Framed(Counter):
    """Renders arrays and nothing else."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # as Gymnasium has it

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.full((4, 6, 3), self._count, np.uint8)
