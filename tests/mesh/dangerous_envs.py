"""Envs that take their process with them, or never come back: what ``isolation="process"`` is for."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Dangerous(gymnasium.Env[Any, Any]):
    """Counts its steps, until a step does what its action says: see :meth:`do`.

    Args:
        at: ``constructor`` or ``reset`` do it as well, with ``what``.
        what: an action.
    """

    SAFE, HANG, SEGFAULT, EXIT, ALLOCATE, COMPUTE, RAISE, SHOUT, UNENCODABLE = range(9)

    observation_space = spaces.Discrete(1 << 30)
    action_space = spaces.Discrete(16)
    metadata = {"render_modes": ["ansi"]}

    def __init__(self, at: str = "", what: int = 0, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.at, self.what = at, what
        self.count = 0
        self.label = "dangerous"
        self._held: Any = None
        if at == "constructor":
            self.do(what)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        if self.at == "reset":
            self.do(self.what)
        self.count = 0
        return 0, {
            "pid": os.getpid(),
            "draw": int(self.np_random.integers(1 << 30)),
            "global": float(np.random.random()),  # noqa: NPY002  # the state that a fork shares
        }

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.count += 1
        info = self.do(int(action)) or {}
        return self.count, 1.0, False, False, {**info, "pid": os.getpid()}

    def do(self, what: int) -> dict[str, Any] | None:
        """What the action says."""
        if what == self.HANG:
            threading.Event().wait()
        if what == self.SEGFAULT:
            ctypes.string_at(0)
        if what == self.EXIT:
            print("I have seen enough", file=sys.stderr)  # noqa: T201  # as envs do
            os._exit(7)
        if what == self.ALLOCATE:
            self._held = np.ones(1 << 28)  # 2 GiB, written to
        while what == self.COMPUTE:
            pass
        if what == self.RAISE:
            raise ZeroDivisionError("no way on")
        if what == self.SHOUT:
            print("x" * (1 << 20))  # noqa: T201  # as envs do
        return {"thing": object(), "fine": 1} if what == self.UNENCODABLE else None

    def render(self) -> str:
        return f"after {self.count} steps"

    def plus(self, a: int, *, b: int = 1) -> int:
        return a + b

    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


class Slowly(Dangerous):
    """A coroutine env."""

    async def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        return super().step(action)
