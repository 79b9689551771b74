"""An env of one's own, served by name and stepped through the mesh.

::

    python examples/serve_my_env.py

Here worker and client are in one program. They need not be: ``await worker.serve_forever()`` in one process, and
``Mesh()`` in another one, on another machine, find each other by the address of the same NATS server
(``MESHRL_URL``, or ``url=``).
"""

import asyncio
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Discrete

from meshrl import EnvWorker, Mesh


class GuessTheNumber(gym.Env[Any, Any]):
    """A number from 0 to 99 is to be found; the observation says 0: too low, 1: too high, 2: found, 3: no guess yet."""

    observation_space, action_space = Discrete(4), Discrete(100)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Draw the number."""
        super().reset(seed=seed, options=options)
        self.number = int(self.np_random.integers(100))
        return 3, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Answer a guess."""
        found = action == self.number
        return 2 if found else int(action > self.number), -1.0, found, False, {}


async def main() -> None:
    async with EnvWorker({"guess": GuessTheNumber}), Mesh() as m:
        env = await m.env("guess")
        await env.reset(seed=7)
        low, high, found = 0, 99, False
        while not found:
            guess = (low + high) // 2
            answer, _, found, _, _ = await env.step(guess)
            print(f"{guess}: {('too low', 'too high', 'found')[answer]}")
            low, high = (guess + 1, high) if answer == 0 else (low, guess - 1)
        await env.close()


if __name__ == "__main__":
    asyncio.run(main())
