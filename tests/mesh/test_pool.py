"""Pools over a real server: whichever env is ready first is handed out first, and nothing twice (R1, R2, R6, R7)."""

from __future__ import annotations

import asyncio
import copy
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from meshrl import Mesh
from meshrl.client.pool import RemotePool
from meshrl.client.ready import PoolBatch
from meshrl.errors import (
    ConcurrentStep,
    InvalidAction,
    InvalidSeed,
    NothingUnderWay,
    RequestTimeout,
    ResetNeeded,
    UnencodableValue,
    UsageError,
)
from meshrl.protocol.seeds import derive
from meshrl.testing.compare import same
from meshrl.wire.codec import pack
from tests.mesh.conftest import until
from tests.mesh.pool_envs import (
    BOTH,
    ENDS,
    LOCAL,
    Gated,
    GatedCoroutine,
    ids,
    pooled,
    soon,
    workers,
)


async def test_the_facts_of_a_pool_are_those_of_its_envs(url: str) -> None:
    async with workers(url, 2) as both, Mesh(url) as m:
        async with await m.pool("cartpole", 5, shards=2) as pool:
            assert isinstance(pool, RemotePool)
            local = gymnasium.make_vec("CartPole-v1", 5)
            assert pool.single_observation_space == local.single_observation_space
            assert pool.observation_space == local.observation_space
            assert pool.action_space == local.action_space
            assert (pool.num_envs, pool.name, pool.ready, pool.under_way) == (5, "cartpole", 0, 0)
            assert {worker for worker, _ in pool.shards} == {worker.id for worker in both}
            assert [size for _, size in pool.shards] == [3, 2]
            assert "5 cartpole: 2 shards at 2 workers" in repr(pool)


# --------------------------------------------------------------------------- the same as local envs


def batched(space: gymnasium.Space[Any], items: list[Any]) -> Any:
    out: Any = create_empty_array(space, len(items))
    return concatenate(space, items, out)


def must_equal(one: Any, other: Any) -> None:
    """Types, dtypes, keys and their order, values, in any depth."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            must_equal(one[key], other[key])
    elif isinstance(one, np.ndarray) and one.dtype.hasobject:
        must_equal(one.tolist(), other.tolist())
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            must_equal(each, its)
    else:
        assert same(one, other), (one, other)


class Locals:
    """A local env for each sub-environment, which does what the pool's was told to and should give what it gives."""

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], num_envs: int, seed: int) -> None:
        self.seed = seed
        self.envs = [make() for _ in range(num_envs)]
        self.spaces = [copy.deepcopy(self.envs[0].action_space) for _ in range(num_envs)]
        for i, space in enumerate(self.spaces):
            space.seed(i)
        self.action: dict[int, Any] = {}
        self.at = [(0, 0)] * num_envs  # episode and step

    def sample(self, env_ids: Any) -> Any:
        """Their next actions, batched."""
        for i in env_ids.tolist():
            self.action[i] = self.spaces[i].sample()
        actions = [self.action[i] for i in env_ids.tolist()]
        return batched(self.envs[0].action_space, actions)

    def check(self, batch: PoolBatch) -> None:
        """Whether each row is what the local env gives for the same."""
        merging: VectorEnv[Any, Any, Any] = VectorEnv()
        merging.num_envs = len(batch)
        infos: dict[str, Any] = {}
        observations = []
        for k, i in enumerate(batch.env_ids.tolist()):
            env, (episode, step) = self.envs[i], self.at[i]
            if batch.first[k]:
                obs, info = env.reset(seed=self.seed + i)
                expected = (0.0, False, False, episode + 1, 0)
            else:
                obs, reward, terminated, truncated, info = env.step(self.action.pop(i))
                expected = (float(reward), bool(terminated), bool(truncated), episode, step + 1)
            self.at[i] = expected[3:]
            if expected[1] or expected[2]:
                final = {"final_obs": obs, "final_info": copy.deepcopy(info)}
                infos = merging._add_info(infos, final, k)
                obs, info = env.reset()
                self.at[i] = (episode + 1, 0)
            infos = merging._add_info(infos, copy.deepcopy(info), k)
            observations.append(copy.deepcopy(obs))
            row = (batch.rewards, batch.terminations, batch.truncations, batch.episodes, batch.steps)
            assert tuple(column[k] for column in row) == expected, f"env_id {i}"
        space = self.envs[0].observation_space
        must_equal(batch.observations, batched(space, observations))
        must_equal(batch.infos, infos)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LOCAL)
