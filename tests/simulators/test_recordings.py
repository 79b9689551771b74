"""Recordings of simulators outlive all that made them, and are forked (LunarLander, MuJoCo and Atari)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meshrl import Mesh
from meshrl.worker.sealing import StateKey
from tests.mesh.exported import same_as_exported
from tests.mesh.learners import Learned, of_all, play_one, play_pool, play_vector
from tests.mesh.restarting import restarted
from tests.mesh.test_recordings_forks import go_on

# Box2D is made by SWIG, and ends the interpreter where its warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

GAMES = {name: f"tests.simulators.atari_envs:{name}" for name in ("breakout", "preprocessed")}
SERVED = {"lander": "LunarLander-v3", "hopper": "Hopper-v5", "inverted": "InvertedPendulum-v5", **GAMES}
KEY = StateKey(b"k" * 32)
OTHER = StateKey(b"o" * 32)


async def play(m: Mesh) -> Learned:
    """Each at both levels, and one of each kind as vector and pool."""
    told = Learned()
    steps = {"lander": 220, "inverted": 60, "breakout": 80}
    for name in SERVED:
        played = [play_one(m, name, level, 130) for level in ("actions", "full")]
        if name in steps:
            played += [play_vector(m, name, "full", steps[name]), play_pool(m, name, "actions", 2 * steps[name])]
        for one in await asyncio.gather(*played):
            told.add(one)
    return told


async def test_what_simulators_told_is_there_when_all_that_told_it_is_gone(tmp_path: Path) -> None:
    async with restarted(tmp_path, SERVED, play, "SIGTERM", state_key=KEY) as (m, told):
        read = await of_all(m.episode, told.episodes)
        told.check(read)
        for verdict in (await of_all(m.verify, told.episodes)).values():
            assert verdict.status == "exact", verdict
        for name in SERVED:
            await same_as_exported(m, name, read, tmp_path / f"{name}.npz")
            some = [(id_, one) for id_, one in told.episodes.items() if one.env == name]
            for id_, one in (some[0], some[-1]):  # with a seed, and without
                size = len(one.rewards)
                for at in (0, 1, size // 2, size):
                    async with await m.fork(id_, at) as env:
                        await go_on(env, one, list(read[id_].infos), at)


@pytest.mark.parametrize(("before", "after"), [(KEY, OTHER), (KEY, None)])
async def test_games_are_the_same_for_workers_with_another_key(
    tmp_path: Path, before: StateKey | None, after: StateKey | None
) -> None:
    """What outlives resets is sealed, so that their episodes are run again from the one that had a seed."""
    games = {"breakout": GAMES["breakout"]}

    async def play(m: Mesh) -> Learned:
        return await play_one(m, "breakout", "actions", 150)

    async with restarted(tmp_path, games, play, "SIGTERM", state_key=before, then={"state_key": after}) as (m, told):
        read = await of_all(m.episode, told.episodes)
        told.check(read)
        for verdict in (await of_all(m.verify, told.episodes)).values():
            assert verdict.status == "exact", verdict
        id_, one = list(told.episodes.items())[1]
        async with await m.fork(id_, 20) as env:
            await go_on(env, one, list(read[id_].infos), 20)
