"""What a remote vector does beyond what a local one can: refusing, cancelling, crashing, spreading (R2, R6, R10)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.vector import RemoteVectorEnv
from meshrl.errors import (
    ConcurrentStep,
    EnvError,
    InvalidAction,
    InvalidName,
    InvalidSeed,
    MalformedMessage,
    MeshUnreachable,
    NotAllowed,
    NothingUnsettled,
    ResetNeeded,
    SessionClosed,
    SessionLost,
    StepUnsettled,
    UnencodableValue,
    UnsupportedSpace,
    UsageError,
)
from meshrl.protocol.session import State
from meshrl.worker.constructing import WIDTH
from meshrl.worker.factories import Factory
from tests.mesh.conftest import until
from tests.mesh.envs import Coroutine, Hooked, Waits
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.test_vector_parity import different
from tests.mesh.worker_process import WorkerProcess

N = 6
SHARDS = pytest.mark.parametrize("shards", [1, 3], ids="{}_shards".format)


@contextlib.asynccontextmanager
async def serving(url: str, *factories: Any, **kwargs: Any) -> AsyncIterator[tuple[Mesh, list[EnvWorker]]]:
    """A client, and a worker for each factory, which all serve theirs as ``env``."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(EnvWorker({"env": make}, url, **kwargs)) for make in factories]
        yield await stack.enter_async_context(Mesh(url)), workers


def sent(workers: Sequence[EnvWorker]) -> list[int]:
    """The number of requests that each session has had."""
    return [session.lane.seq for worker in workers for session in worker.table if session.lane is not None]


class Gate:
    """Where envs wait in a step of the action ``WAIT``."""

    WAIT = 99

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, where: str, action: int) -> None:
        if where == "step" and action == self.WAIT:
            self.reached.set()
            assert self.open.wait(60.0)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


@contextlib.asynccontextmanager
async def gated(url: str, gate: Gate) -> AsyncIterator[tuple[RemoteVectorEnv, Mesh]]:
    """A vector of three shards, begun."""
    async with serving(url, *[lambda: Hooked(gate)] * 3, allow=("*",)) as (m, _):
        envs = await m.vector("env", N, shards=3)
        await envs.reset()
        yield envs, m


def waiting_at(shard: int) -> list[int]:
    return [Gate.WAIT if i // 2 == shard else i for i in range(N)]


async def one_waits(m: Mesh, gate: Gate) -> None:
    await until(gate.reached.is_set, "one shard is at the gate")
    await until(lambda: len(context_of(m).flights) == 1, "the others' answers are here")


async def cut_off(envs: RemoteVectorEnv, m: Mesh, gate: Gate, actions: Any) -> None:
    """Cancel a step when all shards but the one at the gate have answered it."""
    stepping = asyncio.create_task(envs.step(actions))
    await one_waits(m, gate)
    stepping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stepping


# ---------------------------------------------------------------- refused before anything is sent


@SHARDS
async def test_one_bad_action_is_refused_by_its_index_and_nothing_is_sent(url: str, shards: int) -> None:
    async with serving(url, *["CartPole-v1"] * 3) as (m, workers):
        envs = await m.vector("env", N, shards=shards)
        await envs.reset(seed=1)
        before = sent(workers)
        for bad in ([0, 1, 0, 1, 2, 0], np.array([0, 1, 0, 1, -1, 0]), [0, 1, 0, 1, "0", 0], [0, 1, 0, 1, None, 7]):
            with pytest.raises(InvalidAction, match="sub-environment 4") as refused:
                await envs.step(bad)
            assert refused.value.details["env_id"] == 4
        for batch in ([0] * 5, np.zeros((N, 1), int), 0, np.zeros(N)):
            with pytest.raises(InvalidAction):
                await envs.step(batch)
        assert sent(workers) == before == [1] * shards
        await envs.step([0] * N)


async def test_a_mask_of_another_kind_is_refused_with_gymnasiums_error_and_nothing_is_sent(url: str) -> None:
    async with serving(url, *["CartPole-v1"] * 3) as (m, workers):
        envs = await m.vector("env", 3, shards=3)
        await envs.reset(seed=1)
        wrong: list[tuple[Any, type[Exception]]] = [
            ([True, False, True], TypeError),
            (np.array([1, 0, 1]), TypeError),
            (np.array([True, False]), ValueError),
            (np.zeros(3, np.bool_), ValueError),
        ]
        for mask, error in wrong:
            with pytest.raises(error, match="reset_mask"):
                await envs.reset(options={"reset_mask": mask})
        for seed in (-1, 1.5, [1, 2], [1, 2, "3"]):
            with pytest.raises(InvalidSeed):
                await envs.reset(seed=seed)  # type: ignore[arg-type]
        assert sent(workers) == [1, 1, 1]


async def test_the_callers_options_are_left_as_they_are(url: str) -> None:
    async with serving(url, "CartPole-v1") as (m, _):
        envs = await m.vector("env", 2)
        await envs.reset(seed=1)
        mask = np.array([True, False])
        options = {"reset_mask": mask, "low": -0.1, "high": 0.1}
        await envs.reset(options=options)
        assert list(options) == ["reset_mask", "low", "high"]
        assert options["reset_mask"] is mask
        assert mask.tolist() == [True, False]


async def test_a_first_reset_that_leaves_some_out_is_refused_and_none_is_reset(url: str) -> None:
    async with serving(url, *["CartPole-v1"] * 3) as (m, workers):
        envs = await m.vector("env", N, shards=3)
        with pytest.raises(ResetNeeded) as refused:
            await envs.reset(seed=1, options={"reset_mask": np.array([True] * 3 + [False] * 3)})
        assert refused.value.details["env_ids"] == [3, 4, 5]
        assert sent(workers) == [0, 0, 0]
        with pytest.raises(ResetNeeded):
            await envs.step([0] * N)
        local = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * N)
        assert not different(
            await envs.reset(seed=1, options={"reset_mask": np.ones(N, np.bool_)}), local.reset(seed=1)
        )