async def test_every_step_is_what_a_local_env_gives_once_and_in_order(url: str, name: str, count: int) -> None:
    async with workers(url, count), Mesh(url) as m, await m.pool(name, 13, shards=count) as pool:
        assert len({worker for worker, _ in pool.shards}) == count
        local = Locals(LOCAL[name], 13, seed=5)
        await pool.reset(seed=5)
        left, ended = 13 * 60, 0
        async for batch in pool.stream(min=3, max=5):
            assert len(batch) <= 5
            local.check(batch)
            for array in (batch.env_ids, batch.rewards, batch.first, batch.episodes, batch.steps):
                assert array.flags.writeable
            ended += int(np.count_nonzero(batch.terminations | batch.truncations))
            some = batch.env_ids[: min(len(batch), left)]
            left -= len(some)
            if len(some):
                await pool.send(local.sample(some), some)
        assert not local.action
        assert not left
        assert (pool.ready, pool.under_way) == (0, 0)
        assert ended > 13


@pytest.mark.parametrize("count", [1, 3])
async def test_derived_seeding_reproduces_every_episode_alone(url: str, count: int) -> None:
    async with workers(url, count), Mesh(url) as m:
        async with await m.pool("lake", 7, shards=count, seeding="derived") as pool:
            await pool.reset(seed=11)
            told: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
            chance, left = np.random.default_rng(0), 700
            action = np.zeros(7, np.int64)
            async for batch in pool.stream():
                for k, i in enumerate(batch.env_ids.tolist()):
                    episode = int(batch.episodes[k])
                    obs = int(batch.observations[k])
                    if batch.first[k]:
                        told[i, episode].append(obs)
                        continue
                    ends = bool(batch.terminations[k] or batch.truncations[k])
                    seen = int(batch.infos["final_obs"][k]) if ends else obs
                    told[i, episode].append((int(action[i]), seen, float(batch.rewards[k])))
                    if ends:
                        told[i, episode + 1].append(obs)
                left -= len(batch)
                if left > 0:
                    action[batch.env_ids] = chance.integers(0, 4, len(batch))
                    await pool.send(action[batch.env_ids], batch.env_ids)
    env = gymnasium.make("FrozenLake-v1")
    assert len(told) > 14
    for (i, episode), (first, *steps) in told.items():
        assert env.reset(seed=derive(11, i, episode - 1))[0] == first
        for sent, obs, reward in steps:
            assert env.step(sent)[:2] == (obs, reward), (i, episode)


async def test_the_root_of_derived_seeding_is_one_for_all_however_they_are_reset(url: str) -> None:
    async with workers(url, 1), Mesh(url) as m, await m.pool("cartpole", 3, seeding="derived") as pool:
        await pool.reset(seed=11, env_ids=[0])
        await pool.reset(env_ids=[1, 2])
        batch = await soon(pool.recv(min=3))
        env = gymnasium.make("CartPole-v1")
        for k, i in enumerate(batch.env_ids.tolist()):
            assert env.reset(seed=derive(11, i, 0))[0].tolist() == batch.observations[k].tolist()


# --------------------------------------------------------------------------- first ready, first served


@BOTH
async def test_fifteen_are_received_while_the_sixteenth_blocks(url: str, make: Any) -> None:
    async with pooled(url, make, 16) as (pool, gates, _, _m):
        gates.shut(1)
        actions = np.zeros(16, np.int64)
        actions[5] = 1
        await pool.send(actions, np.arange(16))
        assert ids(await soon(pool.recv(min=15))) == [i for i in range(16) if i != 5]
        for _ in range(3):  # and on they go
            others = [i for i in range(16) if i != 5]
            await pool.send(np.zeros(15, np.int64), others)
            assert ids(await soon(pool.recv(min=15))) == others
        assert (pool.under_way, pool.ready) == (1, 0)
        gates.open()
        assert ids(await soon(pool.recv())) == [5]


async def test_sixteen_that_block_on_threads_are_stepped_at_once(url: str) -> None:
    async with pooled(url, Gated, 16) as (pool, gates, _, _m):
        gates.shut(*range(100, 116))
        await pool.send(np.arange(100, 116), range(16))
        for i in reversed(range(16)):  # in an order that no single thread could keep
            gates.open(100 + i)
            assert ids(await soon(pool.recv())) == [i]


