"""``meshrl experiment``: what a manifest says is done, recorded under its hash, found again, and the same each time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from meshrl.client.manifest import read_manifest
from meshrl.protocol.seeds import derive
from meshrl.worker.policies import random_policy
from tests.mesh.conftest import until
from tests.mesh.test_fork_cli import Leans, heavy

EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole_random.toml"
MANIFEST = """
name = "leaning"
env = "cart"
seeds = [3, 5]
num_envs = 2
episodes = 3
max_steps = 20
agent = "leans"
"""
SCRIPT = """
import asyncio, sys
from meshrl import Mesh

async def main():
    async with Mesh() as m:
        experiment = m.experiment
        manifest = experiment.manifest
        async with await m.env(manifest.env, labels={"mine": "yes"}) as env:
            env.action_space.seed(experiment.seed)
            for n in range(2):
                await env.reset(seed=100 * experiment.seed + n)
                ended = False
                while not ended:
                    _, _, terminated, truncated, _ = await env.step(env.action_space.sample())
                    ended = terminated or truncated
        print("done", sys.argv[1:])

asyncio.run(main())
"""


@pytest.fixture
async def m(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("MESHRL_URL", server.url)
    agents = AgentWorker({"random": random_policy, "leans": Leans}, server.url)
    async with EnvWorker({"cart": "CartPole-v1", "CartPole-v1": "CartPole-v1"}, server.url), agents:
        async with Mesh(server.url) as mesh:
            yield mesh


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def experiment(*arguments: object) -> int:
    return await asyncio.to_thread(main, ["experiment", *map(str, arguments)])


async def test_an_agent_plays_each_seed_and_its_episodes_are_found_by_the_hash(
    m: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "m.toml", MANIFEST)
    assert await experiment(path, "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["name"], told["manifest"], told["recorded"]) == ("leaning", read_manifest(path).hash, 6)
    assert [(row["seed"], row["episodes"]) for row in told["seeds"]] == [(3, 3), (5, 3)]
    assert [row["mean_return"] for row in told["seeds"]] == [20.0, 20.0]
    assert [row["steps"] for row in told["seeds"]] == [60, 60]

    found = [one async for one in m.episodes(manifest=told["manifest"][:10])]
    assert {one.manifest for one in found} == {told["manifest"]}
    assert {(one.policy, one.labels["experiment"], one.labels["experiment_run"]) for one in found} == {
        ("leans", "leaning", told["run"])
    }
    seeds = set()
    for one in found:
        read = await m.episode(one.episode_id)
        place = int(one.labels["seed"]), int(one.labels["env_id"]), int(one.episode_id.rsplit(".", 1)[1])
        assert read.seed == derive(*place)
        seeds.add(place)
    assert seeds == {(seed, *place) for seed in (3, 5) for place in ((0, 0), (0, 1), (1, 0))}
    assert [one async for one in m.episodes(manifest="0123abcd")] == []

    assert await asyncio.to_thread(main, ["episodes", "--manifest", told["manifest"][:8], "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["manifest"] for line in lines] == [told["manifest"]] * 6


async def test_it_is_the_same_again_and_said_so_where_it_is_not(
    m: Mesh, server: EmbeddedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "m.toml", MANIFEST.replace('"leans"', '"random"').replace('"cart"', '"other"'))
    async with EnvWorker({"other": "CartPole-v1"}, server.url):
        assert await experiment(path, "--check") == 1
        assert "none of this manifest is on record; run it first" in capfd.readouterr().err
        assert await experiment(path) == 0
        capfd.readouterr()
        assert await experiment(path, "--check") == 0
        assert "same as run" in capfd.readouterr().out
        runs: dict[str, dict[Any, list[int]]] = {}
        async for one in m.episodes("other"):
            place = one.labels["seed"], one.labels["env_id"], one.episode_id.rsplit(".", 1)[1]
            actions = (await m.episode(one.episode_id)).actions.tolist()
            runs.setdefault(one.labels["experiment_run"], {})[place] = actions
    first, second = runs.values()
    assert len(first) == 6
    assert first == second
    await until(lambda: _gone(m), "the worker is forgotten")
    async with EnvWorker({"other": heavy}, server.url):
        assert await experiment(path, "--check", "--json") == 1
        told = json.loads(capfd.readouterr().out)["check"]
    assert (told["equal"], told["episodes"]) == (0, 6)
    assert [(one["seed"], one["equal"], one["episodes"]) for one in told["differences"]] == [("3", 0, 3), ("5", 0, 3)]
    assert told["differences"][0]["first"].startswith("other 0, episode 0, step 1: observation")


async def _gone(m: Mesh) -> bool:
    return "other" not in {one.name for one in await m.envs()}


async def test_whatever_a_script_opens_is_recorded_for_the_experiment(
    m: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.py", SCRIPT)
    text = MANIFEST.replace('agent = "leans"', 'script = "train.py"\narguments = ["--lr", "3"]').replace(
        "[3, 5]", "[3]"
    )
    path = write(tmp_path / "m.toml", text)
    assert await experiment(path) == 0
    out, err = capfd.readouterr()
    assert "done ['--lr', '3']" in out
    assert "seed 3: " in err
    assert await experiment(path, "--check", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["check"]["equal"] == told["recorded"] == 2
    assert [(row["seed"], row["episodes"]) for row in told["seeds"]] == [(3, 2)]
    found = [one async for one in m.episodes(manifest=told["manifest"], labels={"experiment_run": told["run"]})]
    assert [one.labels["seed"] for one in found] == ["3", "3"]
    assert {one.labels["mine"] for one in found} == {"yes"}
    assert {(await m.episode(one.episode_id)).seed for one in found} == {300, 301}

    write(tmp_path / "train.py", "raise SystemExit(3)")
    assert await experiment(path) == 1
    assert "ended with exit code 3 at seed 3" in capfd.readouterr().err


async def test_an_env_with_other_wrappers_is_refused_before_anything_is_run(
    m: Mesh, server: EmbeddedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def wrapped() -> gymnasium.Env[Any, Any]:
        return gymnasium.wrappers.TimeAwareObservation(gymnasium.make("CartPole-v1"))

    async with EnvWorker({"wrapped": wrapped}, server.url):
        fits = (
            MANIFEST.replace('"cart"', '"wrapped"').replace("leans", "random") + 'wrappers = ["TimeAwareObservation"]\n'
        )
        assert await experiment(write(tmp_path / "m.toml", fits)) == 0
        capfd.readouterr()
        for text in (fits.replace('["TimeAware', '["TimeUnaware'), fits.replace('"wrapped"', '"cart"')):
            path = write(tmp_path / "m.toml", text)
            assert await experiment(path) == 1
            assert "workers wrap, so serve it with these" in capfd.readouterr().err
            assert [one async for one in m.episodes(manifest=read_manifest(path).hash)] == []


async def test_the_example_is_an_experiment(m: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    assert await experiment(EXAMPLE) == 0
    shown = capfd.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines() if line.split()[1:2] == ["20"]] == [
        [seed, "20"] for seed in "012"
    ]
    assert await experiment(EXAMPLE, "--hash") == 0
    told = capfd.readouterr().out.strip()
    assert f"meshrl episodes --manifest {told[:12]}" in shown
    assert f"meshrl episodes --manifest {told[:12]}" in (EXAMPLE.parents[1] / "docs" / "experiments.md").read_text()
