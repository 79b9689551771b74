"""Pools that outlive their workers: lanes of a lost shard wait and go on, all others never notice (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl import Mesh, RemotePool
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.ready import PoolBatch
from meshrl.errors import SessionLost
from meshrl.protocol.seeds import derive
from tests.mesh.conftest import until
from tests.mesh.losing import Workers, same
from tests.mesh.resumed_envs import Pictures


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


class Alone:
    """What each sub-environment must tell, by local envs that are stepped with the same actions."""

    def __init__(self, make: Callable[[], Any], count: int, seed: int) -> None:
        self.envs = [make() for _ in range(count)]
        self.rng = [np.random.default_rng(i) for i in range(count)]
        self.actions = [env.action_space for env in self.envs]
        for i, space in enumerate(self.actions):
            space.seed(i)
        self.begun = [env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]
        self.episodes = np.ones(count, np.int64)
        self.steps = np.zeros(count, np.int64)
        self.taken: list[Any] = [None] * count
        self.rows = 0

    def action(self, i: int) -> Any:
        self.taken[i] = self.actions[i].sample()
        return self.taken[i]

    def check(self, batch: PoolBatch) -> None:
        for k, i in enumerate(batch.env_ids.tolist()):
            self.rows += 1
            if batch.first[k]:
                same([batch.observations[k]], [np.asarray(self.begun[i], batch.observations.dtype)[()]])
                continue
            obs, reward, terminated, truncated, _ = self.envs[i].step(self.taken[i])
            self.steps[i] += 1
            assert batch.steps[k] == self.steps[i]
            assert batch.episodes[k] == self.episodes[i]
            if terminated or truncated:
                np.testing.assert_array_equal(batch.infos["final_obs"][k], obs)
                obs, _ = self.envs[i].reset()
                self.episodes[i], self.steps[i] = self.episodes[i] + 1, 0
            same([batch.observations[k]], [np.asarray(obs, batch.observations.dtype)[()]])
            facts = (batch.rewards[k], batch.terminations[k], batch.truncations[k])
            assert facts == (float(reward), terminated, truncated)


async def play(pool: RemotePool, alone: Alone, rounds: int, *, least: int = 3) -> None:
    """Receive whatever is ready and answer it, so many times."""
    for _ in range(rounds):
        batch = await pool.recv(min=least)
        alone.check(batch)
        await pool.send(np.array([alone.action(i) for i in batch.env_ids.tolist()]), batch.env_ids)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("CartPole-v1", 1 << 22), ("FrozenLake-v1", 1 << 22), ("Pendulum-v1", 3000), ("Pictures", 1 << 22)],
)
async def test_workers_that_are_killed_again_and_again_cost_no_transition_of_a_pool(
    server: EmbeddedServer, workers: Workers, name: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.protocol.told.UNCOUNTED_BYTES", bound)
    workers.start(4)
    alone = Alone(Pictures if name == "Pictures" else partial(gymnasium.make, name), 8, 5)
    async with Mesh(server.url) as m, await m.pool(name, 8, shards=2) as pool:
        await pool.reset(seed=5)
        for n in range(3):
            playing = asyncio.ensure_future(play(pool, alone, 60))
            await asyncio.sleep(0.01)
            await until(lambda n=n: pool.shards[n % 2][0] in workers.running, "it is back from the last time")  # type: ignore[misc]
            await workers.kill(pool.shards[n % 2][0])
            await playing
    assert alone.rows >= 3 * 60 * 3


async def test_the_others_go_on_while_a_shard_is_brought_back(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.pool("Slow", 4, shards=2) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=4)
        ones = np.ones(4, np.int64)
        for _ in range(30):
            await pool.send(ones, np.arange(4))
            await pool.recv(min=4)
        await pool.send(ones, np.arange(4))
        await workers.kill(pool.shards[1][0])
        for n in range(32, 36):
            batch = await pool.recv(min=2, max=2)
            assert sorted(batch.env_ids.tolist()) == [0, 1], "the replay takes thirty steps"
            assert batch.observations.tolist() == [n - 1, n - 1]
            await pool.send(ones[:2], batch.env_ids)
        batch = await pool.recv(min=4)
        assert sorted(zip(batch.env_ids.tolist(), batch.observations.tolist(), strict=True))[2:] == [(2, 31), (3, 31)]


async def test_what_is_sent_while_a_shard_is_away_is_done_when_it_is_back(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Slow", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        for _ in range(10):
            await pool.send(np.ones(2, np.int64), [0, 1])
            await pool.recv(min=2)
        await pool.send([1], [0])
        await workers.kill(pool.shards[0][0])
        await asyncio.sleep(0.5)
        await pool.send([5], [1])
        batch = await pool.recv(min=2)
        assert batch.infos == {}
        assert dict(zip(batch.env_ids.tolist(), batch.observations.tolist(), strict=True)) == {0: 11, 1: 15}


async def test_pools_of_coroutine_envs_are_resumed(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Awaited", 3, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=3)
        await pool.send([1, 2, 3], [0, 1, 2])
        await pool.recv(min=3)
        await workers.kill(pool.shards[0][0])
        await pool.send([1, 2, 3], [0, 1, 2])
        batch = await pool.recv(min=3)
        assert sorted(batch.observations.tolist()) == [2, 4, 6]


async def test_the_journals_of_a_pool_stay_short_and_are_exact_after_many_episodes(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    alone = Alone(lambda: gymnasium.make("CartPole-v1"), 4, 9)
    async with Mesh(server.url) as m, await m.pool("CartPole-v1", 4, shards=1) as pool:
        await pool.reset(seed=9)
        # Batches of one where the machine is slow, so that steps are counted, not rounds.
        rounds = 0
        while alone.rows < 2000:
            await play(pool, alone, 50, least=1)
            rounds += 50
        journal: Any = pool._sessions[0].recovery.journal  # type: ignore[attr-defined]
        assert rounds >= 500
        assert len(journal) < rounds
        await workers.kill(pool.shards[0][0])
        await play(pool, alone, 60, least=1)
    assert alone.episodes.min() > 3


async def test_a_shard_that_is_killed_while_it_is_brought_back_is_brought_back_again(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.pool("Slow", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        for _ in range(30):
            await pool.send([1, 1], [0, 1])
            await pool.recv(min=2)
        first = pool.shards[0][0]
        await pool.send([1, 1], [0, 1])
        await workers.kill(first)
        while pool.shards[0][0] == first:
            with pytest.raises(TimeoutError):
                await pool.recv(min=2, timeout=0.05)
        await workers.kill(pool.shards[0][0])
        batch = await pool.recv(min=2)
        assert batch.observations.tolist() == [31, 31]


def given_up(pool: RemotePool, lane: int) -> None:
    """As if nothing had been heard of that lane's request for too long, whatever its worker makes of it."""
    (flight,) = [one for one in pool._under_way._under_way if one.lanes.tolist() == [lane]]
    grant = flight.session.grant
    flight.failed(SessionLost("frozen", reason="worker_frozen", session=grant.session, worker=grant.worker))


