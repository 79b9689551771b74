"""Recordings outlive all that made them: server, workers and client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import astuple
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from gymnasium.vector import AutoresetMode

from meshrl import Mesh
from tests.mesh.exported import same_as_exported
from tests.mesh.learners import Learned, of_all, play_one, play_pool, play_vector
from tests.mesh.restarting import Signal, restarted
from tests.mesh.test_vector_parity import different

SERVED = {
    "cartpole": "CartPole-v1",
    "frozenlake": "FrozenLake-v1",  # slippery
    "pendulum": "tests.mesh.envs:short_pendulum",
    "nested": "tests.mesh.envs:Nested",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cartpole": {"low": -0.01, "high": 0.01},
    "frozenlake": {"unknown": [1]},
    "pendulum": {"x_init": 1.0, "y_init": 0.5},
    "nested": {"steps": 7},
}
FORMS: list[Any] = [play_one, play_pool, *(partial(play_vector, mode=mode) for mode in AutoresetMode)]


async def play(m: Mesh, *, envs: Iterable[str]) -> Learned:
    """Each env in each form, at each level, with a seed at first and without any."""
    told = Learned()
    for env, level in product(envs, ("actions", "full")):
        seeds = [None if (n + (level == "full")) % 3 == 0 else 11 for n in range(len(FORMS))]
        played = [
            form(m, env, level, 80, options=OPTIONS[env], seed=seed) for form, seed in zip(FORMS, seeds, strict=True)
        ]
        for one in await asyncio.gather(*played):
            told.add(one)
    return told


@pytest.mark.parametrize(("how", "envs"), [("SIGTERM", [*SERVED]), ("SIGKILL", ["frozenlake", "nested"])])
async def test_what_was_told_is_there_when_all_that_told_it_is_gone(
    tmp_path: Path, how: Signal, envs: list[str]
) -> None:
    async with restarted(tmp_path, SERVED, partial(play, envs=envs), how, slots=64) as (m, told):
        assert sorted([one.episode_id async for one in m.episodes()]) == sorted(told.episodes)
        read = await of_all(m.episode, told.episodes)
        told.check(read)
        for id_, episode in list(read.items())[::9]:
            replayed = [transition async for transition in m.replay(id_, 3)]
            assert not different(list(map(astuple, replayed)), list(map(astuple, episode.transitions(3))))
        for verdict in (await of_all(m.verify, told.episodes)).values():
            assert verdict.status == "exact", verdict
        for env in envs:
            await same_as_exported(m, env, read, tmp_path / f"{env}.npz")
