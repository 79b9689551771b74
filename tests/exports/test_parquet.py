"""Parquet holds every space, is read back as it was recorded, and is plain to other readers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.adapters.datasets import export_parquet, parquet_rows, read_parquet
from meshrl.adapters.datasets.parquet import ParquetFormat
from meshrl.errors import UsageError
from tests.exports.envs import Odd, Wide, graphs, lists
from tests.exports.episodes import made, names_in, recorded_of, same_episodes, written
from tests.mesh.envs import Nested
from tests.mesh.recordings import drive, listed


@pytest.mark.parametrize(
    ("env", "level"),
    [
        ("CartPole-v1", "actions"),
        (Nested, "full"),
        (lists, "full"),
        (graphs, "actions"),
        (graphs, "full"),
        (Odd, "full"),
        (Wide, "full"),
    ],
)
async def test_a_file_is_read_as_the_episodes_are(url: str, tmp_path: Path, env: Any, level: Any) -> None:
    served = f"parquet-{getattr(env, '__name__', env)}-{level}"
    path = tmp_path / "made" / "told.parquet"
    async with EnvWorker({served: env}, url), Mesh(url) as m:
        async with await m.env(served, record=level, labels={"run": "a"}) as remote:
            remote.policy_version = 3
            await drive(remote, 3, 7, max_steps=20)
        found = await listed(m, served, 3)
        exported = await export_parquet(m, found, path)
        episodes = [await m.episode(one.episode_id) for one in found]
    assert (exported.episodes, exported.steps) == (3, sum(len(one) for one in episodes))
    for one, other in zip(episodes, read_parquet(path), strict=True):
        same_episodes(one, other)
        assert one.remade == other.remade
    forms = json.loads(pq.read_schema(path).metadata[b"meshrl"])["forms"]
    assert not any(form["packed"] for form in forms.values())
    assert names_in(path.parent) == [path.name]


async def test_it_is_plain_to_other_readers(url: str, tmp_path: Path) -> None:
    path = tmp_path / "told.parquet"
    async with EnvWorker({"plain": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("plain", record="full", policy="dqn") as remote:
            told = await drive(remote, 2, 7)
        found = await listed(m, "plain", 2)
        await export_parquet(m, m.episodes("plain"), path)
    frame = pd.read_parquet(path)
    assert len(frame) == sum(len(one.rewards) for one in told)
    assert frame.groupby("episode_id", observed=True).reward.sum().tolist() == [one.episode_return for one in found]
    observations = np.stack(frame.observation.to_list())
    assert observations.dtype == np.float32
    assert np.array_equal(observations, np.concatenate([one.obs[:-1] for one in told]))
    assert np.array_equal(np.stack(frame.next_observation.to_list()), np.concatenate([one.obs[1:] for one in told]))
    assert frame.action.tolist() == [int(action) for one in told for action in one.actions]
    assert set(frame.policy) == {"dqn"}
    assert frame.seed.iloc[0] == 7
    assert frame[frame.terminated].step.tolist() == [len(one.rewards) - 1 for one in told]


async def test_episodes_are_whole_whatever_the_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "GROUP_ROWS", 4)
    monkeypatch.setattr(parquet_rows, "_READ_ROWS", 3)
    recorded = recorded_of(spaces.Sequence(spaces.Text(3)), spaces.MultiDiscrete([2, 3]))
    episodes = [made(recorded, n, 1 + n % 7) for n in range(9)]
    path = await written(ParquetFormat(tmp_path / "x.parquet"), episodes, tmp_path)
    assert pq.ParquetFile(path).num_row_groups > 4
    for one, other in zip(episodes, read_parquet(path), strict=True):
        same_episodes(one, other)


async def test_what_is_no_export_is_said_to_be_none(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="no export"):
        next(read_parquet(tmp_path / "other.parquet"))
    async with Mesh(url) as m:
        with pytest.raises(UsageError, match="is there already"):
            await export_parquet(m, [], tmp_path / "other.parquet")
        with pytest.raises(UsageError, match="no episode to export"):
            await export_parquet(m, [], tmp_path / "new.parquet")
        monkeypatch.delitem(sys.modules, "meshrl.adapters.datasets.parquet_rows")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"pyarrow is not installed; pip install 'meshrl\[parquet\]'"):
            await export_parquet(m, [], tmp_path / "new.parquet")
    assert names_in(tmp_path) == ["other.parquet"]
