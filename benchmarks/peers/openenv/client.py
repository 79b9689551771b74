"""OpenEnv in two ways.

"usual", as its documentation has it: a synchronous step, and what pip installs. "best", the fastest found within public
options: step_async in the server's loop, uvloop, httptools, no compression, the client that leaves dicts as they are.
"""

from __future__ import annotations

import asyncio
import base64
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any, Self

import driver
import numpy as np
import uvloop
from models import Move, Screen, Vector
from openenv.core import EnvClient, GenericEnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_server import State

PATIENCE_S = 100.0
STYLE = sys.argv[1]
NOTES = {
    "usual": "synchronous step on a thread a session, asyncio and h11, its asynchronous typed client; images as lists "
    "of numbers, as its Atari environment sends them; no vector API: vector64 is 64 sessions, each on its own",
    "best": "step_async in the server's loop, uvloop and httptools, its generic client on uvloop; no compression; "
    "images in base64; one thread makes all sessions' envs; no vector API: vector64 is 64 sessions, each on its own",
}


class TypedClient(EnvClient[Move, Any, State]):
    """A client as OpenEnv's environments have one: models in and models out."""

    def _step_payload(self, action: Move) -> dict[str, Any]:
        return {"move": action.move}

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Any]:
        model = Screen if "screen" in payload["observation"] else Vector
        observation = model(**payload["observation"], reward=payload.get("reward"), done=payload.get("done", False))
        return StepResult(observation=observation, reward=payload.get("reward"), done=payload.get("done", False))


class Session:
    """One client and its env; observations become arrays, which is what a trainer takes."""

    def __init__(self, address: str) -> None:
        client = TypedClient if STYLE == "usual" else GenericEnvClient
        self.client: Any = client(
            f"http://127.0.0.1:{address}", connect_timeout_s=PATIENCE_S, message_timeout_s=PATIENCE_S
        )
        self.count = 0

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def reset(self) -> None:
        self.array((await self.client.reset()).observation)

    async def step(self) -> bool:
        move = driver.action(self.count)
        self.count += 1
        result = await self.client.step(Move(move=move) if STYLE == "usual" else {"move": move})
        self.array(result.observation)
        return bool(result.done)

    @staticmethod
    def array(observation: Any) -> Any:
        if isinstance(observation, Vector):
            return np.array(observation.values, np.float32)
        if isinstance(observation, Screen):
            return np.array(observation.screen, np.uint8).reshape(observation.screen_shape)
        if "screen" in observation:
            frame = np.frombuffer(base64.b64decode(observation["screen"]), np.uint8)
            return frame.reshape(observation["screen_shape"])
        return np.array(observation["values"], np.float32)


@cache
def server(env: str) -> str:
    return driver.Server(Path(__file__).with_name("server.py"), STYLE, env).address


def run(main: Coroutine[Any, Any, driver.Answer]) -> driver.Answer:
    return asyncio.run(main) if STYLE == "usual" else uvloop.run(main)


async def timed(env: str, seconds: float) -> driver.Answer:
    async with Session(server(env)) as session:
        await session.reset()
        return await driver.timed_async(session.step, session.reset, seconds)


async def counted(clients: int, seconds: float) -> driver.Answer:
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(Session(server("cartpole"))) for _ in range(clients)]
        for session in sessions:
            await session.reset()
        return await driver.counted_async([(session.step, session.reset) for session in sessions], seconds)


async def at_once(count: int) -> driver.Answer:
    """Each session connects, resets, makes one step of a second and closes; all begin at the same time."""
    address, errors, taken = server("waiting"), Counter[str](), []

    async def one() -> None:
        began = time.perf_counter()
        try:
            async with Session(address) as session:
                await session.client.reset()
                await session.client.step(Move(move=0) if STYLE == "usual" else {"move": 0})
        except Exception as error:  # noqa: BLE001  counted by what it says
            errors[f"{type(error).__name__}: {error}"[:120]] += 1
        else:
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    seconds = time.perf_counter() - began
    percentiles = statistics.quantiles(taken, n=100) if len(taken) > 1 else [seconds] * 99
    return {
        "n": count,
        "ok": len(taken),
        "seconds": seconds,
        "p50_s": percentiles[49],
        "p99_s": percentiles[98],
        "errors": dict(errors.most_common(5)),
    }


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server("cartpole")

    def single(command: Mapping[str, Any]) -> driver.Answer:
        return run(timed("cartpole", command["seconds"]))

    def image(command: Mapping[str, Any]) -> driver.Answer:
        return run(timed("image", command["seconds"]))

    def clients16(command: Mapping[str, Any]) -> driver.Answer:
        return run(counted(driver.CLIENTS, command["seconds"]))

    def vector64(command: Mapping[str, Any]) -> driver.Answer:
        return run(counted(64, command["seconds"]))

    def sessions(command: Mapping[str, Any]) -> driver.Answer:
        return run(at_once(command["n"]))

    driver.obey(
        {"single": single, "clients16": clients16, "image": image, "vector64": vector64, "sessions": sessions},
        versions=driver.versions_of("openenv", "websockets", "uvicorn", "pydantic", "gymnasium", "numpy")
        | (driver.versions_of("uvloop", "httptools") if STYLE == "best" else {}),
        notes=NOTES[STYLE],
    )


if __name__ == "__main__":
    main()
