"""Sessions that outlive their workers: killed, frozen, expired, in the middle of a step or of a replay (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl import Mesh, RemoteEnv
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import EnvError, ResetNeeded, SessionClosed, SessionLost, UsageError
from tests.mesh.conftest import until
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.losing import ENVS, Workers, same
from tests.mesh.resumed_envs import Pictures
from tests.mesh.worker_process import WorkerProcess


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack)


@asynccontextmanager
async def leased(url: str, name: str, **kwargs: Any) -> AsyncIterator[RemoteEnv]:
    async with Mesh(url) as m, await m.env(name, on_loss=kwargs.pop("on_loss", "resume"), **kwargs) as env:
        yield env


@contextmanager
def not_resumed(step: Any, why: str, obs: Any) -> Iterator[dict[str, Any]]:
    """A step that ended its episode because of a loss."""
    observation, reward, terminated, truncated, info = step
    assert (reward, terminated, truncated) == (0.0, False, True)
    same([observation], [obs])
    assert info["session_lost"]["not_resumed"] == why
    yield info["session_lost"]


# --------------------------------------------------------------------------- the same transitions


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "Pendulum-v1", "Blackjack-v1", TAXI])
async def test_workers_that_are_killed_again_and_again_cost_no_transition(
    server: EmbeddedServer, workers: Workers, name: str
) -> None:
    local = gymnasium.make(name)
    local.action_space.seed(5)
    workers.start(2)
    async with leased(server.url, name) as env:
        same(await env.reset(seed=5), local.reset(seed=5))
        for n in range(300):
            action = local.action_space.sample()
            stepping = asyncio.ensure_future(env.step(action))
            if n % 60 == 30:  # with the step on its way there, or under way, or on its way back
                await asyncio.sleep(0.0005 * (n // 60))
                await workers.kill(env.worker)
                await asyncio.to_thread(workers.start)
            same(await stepping, theirs := local.step(action))
            if theirs[2] or theirs[3]:
                same(await env.reset(), local.reset())  # goes on with the generator
    local.close()


async def test_what_its_worker_counts_is_proved_as_what_its_client_counts(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    local = Pictures()
    async with leased(server.url, "Pictures") as env:
        same(await env.reset(seed=5), local.reset(seed=5))
        for n in range(40):
            if n % 10 == 5:
                await workers.kill(env.worker)
                await asyncio.to_thread(workers.start)
            same(await env.step(1), theirs := local.step(1))
            if theirs[2]:
                same(await env.reset(), local.reset())


async def test_answers_that_were_counted_as_others_came_are_proved(
    server: EmbeddedServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.protocol.journal.UNCOUNTED_BYTES", 200)
    workers.start(2)
    local = gymnasium.make("Pendulum-v1")
    async with leased(server.url, "Pendulum-v1") as env:
        same(await env.reset(seed=5), local.reset(seed=5))
        for n in range(120):
            if n % 50 == 30:
                await workers.kill(env.worker)
                await asyncio.to_thread(workers.start)
            action = np.array([n % 3 - 1.0], np.float32)
            same(await env.step(action), local.step(action))


async def test_a_first_reset_without_a_seed_is_done_again_with_the_seed_that_was_drawn(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with leased(server.url, "CartPole-v1") as env:
        obs, _ = await env.reset()
        local = gymnasium.make("CartPole-v1")
        seed = (await env.state()).seed
        same([obs], [local.reset(seed=seed)[0]])
        await workers.kill(env.worker)
        same(await env.step(1), local.step(1))
        assert (await env.state()).seed == seed


async def test_what_was_set_and_called_is_done_again(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with leased(server.url, "Tuned") as env:
        await env.set_attr("gain", 3)
        await env.reset(seed=1)
        assert (await env.step(1))[0] == 3
        await env.reset(seed=2)
        await env.call("double")
        assert (await env.step(1))[0] == 6
        await env.reset(seed=3)
        await workers.kill(env.worker)
        assert (await env.step(1))[0] == 6
        assert await env.get_attr("gain") == 6


async def test_coroutine_envs_are_resumed(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with leased(server.url, "Awaited") as env:
        await env.reset(seed=1)
        assert (await env.step(2))[0] == 2
        await workers.kill(env.worker)
        assert (await env.step(2))[0] == 4


async def test_a_session_that_expired_is_resumed_where_it_was(server: EmbeddedServer, workers: Workers) -> None:
    (only,) = workers.start(1, lease_s=0.5)
    async with leased(server.url, "Tuned") as env:
        await env.reset(seed=1)
        await env.step(1)
        env._session._context._leases.release(env.worker, env.session_id)  # nobody renews it any more
        epoch = env._session.grant.epoch

        async def expired() -> bool:
            await asyncio.sleep(0.3)
            return True

        await until(expired, "the lease is over")
        await asyncio.sleep(0.5)
        assert (await env.step(1))[0] == 2
        assert env.worker == only.id
        assert env._session.grant.epoch == epoch + 1


async def test_a_frozen_worker_is_left_and_what_it_says_when_it_wakes_is_not_heard(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url, timeout=3.0) as m, await m.env("CartPole-v1", on_loss="resume") as env:
        local = gymnasium.make("CartPole-v1")
        same(await env.reset(seed=3), local.reset(seed=3))
        frozen = workers.running[env.worker]
        frozen.freeze()
        same(await env.step(0), local.step(0))
        assert env.worker != frozen.id
        frozen.thaw()
        for n in range(50):
            same(await env.step(n % 2), theirs := local.step(n % 2))
            if theirs[2]:
                break


# --------------------------------------------------------------------------- killed meanwhile


async def test_a_worker_that_is_killed_during_the_replay_is_replaced_as_well(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with leased(server.url, "Slow") as env:
        await env.reset(seed=1)
        for n in range(1, 31):
            assert (await env.step(1))[0] == n
        first = env.worker
        await workers.kill(first)
        stepping = asyncio.ensure_future(env.step(1))
        await until(lambda: env.worker != first, "it is opened elsewhere")
        second = env.worker
        await workers.kill(second)
        await asyncio.to_thread(workers.start)
        assert (await stepping)[0] == 31
        assert env.worker not in (first, second)


async def test_a_step_that_is_cancelled_while_its_session_is_resumed_can_be_settled(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with leased(server.url, "Slow") as env:
        await env.reset(seed=1)
        for _ in range(20):
            await env.step(1)
        first = env.worker
        await workers.kill(first)
        stepping = asyncio.ensure_future(env.step(1))
        await until(lambda: env.worker != first, "it is being brought to where it was")
        stepping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stepping
        assert env.unsettled == "step"
        assert (await env.settle())[0] == 21
        assert (await env.step(1))[0] == 22
        assert env.worker != first


async def test_one_that_is_closed_while_it_is_resumed_frees_its_slot(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m:
        env = await m.env("Slow", on_loss="resume")
        await env.reset(seed=1)
        for _ in range(20):
            await env.step(1)
        first = env.worker
        await workers.kill(first)
        stepping = asyncio.ensure_future(env.step(1))
        await until(lambda: env.worker != first, "it is opened elsewhere")
        await env.close()
        with pytest.raises(SessionClosed):
            await stepping

        async def free() -> bool:
            slow = [entry for entry in await m.envs() if entry.name == "Slow" and entry.worker != first]
            return bool(slow) and all(entry.free == entry.slots for entry in slow)

        await until(free, "its slot is free")


# --------------------------------------------------------------------------- not resumed, and never silently


async def test_an_env_that_does_not_do_the_same_again_is_truncated(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with leased(server.url, "Random") as env:
        await env.reset(seed=1)
        obs = (await env.step(0))[0]
        await workers.kill(env.worker)
        with not_resumed(await env.step(0), "replay_diverged", obs) as facts:
            assert facts["reason"] == "worker_lost"
        with pytest.raises(ResetNeeded, match="cut short"):
            await env.step(0)
        _, info = await env.reset(seed=2)
        assert "session_lost" not in info
        await env.step(0)


async def test_where_nobody_can_take_it_the_episode_is_truncated_and_the_next_waits_for_somebody(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(1)
    async with leased(server.url, "Tuned", wait=1.0) as env:
        await env.reset(seed=1)
        obs = (await env.step(1))[0]
        await workers.kill(env.worker)
        with not_resumed(await env.step(1), "no_worker", obs) as facts:
            assert "worker" in facts["message"]
        await asyncio.to_thread(workers.start)
        assert (await env.reset(seed=1))[0] == 0
        assert (await env.step(1))[0] == 1


async def test_an_env_of_another_fingerprint_does_not_take_it(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(1)
    other = WorkerProcess(server.url, {"Tuned": f"{ENVS}:TunedOtherwise"})
    with other:
        async with Mesh(server.url) as m:
            both = [await m.env("Tuned", on_loss="resume", wait=1.0) for _ in range(2)]  # one at each
            (env,) = [one for one in both if one.worker != other.id]
            await env.reset(seed=1)
            obs = (await env.step(1))[0]
            await workers.kill(env.worker)
            with not_resumed(await env.step(1), "no_worker", obs):
                pass
            assert (await env.reset(seed=1))[0] == 0, "of the same spaces, it may take the next episode"
            assert env.worker == other.id
            await env.close()


async def test_truncate_brings_nothing_back_and_goes_on_elsewhere(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with leased(server.url, "Tuned", on_loss="truncate") as env:
        await env.reset(seed=1)
        obs = (await env.step(1))[0]
        first = env.worker
        await workers.kill(first)
        with not_resumed(await env.step(1), "not_asked_for", obs) as facts:
            assert facts["worker"] == first
        assert (await env.reset(seed=1))[0] == 0
        assert env.worker != first
        await asyncio.to_thread(workers.start)
        await workers.kill(env.worker)
        obs, info = await env.reset()
        assert (obs, info["session_lost"]["not_resumed"]) == (0, "not_asked_for")


async def test_raise_raises(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with leased(server.url, "Tuned", on_loss="raise") as env:
        await env.reset(seed=1)
        await workers.kill(env.worker)
        for _ in range(2):
            with pytest.raises(SessionLost):
                await env.step(1)
        with pytest.raises(SessionLost):
            await env.reset(seed=1)


async def test_what_the_env_itself_raised_is_not_done_again(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(1)
    async with leased(server.url, "Breaks") as env:
        await env.reset(seed=1)
        with pytest.raises(EnvError, match="broken"):
            await env.step(1)
        for _ in range(2):
            with pytest.raises(SessionLost, match="raised"):
                await env.step(1)


async def test_calls_whose_session_cannot_be_resumed_say_so_and_the_step_after_ends_the_episode(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with leased(server.url, "Random") as env:
        await env.reset(seed=1)
        obs = (await env.step(0))[0]
        await workers.kill(env.worker)
        with pytest.raises(SessionLost, match="not resumed"):
            await env.get_attr("label")
        with not_resumed(await env.step(0), "replay_diverged", obs):
            pass


async def test_on_loss_is_one_of_three(server: EmbeddedServer) -> None:
    async with Mesh(server.url) as m:
        with pytest.raises(UsageError, match="raise, truncate, resume"):
            await m.env("CartPole-v1", on_loss="hope")  # type: ignore[arg-type]
