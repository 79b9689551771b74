"""Vectors whose shards do not go together, answer nonsense, or are told half of something (R2, R5, R6, R7)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from meshrl import EnvWorker, Mesh
from meshrl.client.vector import RemoteVectorEnv
from meshrl.errors import (
    ConcurrentStep,
    MalformedMessage,
    MeshError,
    NotAllowed,
    ResetNeeded,
    SpacesDiffer,
    StepUnsettled,
    UnencodableValue,
    UsageError,
)
from meshrl.protocol.seeds import derive
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Description, Vectors
from tests.mesh.conftest import until


class Counts(gymnasium.Env[Any, Any]):
    """Observes how many steps it took; the episode ends at action 1, and action 2 has an info that cannot travel."""

    action_space: spaces.Space[Any] = spaces.Discrete(3)
    observation_space: spaces.Space[Any] = spaces.Box(0, 100, (1,), np.float32)
    t = 0

    def __init__(self, *, n: int = 3, high: float = 100) -> None:
        self.action_space = spaces.Discrete(n)
        self.observation_space = spaces.Box(0, high, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.full(1, self.t, np.float32), 0.0, action == 1, False, {"x": object()} if action == 2 else {}

    def render(self) -> Any:
        return np.zeros((1, 1, 3), np.uint8)


class Altering(EnvWorker):
    """A worker whose vectors offer what it is told, and which alters answers.

    Attributes:
        offers: instead of what its vectors can do.
        alters: makes another answer of each; by its number, from 0.
    """

    def __init__(self, *args: Any, offers: Vectors | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offers = offers
        self.alters: Callable[[dict[str, Any]], None] | None = None
        self._give = self._replies.send
        self._replies.send = self._send  # type: ignore[method-assign]

    async def _describe_all(self) -> dict[str, Description]:
        described = await super()._describe_all()
        if self.offers is None:
            return described
        return {name: said.model_copy(update={"vectors": self.offers}) for name, said in described.items()}

    def _send(self, to: str, packed: bytes, lane: int = 0, seq: int = 0) -> None:
        if self.alters is not None:
            body = unpack(packed)
            self.alters(body)
            packed = pack(body)
        self._give(to, packed, lane, seq)


@contextlib.asynccontextmanager
async def serving(
    url: str, *factories: Any, offers: tuple[Vectors | None, ...] = (None, None)
) -> AsyncIterator[tuple[Mesh, list[Altering]]]:
    """A client, and a worker of four slots for each factory, which all serve theirs as ``env``."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(Altering({"env": make}, url, slots=4, allow=("*",), offers=what))
            for make, what in zip(factories, offers, strict=False)
        ]
        yield await stack.enter_async_context(Mesh(url)), workers


def worker_of(envs: RemoteVectorEnv, workers: list[Altering], shard: int) -> Altering:
    return next(worker for worker in workers if worker.id == envs.shards[shard][0])


def requests(workers: list[Altering]) -> list[int]:
    """How many requests each session has had."""
    return [session.lane.seq for worker in workers for session in worker.table if session.lane is not None]


