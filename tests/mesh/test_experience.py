"""Experience: transitions of others' episodes, in batches, from where their consumer was."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Factory, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.storing import Reader, store
from meshrl.client import following
from meshrl.client.gathering import Experience
from meshrl.errors import StreamMissing, UsageError
from meshrl.recording.streams import EPISODES, POSITIONS
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Counter, Nested, Sampled
from tests.mesh.recordings import Told, drive, listed
from tests.mesh.test_recordings import alike


def by_episode(batches: list[Experience]) -> dict[str, list[int]]:
    """The steps of each episode, in the order in which they came."""
    steps: dict[str, list[int]] = defaultdict(list)
    for batch in batches:
        for id_, step in zip(batch.episode_ids.tolist(), batch.steps.tolist(), strict=True):
            steps[id_].append(step)
    return steps


def same_as(told: dict[str, Told], batches: list[Experience]) -> None:
    """Every transition of these episodes, once, equal to the bit."""
    seen = dict.fromkeys(told, 0)
    for batch in batches:
        for k, id_ in enumerate(batch.episode_ids.tolist()):
            one, t = told[id_], int(batch.steps[k])
            assert t == seen[id_], "in order, and once"
            seen[id_] += 1
            assert alike(row(batch.observations, k), one.obs[t])
            assert alike(row(batch.next_observations, k), one.obs[t + 1])
            assert alike(row(batch.actions, k), one.actions[t])
            assert (batch.rewards[k], batch.terminations[k]) == (one.rewards[t], one.terminations[t])
            assert batch.truncations[k] == one.truncations[t]
    assert seen == {id_: len(one.rewards) for id_, one in told.items()}


def row(batch: Any, k: int) -> Any:
    if isinstance(batch, dict):
        return {key: row(part, k) for key, part in batch.items()}
    if isinstance(batch, tuple) and not isinstance(batch[0], str):  # a batch of texts is a tuple of them
        return tuple(row(part, k) for part in batch)
    return batch[k]


async def recorded(m: Mesh, env: str, level: Any, episodes: int, seed: int = 1, **wish: Any) -> dict[str, Told]:
    async with await m.env(env, record=level, **wish) as remote:
        session = remote.session_id
        told = await drive(remote, episodes, seed, max_steps=30)
    return {f"{session}.0.{n}": one for n, one in enumerate(told)}


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize("served", ["CartPole-v1", "Nested"])
async def test_every_transition_comes_once(url: str, level: Any, served: str) -> None:
    async with EnvWorker({"of": Nested if served == "Nested" else served}, url), Mesh(url) as m:
        told = await recorded(m, "of", level, 4)
        await listed(m, "of", 4)
        batches = [batch async for batch in m.experience("of", follow=False, batch_size=7)]
        assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
        same_as(told, batches)
        assert all((batch.ages_s >= 0).all() and (batch.ages_s < 60).all() for batch in batches)
        if served == "Nested":
            assert all(type(batch.observations) is dict and type(batch.actions) is dict for batch in batches)
            assert batches[0].observations["inner"]["at"].shape == (7, 2, 3)


class Pictures(Sampled):
    """Observations of more than what is sent as one array."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(0, 255, (48, 48, 3), np.uint8), spaces.Discrete(3))


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_pictures_come_as_one_array(url: str, level: Any) -> None:
    async with EnvWorker({"of": Pictures}, url), Mesh(url) as m:
        told = await recorded(m, "of", level, 8)
        assert max(len(one.rewards) for one in told.values()) > 10, "some of them are large"
        await listed(m, "of", 8)
        batches = [batch async for batch in m.experience("of", follow=False, batch_size=16)]
        same_as(told, batches)
        for batch in batches:
            for shown in (batch.observations, batch.next_observations):
                assert (type(shown), shown.shape, shown.dtype) == (np.ndarray, (len(batch), 48, 48, 3), np.uint8)


async def test_it_is_said_which_transition_is_the_last_of_its_episode(url: str) -> None:
    async with EnvWorker({"of": Counter}, url), Mesh(url) as m:  # no episode of it ends by itself
        async with await m.env("of", record="full") as env:
            for steps in (3, 1, 2):
                await env.reset(seed=1)
                for _ in range(steps):
                    await env.step(0)
        await listed(m, "of", 3)
        batches = [batch async for batch in m.experience("of", follow=False, batch_size=2)]
        assert np.concatenate([batch.ends for batch in batches]).tolist() == [False, False, True, True, False, True]
        assert not any((batch.terminations | batch.truncations).any() for batch in batches)


