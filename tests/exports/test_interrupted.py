"""An export that is killed half way leaves nothing that loads as whole, and the next one is not in its way."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import minari
import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.adapters.datasets import export_minari, export_npz, export_parquet, read_parquet
from tests.mesh.recordings import drive, listed

# Exports, and stops for ever when two of three episodes are written.
HALF = """
import asyncio, sys, time
from meshrl import Mesh
from meshrl.adapters import datasets

def stop(done):
    if (done.phase, done.episodes) == ("writing", 2):
        print("half", flush=True)
        time.sleep(600)

async def main(url, name, target):
    async with Mesh(url) as m:
        await getattr(datasets, name)(m, m.episodes("killed"), target, on_progress=stop)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_killed_it_leaves_nothing_that_loads(url: str, datasets: Path, tmp_path: Path) -> None:
    async with EnvWorker({"killed": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("killed", record="full") as env:
            told = await drive(env, 3, 1)
        found = await listed(m, "killed", 3)
        targets = {
            "export_minari": "killed-v0",
            "export_npz": str(tmp_path / "killed.npz"),
            "export_parquet": str(tmp_path / "killed.parquet"),
        }
        await asyncio.gather(*(killed(url, name, target) for name, target in targets.items()))
        assert not minari.list_local_datasets()
        with pytest.raises(FileNotFoundError):
            minari.load_dataset("killed-v0")
        assert {path.name for path in visible(tmp_path)} == {"datasets"}
        assert not visible(datasets)
        await export_minari(m, found, targets["export_minari"])
        await export_npz(m, found, targets["export_npz"])
        await export_parquet(m, found, targets["export_parquet"])
    steps = sum(len(one.rewards) for one in told)
    assert minari.load_dataset("killed-v0").total_steps == steps
    assert len(np.load(targets["export_npz"], allow_pickle=False)["rewards"]) == steps
    assert sum(map(len, read_parquet(targets["export_parquet"]))) == steps


async def killed(url: str, name: str, target: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HALF, url, name, target, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"half\n"
    process.kill()
    await process.wait()


def visible(path: Path) -> list[Path]:
    return [one for one in path.iterdir() if not one.name.startswith(".")]
