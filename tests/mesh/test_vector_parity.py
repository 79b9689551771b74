"""``Mesh.vector`` against Gymnasium's SyncVectorEnv over local envs: the same values, types and bits.

A random script of operations is played on three vectors at once: the local one, one of one shard and one of three.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.vector import RemoteVectorEnv
from tests.mesh.envs import Nested
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.worker_process import WorkerProcess

STEPS = 2000
NUM_ENVS = 7
RENDERS = 6  # of one script: most envs draw with pygame, which takes longer than a hundred steps


class Played(NamedTuple):
    """What a script does to one env besides stepping it."""

    render_mode: str
    reads: Sequence[str]
    sets: tuple[str, Sequence[Any]]
    options: dict[str, Any]


PLAYED = {
    "CartPole-v1": Played("rgb_array", ("state", "gravity"), ("gravity", (9.8, 5.0, 20)), {"low": -0.1, "high": 0.1}),
    "Acrobot-v1": Played("rgb_array", ("state", "dt"), ("torque_noise_max", (0.0, 0.5)), {"low": -0.2, "high": 0.2}),
    "FrozenLake-v1": Played("ansi", ("s", "lastaction", "nrow"), ("s", (0, 3, 14)), {"unknown": [1]}),
    "Pendulum-v1": Played("rgb_array", ("state", "g"), ("g", (10.0, 9.0)), {"x_init": 1.0, "y_init": 0.5}),
    TAXI: Played("ansi", ("s", "num_rows"), ("s", (0, 17, 499)), {}),
    "Blackjack-v1": Played("rgb_array", ("player", "dealer"), ("player", ([1, 10], [2, 3])), {}),
    "nested": Played("ansi", ("steps", "wind"), ("wind", (1.5, np.float32(0.25), 3)), {"steps": 7}),
}
FACTORIES = {name: name for name in PLAYED} | {"nested": "tests.mesh.envs:Nested"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A mesh of three workers in processes of their own."""
    with EmbeddedServer.start() as server:
        workers = [
            WorkerProcess(server.url, FACTORIES, allow=["*"], slots=32, capabilities={"number": i}, wait=False)
            for i in range(3)
        ]
        try:
            for worker in workers:
                worker.wait_advertised()
            yield server.url
        finally:
            for worker in workers:
                worker.stop()


