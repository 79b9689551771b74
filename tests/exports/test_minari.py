"""Minari's own loader gives back what was recorded, to the bit; what it cannot hold is refused by name."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from meshrl import EnvWorker, Mesh
from meshrl.adapters.datasets import Progress, export_minari
from meshrl.adapters.datasets.minari import MinariFormat
from meshrl.errors import EnvError, EpisodeDiverged, FormatCannotHold, InvalidName, SpacesDiffer, UsageError
from meshrl.wire.codec import pack
from tests.exports.envs import Falls, Odd, Wide, graphs, lists
from tests.exports.episodes import alike, made, recorded_of, written
from tests.mesh.envs import Nested
from tests.mesh.recordings import Told, drive, drive_pool, drive_vector, listed, listed_in_the_end

STORAGES: tuple[Any, ...] = ("hdf5", "arrow")


def rows(column: Any, n: int) -> list[Any]:
    """The single values of what Minari's loader gives."""
    if isinstance(column, dict):
        parts = {key: rows(part, n) for key, part in column.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(n)]
    if isinstance(column, tuple):
        parts_ = [rows(part, n) for part in column]
        return [tuple(part[i] for part in parts_) for i in range(n)]
    assert len(column) == n
    return list(column)


def same_as_told(dataset: minari.MinariDataset, told: list[Told]) -> None:
    assert dataset.total_episodes == len(told)
    assert dataset.total_steps == sum(len(one.rewards) for one in told)
    for one, other in zip(told, dataset, strict=True):
        n = len(one.rewards)
        assert all(map(alike, one.obs, rows(other.observations, n + 1)))
        assert all(map(alike, one.actions, rows(other.actions, n)))
        assert pack(np.array(one.rewards)) == pack(other.rewards)
        assert (one.terminations, one.truncations) == (other.terminations.tolist(), other.truncations.tolist())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("env", "level"),
    [("CartPole-v1", "actions"), ("FrozenLake-v1", "full"), (Nested, "full"), (Nested, "actions"), (Odd, "full")],
)
async def test_a_dataset_is_what_was_told(url: str, datasets: Path, env: Any, level: Any, storage: Any) -> None:
    served = f"{getattr(env, '__name__', env)}-{level}-{storage}"
    seen: list[Progress] = []
    async with EnvWorker({served: env}, url), Mesh(url) as m:
        async with await m.env(served, record=level, labels={"run": "a"}, policy="dqn") as remote:
            remote.policy_version = 3
            told = await drive(remote, 3, 7, max_steps=30)
            observations, actions = remote.observation_space, remote.action_space
        found = await listed(m, served, 3)
        exported = await export_minari(
            m, m.episodes(served), "of-tests/told-v0", storage=storage, on_progress=seen.append, description="of a test"
        )
    assert (exported.episodes, exported.steps) == (3, sum(len(one.rewards) for one in told))
    assert [(one.phase, one.episodes) for one in seen] == [(w, n) for w in ("reading", "writing") for n in (1, 2, 3)]
    dataset = minari.load_dataset("of-tests/told-v0")
    same_as_told(dataset, told)
    assert (dataset.observation_space, dataset.action_space) == (observations, actions)
    assert dataset.storage.metadata["description"] == "of a test"
    assert dataset.storage.metadata["algorithm_name"] == "dqn"
    for summary, metadata in zip(found, dataset.storage.get_episode_metadata(range(3)), strict=True):
        facts = metadata["meshrl"]
        assert (facts["episode_id"], facts["reason"]) == (summary.episode_id, summary.reason)
        assert (json.loads(facts["labels"]), facts["policy"], facts["remade"]) == (
            {"run": "a"},
            "dqn",
            level == "actions",
        )
        assert json.loads(facts["versions"])["gymnasium"] == gymnasium.__version__
    first = next(iter(dataset.storage.get_episode_metadata([0])))
    assert first["seed"] == 7
    versions = (
        dataset[0].infos["meshrl"]["policy_version"] if storage == "hdf5" else dataset[0].infos["meshrl/policy_version"]
    )
    assert versions.tolist() == [-1] + [3] * len(told[0].rewards)
    assert exported.recoverable == isinstance(env, str)
    if isinstance(env, str):
        again = dataset.recover_environment()
        assert again.spec is not None
        assert again.spec.id == env
        assert alike(again.reset(seed=7)[0], told[0].obs[0])
        again.close()
    assert set(minari.list_local_datasets()) == {"of-tests/told-v0"}


