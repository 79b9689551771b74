"""The workers of the demo, as programs: one serves envs, one serves agents, on the mesh that ``MESHRL_URL`` names.

::

    python -m meshrl.cli.demo_workers envs CartPole-v1
    python -m meshrl.cli.demo_workers agents CartPole-v1 best-policy.json

Each says its worker's id as a line of JSON on stdout once it serves, and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from meshrl.cli.learner import act
from meshrl.errors import UsageError
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.host import run
from meshrl.worker.policies import random_policy
from meshrl.worker.service import Service

SLOTS = 64


class BestPolicy:
    """The best linear policy so far: its weights stand in a file, and are read again when that changes.

    Args:
        path: of the file: JSON with ``weights``. It may appear later.
        env: Gymnasium id of the env whose spaces it declares.
    """

    def __init__(self, path: Path, env: str) -> None:
        with contextlib.closing(gymnasium.make(env)) as made:
            self.observation_space: gymnasium.Space[Any] = made.observation_space
            self.action_space: gymnasium.Space[Any] = made.action_space
        self._path = path
        self._weights = np.zeros(0)
        self._written_ns = 0

    def act(self, obs: Any) -> int:
        """The action for one observation, shape (4,).

        Raises:
            UsageError: no learner has finished yet.
        """
        try:
            written_ns = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            raise UsageError("agent best has no policy yet: no learner has finished") from None
        if written_ns != self._written_ns:
            self._weights = np.array(json.loads(self._path.read_text(encoding="utf-8"))["weights"])
            self._written_ns = written_ns
        return act(self._weights, obs)


async def serve(worker: Service) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with worker:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(name, worker.stop)
        print(json.dumps({"event": "serving", "worker": worker.id}), flush=True)
        await worker.serve_forever()


async def main(arguments: Sequence[str]) -> None:
    """Serve what the command line says."""
    match arguments:
        case ["envs", env]:
            await serve(EnvWorker({env: env}, slots=SLOTS))
        case ["agents", env, path]:
            await serve(AgentWorker({"best": BestPolicy(Path(path), env), "random": random_policy}))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    run(main(sys.argv[1:]))
