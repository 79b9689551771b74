"""A learner's process that fills a buffer from a feed, and stops where it is told to, to be killed there.

::

    python -m tests.buffers.consumer URL ENV NAME before|after

It writes what it has put into its buffer, a line of JSON a batch, and waits for a line before it goes on: after the
batch is committed, or before that.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from meshrl import Mesh
from meshrl.adapters.buffers import fill, put

BATCH = 7


async def main(url: str, env: str, name: str, when: str) -> None:
    buffer = ReplayBuffer(1000, spaces.Box(0, 1e10, (2,), np.float64), spaces.Discrete(5), device="cpu")
    async with Mesh(url) as m:
        feed = m.experience(env, name=name, follow=False, batch_size=BATCH)
        if when == "after":
            async for count in fill(buffer, feed):
                tell(buffer, count)
        else:
            async for batch in feed:
                tell(buffer, put(buffer, batch))


def tell(buffer: Any, count: int) -> None:
    sys.stdout.write(json.dumps(buffer.observations[buffer.pos - count : buffer.pos, 0].tolist()) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
