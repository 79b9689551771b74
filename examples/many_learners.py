"""Several learners, each in a process of its own, that share one pool of CartPole by name.

::

    python examples/many_learners.py --learners 4

The learner itself (an episode, the search) is ``meshrl/cli/learner.py``, the same that ``meshrl demo`` runs; it reads
from top to bottom like this file. Here is what makes many of one: each process opens its own ``Mesh()``, which leads
to the same mesh, and leases envs by the same name.
"""

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields

from meshrl import Mesh
from meshrl.cli import learner


@dataclass(frozen=True)
class Settings:
    """Also the command line."""

    learners: int = 4
    env: str = "CartPole-v1"
    target: float = 475.0  # mean return of 20 evaluation episodes
    seed: int = 0


def learn(settings: Settings, index: int) -> learner.Result:
    """What one process does."""

    async def main() -> learner.Result:
        seed = settings.seed * settings.learners + index
        async with Mesh() as m:
            return await learner.learn(m, learner.Settings(env=settings.env, target=settings.target, seed=seed))

    return asyncio.run(main())


async def main(settings: Settings) -> None:
    # Spawned and not forked: a process that runs an event loop and threads is not to be copied.
    processes = ProcessPoolExecutor(settings.learners, mp_context=multiprocessing.get_context("spawn"))
    # If there was no mesh, this Mesh() has started one, and the processes below it find it.
    async with Mesh() as m:
        with processes:
            loop = asyncio.get_running_loop()
            learners = [loop.run_in_executor(processes, learn, settings, index) for index in range(settings.learners)]
            for index, learning in enumerate(learners, 1):
                result = await learning
                print(
                    f"learner {index}: mean return {result.mean_return:.1f} after {result.steps:,} env steps in "
                    f"{result.episodes} episodes and {result.seconds:.1f} s, served by {', '.join(result.workers)}"
                )
        report = await m.evaluate(env=settings.env, agent="random", episodes=20, seed=10**9)
        print(f"a random policy: mean return {report.mean_return:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Several learners that share one pool of envs.")
    for one in fields(Settings):
        parser.add_argument(f"--{one.name}", type=type(one.default), default=one.default)
    asyncio.run(main(Settings(**vars(parser.parse_args()))))
