"""The envs as OpenEnv environments, written as its own are: an action, an observation and an environment class each."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from openenv.core.env_server import Action, Environment, Observation, State
from peers.served import Image, cartpole


class Move(Action):
    move: int


class Vector(Observation):
    values: list[float]
    truncated: bool = False


class Screen(Observation):
    """A picture as OpenEnv's own Atari environment sends it: a flat list of numbers."""

    screen: list[int]
    screen_shape: list[int]


class EncodedScreen(Observation):
    """A picture as fast as JSON takes one."""

    screen: str
    screen_shape: list[int]


class Served(Environment[Move, Observation, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    @property
    def state(self) -> State:
        return State()


class CartPole(Served):
    def __init__(self) -> None:
        super().__init__()
        self.env = cartpole()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Vector:
        observation, _ = self.env.reset(seed=seed)
        return Vector(values=observation.tolist())

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Vector:
        observation, reward, terminated, truncated, _ = self.env.step(action.move)
        return Vector(
            values=observation.tolist(), reward=float(reward), done=terminated or truncated, truncated=truncated
        )

    def close(self) -> None:
        self.env.close()


class Picture(Served):
    def __init__(self) -> None:
        super().__init__()
        self.env = Image()

    def shown(self, frame: Any, reward: float | None = None) -> Observation:
        return Screen(screen=frame.ravel().tolist(), screen_shape=list(frame.shape), reward=reward)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        return self.shown(self.env.reset(seed=seed)[0])

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        frame, reward, *_ = self.env.step(action.move)
        return self.shown(frame, reward)


class InTheLoop(Served):
    """Overrides the coroutine: OpenEnv then awaits it in its event loop in place of a hop to a thread and back."""

    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Any:
        return self.reset(seed, episode_id, **kwargs)

    async def step_async(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Any:
        return self.step(action, timeout_s, **kwargs)


class CartPoleInTheLoop(InTheLoop, CartPole):
    pass


class PictureInTheLoop(InTheLoop, Picture):
    def shown(self, frame: Any, reward: float | None = None) -> Observation:
        screen = base64.b64encode(frame).decode()
        return EncodedScreen(screen=screen, screen_shape=list(frame.shape), reward=reward)


class Waiting(Served):
    """OpenEnv's own scaling protocol: a step waits for a second without using the CPU."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Vector:
        return Vector(values=[])

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Vector:
        raise NotImplementedError

    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Vector:
        return self.reset()

    async def step_async(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Vector:
        await asyncio.sleep(1.0)
        return Vector(values=[], reward=0.0)


class WaitingWithoutThreads(Waiting):
    """By default every session has an executor of its own, whose thread makes the env; this shares one."""

    REQUIRES_SINGLE_THREAD_EXECUTOR = True


ENVIRONMENTS = {
    "usual": {"cartpole": CartPole, "image": Picture, "waiting": Waiting},
    "best": {"cartpole": CartPoleInTheLoop, "image": PictureInTheLoop, "waiting": WaitingWithoutThreads},
}
