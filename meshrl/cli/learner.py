"""One learner: it searches a linear policy for CartPole by the cross-entropy method, on envs that it leases by name.

It reads from top to bottom: the settings, what it reports, an episode, the search. The only lines that know of the
mesh are the one that leases the envs and the two that reset and step them.

The method is the noisy cross-entropy method of Szita and Lőrincz (Neural Computation 18, 2006): draw weights from a
Gaussian, keep the elites, fit the Gaussian to them, and add a variance that fades, so that it does not narrow too soon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from meshrl.client.env import RemoteEnv
    from meshrl.client.mesh import Mesh

Weights = NDArray[np.float64]

# Gymnasium takes any seed below 2^31. Training draws its seeds below this, evaluation counts up from it, so that no
# evaluation episode was ever trained on.
EVALUATION_SEEDS = 1_000_000_000
# An evaluation takes up to 10,000 steps. It begins only when a generation (weak members included) returns this part
# of the target on average, and goes on only when its first episodes reach the target.
PROMISING = 0.5
FIRST_EPISODES = 5
# The noise (as a variance) of the first generation; it fades over this many, and a tenth of it stays.
NOISE = 0.25
NOISE_GENERATIONS = 10
# What one unit of weight acts on: a metre, a metre a second, a tenth of a radian, half a radian a second. The episode
# ends at a tilt of 0.2 rad, so that in plain radians the search would hardly see it. With these, all of 150 seeds
# (0 to 149) reach 475: in 24,000 steps on average, 69,000 at most.
SCALE = np.array([1.0, 1.0, 0.1, 0.5])


# --------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What a learner can be told; also its command line (``--population 24``)."""

    env: str = field(default="CartPole-v1", metadata={"help": "served name of the env"})
    seed: int = field(default=0, metadata={"help": "of the search and of its episodes"})
    envs: int = field(default=8, metadata={"help": "envs to lease and step at the same time"})
    population: int = field(default=24, metadata={"help": "policies in a generation, one episode each"})
    elites: int = field(default=6, metadata={"help": "policies that the next generation is drawn around"})
    target: float = field(default=475.0, metadata={"help": "mean evaluation return at which it has learned"})
    episodes: int = field(default=20, metadata={"help": "episodes of an evaluation"})
    max_steps: int = field(default=200_000, metadata={"help": "env steps after which it gives up"})

    @classmethod
    def from_command_line(cls, arguments: Sequence[str] | None = None) -> Settings:
        """The settings that the command line gives."""
        parser = argparse.ArgumentParser(description="One learner of CartPole on the mesh that MESHRL_URL names.")
        for one in fields(cls):
            name = "--" + one.name.replace("_", "-")
            parser.add_argument(
                name, type=type(one.default), default=one.default, help=f"{one.metadata['help']} (%(default)s)"
            )
        return cls(**vars(parser.parse_args(arguments)))

    def command_line(self) -> list[str]:
        """The arguments that give these settings."""
        return [f"--{one.name.replace('_', '-')}={getattr(self, one.name)}" for one in fields(self)]


# --------------------------------------------------------------------------- what it reports


class Episode(BaseModel):
    """One episode has ended.

    Attributes:
        steps: env steps of this learner so far, evaluation included.
        episodes: episodes so far, evaluation included.
        seconds: since the envs were leased.
        episode_return: of this episode.
        evaluation: whether it was greedy and is not learned from.
    """

    model_config = ConfigDict(frozen=True)

    event: Literal["episode"] = "episode"
    steps: int
    episodes: int
    seconds: float
    episode_return: float
    evaluation: bool


class Generation(BaseModel):
    """A generation has been tried.

    Attributes:
        number: from 1.
        steps: env steps of this learner so far.
        mean_return: over its members.
    """

    model_config = ConfigDict(frozen=True)

    event: Literal["generation"] = "generation"
    number: int
    steps: int
    mean_return: float


class Result(BaseModel):
    """What a learner ends with.

    Attributes:
        reached: whether the evaluation reached the target.
        mean_return: of the last evaluation.
        weights: of the policy: it pushes right when ``weights @ observation > 0``.
        steps: env steps, evaluation included.
        episodes: episodes, evaluation included.
        seconds: from the leases to the end of the last evaluation.
        workers: env steps by the id of the worker that took them.
    """

    model_config = ConfigDict(frozen=True)

    event: Literal["result"] = "result"
    reached: bool
    mean_return: float
    weights: list[float]
    steps: int
    episodes: int
    seconds: float
    workers: dict[str, int]


Report = Callable[[Episode | Generation], object]


# --------------------------------------------------------------------------- an episode


def act(weights: Weights, observation: Any) -> int:
    """The linear policy's action: 1 (push right) or 0 (push left)."""
    return int(weights @ observation > 0)


