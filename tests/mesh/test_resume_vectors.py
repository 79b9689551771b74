"""Vectors that outlive their workers: one slow step for what was lost, nothing for the rest (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from meshrl import Mesh, RemoteVectorEnv
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import SessionLost
from meshrl.protocol.seeds import derive
from tests.mesh.conftest import until
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.losing import Workers, same
from tests.mesh.resumed_envs import Draws, Pictures

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


def masked(terminations: Any, truncations: Any) -> dict[str, Any]:
    return {"options": {"reset_mask": terminations | truncations}}


# --------------------------------------------------------------------------- the same transitions


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("CartPole-v1", mode) for mode in MODES),
        ("FrozenLake-v1", AutoresetMode.NEXT_STEP),
        ("Pendulum-v1", AutoresetMode.NEXT_STEP),
        ("Blackjack-v1", AutoresetMode.SAME_STEP),
        (TAXI, AutoresetMode.DISABLED),
    ],
)
async def test_workers_that_are_killed_again_and_again_cost_no_transition_of_a_vector(
    server: EmbeddedServer, workers: Workers, name: str, mode: AutoresetMode
) -> None:
    local = SyncVectorEnv([lambda: gymnasium.make(name)] * 6, autoreset_mode=mode)
    local.action_space.seed(5)
    workers.start(4)
    async with Mesh(server.url) as m, await m.vector(name, 6, shards=2, autoreset_mode=mode) as envs:
        same(await envs.reset(seed=5), local.reset(seed=5))
        for n in range(150):
            actions = local.action_space.sample()
            stepping = asyncio.ensure_future(envs.step(actions))
            if n % 50 == 25:  # with the step on its way there, or under way, or on its way back
                await asyncio.sleep(0.0005 * (n // 50))
                await workers.kill(envs.shards[n // 50 % 2][0])
            same(await stepping, theirs := local.step(actions))
            if mode is AutoresetMode.DISABLED and (theirs[2] | theirs[3]).any():
                same(await envs.reset(**masked(*theirs[2:4])), local.reset(**masked(*theirs[2:4])))
    local.close()


@pytest.mark.parametrize(("name", "bound"), [("Pictures", 1 << 22), ("Pendulum-v1", 2000)])
async def test_who_counts_what_was_told_and_when_is_all_the_same(
    server: EmbeddedServer, workers: Workers, name: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.protocol.told.UNCOUNTED_BYTES", bound)
    make = Pictures if name == "Pictures" else partial(gymnasium.make, name)
    local = SyncVectorEnv([make] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    local.action_space.seed(5)
    workers.start(2)
    async with Mesh(server.url) as m:
        async with await m.vector(name, 4, shards=2, autoreset_mode=AutoresetMode.SAME_STEP) as envs:
            same(await envs.reset(seed=5), local.reset(seed=5))
            for n in range(90):
                if n % 30 == 25:
                    await workers.kill(envs.shards[0][0])
                    await asyncio.to_thread(workers.start)
                actions = local.action_space.sample()
                same(await envs.step(actions), local.step(actions))
    local.close()


@pytest.mark.parametrize("name", ["Pictures", "Draws"])
async def test_resets_of_some_are_proved_whoever_counts(server: EmbeddedServer, workers: Workers, name: str) -> None:
    make = Pictures if name == "Pictures" else Draws
    local = SyncVectorEnv([make] * 4, autoreset_mode=AutoresetMode.DISABLED)
    workers.start(2)
    async with Mesh(server.url) as m:
        async with await m.vector(name, 4, shards=2, autoreset_mode=AutoresetMode.DISABLED) as envs:
            same(await envs.reset(seed=5), local.reset(seed=5))
            for n in range(4):
                same(await envs.step(np.ones(4, np.int64)), local.step(np.ones(4, np.int64)))
                mask = np.arange(4) == n  # of one shard none
                some: dict[str, Any] = {"options": {"reset_mask": mask}}
                same(await envs.reset(**some), local.reset(**some))
                await workers.kill(envs.shards[n % 2][0])
                await asyncio.to_thread(workers.start)
                same(await envs.step(np.ones(4, np.int64)), local.step(np.ones(4, np.int64)))
    local.close()


async def test_two_workers_that_die_at_once_are_replaced_at_once(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.vector("Slow", 3, shards=3) as envs:
        await envs.reset(seed=1)
        for _ in range(3):
            await envs.step(np.ones(3, np.int64))
        lost = [worker for worker, _ in envs.shards[:2]]
        kept = envs.shards[2]
        stepping = asyncio.ensure_future(envs.step(np.ones(3, np.int64)))
        await asyncio.gather(*map(workers.kill, lost))
        assert (await stepping)[0].tolist() == [4, 4, 4]
        assert envs.shards[2] == kept
        assert not {worker for worker, _ in envs.shards} & set(lost)


async def test_a_method_that_was_called_between_episodes_is_called_again_there(
    server: EmbeddedServer, workers: Workers
) -> None:
    """The journal has begun anew before it, and does not any more after it; the digest does as the journal does."""
    local = SyncVectorEnv([Draws] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    workers.start(3)
    async with Mesh(server.url) as m, await m.vector("Draws", 3, shards=1) as envs:
        same(await envs.reset(seed=5), local.reset(seed=5))
        actions = np.ones(3, np.int64)
        for _ in range(3):
            for _ in range(150):
                same(await envs.step(actions), local.step(actions))
            assert await envs.call("double") == local.call("double")
        for _ in range(2):
            await workers.kill(envs.shards[0][0])
            for _ in range(150):
                same(await envs.step(actions), local.step(actions))


async def test_the_journal_of_episodes_that_follow_by_themselves_stays_short(
    server: EmbeddedServer, workers: Workers
) -> None:
    local = SyncVectorEnv([Draws] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    workers.start(2)
    async with Mesh(server.url) as m, await m.vector("Draws", 3, shards=1) as envs:
        same(await envs.reset(seed=5), local.reset(seed=5))
        actions = np.ones(3, np.int64)
        for _ in range(600):
            same(await envs.step(actions), local.step(actions))
        journal: Any = envs._sessions[0]._recovery.journal  # type: ignore[attr-defined]
        assert len(journal) < 300, "two hundred steps, and an episode, which has some twenty"
        await workers.kill(envs.shards[0][0])
        for _ in range(100):
            same(await envs.step(actions), local.step(actions))


async def test_under_derived_seeding_episodes_go_on_with_their_numbers(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.vector("CartPole-v1", 2, shards=1, seeding="derived") as envs:
        alone = gymnasium.make("CartPole-v1")
        await envs.reset(seed=7)
        episodes = np.zeros(2, np.int64)
        ended = np.zeros(2, np.bool_)
        for n in range(120):
            if n in {10, 45, 46, 90}:
                await workers.kill(envs.shards[0][0])
                await asyncio.to_thread(workers.start)
            obs, _, terminations, truncations, _ = await envs.step(np.ones(2, np.int64))
            for i in np.flatnonzero(ended).tolist():
                episodes[i] += 1
                same([obs[i]], [alone.reset(seed=derive(7, i, int(episodes[i])))[0]])
            ended = terminations | truncations
        assert episodes.min() > 5


async def test_what_was_set_and_called_is_done_again_in_a_vector(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    ones = np.ones(3, np.int64)
    async with Mesh(server.url) as m, await m.vector("Tuned", 3, shards=1) as envs:
        await envs.set_attr("gain", [2, 3, 4])
        await envs.reset(seed=1)
        await envs.step(ones)
        await envs.reset(seed=2)
        await envs.set_attr("gain", 5, env_ids=[1])
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(ones))[0].tolist() == [2, 5, 4]
        await envs.call_some([2], "double")
        await envs.reset(seed=3)
        await asyncio.to_thread(workers.start)
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(ones))[0].tolist() == [2, 5, 8]


async def test_who_is_named_twice_in_a_call_is_called_twice_again(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    ones = np.ones(2, np.int64)
    async with Mesh(server.url) as m, await m.vector("Tuned", 2, shards=1) as envs:
        await envs.reset(seed=1)
        assert await envs.call_some([1, 1], "double") == (2, 4)
        await envs.step(ones)
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(ones))[0].tolist() == [2, 8]


@pytest.mark.parametrize(("name", "on_loss"), [("Unresumable", "resume"), ("Tuned", "truncate")])
async def test_what_was_set_is_set_where_nothing_else_can_be_done_again(
    server: EmbeddedServer, workers: Workers, name: str, on_loss: Any
) -> None:
    workers.start(2)
    ones = np.ones(2, np.int64)
    async with Mesh(server.url) as m, await m.vector(name, 2, shards=1, on_loss=on_loss) as envs:
        await envs.set_attr("gain", 3)
        await envs.reset(seed=1)
        await envs.step(ones)
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(ones))[3].all()
        assert not (await envs.step(ones))[3].any()
        assert (await envs.step(ones))[0].tolist() == [3, 3]


async def test_vectors_of_coroutine_envs_are_resumed(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.vector("Awaited", 3, shards=1) as envs:
        await envs.reset(seed=1)
        await envs.step(np.array([1, 2, 3]))
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(np.array([1, 2, 3])))[0].tolist() == [2, 4, 6]


async def test_a_reset_of_some_of_them_is_done_again(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    ones = np.ones(3, np.int64)
    async with Mesh(server.url) as m, await m.vector("Tuned", 3, shards=1) as envs:
        await envs.reset(seed=1)
        await envs.step(ones)
        await envs.reset(options={"reset_mask": np.array([True, False, False])})
        await envs.step(ones)
        await envs.reset(seed=3, options={"reset_mask": np.array([False, True, False])})
        await envs.step(ones)
        await workers.kill(envs.shards[0][0])
        assert (await envs.step(ones))[0].tolist() == [3, 2, 4]


async def test_a_vectors_step_that_is_cancelled_while_it_is_resumed_can_be_settled(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    ones = np.ones(2, np.int64)
    async with Mesh(server.url) as m, await m.vector("Slow", 2, shards=1) as envs:
        await envs.reset(seed=1)
        for _ in range(15):
            await envs.step(ones)
        first = envs.shards[0][0]
        await workers.kill(first)
        stepping = asyncio.ensure_future(envs.step(ones))
        await until(lambda: envs.shards[0][0] != first, "it is being brought to where it was")
        stepping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stepping
        assert (await envs.settle())[0].tolist() == [16, 16]
        assert (await envs.step(ones))[0].tolist() == [17, 17]


# --------------------------------------------------------------------------- not resumed, and never silently


async def lost_in(envs: RemoteVectorEnv, workers: Workers, actions: Any) -> tuple[Any, Any]:
    """The step before the loss of the second shard, and the one after."""
    before = await envs.step(actions)
    await workers.kill(envs.shards[1][0])
    return before, await envs.step(actions)


def check_cut(infos: dict[str, Any], why: str) -> None:
    assert infos["_session_lost"].tolist() == [False, False, True, True]
    assert infos["session_lost"]["not_resumed"].tolist()[2:] == [why, why]


@pytest.mark.parametrize(
    ("name", "why", "on_loss"),
    [
        ("Random", "replay_diverged", "resume"),
        ("Unresumable", "not_resumable", "resume"),
        ("Tuned", "not_asked_for", "truncate"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
async def test_what_cannot_be_resumed_is_truncated_and_the_others_go_on(
    server: EmbeddedServer, workers: Workers, name: str, why: str, on_loss: Any, mode: AutoresetMode
) -> None:
    workers.start(3)
    ones = np.ones(4, np.int64)
    async with (
        Mesh(server.url) as m,
        await m.vector(name, 4, shards=2, autoreset_mode=mode, on_loss=on_loss) as envs,
    ):
        await envs.reset(seed=1)
        before, (obs, rewards, terminations, truncations, infos) = await lost_in(envs, workers, ones)
        assert rewards.tolist() == [1.0, 1.0, 0.0, 0.0]
        assert not terminations.any()
        assert truncations.tolist() == [False, False, True, True]
        check_cut(infos, why)
        if mode is AutoresetMode.SAME_STEP:
            assert obs[2:].tolist() == [0, 0]
            assert infos["_final_obs"].tolist() == [False, False, True, True]
            assert infos["final_obs"].tolist()[2:] == before[0][2:].tolist()
        else:
            assert obs[2:].tolist() == before[0][2:].tolist()
            if mode is AutoresetMode.DISABLED:
                obs, infos = await envs.reset(**masked(terminations, truncations))
            else:
                obs, rewards, terminations, truncations, infos = await envs.step(ones)
                assert rewards.tolist() == [1.0, 1.0, 0.0, 0.0]
                assert not truncations.any()
            assert obs[2:].tolist() == [0, 0]
            assert "session_lost" not in infos
        _, rewards, _, truncations, infos = await envs.step(ones)
        assert rewards.tolist() == [1.0] * 4
        assert not truncations.any()
        assert "session_lost" not in infos


async def test_a_reset_of_all_begins_anew_and_says_that_episodes_were_lost(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.vector("Random", 4, shards=2) as envs:
        await envs.reset(seed=1)
        await envs.step(np.ones(4, np.int64))
        await workers.kill(envs.shards[1][0])
        obs, infos = await envs.reset(seed=2)
        assert obs.tolist() == [0] * 4
        check_cut(infos, "replay_diverged")
        assert "session_lost" not in (await envs.reset(seed=3))[1]


async def test_derived_seeds_are_not_repeated_after_what_could_not_be_resumed(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    alone = gymnasium.make("CartPole-v1")
    async with (
        Mesh(server.url) as m,
        await m.vector("CartPole-v1", 1, seeding="derived", autoreset_mode="SameStep", on_loss="truncate") as envs,
    ):
        await envs.reset(seed=7)
        for episode in range(1, 4):
            *_, ended, _, _ = await envs.step(np.ones(1, np.int64))
            while not ended.any():
                obs, _, ended, _, _ = await envs.step(np.ones(1, np.int64))
            same([obs[0]], [alone.reset(seed=derive(7, 0, episode))[0]])
        await workers.kill(envs.shards[0][0])
        obs, _, _, truncations, _ = await envs.step(np.ones(1, np.int64))
        assert truncations.all()
        same([obs[0]], [alone.reset(seed=derive(7, 0, 4))[0]])


async def test_where_nobody_can_take_a_shard_it_is_said_and_later_it_goes_on(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(1)
    ones = np.ones(2, np.int64)
    async with (
        Mesh(server.url) as m,
        await m.vector("Tuned", 2, autoreset_mode="SameStep", wait=1.0) as envs,
    ):
        await envs.reset(seed=1)
        await envs.step(ones)
        await workers.kill(envs.shards[0][0])
        for _ in range(2):
            with pytest.raises(SessionLost, match="no_worker"):
                await envs.step(ones)
        await asyncio.to_thread(workers.start)
        obs, _, _, truncations, infos = await envs.step(ones)
        assert obs.tolist() == [0, 0]
        assert truncations.all()
        assert infos["final_obs"].tolist() == [1, 1]


async def test_raise_raises_for_a_vector(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.vector("Tuned", 2, on_loss="raise") as envs:
        await envs.reset(seed=1)
        await workers.kill(envs.shards[0][0])
        for _ in range(2):
            with pytest.raises(SessionLost):
                await envs.step(np.ones(2, np.int64))