async def cut_off(call: Any) -> None:
    """Cancel a call that has been sent."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def all_free(workers: list[Altering]) -> None:
    await until(lambda: all(worker.table.free == worker.table.slots for worker in workers), "all slots are free")


# ---------------------------------------------------------------- shards that do not go together


@pytest.mark.parametrize(
    ("other", "what"),
    [(lambda: Counts(high=255), "observation"), (lambda: Counts(n=5), "action")],
    ids=["observation", "action"],
)
@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_shards_of_different_spaces_are_refused_and_given_back(
    url: str, form: str, other: Callable[[], Any], what: str
) -> None:
    async with serving(url, Counts, other) as (m, workers):
        with pytest.raises(SpacesDiffer, match=f"{what} space") as refused:
            await getattr(m, form)("env", num_envs=6, shards=2)
        for part in (*(worker.id for worker in workers), "where=", "shards=1"):
            assert part in str(refused.value)
        await all_free(workers)
        alone = await getattr(m, form)("env", num_envs=4, shards=1)
        await alone.close()


async def test_equal_spaces_that_are_described_in_another_order_go_together(url: str) -> None:
    class Ordered(Counts):
        def __init__(self, names: str) -> None:
            super().__init__()
            self.observation_space = spaces.Dict([(name, spaces.Discrete(2)) for name in names])

    async with serving(url, lambda: Ordered("ab"), lambda: Ordered("ba")) as (m, _):
        envs = await m.vector("env", num_envs=6, shards=2)
        await envs.close()


async def test_shards_of_different_implementations_are_refused_and_given_back(url: str) -> None:
    other = Vectors(implementation="other", reset_mask=False)
    async with serving(url, Counts, Counts, offers=(None, other)) as (m, workers):
        with pytest.raises(UsageError, match="other") as refused:
            await m.vector("env", num_envs=6, shards=2)
        for part in (*(worker.id for worker in workers), "meshrl", "where=", "shards=1"):
            assert part in str(refused.value)
        await all_free(workers)


async def test_what_an_implementation_does_not_have_is_refused_before_anything_is_sent(url: str) -> None:
    none = Vectors(implementation="other", reset_mask=False, options=False, attributes=False)
    async with serving(url, Counts, Counts, offers=(none, none)) as (m, workers):
        envs = await m.vector("env", num_envs=6, shards=2)
        await envs.reset(seed=1)
        with pytest.raises(UsageError, match="reset_mask"):
            await envs.reset(options={"reset_mask": np.arange(6) < 3})
        with pytest.raises(UsageError, match="implementation other takes no reset options, and was given 'low'"):
            await envs.reset(options={"low": 1})
        for call in (
            envs.call("close"),
            envs.call_some([0], "close"),
            envs.get_attr("t"),
            envs.get_attr("t", [5]),
            envs.set_attr("t", 3),
            envs.is_wrapped(gymnasium.wrappers.TimeLimit),
        ):
            with pytest.raises(NotAllowed, match="implementation other"):
                await call
        assert requests(workers) == [1, 1]
        await envs.close()


# ---------------------------------------------------------------- what shards answer


@pytest.mark.parametrize("alter", [lambda v: v[:-1], lambda v: [*v, 0], lambda _: "values", lambda _: None])
@pytest.mark.parametrize("shard", [0, 1])
async def test_another_number_of_values_is_malformed_and_its_worker_is_named(url: str, alter: Any, shard: int) -> None:
    def values(body: dict[str, Any]) -> None:
        for field in ("values", "frames"):
            if field in body:
                body[field] = alter(body[field])

    async with serving(url, Counts, Counts) as (m, workers):
        envs = await m.vector("env", num_envs=6, shards=2)
        envs.render_mode = "rgb_array"  # this env draws in any mode
        await envs.reset(seed=1)
        bad = worker_of(envs, workers, shard)
        bad.alters = values
        for call in (
            envs.get_attr("t"),
            envs.get_attr("t", [5, 0, 1]),
            envs.call("t"),
            envs.is_wrapped(gymnasium.wrappers.TimeLimit),
            envs.render(),
        ):
            with pytest.raises(MalformedMessage, match=bad.id):
                await call
        bad.alters = None
        assert await envs.get_attr("t") == (0,) * 6
        await envs.close()


async def test_values_that_are_settled_come_in_the_order_that_was_asked_for(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await m.vector("env", num_envs=4, shards=2)
        await envs.reset()
        await envs.set_attr("t", [0, 1, 2, 3])
        await cut_off(envs.call_some([3, 0, 2], "t"))
        assert await envs.settle() == (3, 0, 2)
        await envs.close()


# ---------------------------------------------------------------- ends that nobody was told of


async def disabled(m: Mesh) -> RemoteVectorEnv:
    envs = await m.vector("env", num_envs=4, shards=2, autoreset_mode=AutoresetMode.DISABLED)
    await envs.reset(seed=0)
    return envs


async def test_the_ends_of_a_discarded_step_count_where_autoreset_is_disabled(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await disabled(m)
        await cut_off(envs.step([0, 0, 0, 1]))
        await envs.reset(options={"reset_mask": np.array([True, False, False, False])})
        before = await envs.get_attr("t")
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0] * 4)
        assert refused.value.details["env_ids"] == [3]
        assert await envs.get_attr("t") == before == (0, 1, 1, 1)
        await envs.reset(options={"reset_mask": np.arange(4) == 3})
        await envs.step([0] * 4)
        assert await envs.get_attr("t") == (1, 2, 2, 1)
        await envs.close()


async def test_a_discarded_reset_takes_back_the_ends_it_reset(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await disabled(m)
        await envs.step([1, 0, 0, 1])
        await cut_off(envs.reset(options={"reset_mask": np.arange(4) == 3}))
        await envs.reset(options={"reset_mask": np.arange(4) == 0})
        await envs.step([0] * 4)
        await envs.close()


async def test_the_ends_in_one_shard_count_although_another_answered_with_an_error(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await disabled(m)
        with pytest.raises(MeshError):
            await envs.step([1, 0, 0, 2])
        before = await envs.get_attr("t")
        with pytest.raises(ResetNeeded):
            await envs.step([0] * 4)
        assert await envs.get_attr("t") == before
        await envs.close()


# ---------------------------------------------------------------- roots


async def seeds_of(envs: RemoteVectorEnv) -> list[int]:
    return list(await envs.get_attr("np_random_seed"))


def roots_of(envs: RemoteVectorEnv) -> Any:
    return envs.root, envs.roots


async def test_a_reset_that_was_not_sent_leaves_the_root_as_it_was(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await m.vector("env", num_envs=2, shards=2, seeding="derived")
        with pytest.raises(UnencodableValue):
            await envs.reset(seed=5, options={"x": object()})
        assert envs.roots == (None, None)
        await envs.reset(seed=5)
        with pytest.raises(UnencodableValue):
            await envs.reset(seed=7, options={"x": object()})
        assert envs.root == 5
        stepping = asyncio.create_task(envs.step([0, 0]))
        await asyncio.sleep(0)
        with pytest.raises(ConcurrentStep):
            await envs.reset(seed=11)
        await stepping
        assert envs.root == 5
        await envs.reset()
        assert await seeds_of(envs) == [derive(5, i, 1) for i in range(2)]
        await envs.close()


async def test_a_masked_reset_with_a_seed_keeps_a_root_for_each_sub_environment(url: str) -> None:
    async with serving(url, Counts, Counts) as (m, _):
        envs = await m.vector("env", num_envs=2, shards=2, seeding="derived")
        assert roots_of(envs) == (None, (None, None))
        await envs.reset(seed=5)
        assert roots_of(envs) == (5, (5, 5))
        await envs.reset(seed=9, options={"reset_mask": np.array([True, False])})
        assert roots_of(envs) == (None, (9, 5))
        await envs.reset()
        assert await seeds_of(envs) == [derive(9, 0, 1), derive(5, 1, 1)]
        await cut_off(envs.reset(seed=4))
        assert envs.root == 4, "it was sent"
        with pytest.raises(StepUnsettled):
            await envs.step([0, 0])
        await envs.settle()
        assert await seeds_of(envs) == [derive(4, 0, 0), derive(4, 1, 0)]
        await envs.close()


async def test_a_root_that_a_worker_may_not_have_got_is_told_again(url: str) -> None:
    def refused(body: dict[str, Any]) -> None:
        body["error"] = {"code": "usage", "message": "no"}

    async with serving(url, Counts, Counts) as (m, workers):
        envs = await m.vector("env", num_envs=2, shards=2, seeding="derived")
        bad = worker_of(envs, workers, 1)
        bad.alters = refused
        with pytest.raises(UsageError):
            await envs.reset()
        bad.alters = None
        root = envs.root
        assert root is not None
        await envs.reset()
        assert await seeds_of(envs) == [derive(root, 0, 1), derive(root, 1, 0)]
        assert envs.root == root
        await envs.close()


# ---------------------------------------------------------------- closing


@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_a_close_that_is_cancelled_closes_all_shards_the_same(url: str, form: str) -> None:
    async with serving(url, Counts) as (m, workers):
        envs = await getattr(m, form)("env", num_envs=4, shards=4)
        await cut_off(envs.close())
        await all_free(workers)
        await envs.close()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_numbers_are_integers_of_any_kind_and_nothing_else(url: str, form: str) -> None:
    async with serving(url, Counts) as (m, _):
        envs = await getattr(m, form)("env", num_envs=np.int64(3), shards=np.int64(2))
        assert [size for _, size in envs.shards] == [2, 1]
        await envs.close()
        for bad in ({"num_envs": "3"}, {"num_envs": 2.0}, {"num_envs": True}, {"num_envs": 2, "shards": 1.0}):
            with pytest.raises(UsageError, match=f"{list(bad)[-1]} is a whole number"):
                await getattr(m, form)("env", **bad)


@pytest.mark.parametrize("mode", ["next_step", None, 3])
async def test_a_mode_that_is_none_is_refused_by_the_names_there_are(url: str, mode: Any) -> None:
    async with serving(url, Counts) as (m, _):
        with pytest.raises(UsageError, match="NextStep, SameStep or Disabled") as refused:
            await m.vector("env", num_envs=2, autoreset_mode=mode)
        assert repr(mode) in str(refused.value)