@BOTH
async def test_lanes_that_finish_together_are_answered_together(url: str, make: Any) -> None:
    async with pooled(url, make, 16) as (pool, gates, worker, _m):
        answers: list[int] = []
        worker.alters = lambda body: answers.append(len(body["lanes"])) or pack(body)  # type: ignore[func-returns-value]
        await pool.send(np.zeros(16, np.int64), range(16))
        await soon(pool.recv(min=16))
        assert sum(answers) == 16
        if make is GatedCoroutine:
            assert answers == [16]
            gates.shut(1)
            await pool.send(np.ones(16, np.int64), range(16))
            await until(lambda: gates.at.get(1) == 16, "all wait")
            gates.open()
            await soon(pool.recv(min=16))
            assert answers == [16, 16]


async def test_in_a_fair_pool_the_least_handed_out_come_first(url: str) -> None:
    for fair, expected in ((True, [[1, 2], [3, 0]]), (False, [[0, 3], [1, 2]])):
        async with pooled(url, Gated, 4, fair=fair) as (pool, _, _w, _m):
            for _ in range(3):
                for env_id in (0, 3, 3, 0, 0)[: 5 if _ else 3]:
                    await pool.send([0], [env_id])
                    await soon(pool.recv())
            for n, env_id in enumerate((0, 3, 1, 2), 1):
                await pool.send([0], [env_id])
                await until(lambda n=n: pool.ready == n, "it is ready")  # type: ignore[misc]
            got = [sorted((await pool.recv(min=1, max=2)).env_ids.tolist()) for _ in range(2)]
            assert got == [sorted(pair) for pair in expected]


async def test_results_are_handed_out_in_order_of_arrival(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, _, _w, _m):
        for n, env_id in enumerate((3, 0, 2, 1), 1):
            await pool.send([0], [env_id])
            await until(lambda n=n: pool.ready == n, "it is ready")  # type: ignore[misc]
        assert (await pool.recv(max=1)).env_ids.tolist() == [3]
        assert (await pool.recv()).env_ids.tolist() == [0, 2, 1]


# --------------------------------------------------------------------------- recv and its deadline


async def test_at_the_deadline_what_is_ready_is_given_and_the_rest_is_not_lost(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, gates, _, _m):
        gates.shut(1)
        await pool.send([0, 0, 1, 1], range(4))
        await until(lambda: pool.ready == 2, "two are ready")
        assert ids(await soon(pool.recv(min=4, timeout=0.01))) == [0, 1]
        with pytest.raises(TimeoutError) as caught:
            await pool.recv(timeout=0.01)
        assert isinstance(caught.value, RequestTimeout)
        assert caught.value.details["timeout_s"] == 0.01
        gates.open()
        assert ids(await soon(pool.recv(min=2))) == [2, 3]
        with pytest.raises(NothingUnderWay):
            await pool.recv()


async def test_the_deadline_is_that_of_the_whole_call_and_not_of_each_result(url: str) -> None:
    """One more is ready every few moments, each time before the deadline would be over if it began anew."""
    async with pooled(url, Gated, 64) as (pool, gates, _, _m):
        gates.shut(*range(100, 164))
        await pool.send(np.arange(100, 164), range(64))
        gates.open(100)
        await until(lambda: pool.ready == 1, "one is ready")

        async def open_one_after_another() -> None:
            for action in range(101, 164):
                await asyncio.sleep(0.05)
                gates.open(action)

        opening = asyncio.create_task(open_one_after_another())
        batch = await soon(pool.recv(min=64, timeout=0.2))
        assert 1 <= len(batch) < 64
        opening.cancel()
        await asyncio.wait({opening})


async def test_a_timeout_of_zero_polls(url: str) -> None:
    """Also where nothing else is awaited between two looks."""
    async with pooled(url, Gated, 2) as (pool, gates, _, _m):
        gates.shut(1)
        await pool.send([1, 0], [0, 1])
        await until(lambda: pool.ready == 1, "one is ready")
        assert ids(await pool.recv(min=2, timeout=0)) == [1]
        with pytest.raises(TimeoutError):
            await pool.recv(timeout=0)
        gates.open()
        for _ in range(300_000):
            try:
                batch = await pool.recv(timeout=0)
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("it never comes")
        assert ids(batch) == [0]