async def test_infos_have_one_set_of_keys_and_masks(url: str, datasets: Path) -> None:
    async with EnvWorker({"told": Nested}, url), Mesh(url) as m:
        async with await m.env("told", record="full") as env:
            told = await drive(env, 4, 1, max_steps=10)
        await listed(m, "told", 4)
        await export_minari(m, m.episodes("told"), "infos-v0")
        await export_minari(m, m.episodes("told"), "bare-v0", infos=False)
    dataset = minari.load_dataset("infos-v0")
    keys = [set(episode.infos) for episode in dataset]
    assert all(one == keys[0] for one in keys)
    assert {"note", "_note", "list", "_list", "np", "_np", "no", "_no", "seen", "sums", "lucky"} < keys[0]
    assert not {"_seen", "_sums", "_lucky"} & keys[0]
    for one, episode in zip(told, dataset, strict=True):
        infos = episode.infos
        assert infos["_note"].tolist() == ["note" in info for info in one.infos]
        assert [text.decode() for text in infos["note"]] == [info.get("note", "") for info in one.infos]
        assert infos["np"].dtype == np.float32
        assert infos["sums"]["deep"]["mean"].tolist() == [info["sums"]["deep"]["mean"] for info in one.infos]
        assert alike(infos["seen"], np.stack([info["seen"] for info in one.infos]))
        lists_ = [json.loads(text) for text, there in zip(infos["list"], infos["_list"], strict=True) if there]
        assert lists_ == [info["list"] for info in one.infos if "list" in info]
    assert set(minari.load_dataset("bare-v0")[0].infos) == {"meshrl"}


@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_episodes_of_vectors_and_pools_are_in_one_dataset(url: str, datasets: Path, form: str) -> None:
    served = f"many-{form}"
    async with EnvWorker({served: "CartPole-v1"}, url), Mesh(url) as m:
        if form == "vector":
            async with await m.vector(served, 4, autoreset_mode=AutoresetMode.SAME_STEP, record="full") as envs:
                told = await drive_vector(envs, 80, 5)
        else:
            async with await m.pool(served, 4, record="actions") as pool:
                told = await drive_pool(pool, 320, 5)
        found = await listed_in_the_end(m, served, len(told))
        await export_minari(m, found, "of-tests/many-v0")
    dataset = minari.load_dataset("of-tests/many-v0")
    metadata = list(dataset.storage.get_episode_metadata(range(len(found))))
    for summary, facts, episode in zip(found, metadata, dataset, strict=True):
        assert (facts["meshrl"]["episode_id"], facts["meshrl"]["env_id"]) == (summary.episode_id, summary.env_id)
        assert (len(episode), episode.rewards.sum()) == (summary.steps, summary.episode_return)
        assert episode.observations.shape == (summary.steps + 1, 4)
    assert {facts["meshrl"]["env_id"] for facts in metadata} == {0, 1, 2, 3}


async def test_each_kind_of_end_is_told(url: str, datasets: Path) -> None:
    limited = lambda: gymnasium.make("CartPole-v1", max_episode_steps=5)  # noqa: E731
    async with EnvWorker({"ends": limited, "falls": Falls}, url), Mesh(url) as m:
        async with await m.env("ends", record="full") as env:
            for steps in (5, 3, 2):
                await env.reset(seed=1)
                for _ in range(steps):
                    await env.step(0)
        async with await m.env("falls", record="full") as env:
            await env.reset(seed=1)
            for _ in range(2):
                await env.step(np.zeros(1, np.float32))
            with pytest.raises(EnvError):
                await env.step(np.zeros(1, np.float32))
        await listed(m, "ends", 3)
        await listed(m, "falls", 1)
        for name in ("ends", "falls"):
            await export_minari(m, m.episodes(name), f"{name}-v0")
    dataset = minari.load_dataset("ends-v0")
    told = [one["meshrl"]["reason"] for one in dataset.storage.get_episode_metadata(range(3))]
    assert told == ["truncated", "reset", "closed"]
    flags = [(bool(one.terminations.any()), one.truncations.tolist()) for one in dataset]
    assert flags == [(False, [False] * 4 + [True]), (False, [False] * 3), (False, [False] * 2)]
    (fell,) = minari.load_dataset("falls-v0").storage.get_episode_metadata([0])
    assert (fell["meshrl"]["reason"], fell["total_steps"]) == ("crashed", 2)


async def test_values_of_another_dtype_than_their_space_keep_it(url: str, datasets: Path) -> None:
    async with EnvWorker({"wide": Wide}, url), Mesh(url) as m:
        async with await m.env("wide", record="full") as env:
            told = await drive(env, 2, 3)
        await listed(m, "wide", 2)
        await export_minari(m, m.episodes("wide"), "wide-v0")
        same_as_told(minari.load_dataset("wide-v0"), told)
        with pytest.raises(FormatCannotHold, match=r"--format minari"):
            await export_minari(m, m.episodes("wide"), "wide-v1", storage="arrow")