async def test_without_autoreset_an_ended_one_is_not_stepped_and_nor_is_any_other(url: str) -> None:
    async with serving(url, *["CartPole-v1"] * 3) as (m, workers):
        envs = await m.vector("env", N, shards=3, autoreset_mode="Disabled")
        await envs.reset(seed=1)
        ended = np.zeros(N, np.bool_)
        while not ended.any():
            _, _, terminations, truncations, _ = await envs.step([1, 0, 1, 0, 1, 0])
            ended = terminations | truncations
        before, states = sent(workers), await envs.get_attr("state")
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0] * N)
        assert refused.value.details["env_ids"] == np.flatnonzero(ended).tolist()
        assert sent(workers) == [seq + 1 for seq in before], "get_attr alone"
        assert not different(await envs.get_attr("state"), states)
        await envs.reset(options={"reset_mask": ended})
        await envs.step([0] * N)


async def test_a_value_that_cannot_travel_is_set_on_none(url: str) -> None:
    async with serving(url, Hooked, Hooked, Hooked, allow=("tag",)) as (m, workers):
        envs = await m.vector("env", 3, shards=3)
        await envs.reset()
        with pytest.raises(UnencodableValue):
            await envs.set_attr("tag", [1, 2, object()])
        assert sent(workers) == [1, 1, 1]
        assert await envs.get_attr("tag") == (0, 0, 0)


# ---------------------------------------------------------------- cancelled, concurrent


GATED = pytest.mark.parametrize("shard", [0, 1, 2], ids="shard_{}_waits".format)


@GATED
async def test_a_cancelled_step_is_settled_whatever_shards_had_answered(url: str, gate: Gate, shard: int) -> None:
    async with gated(url, gate) as (envs, m):
        actions = waiting_at(shard)
        await cut_off(envs, m, gate, actions)
        for call in (envs.step([0] * N), envs.get_attr("count"), envs.set_attr("tag", 1), envs.call("add", 1)):
            with pytest.raises(StepUnsettled, match="settle"):
                await call
        settling = asyncio.create_task(envs.settle())
        await asyncio.sleep(0)
        settling.cancel()
        await asyncio.wait({settling})
        gate.open.set()
        obs, rewards, terminations, truncations, infos = await envs.settle()
        assert [obs.tolist(), rewards.tolist(), infos] == [[1] * N, actions, {}]
        assert not (terminations | truncations).any()
        with pytest.raises(NothingUnsettled):
            await envs.settle()
        assert (await envs.step([0] * N))[0].tolist() == [2] * N, "it was stepped once"


@GATED
async def test_reset_drops_a_cancelled_step(url: str, gate: Gate, shard: int) -> None:
    async with gated(url, gate) as (envs, m):
        await cut_off(envs, m, gate, waiting_at(shard))
        gate.open.set()
        assert (await envs.reset())[0].tolist() == [0] * N
        assert (await envs.step([0] * N))[0].tolist() == [1] * N
        with pytest.raises(NothingUnsettled):
            await envs.settle()


