"""One lane over a real server: order, cancellation, settling (R1, R2)."""

from __future__ import annotations

import asyncio
import random

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import (
    ConcurrentStep,
    InvalidAction,
    MeshUnreachable,
    NotAllowed,
    NothingUnsettled,
    ResetNeeded,
    SessionClosed,
    StepUnsettled,
    UsageError,
)
from tests.mesh.envs import Coroutine, Counter


async def test_of_two_coroutines_that_step_one_env_one_steps_and_the_other_gets_concurrent_step(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        env = await m.env("counter", {"slow_s": 0.01})
        await env.reset(seed=0)
        for round_ in range(20):
            results = await asyncio.gather(env.step(1), env.step(2), return_exceptions=True)
            stepped = [r for r in results if isinstance(r, tuple)]
            refused = [r for r in results if isinstance(r, ConcurrentStep)]
            assert len(stepped) == len(refused) == 1
            obs, reward, *_ = stepped[0]
            assert obs == round_ + 1
            assert reward == results.index(stepped[0]) + 1.0, "the reply belongs to the one who stepped"
        assert (await env.state()).steps == 20


@pytest.mark.parametrize("slow_s", [0.0, 0.002], ids=["inline", "slow"])
async def test_cancelling_at_any_await_neither_loses_nor_repeats_a_step(url: str, slow_s: float) -> None:
    chance = random.Random(7)
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        env = await m.env("counter", {"slow_s": slow_s})
        await env.reset(seed=0)
        cancelled = 0
        for expected in range(1, 301):
            task = asyncio.create_task(env.step(expected))
            for _ in range(chance.randrange(0, 6)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                await asyncio.sleep(0.0015)
            if task.cancel():
                try:
                    obs, reward, *_ = await task
                except asyncio.CancelledError:
                    cancelled += 1
                    try:
                        obs, reward, *_ = await env.settle()
                    except NothingUnsettled:  # it was cancelled before it began
                        obs, reward, *_ = await env.step(expected)
            else:
                obs, reward, *_ = await task
            assert (obs, reward) == (expected, float(expected))
        assert cancelled > 50
        assert (await env.state()).total_steps == 300


async def test_after_a_cancelled_step_the_next_is_refused_until_it_is_settled(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        env = await m.env("counter", {"slow_s": 0.2})
        await env.reset(seed=0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(env.step(5), 0.05)
        with pytest.raises(StepUnsettled, match="settle"):
            await env.step(6)
        with pytest.raises(StepUnsettled):
            await env.state()
        assert (await env.settle())[:2] == (1, 5.0)
        assert (await env.step(7))[:2] == (2, 7.0)
        with pytest.raises(NothingUnsettled):
            await env.settle()


async def test_settle_can_be_cancelled_and_called_again(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        env = await m.env("counter", {"slow_s": 0.3})
        await env.reset(seed=0)
        for call in (env.step(5), env.settle(), env.settle()):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(call, 0.03)
        assert (await env.settle())[:2] == (1, 5.0)


async def test_reset_settles_a_cancelled_step_and_drops_its_result(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        env = await m.env("counter", {"slow_s": 0.1})
        await env.reset(seed=0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(env.step(5), 0.02)
        obs, _ = await env.reset()
        assert obs == 0
        assert (await env.step(1))[0] == 1
        assert (await env.state()).episode == 2


async def test_a_cancelled_reading_call_leaves_nothing_to_settle(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url), Mesh(url) as m:
        env = await m.env("counter", render_mode="ansi")
        await env.reset(seed=0)
        task = asyncio.create_task(env.render())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await env.step(1))[0] == 1
        assert await env.render() == "count 1"


async def test_an_action_that_does_not_fit_is_refused_and_takes_no_sequence_number(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url), Mesh(url) as m:
        env = await m.env("cartpole")
        await env.reset(seed=0)
        for action in (2, -1, "0", 0.0, [0], None):
            with pytest.raises(InvalidAction, match="cartpole"):
                await env.step(action)
        await env.step(1)
        assert (await env.state()).steps == 1


async def test_step_and_render_before_reset_say_so_and_the_session_goes_on(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url), Mesh(url) as m:
        env = await m.env("counter", render_mode="ansi")
        with pytest.raises(ResetNeeded, match="reset"):
            await env.step(1)
        with pytest.raises(ResetNeeded):
            await env.render()
        assert (await env.reset())[0] == 0
        assert (await env.step(1))[0] == 1


async def test_a_first_reset_without_a_seed_gets_one_drawn_and_kept(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url), Mesh(url) as m:
        one, two = await m.env("cartpole"), await m.env("cartpole")
        first, _ = await one.reset()
        seed = (await one.state()).seed
        assert seed is not None
        again, _ = await two.reset(seed=seed)
        assert first.tolist() == again.tolist()
        assert ((await one.reset())[0] == (await two.reset())[0]).all(), "unseeded resets go on with the generator"


async def test_public_attributes_are_read_and_only_allowed_names_are_called_and_set(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow=("add",)), Mesh(url) as m:
        env = await m.env("counter")
        await env.reset(seed=0)
        assert await env.get_attr("label") == "counter"
        assert await env.call("add", 2, b=3) == 5
        with pytest.raises(NotAllowed, match="allow"):
            await env.set_attr("label", "mine")
        for call in (env.call("close"), env.get_attr("_np_random"), env.get_attr("nothing"), env.call("__class__")):
            with pytest.raises(NotAllowed):
                await call
        assert (await env.step(1))[0] == 1
    async with EnvWorker({"counter": Counter}, url, allow=("*",)), Mesh(url) as m:
        env = await m.env("counter")
        await env.set_attr("label", "mine")
        assert await env.get_attr("label") == "mine"


async def test_a_coroutine_env_steps_many_sessions_at_once(url: str) -> None:
    Coroutine.barrier = None
    async with EnvWorker({"chat": Coroutine}, url, allow_kwargs=("parties",)), Mesh(url) as m:
        envs = [await m.env("chat", {"parties": 8}) for _ in range(8)]
        await asyncio.gather(*(env.reset() for env in envs))
        await asyncio.gather(*(env.step("meet") for env in envs))  # one after another would never end
        obs, reward, terminated, truncated, info = await envs[0].step("bye")
        assert (obs, reward, terminated, truncated, info) == ("BYE", 1.0, True, False, {"turns": 2})


async def test_a_closed_env_and_a_closed_mesh_say_so(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url):
        m = Mesh(url)
        with pytest.raises(UsageError, match="async with"):
            await m.env("counter")
        async with m:
            env = await m.env("counter")
            other = await m.env("counter")
            await env.close()
            await env.close()
            with pytest.raises(SessionClosed):
                await env.reset()
        with pytest.raises(SessionClosed):
            await other.reset()
        with pytest.raises(SessionClosed):
            await m.env("counter")


async def test_a_step_in_human_mode_that_is_cancelled_while_its_frame_is_fetched_is_settled_too(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pytest.importorskip("pygame")
    async with EnvWorker({"cartpole": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("cartpole", render_mode="human") as env, await m.env("cartpole") as other:
            await env.reset(seed=1)
            await other.reset(seed=1)
            cancelled = 0
            for number in range(16):
                task = asyncio.create_task(env.step(number % 2))
                await asyncio.sleep(0.0005 * number)  # cut off in the step, in its frame, or not at all
                if task.cancel():
                    cancelled += 1
                    await asyncio.wait({task})
                    try:
                        result = await env.settle() if task.cancelled() else task.result()
                    except NothingUnsettled:  # cut off while it dropped the last frame: it had not begun
                        result = await env.step(number % 2)
                else:
                    result = await task
                expected = await other.step(number % 2)
                assert result[0].tolist() == expected[0].tolist()
            assert cancelled > 0


async def test_a_step_that_outlasts_the_disconnection_bound_is_settled_when_the_server_is_back(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.protocol.doubt.DISCONNECTED_S", 0.5)
    async with EnvWorker({"counter": Counter}, server.url), Mesh(server.url, timeout=1.0) as m:
        env = await m.env("counter")
        await env.reset(seed=0)
        await env.step(1)
        await asyncio.to_thread(server.kill)
        with pytest.raises(MeshUnreachable):
            await env.step(2)
        with pytest.raises(StepUnsettled):
            await env.step(3)
        await asyncio.to_thread(server.restart)
        while True:
            try:
                obs, reward, *_ = await env.settle()
                break
            except MeshUnreachable:
                continue
        assert (obs, reward) == (2, 2.0)
        assert (await env.step(3))[:2] == (3, 3.0)
