"""Envs in the exact state of another (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import gymnasium
import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import ConcurrentStep, MeshFull, ReplayDiverged, ResetNeeded, UsageError
from tests.mesh.conftest import until
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.losing import Workers, same
from tests.mesh.test_vector_parity import different


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        made = Workers(server.url, stack)
        made.start(2)
        yield made


@pytest.mark.parametrize("name", ["CartPole-v1", "Blackjack-v1", "Pendulum-v1", TAXI])
async def test_forks_go_on_as_the_env_itself_and_apart_from_it(
    server: EmbeddedServer, workers: Workers, name: str
) -> None:
    assert len(workers.running) == 2
    local = gymnasium.make(name)
    local.action_space.seed(3)
    async with Mesh(server.url) as m, await m.env(name) as env:
        same(await env.reset(seed=3), local.reset(seed=3))
        same(await env.reset(), local.reset())  # the generator goes on
        for _ in range(7):
            same(await env.step(action := local.action_space.sample()), theirs := local.step(action))
            if theirs[2] or theirs[3]:
                same(await env.reset(), local.reset())
        forks = await env.fork(4)
        for fork in forks:
            same(fork.last(), env.last())
        assert len({fork.session_id for fork in forks} | {env.session_id}) == 5
        assert len({fork.worker for fork in forks}) == 2, "spread like any others"
        actions = [local.action_space.sample() for _ in range(30)]
        tales = [await play(one, actions) for one in (forks[0], env, forks[1])]
        same(tales[0], tales[1])
        same(tales[2], tales[1])
        same(await play(forks[2], actions[:5]), tales[1][:5])
        grandchildren = await forks[2].fork(2)
        same(await play(grandchildren[1], actions[5:]), tales[1][5:])
    local.close()


async def play(env: Any, actions: list[Any]) -> list[Any]:
    told = []
    for action in actions:
        told.append(await env.step(action))
        if told[-1][2] or told[-1][3]:
            await env.reset()
    return told


async def test_last_is_what_was_told_last(server: EmbeddedServer, workers: Workers) -> None:
    assert workers
    async with Mesh(server.url) as m:
        for on_loss in ("resume", "truncate"):
            async with await m.env("CartPole-v1", on_loss=on_loss) as env:
                with pytest.raises(ResetNeeded):
                    env.last()
                obs, info = await env.reset(seed=1)
                same(env.last(), (obs, 0.0, False, False, info))
                told = await env.step(1)
                await env.get_attr("x_threshold")
                same(env.last(), told)
                stepping = asyncio.ensure_future(env.step(1))
                await asyncio.sleep(0)
                same(env.last(), told)
                told = await stepping
                same(env.last(), told)
        async with await m.env("CartPole-v1", on_loss="raise") as env:
            await env.reset(seed=1)
            with pytest.raises(UsageError, match="keeps no answers"):
                env.last()


@pytest.mark.parametrize("name", ["CartPole-v1", "Unresumable"])
async def test_last_says_what_has_ended_an_episode(server: EmbeddedServer, workers: Workers, name: str) -> None:
    on_loss: Any = "truncate" if name == "CartPole-v1" else "resume"
    async with Mesh(server.url) as m, await m.env(name, on_loss=on_loss) as env:
        await env.reset(seed=1)
        obs, *_ = await env.step(1)
        await workers.kill(env.worker)
        told = await env.step(1)
        assert "session_lost" in told[4]
        assert told[3]
        for _ in range(2):
            same(env.last(), told)
        assert not different(env.last()[0], obs)
        obs, info = await env.reset(seed=1)
        same(env.last(), (obs, 0.0, False, False, info))


async def test_forks_of_an_env_with_attributes_have_them(server: EmbeddedServer, workers: Workers) -> None:
    assert workers
    async with Mesh(server.url) as m, await m.env("Tuned") as env:
        await env.set_attr("gain", 3)
        await env.reset(seed=1)
        await env.step(1)
        await env.call("double")
        (fork,) = await env.fork()
        assert (await fork.step(1))[0] == (await env.step(1))[0] == 9


async def test_forks_outlive_their_workers(server: EmbeddedServer, workers: Workers) -> None:
    async with Mesh(server.url) as m, await m.env("Tuned") as env:
        await env.reset(seed=1)
        await env.step(5)
        forks = await env.fork(2)
        await asyncio.to_thread(workers.start)
        await workers.kill(forks[0].worker)
        assert [(await one.step(2))[0] for one in (*forks, env)] == [7, 7, 7]


async def test_an_env_that_was_not_asked_anything_is_forked_as_it_is(server: EmbeddedServer, workers: Workers) -> None:
    assert workers
    async with Mesh(server.url) as m, await m.env("Tuned") as env:
        (fork,) = await env.fork()
        assert (await fork.reset(seed=1))[0] == 0


async def test_what_cannot_be_forked_is_refused_with_the_reason(server: EmbeddedServer, workers: Workers) -> None:
    assert workers
    async with Mesh(server.url) as m:
        async with await m.env("Tuned", on_loss="raise") as env:
            with pytest.raises(UsageError, match="on_loss='resume'"):
                await env.fork()
        async with await m.env("Unresumable") as env:
            await env.reset(seed=1)
            with pytest.raises(UsageError) as told:
                await env.fork()
            assert told.value.details["lacking"] == "not_resumable"
            with pytest.raises(UsageError, match="one env or more"):
                await env.fork(0)
        async with await m.env("Slow") as env:
            await env.reset(seed=1)
            stepping = asyncio.ensure_future(env.step(1))
            await asyncio.sleep(0)
            with pytest.raises(ConcurrentStep):
                await env.fork()
            await stepping


async def test_a_fork_that_comes_to_another_state_is_none_and_no_slot_is_lost(
    server: EmbeddedServer, workers: Workers
) -> None:
    assert workers
    async with Mesh(server.url) as m, await m.env("Random") as env:
        await env.reset(seed=1)
        await env.step(0)
        with pytest.raises(ReplayDiverged):
            await env.fork(3)

        async def given_back() -> bool:
            taken = [entry.slots - entry.free for entry in await m.envs() if entry.name == "Random"]
            return sum(taken) == 1

        await until(given_back, "the slots of the forks are free")


async def test_all_forks_or_none(server: EmbeddedServer) -> None:
    with ExitStack() as stack:
        Workers(server.url, stack, slots=3).start(1)
        async with Mesh(server.url) as m, await m.env("Tuned", wait=0.5) as env:
            await env.reset(seed=1)
            with pytest.raises(MeshFull):
                await env.fork(3)
            forks = await env.fork(2)
            assert len(forks) == 2
            for fork in forks:
                await fork.close()