@pytest.mark.parametrize("storage", STORAGES)
async def test_what_minari_cannot_hold_is_refused_and_leaves_nothing(url: str, datasets: Path, storage: Any) -> None:
    async with EnvWorker({"lists": lists, "graphs": graphs}, url), Mesh(url) as m:
        for name, kind in (("lists", "Sequence"), ("graphs", "Graph")):
            served = await m.env(name, record="full")
            async with served as env:
                await drive(env, 1, 3, max_steps=5)
            await listed_in_the_end(m, name, 1)
            with pytest.raises(FormatCannotHold, match=rf"{kind} spaces; --format parquet"):
                await export_minari(m, m.episodes(name), f"of-tests/{name}-v0", storage=storage)
    assert not files_in(datasets)
    assert not minari.list_local_datasets()


async def test_what_cannot_be_a_dataset_is_said(url: str, datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"one": "CartPole-v1", "other": "FrozenLake-v1"}
    async with EnvWorker(served, url), Mesh(url) as m:
        with pytest.raises(UsageError, match="no episode to export"):
            await export_minari(m, m.episodes("one"), "none-v0")
        for name in served:
            async with await m.env(name, record="full") as env:
                await drive(env, 1, 1, max_steps=5)
            await listed(m, name, 1)
        (one,) = await listed(m, "one", 1)
        with pytest.raises(SpacesDiffer, match="--env"):
            await export_minari(m, [one, *await listed(m, "other", 1)], "both-v0")
        for wrong in ("unversioned", "x/one-v0", "../one-v0", "one-v0/"):
            with pytest.raises(InvalidName, match="cartpole/any-v0"):
                await export_minari(m, one.episode_id, wrong)
        await export_minari(m, one.episode_id, "one-v0")
        with pytest.raises(UsageError, match="is there already"):
            await export_minari(m, [one], "one-v0")
        assert set(minari.list_local_datasets()) == {"one-v0"}
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(UsageError, match=r"h5py is not installed; pip install 'meshrl\[minari\]'"):
            await export_minari(m, [one], "one-v1")


async def test_what_cannot_be_made_again_stops_it_or_is_left_out(url: str, datasets: Path) -> None:
    def heavier() -> gymnasium.Env[Any, Any]:
        env = gymnasium.make("CartPole-v1")
        env.unwrapped.gravity = 99.0  # type: ignore[attr-defined]
        return env

    async with Mesh(url) as m:
        async with EnvWorker({"changed": "CartPole-v1"}, url):
            for level in ("actions", "full"):
                async with await m.env("changed", record=level) as env:
                    await drive(env, 1, 2)
        found = await listed(m, "changed", 2)
        async with EnvWorker({"changed": heavier}, url):
            with pytest.raises(EpisodeDiverged, match=found[0].episode_id):
                await export_minari(m, m.episodes("changed"), "changed-v0")
            exported = await export_minari(m, m.episodes("changed"), "changed-v0", skip_unreadable=True)
    assert [(one.episode_id, one.code) for one in exported.skipped] == [(found[0].episode_id, "episode_diverged")]
    assert exported.episodes == minari.load_dataset("changed-v0").total_episodes == 1


async def test_cancelled_it_leaves_nothing(url: str, datasets: Path) -> None:
    async with EnvWorker({"left": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("left", record="full") as env:
            await drive(env, 2, 1)
        await listed(m, "left", 2)
        task = asyncio.create_task(
            export_minari(m, m.episodes("left"), "left-v0", on_progress=lambda done: stop(done, task))
        )
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not files_in(datasets)


def files_in(path: Path) -> list[Path]:
    return [one for one in path.rglob("*") if one.is_file()]


def stop(done: Progress, task: asyncio.Task[Any]) -> None:
    if done.phase == "writing":
        task.cancel()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("jpeg", [False, True])
async def test_pictures_are_as_they_were_unless_asked_otherwise(
    datasets: Path, tmp_path: Path, storage: Any, jpeg: bool
) -> None:
    pictures = recorded_of(spaces.Box(0, 255, (40, 40, 3), np.uint8), spaces.Discrete(2))
    episode = made(pictures, 0, 3)
    path = await written(MinariFormat("pictures-v0", storage, jpeg=jpeg), [episode], tmp_path)
    loaded = minari.MinariDataset(path / "data")[0].observations
    assert loaded.shape == episode.observations.shape
    assert np.array_equal(loaded, episode.observations) == (not jpeg)
