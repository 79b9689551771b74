"""A consumer that is killed, and comes back under its name: what was in its buffer and committed is not given again."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from meshrl import EnvWorker, Mesh
from meshrl.adapters.buffers import fill
from tests.buffers.consumer import BATCH
from tests.buffers.made import Counts, columns_of
from tests.mesh.recordings import drive, listed

ROOT = Path(__file__).parents[2]


async def consumed(url: str, when: str, batches: int | None) -> list[Any]:
    """What a consumer's process had put into its buffer when it was killed, after so many batches; None: to the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.buffers.consumer", url, "of", "learner", when),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    rows: list[Any] = []
    while line := await process.stdout.readline():
        rows += json.loads(line)
        if batches is not None and len(rows) >= batches * BATCH:
            process.kill()
            break
        process.stdin.write(b"\n")
    await process.wait()
    return rows


@pytest.mark.parametrize("when", ["after", "before"])
async def test_a_killed_consumer_comes_back_behind_what_it_committed(url: str, when: str) -> None:
    async with EnvWorker({"of": Counts}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = columns_of(await drive(env, 9, 1))["obs"].tolist()
        await listed(m, "of", 9)
        before = await consumed(url, when, 3)
        assert before == told[: 3 * BATCH]
        rest = await consumed(url, when, None)
        taken = 3 * BATCH if when == "after" else 2 * BATCH  # the third was in the buffer, and not committed
        assert rest == told[taken:]


async def test_a_buffer_that_is_stored_with_its_position_goes_on_with_it(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"of": Counts}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = columns_of(await drive(env, 9, 1))["obs"]
        await listed(m, "of", 9)
        feed = m.experience("of", name="learner", follow=False, batch_size=BATCH)
        buffer = ReplayBuffer(1000, spaces.Box(0, 1e10, (2,), np.float64), spaces.Discrete(5), device="cpu")
        filling = fill(buffer, feed)
        for _ in range(3):
            await anext(filling)
        save_to_pkl(str(tmp_path / "buffer"), (buffer, feed.position))
        await anext(filling)  # is lost with its process, although it was committed
        await filling.aclose()
        buffer, position = load_from_pkl(str(tmp_path / "buffer"))
        async for _ in fill(buffer, m.experience("of", from_=position, follow=False)):
            pass
        np.testing.assert_array_equal(buffer.observations[: buffer.pos, 0], told)
