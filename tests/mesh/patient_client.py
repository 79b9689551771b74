"""A client in a process of its own that thinks: it holds an env, a vector and a pool, and steps them when told to.

Each line on standard input is a word. ``step``: step each once, and print for each what it observed, or the name of
the error. ``think``: block the event loop for as many seconds as follow.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from meshrl import Mesh
from meshrl.errors import MeshError

NUM_ENVS = 2
SLOTS = 1 + 2 * NUM_ENVS


async def _outcome(stepping: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await stepping()
    except MeshError as exc:
        return type(exc).__name__


async def main(url: str, namespace: str) -> None:
    async with Mesh(url, namespace=namespace) as m:
        env = await m.env("told", on_loss="raise")
        envs = await m.vector("told", NUM_ENVS, on_loss="raise")
        pool = await m.pool("told", NUM_ENVS, on_loss="raise")
        await env.reset()
        await envs.reset()
        await pool.reset()
        await pool.recv(min=NUM_ENVS)

        async def single() -> Any:
            return (await env.step(0))[0]

        async def vector() -> Any:
            return (await envs.step([0] * NUM_ENVS))[0].tolist()

        async def pooled() -> Any:
            await pool.send([0] * NUM_ENVS, range(NUM_ENVS))
            return (await pool.recv(min=NUM_ENVS)).observations.tolist()

        _say("ready")
        while line := os.read(0, 100).decode().split():  # blocking is what this client is for
            if line[0] == "think":
                time.sleep(float(line[1]))  # noqa: ASYNC251  # so is this
                _say("thought")
            else:
                _say([await _outcome(stepping) for stepping in (single, vector, pooled)])


def _say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