async def play(env: RemoteEnv, weights: Weights, seed: int) -> float:
    """Run one episode; gives its return."""
    observation, _ = await env.reset(seed=seed)
    total, terminated, truncated = 0.0, False, False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, _ = await env.step(act(weights, observation))
        total += reward
    return total


# --------------------------------------------------------------------------- the search


class Learner:
    """The search, and the count of what it has used.

    Its course depends on the settings alone: which env or worker an episode runs on, and when it ends, changes
    nothing.

    Args:
        settings: of the search.
        envs: leased ones, stepped at the same time.
        report: is told of each episode and generation.
    """

    def __init__(self, settings: Settings, envs: Sequence[RemoteEnv], report: Report) -> None:
        self.settings = settings
        self.steps = 0
        self.episodes = 0
        self.by_worker: Counter[str] = Counter()
        self._envs = envs
        self._report = report
        self._began = time.monotonic()

    async def search(self) -> Result:
        """Learn until an evaluation reaches the target, or until ``max_steps``."""
        settings = self.settings
        rng = np.random.default_rng(settings.seed)
        mean, std = np.zeros(SCALE.shape), np.ones(SCALE.shape)
        number = 0
        while True:
            population = mean + std * rng.standard_normal((settings.population, SCALE.size))
            seeds = rng.integers(EVALUATION_SEEDS, size=settings.population)
            jobs = [(member / SCALE, int(seed)) for member, seed in zip(population, seeds, strict=True)]
            returns = await self._play_all(jobs, evaluation=False)

            elites = population[np.argsort(-returns, kind="stable")[: settings.elites]]
            noise = NOISE * max(0.1, 1.0 - number / NOISE_GENERATIONS)
            mean, std = elites.mean(axis=0), np.sqrt(elites.var(axis=0) + noise)
            number += 1
            self._report(Generation(number=number, steps=self.steps, mean_return=float(returns.mean())))

            last = self.steps >= settings.max_steps
            if last or returns.mean() >= PROMISING * settings.target:
                final = await self._evaluate(mean / SCALE, whole=last)
                if last or final >= settings.target:
                    return self._result(mean / SCALE, final)

    async def _evaluate(self, weights: Weights, *, whole: bool) -> float:
        """Mean return of the evaluation episodes; 0 when the first ones fail and nobody needs to know the rest."""
        first = EVALUATION_SEEDS + self.settings.seed * self.settings.episodes
        jobs = [(weights, first + index) for index in range(self.settings.episodes)]
        returns = await self._play_all(jobs[:FIRST_EPISODES], evaluation=True)
        if returns.mean() < self.settings.target and not whole:
            return 0.0
        others = await self._play_all(jobs[FIRST_EPISODES:], evaluation=True)
        return float(np.concatenate([returns, others]).mean())

    async def _play_all(self, jobs: Sequence[tuple[Weights, int]], *, evaluation: bool) -> NDArray[np.float64]:
        """Run an episode for each (weights, seed), the next one in whichever env is free; gives their returns."""
        returns = np.zeros(len(jobs))
        waiting = iter(enumerate(jobs))

        async def keep_busy(env: RemoteEnv) -> None:
            for index, (weights, seed) in waiting:  # one iterator for all: each takes the next
                returns[index] = total = await play(env, weights, seed)
                self._count(env.worker, total, evaluation=evaluation)

        async with asyncio.TaskGroup() as group:
            for env in self._envs:
                group.create_task(keep_busy(env))
        return returns

    def _count(self, worker: str, total: float, *, evaluation: bool) -> None:
        length = int(total)  # CartPole gives 1 a step
        self.steps += length
        self.episodes += 1
        self.by_worker[worker] += length
        self._report(
            Episode(
                steps=self.steps,
                episodes=self.episodes,
                seconds=time.monotonic() - self._began,
                episode_return=total,
                evaluation=evaluation,
            )
        )

    def _result(self, weights: Weights, final: float) -> Result:
        return Result(
            reached=final >= self.settings.target,
            mean_return=final,
            weights=weights.tolist(),
            steps=self.steps,
            episodes=self.episodes,
            seconds=time.monotonic() - self._began,
            workers=dict(self.by_worker),
        )


async def learn(mesh: Mesh, settings: Settings, report: Report = lambda _event: None) -> Result:
    """Lease the envs and learn.

    Args:
        mesh: where the env is served.
        settings: of the search.
        report: is told of each episode and generation.

    Raises:
        UnknownName: nobody serves the env.
        MeshFull: there are not enough slots.
        ExceptionGroup: of ``SessionLost``: a worker went away with envs.
    """
    async with contextlib.AsyncExitStack() as stack:
        envs = [await stack.enter_async_context(await mesh.env(settings.env)) for _ in range(settings.envs)]
        return await Learner(settings, envs, report).search()