def different(a: Any, b: Any, at: str = "") -> str:
    """Where two values differ in type, order of keys, dtype, shape or bits; empty where they do not."""
    if type(a) is not type(b):
        return f"{at}: {type(a).__name__} {a!r} against {type(b).__name__} {b!r}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{at}: the keys {list(a)} against {list(b)}"
        pairs = [(f"{at}[{key!r}]", a[key], b[key]) for key in a]
    elif isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{at}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
        if not a.dtype.hasobject:
            return "" if a.tobytes() == b.tobytes() else f"{at}: {a} against {b}"
        pairs = [(f"{at}[{i}]", x, y) for i, (x, y) in enumerate(zip(a.flat, b.flat, strict=True))]
    elif isinstance(a, (tuple, list)):
        if len(a) != len(b):
            return f"{at}: {len(a)} against {len(b)} values"
        pairs = [(f"{at}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        if isinstance(a, np.generic):
            same = a.dtype == b.dtype and a.tobytes() == b.tobytes()
        else:
            same = struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else bool(a == b)
        return "" if same else f"{at}: {a!r} against {b!r}"
    return next((found for where, x, y in pairs if (found := different(x, y, where))), "")


def local_env(name: str, render_mode: str) -> gymnasium.Env[Any, Any]:
    return Nested(render_mode) if name == "nested" else gymnasium.make(name, render_mode=render_mode)


class Script:
    """Plays the same on a local vector and on remote ones, and compares what each gives.

    Attributes:
        ended: where an episode has ended and was not begun anew.
    """

    def __init__(self, local: SyncVectorEnv, remotes: Sequence[RemoteVectorEnv], played: Played, seed: int) -> None:
        self.local = local
        self.remotes = remotes
        self.played = played
        self.chance = np.random.default_rng(seed)
        self.renders = RENDERS
        self.ended = np.zeros(local.num_envs, np.bool_)
        self.ends = 0  # episodes
        self.looked = 0  # operations while one is ended
        local.action_space.seed(seed)

    async def same(self, what: str, expected: Any, ask: Callable[[RemoteVectorEnv], Awaitable[Any]]) -> None:
        if what == "render":  # pygame's lines come out wrong where two threads of a process draw at once
            told = [await ask(remote) for remote in self.remotes]
        else:
            told = await asyncio.gather(*map(ask, self.remotes))
        for remote, got in zip(self.remotes, told, strict=True):
            found = different(got, expected, what)
            assert not found, f"{found} ({len(remote.shards)} shards)"

    async def reset(self, seed: Any = None, **options: Any) -> None:
        own: Any = [dict(options) if options else None for _ in range(1 + len(self.remotes))]
        expected = self.local.reset(seed=seed, options=own.pop())
        await self.same("reset", expected, lambda remote: remote.reset(seed=seed, options=own.pop()))
        self.ended[options.get("reset_mask", slice(None))] = False

    async def step(self) -> None:
        actions = self.local.action_space.sample()
        expected = self.local.step(actions)
        await self.same("step", expected, lambda remote: remote.step(actions))
        self.ended = expected[2] | expected[3]
        self.ends += int(self.ended.sum())

    async def look(self) -> None:
        if self.renders and self.chance.random() < 0.1:
            self.renders -= 1
            await self.same("render", self.local.render(), lambda remote: remote.render())
        for name in self.played.reads:
            await self.same(name, self.local.get_attr(name), lambda remote, name=name: remote.get_attr(name))

    async def change(self) -> None:
        name, values = self.played.sets
        picked = [values[i] for i in self.chance.integers(len(values), size=self.local.num_envs)]
        told = picked if self.chance.random() < 0.7 or isinstance(picked[0], list) else picked[0]
        self.local.set_attr(name, told)
        await self.same("set_attr", None, lambda remote: remote.set_attr(name, told))

    async def begin_some(self, mask: Any) -> None:
        """A reset of any kind; of ``mask`` alone, or of all."""
        chance, seeds = self.chance, self.chance.integers(2**31, size=self.local.num_envs).tolist()
        some = [seed if chance.random() < 0.5 else None for seed in seeds]
        seed = [None, seeds[0], seeds, some][int(chance.integers(4))]
        options = dict(self.played.options) if chance.random() < 0.5 else {}
        if mask is not None:
            options["reset_mask"] = mask
        await self.reset(seed, **options)

    async def between(self, *, must: bool) -> None:
        """Operations between two steps; ``must``: every one that has ended is reset in the end."""
        chance = self.chance
        for _ in range(int(chance.integers(1, 4))):
            self.looked += bool(self.ended.any())
            kind = chance.random()
            if kind < 0.45:
                await self.look()
            elif kind < 0.7:
                await self.change()
            elif kind < 0.95:
                mask = chance.random(self.local.num_envs) < 0.4
                await self.begin_some(mask if mask.any() else None)
            else:
                await self.begin_some(None)
        if must and self.ended.any():
            await self.begin_some(self.ended.copy() if chance.random() < 0.9 else None)

    async def play(self, steps: int) -> None:
        await self.reset(int(self.chance.integers(2**31)))
        for _ in range(steps):
            await self.step()
            disabled = self.local.metadata["autoreset_mode"] is AutoresetMode.DISABLED and bool(self.ended.any())
            if disabled or self.chance.random() < (0.15 if self.ended.any() else 0.01):
                await self.between(must=disabled)


def facts(envs: Any) -> list[Any]:
    return [
        envs.num_envs,
        envs.single_observation_space,
        envs.single_action_space,
        envs.observation_space,
        envs.action_space,
        envs.metadata,
        envs.render_mode,
        envs.autoreset_mode,
    ]


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", PLAYED)
async def test_two_thousand_steps_on_one_shard_and_on_three_are_the_local_vectors(
    url: str, name: str, mode: AutoresetMode
) -> None:
    played = PLAYED[name]
    local = SyncVectorEnv([lambda: local_env(name, played.render_mode)] * NUM_ENVS, autoreset_mode=mode)
    async with Mesh(url) as m:
        # The workers are not equally loaded.
        others = [await m.env(name, where={"number": number}) for number in (0, 0, 1)]
        one, three = [
            await m.vector(name, NUM_ENVS, render_mode=played.render_mode, autoreset_mode=mode, shards=shards)
            for shards in (1, 3)
        ]
        assert [len(one.shards), len({worker for worker, _ in three.shards})] == [1, 3]
        assert sorted(size for _, size in three.shards) == [2, 2, 3]
        for remote in (one, three):
            assert facts(remote) == facts(local)
        script = Script(local, (one, three), played, seed=sum(map(ord, name + mode.value)))
        await script.play(STEPS)
        assert script.ends > 30
        assert script.looked > 20
        for env in (one, three, *others):
            await env.close()
    local.close()
