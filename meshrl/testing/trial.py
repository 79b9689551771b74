"""A trial: one env under the suite, how checks lease it and play in it, and how they say what they found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from meshrl.client.env import RemoteEnv
from meshrl.client.mesh import Mesh
from meshrl.testing.compare import Episode, Transition
from meshrl.wire.messages import Description


class Found(Exception):
    """What a check says that did not simply pass.

    Attributes:
        found: what it found, in a sentence.
        remedy: what to do about it.
    """

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


class Broken(Found):
    """The env breaks its contract."""


class Doubtful(Found):
    """Something to look at, which may be meant so."""


class NotApplicable(Found):
    """There is nothing to check here."""


@dataclass
class Trial:
    """One env under the suite.

    Attributes:
        mesh: where it is served.
        name: as served.
        kwargs: for its constructor.
        episodes: how many are played in a row where one would not do.
        seed: of the first.
        max_steps: an episode is left after that many.
        wait: seconds to wait for a slot.
        description: what the worker tells of it.
        played: the episodes of the check ``step``, for those after it.
    """

    mesh: Mesh
    name: str
    kwargs: Mapping[str, Any] | None
    episodes: int
    seed: int
    max_steps: int
    wait: float
    description: Description
    played: list[Episode] = field(default_factory=list)

    @asynccontextmanager
    async def env(self, render_mode: str | None = None, *, wait: float | None = None) -> AsyncIterator[RemoteEnv]:
        """A session of its own, closed at the end."""
        env = await self.mesh.env(
            self.name, self.kwargs, render_mode=render_mode, wait=self.wait if wait is None else wait
        )
        try:
            yield env
        finally:
            await env.close()

    async def play(self, env: RemoteEnv, seed: int | None, *, action_seed: int | None = None) -> Episode:
        """One episode of random actions, the same ones for the same ``action_seed`` (``seed`` when None)."""
        drawn_by = (given for given in (action_seed, seed, self.seed) if given is not None)
        walk = Walk(env, next(drawn_by))
        episode = await walk.begin(seed)
        while len(episode.steps) < self.max_steps and await walk.step():
            pass
        return episode


class Walk:
    """An episode under way: random actions, drawn from a generator of its own.

    Args:
        env: to act in.
        action_seed: of the actions.
    """

    def __init__(self, env: RemoteEnv, action_seed: int) -> None:
        self._env = env
        self._space = env.action_space
        self._space.seed(action_seed)
        self.episode: Episode | None = None

    async def begin(self, seed: int | None) -> Episode:
        """Reset."""
        obs, info = await self._env.reset(seed=seed)
        self.episode = Episode(self._env.worker, obs, info)
        return self.episode

    async def step(self) -> bool:
        """One step; gives whether the episode goes on."""
        episode = self.episode
        assert episode is not None, "begin comes first"
        last = episode.steps[-1].info if episode.steps else episode.info
        episode.steps.append(Transition(*await self._env.step(sample(self._space, last))))
        return not episode.ended


def sample(space: spaces.Space[Any], info: Any) -> Any:
    """A random action, legal where ``info["action_mask"]`` says what is."""
    mask = info.get("action_mask") if isinstance(info, Mapping) else None
    if mask is not None and isinstance(space, spaces.Discrete):
        return space.sample(mask=np.asarray(mask, dtype=np.int8))
    return space.sample()


@dataclass(frozen=True)
class Check:
    """One question that the suite asks.

    Attributes:
        name: as it stands in reports.
        about: what it asks, as a sentence that is true of a good env.
        run: gives in a sentence what it found when all is well; raises :class:`Found` or a MeshError otherwise.
        needs: checks that must not have failed, for the question to make sense.
    """

    name: str
    about: str
    run: Callable[[Trial], Awaitable[str]]
    needs: tuple[str, ...] = ()
