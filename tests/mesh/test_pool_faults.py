"""Pools that are answered nonsense, whose errors are out of date, and whose episodes are to be reproduced (R2, R7)."""

from __future__ import annotations

from typing import Any

import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.client.pool import RemotePool
from meshrl.errors import MalformedMessage, MeshError, ResetNeeded, UnencodableValue
from meshrl.protocol.seeds import derive
from tests.mesh.conftest import until
from tests.mesh.envs import Counter
from tests.mesh.pool_envs import ENDS, Gated, GatedCoroutine, Gates, altered, ids, pooled, soon


class Tells(Gated):
    """Its infos are those that its actions stand for."""

    OBJECT, HUGE, NUMBER, DICT = 20, 21, 22, 23
    INFOS: dict[int, Any] = {OBJECT: object(), HUGE: 1 << 80, NUMBER: 1, DICT: {"b": 1}}

    def _stepped(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        stepped = super()._stepped(action)
        return (*stepped[:4], {"a": self.INFOS[action]} if action in self.INFOS else {})


async def settled(pool: RemotePool) -> None:
    await until(lambda: pool.under_way == 0, "all have answered")


# ---------------------------------------------------------------- answers that are none


@pytest.mark.parametrize(
    "infos", ["text", 3, {}, {"columns": "garbage"}, {"entries": 3}, {"entries": [[7, {}]]}, {"merged": {}}], ids=str
)
async def test_infos_that_are_none_cost_their_own_lanes_alone(url: str, infos: Any) -> None:
    async with pooled(url, GatedCoroutine, 4) as (pool, _, worker, _m):
        worker.alters = altered(infos=infos)
        await pool.send([0, 0], [2, 3])
        await settled(pool)
        worker.alters = None
        await pool.send([1, 1], [0, 1])
        await until(lambda: pool.ready == 2, "the others are ready")
        assert ids(await soon(pool.recv(min=2))) == [0, 1]
        with pytest.raises(MalformedMessage, match=r"\[2, 3\]") as told:
            await soon(pool.recv())
        assert sorted(told.value.details["env_ids"]) == [2, 3]
        await pool.send([1, 1], [0, 1])
        assert ids(await soon(pool.recv(min=2))) == [0, 1]
        with pytest.raises(ResetNeeded):
            await pool.send([0], [2])
        await pool.reset(env_ids=[2, 3])
        assert ids(await soon(pool.recv(min=2))) == [2, 3]


@pytest.mark.parametrize("fair", [False, True])
async def test_infos_that_no_array_takes_cost_their_own_row_alone(url: str, fair: bool) -> None:
    async with pooled(url, Tells, 4, fair=fair) as (pool, _, _w, _m):
        await pool.send([0, Tells.HUGE, Tells.NUMBER, Tells.HUGE], range(4))
        await settled(pool)
        with pytest.raises(MalformedMessage, match="sub-environments") as told:
            await soon(pool.recv(min=4))
        assert sorted(told.value.details["env_ids"]) == [1, 3]
        assert ids(await soon(pool.recv(min=2))) == [0, 2]
        with pytest.raises(ResetNeeded):
            await pool.send([0], [1])
        await pool.reset(env_ids=[1, 3])
        assert ids(await soon(pool.recv(min=2))) == [1, 3]


# ---------------------------------------------------------------- errors that are out of date


async def test_errors_of_lanes_that_were_reset_since_are_not_raised(url: str) -> None:
    async with pooled(url, Tells, 3) as (pool, _, _w, _m):
        await pool.send([Tells.OBJECT], [0])
        await settled(pool)
        await pool.reset(seed=1)
        batch = await soon(pool.recv(min=3))
        assert batch.first.all()
        await pool.send([0, 0, 0], range(3))
        assert ids(await soon(pool.recv(min=3))) == [0, 1, 2]


async def test_errors_of_lanes_that_were_not_reset_are_still_raised(url: str) -> None:
    async with pooled(url, Tells, 3) as (pool, _, _w, _m):
        await pool.send([Tells.OBJECT], [0])
        await settled(pool)
        await pool.reset(env_ids=[1, 2])
        await until(lambda: pool.ready == 2, "the others are ready")
        assert ids(await soon(pool.recv(min=2))) == [1, 2]
        with pytest.raises(MeshError) as told:
            await soon(pool.recv())
        assert not isinstance(told.value, ResetNeeded)


# ---------------------------------------------------------------- roots and episodes


class Told(Gated):
    """Its infos tell the seed that it was reset with."""

    observation_space = spaces.Discrete(1 << 40)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return 0, {"seed": seed}


class ToldCoroutine(GatedCoroutine):
    """The same, with coroutine functions."""

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates)
        self._env: Gated = Told(gates)


@pytest.mark.parametrize("make", [Told, ToldCoroutine], ids=["threads", "coroutines"])
async def test_an_episodes_number_tells_its_seed_whatever_was_reset_before(url: str, make: Any) -> None:
    async with pooled(url, make, 2, seeding="derived") as (pool, _, _w, _m):
        root = 0
        for seed in (1, None, 2, None, None, 7):
            root = root if seed is None else seed
            await pool.reset(seed=seed)
            batch = await soon(pool.recv(min=2))
            assert batch.episodes.tolist() == [1, 1] if seed is not None else batch.episodes.min() > 1
            for i, episode, told in zip(batch.env_ids, batch.episodes, batch.infos["seed"], strict=True):
                assert told == derive(root, i, episode - 1)
            await pool.send([ENDS, ENDS], [0, 1])
            ended = await soon(pool.recv(min=2))
            for i, episode, told in zip(ended.env_ids, ended.episodes, ended.infos["seed"], strict=True):
                assert told == derive(root, i, episode), "the next one's, which follows at once"


async def test_with_gymnasiums_seeding_the_numbers_of_episodes_go_on(url: str) -> None:
    async with pooled(url, Gated, 2) as (pool, _, _w, _m):
        await pool.reset(seed=3)
        assert (await soon(pool.recv(min=2))).episodes.tolist() == [2, 2]


def roots_of(pool: RemotePool) -> Any:
    return pool.root, pool.roots


async def test_a_pool_tells_its_root(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url) as _, Mesh(url) as m:
        async with await m.pool("counter", 2, seeding="derived") as pool:
            assert roots_of(pool) == (None, (None, None))
            with pytest.raises(UnencodableValue):
                await pool.reset(seed=5, options={"x": object()})
            assert roots_of(pool) == (None, (None, None))
            await pool.reset()
            drawn = pool.root
            assert drawn is not None
            await pool.reset(seed=8, env_ids=[1])
            assert roots_of(pool) == (None, (drawn, 8))
            await pool.reset()
            assert roots_of(pool) == (8, (8, 8))
        async with await m.pool("counter", 2) as pool:
            await pool.reset(seed=5)
            assert roots_of(pool) == (None, (None, None))
