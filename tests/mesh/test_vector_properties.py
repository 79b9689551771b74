"""For any spaces, infos, mode and cut into shards, a remote vector is Gymnasium's SyncVectorEnv."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.opening import Opening
from meshrl.client.session import RemoteSession
from meshrl.client.vector import RemoteVectorEnv
from tests.mesh.envs import Sampled
from tests.mesh.test_vector_parity import Played, Script
from tests.unit.wire.strategies import all_spaces

STEPS = 25
PLAYED = Played("ansi", ("steps", "wind"), ("wind", (0.5, np.float32(2.0), 3)), {"steps": 4})

Run = Callable[[Callable[[Mesh], Coroutine[Any, Any, None]]], None]
# A key's values are of one kind, or it is a dict again.
Schema = dict[str, Any]


class Spec(NamedTuple):
    """What env to make."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    infos: Schema
    ends: float

    def make(self, render_mode: str | None = None) -> Sampled:
        return Sampled(
            self.observation_space, self.action_space, partial(told, self.infos), self.ends, render_mode=render_mode
        )


class Case(NamedTuple):
    """What to play."""

    spec: Spec
    mode: AutoresetMode
    sizes: list[int]
    seed: int


# Of the worker that is in this process; a client names one by its number.
SPECS = [Spec(spaces.Discrete(2), spaces.Discrete(2), {}, 0.1)]


def make(number: int = 0, render_mode: str | None = None) -> Sampled:
    return SPECS[number].make(render_mode)


# ---------------------------------------------------------------- infos

KINDS: dict[str, Callable[[np.random.Generator], Any]] = {
    "int": lambda chance: int(chance.integers(-5, 5)),
    "float": lambda chance: float(chance.normal()),
    "bool": lambda chance: bool(chance.integers(2)),
    "number": lambda chance: (1, 2.7, True, np.int16(-3), np.float32(0.1))[chance.integers(5)],
    "float32": lambda chance: np.float32(chance.normal()),
    "uint8": lambda chance: np.uint8(chance.integers(256)),
    "bool_": lambda chance: np.bool_(chance.integers(2)),
    "array": lambda chance: chance.integers(-9, 9, (2, 1), np.int16),
    "no axes": lambda chance: np.array(chance.normal()),
    "text": lambda chance: "some text"[: chance.integers(10)],
    "thing": lambda chance: (None, "text", (1, 2), b"bytes", [1, "two"], frozenset({3}))[chance.integers(6)],
}


def schemas(depth: int = 0) -> st.SearchStrategy[Schema]:
    kind = st.sampled_from(sorted(KINDS))
    values = st.one_of(kind, schemas(depth + 1)) if depth < 2 else kind
    return st.dictionaries(st.sampled_from(("a", "b", "c", "_d", "final_obs")), values, max_size=4)


def told(schema: Schema, chance: np.random.Generator) -> dict[str, Any]:
    """Some of the keys, in any order."""
    info = {}
    for k in chance.permutation(len(schema)):
        key, kind = list(schema.items())[k]
        if chance.random() < 0.6:
            info[key] = told(kind, chance) if isinstance(kind, dict) else KINDS[kind](chance)
    return info


# ---------------------------------------------------------------- cases


def has_empty(space: spaces.Space[Any]) -> bool:
    """Whether there is a Dict or Tuple without parts, over which Gymnasium cannot iterate."""
    if isinstance(space, spaces.Dict):
        return not space.spaces or any(map(has_empty, space.spaces.values()))
    return isinstance(space, spaces.Tuple) and (not space.spaces or any(map(has_empty, space.spaces)))


specs = st.builds(
    Spec,
    all_spaces,
    all_spaces.filter(lambda space: not has_empty(space)),
    schemas(),
    st.sampled_from((0.0, 0.15, 0.5, 1.0)),
)
cases = st.builds(
    Case,
    specs,
    st.sampled_from(AutoresetMode),
    st.integers(1, 4).flatmap(lambda shards: st.lists(st.integers(1, 4), min_size=shards, max_size=shards)),
    st.integers(0, 2**31 - 1),
)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One mesh for all cases, on a loop that runs while one of them does."""
    with EmbeddedServer.start() as server, asyncio.Runner() as runner:
        end = asyncio.Event()

        async def own(ready: asyncio.Future[Mesh]) -> None:
            worker = EnvWorker({"env": make}, server.url, allow=("*",), allow_kwargs=("number",))
            async with worker, Mesh(server.url) as m:
                ready.set_result(m)
                await end.wait()

        async def begin() -> tuple[asyncio.Task[None], Mesh]:
            ready: asyncio.Future[Mesh] = asyncio.get_running_loop().create_future()
            return asyncio.create_task(own(ready)), await ready

        async def finish(owner: asyncio.Task[None]) -> None:
            end.set()
            await owner

        owner, m = runner.run(begin())
        yield lambda test: runner.run(test(m))
        runner.run(finish(owner))


async def opened(m: Mesh, case: Case, number: int) -> RemoteVectorEnv:
    """A vector of shards of just these sizes: placement would make them as equal as it can."""
    sessions = []
    for first, size in zip(accumulate([0, *case.sizes]), case.sizes, strict=False):
        request = {
            "kwargs": {"number": number},
            "form": "vector",
            "autoreset_mode": case.mode.value,
            "render_mode": PLAYED.render_mode,
            "first_env_id": first,
            "num_envs": size,
        }
        opening = Opening(context_of(m), "env", "env", wait=30.0, where=None, request=request)
        shard = partial(RemoteSession, first_env_id=first, num_envs=size)
        sessions.append(await context_of(m).lease(opening, shard))
    return RemoteVectorEnv(
        sessions, autoreset_mode=case.mode, seeding="gymnasium", render_mode=PLAYED.render_mode, check_actions="normal"
    )


NESTED = Spec(
    spaces.Dict({"b": spaces.Tuple((spaces.Text(3), spaces.Discrete(3))), "a": spaces.Sequence(spaces.Discrete(4))}),
    spaces.Dict({"y": spaces.Box(-1, 1, (2,), np.float32), "x": spaces.Graph(spaces.Discrete(3), None)}),
    {"a": "number", "b": {"c": "thing", "a": "array"}, "final_obs": "float"},
    0.5,
)


@pytest.mark.timeout(300)  # it is shrunk where it fails, and is slow where much else runs
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases)
@example(Case(NESTED, AutoresetMode.SAME_STEP, [1, 3, 2], 1))
@example(Case(NESTED, AutoresetMode.DISABLED, [2, 1], 2))
def test_any_env_in_any_mode_cut_into_any_shards_is_the_local_vector(run: Run, case: Case) -> None:
    event(case.mode.value)
    event(f"{len(case.sizes)} shards")

    async def test(m: Mesh) -> None:
        local = SyncVectorEnv([partial(case.spec.make, PLAYED.render_mode)] * sum(case.sizes), autoreset_mode=case.mode)
        SPECS.append(case.spec)
        async with await opened(m, case, len(SPECS) - 1) as envs:
            assert [envs.observation_space, envs.action_space] == [local.observation_space, local.action_space]
            await Script(local, (envs,), PLAYED, case.seed, often=0.5).play(STEPS)
        local.close()

    run(test)