async def test_what_a_worker_says_that_was_given_up_is_not_heard(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Slow", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        for n in range(1, 4):
            await pool.send([1, 1], [0, 1])
            assert (await pool.recv(min=2)).observations.tolist() == [n, n]
        await pool.send([1], [0])
        await pool.send([1], [1])
        given_up(pool, 0)  # and the answer to the other's is on its way
        told: dict[int, list[int]] = {0: [], 1: []}
        for _ in range(3):
            batch = await pool.recv(min=2)
            for i, obs in zip(batch.env_ids.tolist(), batch.observations.tolist(), strict=True):
                told[i].append(obs)
            await pool.send([1, 1], batch.env_ids)
        assert told == {0: [4, 5, 6], 1: [4, 5, 6]}


async def test_envs_that_fill_the_same_array_again_are_resumed(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Reused", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        for _ in range(5):
            await pool.send([1, 2], [0, 1])
            await pool.recv(min=2)
        await workers.kill(pool.shards[0][0])
        await pool.send([1, 2], [0, 1])
        batch = await pool.recv(min=2)
        assert batch.infos == {}
        assert sorted(batch.observations[:, 0].tolist()) == [6, 12]


# --------------------------------------------------------------------------- not resumed, and never silently


async def test_no_action_of_an_episode_that_was_ended_is_taken_in_the_next(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Random", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([1, 1], [0, 1])
        await pool.recv(min=2)
        await pool.send([1], [0])
        await pool.send([1], [1])
        given_up(pool, 0)
        batch = await pool.recv(min=2)
        assert batch.truncations.tolist() == [True, True]
        assert batch.episodes.tolist() == [1, 1]


async def test_a_lane_may_be_reset_while_it_is_reset_in_place_of_its_episode(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("SlowReset", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([1, 1], [0, 1])
        await pool.recv(min=2)
        await pool.send([1], [0])
        given_up(pool, 0)
        (revival,) = pool._under_way._revivals.values()
        await until(lambda: bool(revival._beginning), "the shard begins anew")
        await pool.reset(env_ids=[1])
        rows: dict[int, tuple[bool, bool]] = {}
        while len(rows) < 2:
            batch = await pool.recv()
            flags = zip(batch.first.tolist(), batch.truncations.tolist(), strict=True)
            rows.update(zip(batch.env_ids.tolist(), flags, strict=True))
        assert rows == {0: (False, True), 1: (True, False)}
        await pool.send([1, 1], [0, 1])
        assert not (await pool.recv(min=2)).truncations.any()
        assert pool.under_way == 0


@pytest.mark.parametrize(
    ("name", "why", "on_loss"),
    [
        ("Random", "replay_diverged", "resume"),
        ("Unresumable", "not_resumable", "resume"),
        ("Tuned", "not_asked_for", "truncate"),
    ],
)
async def test_lanes_that_cannot_be_resumed_are_truncated_each_once(
    server: EmbeddedServer, workers: Workers, name: str, why: str, on_loss: Any
) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.pool(name, 4, shards=2, on_loss=on_loss) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=4)
        await pool.send([1, 1, 1, 1], [0, 1, 2, 3])
        before = await pool.recv(min=4)
        told = dict(zip(before.env_ids.tolist(), before.observations.tolist(), strict=True))
        await workers.kill(pool.shards[1][0])
        await pool.send([1, 1, 1], [0, 1, 2])  # with one of the lost shard, and one of it left
        batch = await pool.recv(min=3)
        rows = {i: k for k, i in enumerate(batch.env_ids.tolist())}
        assert batch.truncations[[rows[0], rows[1], rows[2]]].tolist() == [False, False, True]
        check_cut(batch, rows[2], why, told[2])
        await pool.send([1, 1], [2, 3])
        batch = await pool.recv(min=2)
        rows = {i: k for k, i in enumerate(batch.env_ids.tolist())}
        assert batch.truncations[[rows[2], rows[3]]].tolist() == [False, True]
        assert batch.rewards[rows[2]] == 1.0
        assert (batch.episodes[rows[2]], batch.steps[rows[2]]) == (2, 1)
        check_cut(batch, rows[3], why, told[3])
        await pool.send([1, 1], [2, 3])
        batch = await pool.recv(min=2)
        assert not batch.truncations.any()
        assert batch.rewards.tolist() == [1.0, 1.0]
        assert "session_lost" not in batch.infos


def check_cut(batch: PoolBatch, row: int, why: str, last: int) -> None:
    assert batch.rewards[row] == 0.0
    assert not batch.terminations[row]
    assert not batch.first[row]
    assert batch.observations[row] == 0
    assert batch.infos["final_obs"][row] == last
    assert batch.infos["session_lost"]["not_resumed"][row] == why
    assert (batch.episodes[row], batch.steps[row]) == (1, 1)


async def test_a_reset_under_way_is_sent_to_the_shard_that_begins_anew(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Random", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([1, 1], [0, 1])
        await pool.recv(min=2)
        await workers.kill(pool.shards[0][0])
        await pool.reset(seed=4, env_ids=[0])
        batch = await pool.recv()
        assert batch.env_ids.tolist() == [0]
        assert batch.first.all()
        assert batch.observations.tolist() == [0]
        await pool.send([1, 1], [0, 1])
        batch = await pool.recv(min=2)
        rows = {i: k for k, i in enumerate(batch.env_ids.tolist())}
        assert batch.truncations[[rows[0], rows[1]]].tolist() == [False, True]


async def test_derived_seeds_go_on_with_the_numbers_of_the_episodes(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    alone = gymnasium.make("CartPole-v1")
    async with (
        Mesh(server.url) as m,
        await m.pool("CartPole-v1", 1, seeding="derived", on_loss="truncate") as pool,
    ):
        await pool.reset(seed=7)
        await pool.recv()
        ends = 0
        while ends < 5:
            if ends == 3:
                await workers.kill(pool.shards[0][0])
            await pool.send([1], [0])
            batch = await pool.recv()
            if batch.terminations[0] or batch.truncations[0]:
                ends += 1
                same([batch.observations[0]], [alone.reset(seed=derive(7, 0, ends))[0]])
                assert batch.episodes[0] == ends
                assert ("session_lost" in batch.infos) == (ends == 4)


async def test_where_nobody_can_take_a_shard_recv_says_so_and_later_it_goes_on(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(1)
    async with Mesh(server.url) as m, await m.pool("Tuned", 2, wait=1.0) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([1, 1], [0, 1])
        await pool.recv(min=2)
        await workers.kill(pool.shards[0][0])
        await pool.send([1, 1], [0, 1])
        with pytest.raises(SessionLost, match="no_worker"):
            await pool.recv(min=2)
        with pytest.raises(SessionLost, match="no_worker"):
            await pool.reset(seed=2)
        await asyncio.to_thread(workers.start)
        batch = await pool.recv(min=2)
        assert batch.truncations.all()
        assert batch.infos["final_obs"].tolist() == [1, 1]


async def test_raise_raises_for_a_pool(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Tuned", 2, shards=1, on_loss="raise") as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([1, 1], [0, 1])
        await pool.recv(min=2)
        await workers.kill(pool.shards[0][0])
        await pool.send([1, 1], [0, 1])
        with pytest.raises(SessionLost):
            await pool.recv(min=2)