async def test_to_wait_for_what_cannot_come_is_an_error_at_once(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, gates, _, _m):
        for receiving in (pool.recv(), pool.recv(timeout=60.0), pool.recv(min=4), pool.recv(timeout=0)):
            with pytest.raises(NothingUnderWay, match="send"):
                await receiving
        gates.shut(1)
        await pool.send([1, 0], [0, 1])
        await until(lambda: pool.ready == 1, "one is ready")
        with pytest.raises(NothingUnderWay) as caught:
            await pool.recv(min=3)
        assert (caught.value.details["ready"], caught.value.details["under_way"]) == (1, 1)
        for low, high in ((0, None), (-1, 3), (3, 2), (5, None)):
            with pytest.raises(UsageError, match="min"):
                await pool.recv(low, high)
        assert pool.ready == 1
        assert [ids(batch) async for batch in pool.stream(max=1) if gates.open() is None] == [[1], [0]]  # type: ignore[func-returns-value]


async def test_of_two_that_receive_at_once_the_second_is_refused_and_disturbs_nothing(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, gates, _, _m):
        gates.shut(1, 2)
        await pool.send([1, 1, 2, 0], range(4))
        await until(lambda: pool.ready == 1, "one is ready")
        first = asyncio.create_task(pool.recv(min=3))
        await asyncio.sleep(0)
        for low in (1, 4):  # one that could be served, and one that would wait for more
            with pytest.raises(ConcurrentStep):
                await pool.recv(low)
        with pytest.raises(ConcurrentStep):
            await pool.reset()
        gates.open(1)
        assert ids(await soon(first)) == [0, 1, 3]
        gates.open()
        assert ids(await soon(pool.recv())) == [2]


async def test_recv_that_is_cancelled_anywhere_loses_and_repeats_nothing(url: str) -> None:
    chance = random.Random(3)
    async with pooled(url, Gated, 8) as (pool, _, _w, _m):
        counts = [0] * 8
        await pool.send(np.zeros(8, np.int64), range(8))
        cancelled = 0
        while sum(counts) < 800:
            receiving = asyncio.create_task(pool.recv(min=chance.randrange(1, 4), timeout=chance.choice([None, 0.5])))
            for _ in range(chance.randrange(0, 5)):
                await asyncio.sleep(0)
            if chance.random() < 0.5 and receiving.cancel():
                cancelled += 1
                await asyncio.wait({receiving})
                if receiving.cancelled():
                    continue
            batch = await soon(receiving)
            for env_id, obs in zip(batch.env_ids.tolist(), batch.observations.tolist(), strict=True):
                counts[env_id] += 1
                assert obs == counts[env_id], "each once and in order"
            await pool.send(np.zeros(len(batch), np.int64), batch.env_ids)
        assert cancelled > 20


# --------------------------------------------------------------------------- send and reset


async def test_only_what_was_received_can_be_sent_to(url: str) -> None:
    async with workers(url, 1), Mesh(url) as m, await m.pool("cartpole", 2) as pool:
        with pytest.raises(ResetNeeded, match="sub-environment 0"):
            await pool.send([0, 0], [0, 1])
    async with pooled(url, Gated, 4) as (pool, gates, worker, _m):
        gates.shut(1)
        await pool.send([1, 0], [0, 1])
        await until(lambda: pool.ready == 1, "one is ready")
        heard = len(worker.heard)
        for env_id, words in ((0, "under way"), (1, "not received")):
            with pytest.raises(ConcurrentStep, match=words) as caught:
                await pool.send([0, 0], [2, env_id])
            assert caught.value.details["env_id"] == env_id
        wrongs: list[Any] = [[4], [-1], [2, 2], [[2]], np.array([2.0]), np.array([2**63 + 2], np.uint64)]
        for wrong in wrongs:
            with pytest.raises((UsageError, TypeError)):
                await pool.send(np.zeros(len(wrong), np.int64), wrong)
            with pytest.raises((UsageError, TypeError)):
                await pool.reset(env_ids=wrong)
        await pool.send([], [])
        assert len(worker.heard) == heard, "nothing was sent"
        await pool.send([7], np.array([2], np.uint8))
        assert (await soon(pool.recv(min=2))).rewards.tolist() == [0.0, 7.0]


async def test_a_bad_action_names_its_env_id_and_nothing_is_sent(url: str) -> None:
    async with workers(url, 3), Mesh(url) as m, await m.pool("cartpole", 6, shards=3) as pool:
        await pool.reset(seed=0)
        batch = await soon(pool.recv(min=6))
        for actions in ([0, 2, 1], [0, -1, 1], np.array([0, 5, 0])):
            with pytest.raises(InvalidAction) as caught:
                await pool.send(actions, [0, 4, 2])
            assert caught.value.details["env_id"] == 4
        others: list[Any] = [[0, 1], [0.5, 0.5, 0.5], "abc", None]
        for other in others:
            with pytest.raises(InvalidAction):
                await pool.send(other, [0, 4, 2])
        assert pool.under_way == 0
        await pool.send(np.zeros(6, np.int64), batch.env_ids)
        assert (await soon(pool.recv(min=6))).steps.tolist() == [1] * 6