@GATED
async def test_a_reset_cancelled_before_it_left_leaves_the_step_to_be_settled(url: str, gate: Gate, shard: int) -> None:
    async with gated(url, gate) as (envs, m):
        stepping = asyncio.create_task(envs.step(waiting_at(shard)))
        await asyncio.sleep(0)  # it has left, and nothing was answered
        stepping.cancel()
        await asyncio.wait({stepping})
        resetting = asyncio.create_task(envs.reset())
        await one_waits(m, gate)
        resetting.cancel()
        await asyncio.wait({resetting})
        gate.open.set()
        assert (await envs.settle())[0].tolist() == [1] * N
        assert (await envs.step([0] * N))[0].tolist() == [2] * N


async def test_cancelling_at_any_await_neither_loses_nor_repeats_a_step(url: str) -> None:
    chance = np.random.default_rng(5)
    async with serving(url, *[Hooked] * 3) as (m, _):
        envs = await m.vector("env", N, shards=3)
        await envs.reset()
        cancelled = 0
        for expected in range(1, 301):
            task = asyncio.create_task(envs.step([expected] * N))
            for _ in range(int(chance.integers(25))):
                await asyncio.sleep(0)
            if task.cancel():
                try:
                    obs, rewards, *_ = await task
                except asyncio.CancelledError:
                    try:
                        obs, rewards, *_ = await envs.settle()
                        cancelled += 1
                    except NothingUnsettled:  # it was cancelled before it began
                        obs, rewards, *_ = await envs.step([expected] * N)
            else:
                obs, rewards, *_ = await task
            assert obs.tolist() == rewards.tolist() == [expected] * N
        assert cancelled > 50


async def test_a_cancelled_reset_is_settled_too(url: str) -> None:
    held = threading.Event()

    def hook(where: str, _: int) -> None:
        if where == "reset":
            assert held.wait(60.0)

    async with serving(url, Hooked, lambda: Hooked(hook)) as (m, workers):
        envs = await m.vector("env", 4, shards=2)
        resetting = asyncio.create_task(envs.reset(seed=3))
        await until(lambda: sent(workers) == [1, 1], "both were asked")
        resetting.cancel()
        await asyncio.wait({resetting})
        held.set()
        obs, infos = await envs.settle()
        assert (obs.tolist(), list(infos)) == ([0] * 4, ["pid", "_pid"])
        await envs.step([0] * 4)


async def test_a_second_call_gets_concurrent_step_and_the_first_goes_on_undisturbed(url: str, gate: Gate) -> None:
    async with gated(url, gate) as (envs, _):
        stepping = asyncio.create_task(envs.step([Gate.WAIT] * N))
        await until(gate.reached.is_set, "it is under way")
        for call in (envs.step([1] * N), envs.reset(), envs.get_attr("count"), envs.settle(), envs.set_attr("tag", 1)):
            with pytest.raises(ConcurrentStep):
                await call
        gate.open.set()
        obs, rewards, *_ = await stepping
        assert (obs.tolist(), rewards.tolist()) == ([1] * N, [99.0] * N)
        assert (await envs.step([0] * N))[0].tolist() == [2] * N


