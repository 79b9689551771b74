"""The parts of the demo, as programs, each for one process on the mesh that ``MESHRL_URL`` names.

::

    python -m meshrl.cli.demo_parts envs CartPole-v1
    python -m meshrl.cli.demo_parts agents CartPole-v1 best-policy.json
    python -m meshrl.cli.demo_parts learner --seed 1

What they have to say stands on stdout, in lines of JSON with an ``event``. Workers say their id once they serve, and
serve until SIGTERM; a learner reports its episodes and generations, and ends with its result.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from meshrl.cli.learner import Settings, act, learn
from meshrl.cli.serving import stay_serving
from meshrl.client.mesh import Mesh
from meshrl.errors import UsageError
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.policies import random_policy
from meshrl.worker.running import run, until_stopped
from meshrl.worker.service import Service

# Room on one worker for all that the command line can ask for: 16 learners of 8 envs, and an evaluation.
SLOTS = 256


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
    await until_stopped(stay_serving(worker, lambda it: json.dumps({"event": "serving", "worker": it.id})))


async def teach(settings: Settings) -> None:
    """Run a learner to its end."""
    async with Mesh() as mesh:
        result = await learn(mesh, settings, lambda event: print(event.model_dump_json(), flush=True))
    print(result.model_dump_json(), flush=True)


async def main(arguments: Sequence[str]) -> None:
    """Serve what the command line says."""
    match arguments:
        case ["envs", env]:
            await serve(EnvWorker({env: env}, slots=SLOTS))
        case ["agents", env, path]:
            await serve(AgentWorker({"best": BestPolicy(Path(path), env), "random": random_policy}))
        case ["learner", *settings]:
            await teach(Settings.from_command_line(settings))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    run(main(sys.argv[1:]))
