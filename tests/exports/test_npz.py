"""One ``.npz`` file holds what arrays can hold, and is loaded without pickle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.adapters.datasets import export_npz
from meshrl.adapters.datasets.npz import NpzFormat
from meshrl.errors import FormatCannotHold, UsageError
from tests.exports.envs import Odd, Wide, graphs, lists
from tests.exports.episodes import alike, made, names_in, recorded_of, written
from tests.mesh.envs import Nested
from tests.mesh.recordings import drive, listed, listed_in_the_end


@pytest.mark.parametrize(
    ("env", "level"), [("CartPole-v1", "actions"), ("FrozenLake-v1", "full"), (Odd, "full"), (Wide, "actions")]
)
async def test_arrays_are_what_was_told(url: str, tmp_path: Path, env: Any, level: Any) -> None:
    served = f"npz-{getattr(env, '__name__', env)}-{level}"
    async with EnvWorker({served: env}, url), Mesh(url) as m:
        async with await m.env(served, record=level) as remote:
            told = await drive(remote, 3, 7, max_steps=20)
        found = await listed(m, served, 3)
        await export_npz(m, m.episodes(served), tmp_path / "told.npz")
        with pytest.raises(UsageError, match="is there already"):
            await export_npz(m, m.episodes(served), tmp_path / "told.npz")
    with np.load(tmp_path / "told.npz", allow_pickle=False) as arrays:
        starts, shown = arrays["episode_offsets"].tolist(), arrays["observation_offsets"].tolist()
        for i, one in enumerate(told):
            steps, rows = slice(starts[i], starts[i + 1]), slice(shown[i], shown[i + 1])
            assert all(map(alike, one.obs, arrays["observations"][rows]))
            assert all(map(alike, one.actions, arrays["actions"][steps]))
            assert alike(np.array(one.rewards), arrays["rewards"][steps])
            assert arrays["terminations"][steps].tolist() == one.terminations
            assert arrays["truncations"][steps].tolist() == one.truncations
        meta = json.loads(str(arrays["meta"]))
    assert [one["episode_id"] for one in meta["episodes"]] == [one.episode_id for one in found]


async def test_parts_of_observations_and_infos_have_names(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"named": Nested}, url), Mesh(url) as m:
        async with await m.env("named", record="full") as env:
            told = await drive(env, 2, 1, max_steps=10)
        await listed(m, "named", 2)
        await export_npz(m, m.episodes("named"), tmp_path / "named.npz")
    infos = [info for one in told for info in one.infos]
    with np.load(tmp_path / "named.npz", allow_pickle=False) as arrays:
        assert {"observations/inner/at", "observations/pair/0", "observations/said", "actions/turn"} < set(arrays)
        assert arrays["observations/said"].tolist() == [obs["said"] for one in told for obs in one.obs]
        assert arrays["infos/sums/all"].tolist() == [info["sums"]["all"] for info in infos]
        assert arrays["infos/_note"].tolist() == ["note" in info for info in infos]


async def test_what_is_no_array_is_refused_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"lists": lists, "graphs": graphs}, url), Mesh(url) as m:
        for name, kind in (("lists", "Sequence"), ("graphs", "Graph")):
            async with await m.env(name, record="full") as env:
                await drive(env, 1, 3, max_steps=5)
            await listed_in_the_end(m, name, 1)
            with pytest.raises(FormatCannotHold, match=rf"{kind} spaces; --format parquet"):
                await export_npz(m, m.episodes(name), tmp_path / "x.npz")
    assert not names_in(tmp_path)


async def test_texts_that_numpy_would_cut_are_refused(tmp_path: Path) -> None:
    episode = made(recorded_of(spaces.Text(1, charset="\0"), spaces.Discrete(2)), 0, 2)
    episode = replace(episode, observations=("\0",) * 3)
    with pytest.raises(FormatCannotHold, match="ends with a NUL"):
        await written(NpzFormat(tmp_path / "x.npz"), [episode], tmp_path)