async def test_a_step_that_outlasts_the_servers_absence_is_settled_when_it_is_back(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.protocol.doubt.DISCONNECTED_S", 0.5)
    async with (
        EnvWorker({"env": Hooked}, server.url),
        EnvWorker({"env": Hooked}, server.url),
        Mesh(server.url, timeout=1.0) as m,
    ):
        envs = await m.vector("env", 4, shards=2)
        await envs.reset()
        await envs.step([1] * 4)
        await asyncio.to_thread(server.kill)
        with pytest.raises(MeshUnreachable):
            await envs.step([2] * 4)
        with pytest.raises(StepUnsettled):
            await envs.step([3] * 4)
        await asyncio.to_thread(server.restart)
        while True:
            try:
                obs, rewards, *_ = await envs.settle()
                break
            except MeshUnreachable:
                continue
        assert (obs.tolist(), rewards.tolist()) == ([2] * 4, [2.0] * 4)
        assert (await envs.step([3] * 4))[0].tolist() == [3] * 4


# ---------------------------------------------------------------- crashes, ends


def _breaks(_: str, action: int) -> None:
    if action == 13:
        raise RuntimeError("the simulator diverged")


@SHARDS
async def test_a_crash_names_its_sub_environment_and_ends_no_other_session(url: str, shards: int) -> None:
    async with serving(url, *[lambda: Hooked(_breaks)] * 3) as (m, workers):
        envs, other = await m.vector("env", N, shards=shards), await m.vector("env", 3, shards=3)
        await envs.reset()
        await other.reset()
        with pytest.raises(EnvError, match="the simulator diverged") as crash:
            await envs.step([1, 1, 1, 13, 1, 1])
        assert crash.value.details["env_id"] == 3
        assert "in _breaks" in (crash.value.remote_traceback or "")
        with pytest.raises(SessionLost):
            await envs.step([1] * N)
        assert (await other.step([1] * 3))[0].tolist() == [1] * 3
        await envs.close()
        await until(lambda: sum(w.table.slots - w.table.free for w in workers) == 3, "its slots are free")


async def test_close_frees_the_slots_and_the_closed_vector_says_so(url: str) -> None:
    async with serving(url, *["CartPole-v1"] * 3, slots=4) as (m, workers):
        async with await m.vector("env", 12) as envs:
            assert [worker.table.free for worker in workers] == [0, 0, 0]
            await envs.reset()
        await until(lambda: [worker.table.free for worker in workers] == [4, 4, 4], "all are free")
        await envs.close()
        for call in (envs.reset(), envs.step([0] * 12), envs.get_attr("state")):
            with pytest.raises(SessionClosed):
                await call


async def test_a_vector_that_nobody_closed_warns_and_frees_its_slots(url: str) -> None:
    async with serving(url, "CartPole-v1", "CartPole-v1") as (m, workers):
        envs: RemoteVectorEnv | None = await m.vector("env", 4, shards=2)
        assert envs is not None
        with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031  # one statement cannot drop and collect
            envs = None
            gc.collect()
        await until(lambda: all(w.table.free == w.table.slots for w in workers), "all are free")


@pytest.mark.parametrize("when", ["before a step", "during a step"])
async def test_a_killed_worker_under_one_shard_is_a_lost_session_within_seconds(url: str, when: str) -> None:
    with contextlib.ExitStack() as stack:
        workers = [WorkerProcess(url, {"env": "tests.mesh.envs:Counter"}, allow=["slow_s"], wait=False) for _ in "abc"]
        for worker in workers:
            stack.enter_context(worker).wait_advertised()
        async with Mesh(url) as m:
            envs = await m.vector("env", N, shards=3, on_loss="raise")
            await envs.reset()
            await envs.step([1] * N)
            victim = workers[1].id
            mine = next(i for i, (worker, _) in enumerate(envs.shards) if worker == victim)
            if when == "during a step":
                await envs.set_attr("slow_s", 60.0, [2 * mine, 2 * mine + 1])
                stepping = asyncio.create_task(envs.step([1] * N))
                await asyncio.sleep(0)
            await asyncio.to_thread(workers[1].kill)
            async with asyncio.timeout(20.0):
                with pytest.raises(SessionLost) as lost:
                    await (stepping if when == "during a step" else envs.step([1] * N))
            assert lost.value.details["worker"] == victim
            with pytest.raises(SessionLost):
                await envs.step([1] * N)
            await envs.close()


# ---------------------------------------------------------------- attributes and frames


@SHARDS
async def test_frames_come_in_the_order_of_the_sub_environments(url: str, shards: int) -> None:
    async with serving(url, Hooked, Hooked, Hooked, allow=("tag",)) as (m, _):
        envs = await m.vector("env", N, shards=shards, render_mode="rgb_array")
        await envs.reset()
        await envs.set_attr("tag", [10, 20, 30, 40, 50, 60])
        frames = await envs.render()
        assert frames is not None
        assert not different(frames, tuple(np.full((2, 4, 3), 10 * (i + 1), np.uint8) for i in range(N)))
        plain = await m.vector("env", 2)
        with pytest.raises(UsageError, match="render_mode"):
            await plain.render()
        with pytest.raises(UsageError, match="rgb_array"):
            await m.vector("env", 2, render_mode="human")


@SHARDS
async def test_attributes_and_methods_of_all_or_some_are_reached_as_far_as_the_operator_allows(
    url: str, shards: int
) -> None:
    async with serving(url, Hooked, Hooked, Hooked, allow=("add", "tag", "label")) as (m, _):
        envs = await m.vector("env", N, shards=shards)
        await envs.reset()
        await envs.set_attr("tag", list(range(N)))
        await envs.set_attr("tag", 9, env_ids=[4, np.int64(0)])
        await envs.set_attr("label", ("five", "one"), env_ids=[5, 1])
        assert await envs.get_attr("tag") == (9, 1, 2, 3, 9, 5)
        assert await envs.get_attr("label", [5, 0, 1, 5]) == ("five", "counter", "one", "five")
        assert await envs.call("add", 2, b=3) == (5,) * N
        assert await envs.call("count") == await envs.get_attr("count")  # what is no method is read, as in Gymnasium
        assert await envs.call_some([3, 3], "add", 2) == (3, 3)
        assert await envs.get_attr("tag", []) == ()
        for values in ([1, 2], tuple(range(N + 1))):
            with pytest.raises(ValueError, match="length"):
                await envs.set_attr("tag", values)
        refused = [
            envs.call("render"),
            envs.set_attr("count", 3),
            envs.get_attr("_np_random"),
            envs.get_attr("nothing"),
            envs.call("__class__"),
        ]
        for call in refused:
            with pytest.raises(NotAllowed):
                await call
        for ids in ([N], [-1]):
            with pytest.raises(UsageError, match="env_ids"):
                await envs.get_attr("tag", ids)
        assert (await envs.step([1] * N))[0].tolist() == [1] * N


class Brittle(Hooked):
    """Its methods raise where its tag is 2."""

    def render(self) -> Any:
        return self.add(0)

    def add(self, a: int, b: int = 1) -> int:
        if self.tag == 2:
            raise RuntimeError("no window here")
        return super().add(a, b)


@pytest.mark.parametrize("what", ["render", "call"])
async def test_a_crash_in_a_method_names_its_sub_environment_too(url: str, what: str) -> None:
    async with serving(url, *[Brittle] * 3, allow=("tag", "add")) as (m, _):
        envs = await m.vector("env", N, shards=3, render_mode="rgb_array")
        await envs.reset()
        await envs.set_attr("tag", [0, 0, 0, 0, 0, 2])
        with pytest.raises(EnvError, match="no window here") as crash:
            await (envs.render() if what == "render" else envs.call("add", 1))
        assert crash.value.details["env_id"] == 5


@SHARDS
async def test_which_wrappers_are_around_the_remote_envs_is_told(url: str, shards: int) -> None:
    async with serving(url, *["CartPole-v1"] * 3) as (m, _):
        envs = await m.vector("env", 3, shards=shards)
        assert await envs.is_wrapped(gymnasium.wrappers.TimeLimit) == (True,) * 3
        assert await envs.is_wrapped(gymnasium.Wrapper, [2]) == (True,)
        assert await envs.is_wrapped(gymnasium.wrappers.RecordEpisodeStatistics, [1, 0]) == (False, False)


async def test_arrays_that_were_handed_out_are_the_callers_own(url: str) -> None:
    async with serving(url, "CartPole-v1", "CartPole-v1") as (m, _):
        for shards in (1, 2):
            envs = await m.vector("env", 4, shards=shards)
            first, _ = await envs.reset(seed=1)
            kept = first.copy()
            arrays = [first, *(await envs.step([1] * 4))[:4]]
            assert all(array.flags.writeable for array in arrays)
            assert not different(first, kept)
            first[:] = 7.0
            copy = [array.copy() for array in arrays]
            await envs.step([0] * 4)
            assert not different(arrays, copy)
            await envs.close()


# ---------------------------------------------------------------- at once


@SHARDS
async def test_the_coroutine_envs_of_a_vector_step_at_once(url: str, shards: int) -> None:
    Coroutine.barrier = None
    async with serving(url, *[lambda: Coroutine(parties=N)] * 3) as (m, _):
        envs = await m.vector("env", N, shards=shards, autoreset_mode="SameStep")
        assert (await envs.reset())[0] == ("hello",) * N
        await envs.step(("meet",) * N)  # one after another would never end
        obs, rewards, terminations, _, infos = await envs.step(("bye", *["more"] * (N - 1)))
        assert obs == ("hello", *["MORE"] * (N - 1))
        assert [rewards.tolist(), terminations.tolist()] == [[1.0] * N, [True] + [False] * (N - 1)]
        assert infos["final_obs"].tolist() == ["BYE", *[None] * (N - 1)]
        assert infos["final_info"]["turns"].tolist() == [2] + [0] * (N - 1)


@pytest.mark.parametrize("how", ["exit", "cancel"])
async def test_a_coroutine_env_that_ends_itself_ends_its_own_vector_and_the_others_steps(url: str, how: str) -> None:
    async with serving(url, Waits) as (m, _):
        envs, other = await m.vector("env", 3), await m.vector("env", 2)
        Waits.closed = Waits.cancelled = 0
        await envs.reset()
        await other.reset()
        with pytest.raises(EnvError) as crash:
            await envs.step(("wait", how, "wait"))
        assert crash.value.details["env_id"] == 1
        await until(lambda: Waits.closed == 3, "they are closed")
        assert Waits.cancelled == 2, "none steps on after it was closed"
        assert (await other.step(("a", "b")))[0] == ("A", "B")


class Whispers(Coroutine):
    """Its methods are coroutine functions."""

    metadata = {"render_modes": ["ansi"]}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    async def render(self) -> str:
        return f"{len(self.said)} said"

    async def whisper(self, text: str) -> str:
        await asyncio.sleep(0)
        self.said.append(text)
        return text.lower()


async def test_coroutine_methods_of_sub_environments_are_awaited(url: str) -> None:
    async with serving(url, Whispers, allow=("whisper",)) as (m, _):
        envs = await m.vector("env", 3, render_mode="ansi")
        await envs.reset()
        assert await envs.call_some([2, 0], "whisper", "HUSH") == ("hush", "hush")
        assert await envs.render() == ("1 said", "0 said", "1 said")


@SHARDS
async def test_slow_envs_of_a_vector_reset_and_step_at_once_on_threads(url: str, shards: int) -> None:
    barrier = threading.Barrier(N)

    def meet(_: str, __: int) -> None:
        barrier.wait(60.0)  # one after another, it breaks

    async with serving(url, *[lambda: Hooked(meet)] * 3) as (m, _):
        envs = await m.vector("env", N, shards=shards)
        for _ in range(3):
            assert (await envs.reset())[0].tolist() == [0] * N
            assert (await envs.step([1] * N))[0].tolist() == [1] * N


async def test_fast_envs_of_a_vector_end_up_on_the_event_loop(url: str) -> None:
    threads = set()

    def note(where: str, _: int) -> None:
        if where == "step":
            threads.add(threading.current_thread())

    async with serving(url, lambda: Hooked(note)) as (m, _):
        envs = await m.vector("env", 4)
        await envs.reset()
        async with asyncio.timeout(60.0):
            while threads != {threading.main_thread()}:
                threads.clear()
                await envs.step([1] * 4)


# ---------------------------------------------------------------- hosted vector implementations


async def test_cartpoles_own_vector_implementation_is_the_local_one(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url, vectors="gymnasium"), Mesh(url) as m:
        envs = await m.vector("cartpole", 5, seeding="implementation")
        local = gymnasium.make_vec("CartPole-v1", 5, vectorization_mode="vector_entry_point")
        assert [envs.single_observation_space, envs.action_space] == [
            local.single_observation_space,
            local.action_space,
        ]
        local.action_space.seed(1)
        assert not different(await envs.reset(seed=3), local.reset(seed=3))
        for number in range(400):
            actions = local.action_space.sample()
            assert not different(await envs.step(actions), local.step(actions))
            if number == 200:
                assert not different(await envs.reset(), local.reset())
        local.close()


async def test_what_a_vector_implementation_cannot_do_is_refused_and_what_it_can_is_said(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url, vectors="gymnasium") as worker, Mesh(url) as m:
        vectors = (await m.describe("cartpole")).vectors
        assert vectors is not None
        assert [vectors.autoreset_modes, vectors.seedings] == [["NextStep"], ["implementation"]]
        for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
            with pytest.raises(UsageError, match="NextStep"):
                await m.vector("cartpole", 2, seeding="implementation", autoreset_mode=mode)
        for seeding in ("gymnasium", "derived"):
            with pytest.raises(UsageError, match="implementation"):
                await m.vector("cartpole", 2, seeding=seeding)
        with pytest.raises(UsageError, match="pool"):
            await m.pool("cartpole", 2)
        envs = await m.vector("cartpole", 2, seeding="implementation")
        with pytest.raises(ResetNeeded):
            await envs.step([0, 1])
        await envs.reset(seed=1)
        with pytest.raises(UsageError, match="all of its sub-environments or none"):
            await envs.reset(options={"reset_mask": np.array([True, False])})
        for call in (envs.get_attr("gravity"), envs.call("reset"), envs.set_attr("gravity", 1.0)):
            with pytest.raises(NotAllowed, match="implementation"):
                await call
        await envs.step([0, 1])
        await envs.close()
        await until(lambda: worker.table.free == worker.table.slots, "its slots are free")
        async with await m.env("cartpole") as env:  # single envs are not concerned
            await env.reset(seed=1)


@pytest.mark.parametrize(
    ("source", "vectors"),
    [(TAXI, "gymnasium"), (Hooked, "gymnasium"), ("CartPole-v1", "other")],
)
async def test_a_vector_implementation_that_there_is_not_is_an_error_at_the_start(
    url: str, source: Any, vectors: str
) -> None:
    with pytest.raises(InvalidName):
        async with EnvWorker({"env": source}, url, vectors=vectors):
            pass


@pytest.mark.parametrize("shards", [1, 2], ids="{}_shards".format)
async def test_seeds_that_a_vector_implementation_cannot_follow_are_refused_before_anything_is_sent(
    url: str, shards: int
) -> None:
    async with serving(url, *["CartPole-v1"] * 2, vectors="gymnasium") as (m, workers):
        envs = await m.vector("env", 4, seeding="implementation", shards=shards)
        first = (await envs.reset(seed=5))[0]
        assert not different((await envs.reset(seed=[5, 6, 7, 8]))[0], first), "what seed=5 means"
        # Of some of these one shard of two could follow its own, of some both.
        for seeds in ([1, 2, 3, 5], [1, 2, 9, 10], [5] * 4, [5, None, 7, 8], [None, 6, 7, 8], [None, None, 7, 8]):
            with pytest.raises(InvalidSeed, match="consecutive"):
                await envs.reset(seed=seeds)
        assert sent(workers) == [2] * shards
        await envs.reset(seed=[None] * 4)
        await envs.step([0, 1, 0, 1])


class Recorded:
    """Stands in for EnvPool, which no package index has for every Python: keeps the seeds that it is made with."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def make_gymnasium(self, source: str, *, num_envs: int, seed: int, **kwargs: Any) -> Any:
        self.seeds.append(seed)
        return gymnasium.make_vec(source, num_envs, vectorization_mode="vector_entry_point", **kwargs)


async def test_envpool_gets_drawn_seeds_and_no_list_that_it_cannot_follow(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    envpool = Recorded()
    monkeypatch.setitem(sys.modules, "envpool", envpool)
    async with EnvWorker({"cartpole": "CartPole-v1"}, url, vectors="envpool"), Mesh(url) as m:
        envpool.seeds.clear()
        for _ in range(3):
            async with await m.vector("cartpole", 2) as envs:
                await envs.reset()
        assert len(set(envpool.seeds)) == 3
        envs = await m.vector("cartpole", 3)
        envpool.seeds.clear()
        for seeds in ([3, 99, 7], [None, 5, 5], [1 << 31, (1 << 31) + 1, (1 << 31) + 2]):
            with pytest.raises(InvalidSeed):
                await envs.reset(seed=seeds)
        assert envpool.seeds == []
        await envs.reset(seed=[3, 4, 5])
        assert envpool.seeds == [3]


async def test_seeds_that_envpool_has_no_room_for_are_refused_before_anything_is_sent(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "envpool", Recorded())
    async with serving(url, *["CartPole-v1"] * 2, vectors="envpool") as (m, workers):
        envs = await m.vector("env", 4, shards=2)
        with pytest.raises(InvalidSeed, match=f"one of these is {1 << 31}"):
            await envs.reset(seed=(1 << 31) - 3)  # the first shard has room for its own
        assert sent(workers) == [0, 0]
        await envs.reset(seed=(1 << 31) - 4)


async def test_options_of_a_reset_that_envpool_would_drop_are_refused_before_anything_is_sent(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "envpool", Recorded())
    async with serving(url, *["CartPole-v1"] * 2, vectors="envpool") as (m, workers):
        vectors = (await m.describe("env")).vectors
        assert vectors is not None
        assert not vectors.options
        envs = await m.vector("env", 4, shards=2)
        with pytest.raises(UsageError, match="envpool takes no reset options, and was given 'low', 'high'"):
            await envs.reset(seed=1, options={"low": -0.1, "high": 0.1})
        assert sent(workers) == [0, 0]
        await envs.reset(seed=1, options=None)
        await envs.reset(seed=1, options={})


async def test_the_options_of_a_reset_reach_the_envs_own_vector_implementation(url: str) -> None:
    async with serving(url, "CartPole-v1", vectors="gymnasium") as (m, _):
        vectors = (await m.describe("env")).vectors
        assert vectors is not None
        assert vectors.options
        envs = await m.vector("env", 4, seeding="implementation")
        observations, _ = await envs.reset(seed=1, options={"low": 0.02, "high": 0.03})
        assert ((observations >= 0.02) & (observations <= 0.03)).all()


class Grouped(VectorEnv[Any, Any, Any]):
    """Has actions that are no array, unless it is told otherwise, and renders one array."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "tiled"], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, grouped: bool = True) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        part = spaces.Discrete(2)
        self.single_observation_space = part
        self.single_action_space = spaces.Dict(a=part) if grouped else part
        self.observation_space = batch_space(part, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(self.num_envs, np.int64), {}

    def render(self) -> Any:
        shape = (2, 4, 3)
        return np.ones(shape if self.render_mode == "tiled" else (self.num_envs, *shape), np.uint8)


class Single(gymnasium.Env[Any, Any]):
    metadata: dict[str, Any] = Grouped.metadata
    observation_space = action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, grouped: bool = True) -> None:
        self.render_mode = render_mode


@pytest.fixture
def grouped() -> Iterator[str]:
    gymnasium.register("MeshrlGrouped-v0", entry_point=f"{__name__}:Single", vector_entry_point=f"{__name__}:Grouped")
    yield "MeshrlGrouped-v0"
    del gymnasium.registry["MeshrlGrouped-v0"]


async def test_a_vector_implementation_whose_actions_are_no_array_is_an_error_at_the_start(
    url: str, grouped: str
) -> None:
    with pytest.raises(UnsupportedSpace, match="not one array"):
        async with EnvWorker({"env": grouped}, url, vectors="gymnasium"):
            pass


async def test_a_vector_implementation_may_render_one_array_of_frames(url: str, grouped: str) -> None:
    source = Factory(grouped, {"grouped": False})
    async with EnvWorker({"env": source}, url, vectors="gymnasium"), Mesh(url) as m:
        envs = await m.vector("env", 3, seeding="implementation", render_mode="rgb_array")
        await envs.reset()
        assert not different(await envs.render(), (np.ones((2, 4, 3), np.uint8),) * 3)
        tiled = await m.vector("env", 3, seeding="implementation", render_mode="tiled")
        await tiled.reset()
        with pytest.raises(UsageError, match=r"shape \(2, 4, 3\), not a frame of each"):
            await tiled.render()
        await tiled.reset()


# ---------------------------------------------------------------- what one client may cost the others


async def test_a_small_request_is_not_answered_a_thousand_times(url: str) -> None:
    async with serving(url, Hooked, allow=("add",)) as (m, _):
        envs = await m.vector("env", 2)
        await envs.reset()
        assert await envs.get_attr("tag", [1, 1]) == (await envs.get_attr("tag", [1])) * 2
        for call in (envs.get_attr("tag", [0] * 1000), envs.call_some([0, 1] * 40, "add", 1)):
            with pytest.raises(MalformedMessage, match="too many"):
                await call
        await envs.step([1, 1])


@SHARDS
async def test_a_seed_of_a_megabyte_is_refused_by_both_sides(url: str, shards: int) -> None:
    async with serving(url, *[Hooked] * 3) as (m, workers):
        envs = await m.vector("env", N, shards=shards)
        for seed in (1 << 8_000_000, (1 << 256) - 1):  # seed + 1 is too long
            with pytest.raises(InvalidSeed, match="bits"):
                await envs.reset(seed=seed)
        assert sent(workers) == [0] * shards
        with pytest.raises(InvalidSeed, match="bits"):
            await envs._lockstep.call("reset", [{"seeds": [1 << 256] * (N // shards)}] * shards)
        await envs.reset(seed=(1 << 256) - N)


async def test_sub_environments_that_nobody_waits_for_are_not_constructed(url: str, gate: Gate) -> None:
    made: list[int] = []

    class Slow(Hooked):
        def __init__(self) -> None:
            super().__init__()
            made.append(0)
            if len(made) == 5:
                gate.reached.set()
                gate.open.wait(60.0)

    async with serving(url, Slow, slots=50) as (m, (worker,)):
        made.clear()
        opening = asyncio.ensure_future(m.vector("env", 50))
        await asyncio.to_thread(gate.reached.wait, 60.0)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
        await until(lambda: all(session.state is State.ENDING for session in worker.table), "it is given up")
        gate.open.set()
        await until(lambda: worker.table.free == 50, "its slots are free")
        assert len(made) <= 4 + WIDTH


async def test_which_sub_environments_info_cannot_travel_is_told(url: str) -> None:
    class Odd(Hooked):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"what": object()} if action == 7 else {}

    async with serving(url, Odd, Odd) as (m, _):
        envs = await m.vector("env", 4, shards=2)
        await envs.reset()
        with pytest.raises(UnencodableValue) as caught:
            await envs.step([1, 1, 1, 7])
        assert caught.value.details["env_id"] == 3