async def test_what_cannot_be_encoded_is_refused_and_changes_nothing(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, gates, _, _m):
        await pool.send([0, 0], [0, 1])
        await until(lambda: pool.ready == 2, "two are ready")
        with pytest.raises(UnencodableValue):
            await pool.reset(options={"thing": object()})
        assert pool.ready == 2
        assert ids(await soon(pool.recv(min=2))) == [0, 1]
        with pytest.raises(InvalidSeed):
            await pool.reset(seed=[1])
        await pool.send(np.zeros(4, np.int64), range(4))
        assert len(await soon(pool.recv(min=4))) == 4
        assert not gates._shut


@BOTH
async def test_reset_waits_for_what_is_under_way_and_drops_it(url: str, make: Any) -> None:
    async with pooled(url, make, 4) as (pool, gates, _, _m):
        gates.shut(1)
        await pool.send([1, 0, 0], [0, 1, 2])
        await until(lambda: pool.ready == 2, "two are ready")
        resetting = asyncio.create_task(pool.reset(options={"n": 3}))
        await asyncio.sleep(0)
        await until(lambda: gates.at.get(1) == 1, "the first is at the gate")
        assert not resetting.done()
        with pytest.raises(ConcurrentStep):
            await pool.recv(min=3)
        gates.open()
        await resetting
        batch = await soon(pool.recv(min=4))
        assert ids(batch) == [0, 1, 2, 3]
        assert batch.first.all()
        assert (batch.episodes.tolist(), batch.steps.tolist()) == ([2] * 4, [0] * 4)
        assert batch.observations.tolist() == [0] * 4
        assert batch.infos["n"].tolist() == [3] * 4
        assert pool.ready == pool.under_way == 0


async def test_some_are_reset_and_the_others_go_on(url: str) -> None:
    async with pooled(url, Gated, 4) as (pool, gates, _, _m):
        gates.shut(1)
        await pool.send([0, 0, 1], [0, 1, 2])
        await until(lambda: pool.ready == 2, "two are ready")
        await pool.reset(env_ids=[3, 1])  # waits for neither of the others
        await until(lambda: pool.ready == 3, "they are reset")
        batch = await pool.recv(min=3)
        assert dict(zip(batch.env_ids.tolist(), batch.first.tolist(), strict=True)) == {0: False, 1: True, 3: True}
        assert dict(zip(batch.env_ids.tolist(), batch.episodes.tolist(), strict=True)) == {0: 1, 1: 2, 3: 2}
        gates.open()
        assert ids(await soon(pool.recv())) == [2]


async def test_a_reset_that_is_cancelled_while_it_waits_has_changed_nothing(url: str) -> None:
    async with pooled(url, Gated, 2) as (pool, gates, _, _m):
        gates.shut(1)
        await pool.send([1, 0], [0, 1])
        await until(lambda: pool.ready == 1, "one is ready")
        resetting = asyncio.create_task(pool.reset())
        await asyncio.sleep(0)
        resetting.cancel()
        await asyncio.wait({resetting})
        gates.open()
        batch = await soon(pool.recv(min=2))
        assert batch.steps.tolist() == [1, 1]


async def test_an_end_is_followed_by_the_next_episode_at_once(url: str) -> None:
    async with pooled(url, Gated, 2) as (pool, _, _w, _m):
        await pool.send([0, 0], [0, 1])
        await soon(pool.recv(min=2))
        await pool.send([ENDS, 3], [0, 1])
        rows: dict[int, Any] = {}
        for _ in range(2):
            batch = await soon(pool.recv(max=1))
            rows[int(batch.env_ids[0])] = batch
        end, other = rows[0], rows[1]
        assert (end.terminations[0], end.episodes[0], end.steps[0], end.first[0]) == (True, 1, 2, False)
        assert (end.observations[0], end.infos["final_obs"][0]) == (0, 2)
        assert end.infos["final_info"] == {}
        assert (other.episodes[0], other.steps[0], other.infos) == (1, 2, {})
        await pool.send([0, 0], [0, 1])
        batch = await soon(pool.recv(min=2))
        at = dict(
            zip(batch.env_ids.tolist(), zip(batch.episodes.tolist(), batch.steps.tolist(), strict=True), strict=True)
        )
        assert at == {0: (2, 1), 1: (1, 3)}