async def test_what_is_of_too_old_a_policy_or_happened_too_long_ago_is_left_out(url: str) -> None:
    async with EnvWorker({"of": Counter}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            for versions in ((None, 1, 1, 2), (1, 1), (2, 1, 3)):
                await env.reset(seed=1)
                for version in versions:
                    if version is not None:
                        env.policy_version = version
                    await env.step(0)
        await listed(m, "of", 3)
        feed = m.experience("of", name="fresh", follow=False, min_version=2)
        (batch,) = [one async for one in feed]
        assert batch.policy_versions.tolist() == [2, 2, 3]
        assert batch.steps.tolist() == [3, 0, 2]
        assert batch.ends.tolist() == [True, True, True], "what comes behind a gap is not joined to what is before"
        assert feed.stale == 6
        assert not [one async for one in m.experience("of", name="fresh", follow=False)], "it was passed over for good"
        feed = m.experience("of", follow=False, batch_size=3, min_version=1)
        first = await anext(feed)
        feed.min_version = 3  # as its learner gets better
        rest = [one async for one in feed]
        assert [one.policy_versions.tolist() for one in (first, *rest)] == [[1, 1, 2], [3]]
        assert not [one async for one in m.experience("of", follow=False, max_age_s=0.0)]
        assert sum([len(one) async for one in m.experience("of", follow=False, max_age_s=600.0)]) == 9


async def test_batches_are_a_multiple_of_what_was_asked_for_and_the_rest_waits(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = await recorded(m, "of", "full", 3)
        await listed(m, "of", 3)
        batches = [one async for one in m.experience("of", name="by 8", follow=False, batch_size=20, multiple_of=8)]
        count = sum(len(one.rewards) for one in told.values())
        assert count % 8, "something is left"
        assert all(len(batch) == 16 for batch in batches[:-1])
        assert sum(map(len, batches)) == count - count % 8
        assert not [one async for one in m.experience("of", name="by 8", follow=False, multiple_of=8)]
        told |= await recorded(m, "of", "full", 2, seed=9)
        await listed(m, "of", 5)
        batches += [one async for one in m.experience("of", name="by 8", follow=False, multiple_of=8)]
        batches += [one async for one in m.experience("of", name="by 8", follow=False)]
        same_as(told, batches)
        with pytest.raises(UsageError, match="multiple_of"):
            m.experience("of", batch_size=7, multiple_of=8)


async def test_a_feed_goes_on_from_where_another_says_that_it_is(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = await recorded(m, "of", "full", 4)
        await listed(m, "of", 4)
        feed = m.experience("of", follow=False, batch_size=13)
        batches = [await anext(feed), await anext(feed)]
        rest = [one async for one in m.experience("of", follow=False, from_=feed.position)]
        same_as(told, [*batches, *rest])
        with pytest.raises(UsageError, match="position"):
            m.experience("of", from_="yesterday")


async def stored_again(url: str, env: str, which: int) -> None:
    """An entry of the index once more, as by a retry that comes too late to be known as one."""
    async with connect(url) as connection, Reader(connection, 5.0) as reader:
        entries = [one async for one in reader.get(EPISODES, Subjects().episodes(env, "*"))]
        await store(connection, entries[which].subject, entries[which].body, 5.0, message_id=f"again:{which}")


@pytest.mark.parametrize("kept", [following.KEPT_SESSIONS, 1])
async def test_an_entry_of_the_index_that_is_stored_twice_gives_its_episodes_once(
    url: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "KEPT_SESSIONS", kept)
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = await recorded(m, "of", "full", 2)
        told |= await recorded(m, "of", "full", 2, seed=4)
        await listed(m, "of", 4)
        feed = m.experience("of", name="once", follow=False)
        batches = [one async for one in feed]
        await stored_again(url, "of", 0)
        assert not [one async for one in m.experience("of", name="once", follow=False)], "whoever comes back knows it"
        told |= await recorded(m, "of", "full", 1, seed=7)
        await stored_again(url, "of", 1)
        await listed(m, "of", 5)
        batches += [one async for one in m.experience("of", name="once", follow=False)]
        same_as(told, batches)
        same_as(told, [one async for one in m.experience("of", follow=False)])


async def test_a_feed_begins_again_with_an_index_that_was_made_anew(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Mesh(url) as m:
        async with EnvWorker({"of": "CartPole-v1"}, url):
            for seed in range(3):
                await recorded(m, "of", "full", 1, seed=seed)
            await listed(m, "of", 3)
            assert [one async for one in m.experience("of", name="late", follow=False)]
            follower = m.experience("of", name="follower")
            await anext(follower)
            waiting = asyncio.ensure_future(anext(follower))
            await asyncio.sleep(0)
        async with connect(url) as connection:
            await connection.ask(f"$JS.API.STREAM.DELETE.{EPISODES}", b"", 10.0)
        async with EnvWorker({"of": "CartPole-v1"}, url):
            told = await recorded(m, "of", "full", 1, seed=9)
            await listed(m, "of", 1)
            same_as(told, [one async for one in m.experience("of", name="late", follow=False)])
            async with asyncio.timeout(20):
                same_as(told, [await waiting])
            assert "made anew" in caplog.text


async def test_what_retention_has_taken_from_under_a_position_is_said(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        for seed in range(3):
            await recorded(m, "of", "full", 1, seed=seed)
        await listed(m, "of", 3)
        feed = m.experience("of", name="slow", follow=False, batch_size=2)
        await anext(feed)
        await feed.commit()
        async with connect(url) as connection:
            info = json.loads(await connection.ask(f"$JS.API.STREAM.INFO.{EPISODES}", b"", 10.0) or b"")
            config = info["config"] | {"max_msgs": 1}
            await connection.ask(f"$JS.API.STREAM.UPDATE.{EPISODES}", json.dumps(config).encode(), 10.0)
        (last,) = await listed(m, "of", 1)
        batches = [one async for one in m.experience("of", name="slow", follow=False)]
        assert by_episode(batches) == {last.episode_id: list(range(last.steps))}
        assert "kept no more" in caplog.text


async def test_of_two_feeds_by_one_name_only_one_can_commit(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        await recorded(m, "of", "full", 3)
        await listed(m, "of", 3)
        old, new = (m.experience("of", name="mine", follow=False, batch_size=5) for _ in range(2))
        for feed in (old, new):
            await anext(feed)
        await anext(new)  # commits what it had
        with pytest.raises(UsageError, match="name of its own"):
            await old.commit()
        await new.commit()
        async with connect(url) as connection:
            await connection.ask(f"$JS.API.STREAM.DELETE.{POSITIONS}", b"", 10.0)
        await anext(new)
        with pytest.raises(StreamMissing):
            await new.commit()
        async with EnvWorker({"other": "CartPole-v1"}, url):
            await recorded(m, "other", "full", 1)  # whose worker makes it again
            await listed(m, "other", 1)
        await new.commit()
        again = m.experience("of", name="mine", follow=False, batch_size=5)
        assert (await anext(again)).steps.tolist() == (await anext(new)).steps.tolist()


async def test_each_name_of_an_env_has_its_own_experience_and_positions(url: str) -> None:
    async with EnvWorker({"one": "CartPole-v1", "two": "CartPole-v1"}, url), Mesh(url) as m:
        told = {name: await recorded(m, name, "full", 2, seed=seed) for seed, name in enumerate(("one", "two"))}
        for name, own in told.items():
            await listed(m, name, 2)
            same_as(own, [one async for one in m.experience(name, name="mine", follow=False)])


async def test_who_comes_back_goes_on_where_it_was_and_each_name_by_itself(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = await recorded(m, "of", "full", 6)
        await listed(m, "of", 6)
        feed = m.experience("of", name="first", follow=False, batch_size=10)
        taken = [await anext(feed) for _ in range(3)]
        again = m.experience("of", name="first", follow=False, batch_size=10)
        third = await anext(again)
        assert third.episode_ids.tolist() == taken[2].episode_ids.tolist(), "it was not taken yet"
        assert third.steps.tolist() == taken[2].steps.tolist()
        await again.commit()
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        rest = [batch async for batch in m.experience("of", name="first", follow=False, batch_size=64)]
        same_as(told, [*taken, *rest])
        assert not [batch async for batch in m.experience("of", name="first", follow=False)]
        other = [batch async for batch in m.experience("of", name="second", follow=False)]
        same_as(told, other)


async def test_a_step_of_a_pool_is_of_the_policy_that_chose_it_however_late_it_is_answered(url: str) -> None:
    async with EnvWorker({"of": Factory(Counter, {"slow_s": -1.0})}, url) as worker, Mesh(url) as m:
        async with await m.pool("of", 3, record="full") as pool:
            await pool.reset(seed=1)
            await pool.recv(min=3, timeout=10)
            pool.policy_version = 1
            await pool.send(np.array([400]), np.array([0]))  # milliseconds
            pool.policy_version = 2
            await pool.send(np.array([1]), np.array([1]))
            assert (await pool.recv(min=1, max=1, timeout=10)).env_ids.tolist() == [1]
            pool.policy_version = 3
            await pool.send(np.array([500, 1]), np.array([2, 1]))
            await pool.recv(min=3, timeout=10)
            await until(lambda: worker.recorded.recorded == 7, "all of it is stored")
        episodes = [await m.episode(one.episode_id) for one in await listed(m, "of", 3)]
        assert {one.env_id: one.policy_versions.tolist() for one in episodes} == {0: [1], 1: [2, 3], 2: [3]}


async def test_a_feed_that_follows_gets_what_is_recorded_later(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        got: list[Experience] = []

        async def follow() -> None:
            async for batch in m.experience("of", batch_size=1000):
                got.append(batch)

        following = asyncio.create_task(follow())
        told = await recorded(m, "of", "full", 2)
        told |= await recorded(m, "of", "full", 2, seed=5)
        wanted = sum(len(one.rewards) for one in told.values())
        await until(lambda: sum(map(len, got)) >= wanted, "all of it was given")
        following.cancel()
        await asyncio.wait({following})
        same_as(told, got)


async def test_a_feed_has_what_was_asked_for_and_whose_policy_it_was(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        await recorded(m, "of", "full", 2)
        async with await m.env("of", record="full", policy="mine", labels={"run": "a"}) as env:
            await env.reset(seed=1)
            for version in (3, 3, 4):
                env.policy_version = version
                await env.step(1)
        async with await m.vector("of", 2, record="full", policy="ours") as envs:
            await envs.reset(seed=1)
            await envs.step(np.ones(2, np.int64))
            envs.policy_version = 9
            await envs.step(np.ones(2, np.int64))
        async with await m.pool("of", 2, record="full", policy="theirs") as pool:
            await pool.reset(seed=1)
            await pool.recv(min=2)
            pool.policy_version = 5
            await pool.send(np.ones(2, np.int64), [0, 1])
            await pool.recv(min=2)
        await listed(m, "of", 2 + 1 + 2 + 2)
        (mine,) = [one async for one in m.experience("of", follow=False, policy="mine")]
        assert mine.policy_versions.tolist() == [3, 3, 4]
        (same,) = [one async for one in m.experience("of", follow=False, labels={"run": "a"})]
        assert same.episode_ids.tolist() == mine.episode_ids.tolist()
        (ours,) = [one async for one in m.experience("of", follow=False, policy="ours")]
        assert ours.policy_versions.tolist() == [-1, 9, -1, 9]
        (theirs,) = [one async for one in m.experience("of", follow=False, policy="theirs")]
        assert theirs.policy_versions.tolist() == [5, 5]
        with pytest.raises(UsageError, match="batch_size"):
            m.experience("of", batch_size=0)


async def test_what_nobody_runs_again_is_skipped_and_blocks_nobody(url: str) -> None:
    """Its kwargs are no longer allowed."""
    async with Mesh(url) as m:
        async with EnvWorker({"of": "CartPole-v1"}, url, allow_kwargs=("sutton_barto_reward",)):
            for kwargs in ({"sutton_barto_reward": True}, None):
                async with await m.env("of", kwargs, record="actions") as env:
                    told = await drive(env, 1, 1)
                await listed(m, "of", 1 if kwargs else 2)
        async with EnvWorker({"of": "CartPole-v1"}, url):
            feed = m.experience("of", follow=False)
            batches = [batch async for batch in feed]
        assert sum(map(len, batches)) == len(told[0].actions)
        assert feed.skipped == 1
