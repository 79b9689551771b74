"""``Mesh.vector`` against Gymnasium's SyncVectorEnv over local envs: the same values, types and bits.

A random script of operations is played on three vectors at once: the local one, one of one shard and one of three.
``MESHRL_PARITY_STEPS`` says how many steps it has.
"""

from __future__ import annotations

import asyncio
import os
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
from meshrl.errors import InvalidSeed, UnencodableValue
from meshrl.protocol.seeds import derive
from meshrl.worker.factories import as_factory
from tests.mesh.worker_process import WorkerProcess

STEPS = int(os.environ.get("MESHRL_PARITY_STEPS", "2000"))
NUM_ENVS = 5
RENDERS = 2  # of one script: most envs draw with pygame, which takes longer than a hundred steps


class Played(NamedTuple):
    """What a script does to one env besides stepping it."""

    render_mode: str
    reads: Sequence[str]
    sets: tuple[str, Sequence[Any]]
    options: dict[str, Any]


PLAYED = {
    "cartpole": Played("rgb_array", ("state", "gravity"), ("gravity", (9.8, 5.0, 20)), {"low": -0.1, "high": 0.1}),
    "acrobot": Played("rgb_array", ("state", "dt"), ("torque_noise_max", (0.0, 0.5)), {"low": -0.2, "high": 0.2}),
    "frozenlake": Played("ansi", ("s", "lastaction"), ("s", (0, 3, 14)), {"unknown": [1]}),
    "pendulum": Played("rgb_array", ("state", "g"), ("g", (10.0, 9.0)), {"x_init": 1.0, "y_init": 0.5}),
    "taxi": Played("ansi", ("s", "lastaction"), ("s", (0, 17, 499)), {}),
    "blackjack": Played("rgb_array", ("player", "dealer"), ("natural", (True, False)), {}),
    "nested": Played("ansi", ("steps", "wind"), ("wind", (1.5, np.float32(0.25), 3)), {"steps": 7}),
}
FACTORIES = {
    "cartpole": "CartPole-v1",
    "acrobot": "tests.mesh.envs:short_acrobot",
    "frozenlake": "FrozenLake-v1",
    "pendulum": "tests.mesh.envs:short_pendulum",
    "taxi": "tests.mesh.envs:short_taxi",
    "blackjack": "Blackjack-v1",
    "nested": "tests.mesh.envs:Nested",
}


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


class Script:
    """Plays the same on a local vector and on remote ones, and compares what each gives.

    Args:
        local: a new one.
        remotes: new ones.
        played: what to do to them.
        seed: of the script, and of the actions.
        often: the probability of something between a step that ended an episode and the next one.

    Attributes:
        ended: where an episode has ended and was not begun anew.
    """

    def __init__(
        self,
        local: SyncVectorEnv,
        remotes: Sequence[RemoteVectorEnv],
        played: Played,
        seed: int,
        *,
        often: float = 0.15,
    ) -> None:
        self.local = local
        self.remotes = remotes
        self.played = played
        self.chance = np.random.default_rng(seed)
        self.often = often
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
        name = self.played.reads[int(self.chance.integers(2))]
        await self.same(name, self.local.get_attr(name), lambda remote: remote.get_attr(name))

    async def change(self) -> None:
        name, values = self.played.sets
        picked = [values[i] for i in self.chance.integers(len(values), size=self.local.num_envs)]
        told = picked if self.chance.random() < 0.7 else picked[0]
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

    async def between(self) -> None:
        """Operations between two steps."""
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

    async def play(self, steps: int) -> None:
        await self.reset(int(self.chance.integers(2**31)))
        for _ in range(steps):
            await self.step()
            if self.chance.random() < (self.often if self.ended.any() else self.often / 15):
                await self.between()
            if self.local.metadata["autoreset_mode"] is AutoresetMode.DISABLED and self.ended.any():
                await self.begin_some(self.ended.copy() if self.chance.random() < 0.9 else None)


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
    factory = as_factory(FACTORIES[name])
    local = SyncVectorEnv([lambda: factory.make({}, played.render_mode)] * NUM_ENVS, autoreset_mode=mode)
    async with Mesh(url) as m:
        # The workers are not equally loaded.
        others = [await m.env(name, where={"number": number}) for number in (0, 0, 1)]
        one, three = [
            await m.vector(name, NUM_ENVS, render_mode=played.render_mode, autoreset_mode=mode, shards=shards)
            for shards in (1, 3)
        ]
        assert [len(one.shards), len({worker for worker, _ in three.shards})] == [1, 3]
        assert sorted(size for _, size in three.shards) == [1, 2, 2]
        for remote in (one, three):
            assert facts(remote) == facts(local)
        script = Script(local, (one, three), played, seed=sum(map(ord, name + mode.value)))
        await script.play(STEPS)
        assert script.ends > STEPS / 20
        assert script.looked > 10 or STEPS < 2000, "of few steps there may be none"
        for envs in (one, three):
            await envs.close()
        for env in others:
            await env.close()

    local.close()


# ---------------------------------------------------------------- derived seeding


class Episode:
    """What was told of one: the first observation, then (action, observation, reward, terminated, truncated)."""

    def __init__(self, first: Any) -> None:
        self.first = first
        self.steps: list[tuple[Any, ...]] = []


def recorded(obs: Any, begun: Any, into: list[list[Episode]]) -> None:
    for i in np.flatnonzero(begun):
        into[i].append(Episode(obs[i].copy()))


async def play_derived(envs: RemoteVectorEnv, seed: int | None, steps: int, chance: np.random.Generator) -> Any:
    """Play, with resets of some in between; gives each sub-environment's episodes."""
    n = envs.num_envs
    episodes: list[list[Episode]] = [[] for _ in range(n)]
    recorded((await envs.reset(seed=seed))[0], np.ones(n, np.bool_), episodes)
    ended = np.zeros(n, np.bool_)
    for _ in range(steps):
        mask = chance.random(n) < 0.03
        if envs.autoreset_mode is AutoresetMode.DISABLED:
            mask |= ended
        if mask.any():
            recorded((await envs.reset(options={"reset_mask": mask}))[0], mask, episodes)
            ended &= ~mask
        actions = chance.integers(2, size=n)
        obs, rewards, terminations, truncations, infos = await envs.step(actions)
        begins = ended if envs.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros(n, np.bool_)
        ended = terminations | truncations
        for i in np.flatnonzero(~begins):
            last = infos["final_obs"][i] if "final_obs" in infos and ended[i] else obs[i].copy()
            episodes[i][-1].steps.append((actions[i], last, rewards[i], terminations[i], truncations[i]))
        recorded(obs, ended if envs.autoreset_mode is AutoresetMode.SAME_STEP else begins, episodes)
    return episodes


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.value)
async def test_with_derived_seeding_each_episode_is_reproduced_alone(url: str, mode: AutoresetMode) -> None:
    told = []
    async with Mesh(url) as m:
        for shards in (1, 3):
            async with await m.vector(
                "cartpole", NUM_ENVS, autoreset_mode=mode, seeding="derived", shards=shards
            ) as envs:
                told.append(await play_derived(envs, 77, 200, np.random.default_rng(3)))
                seeds = await envs.get_attr("np_random_seed")
                assert seeds == tuple(derive(77, i, len(told[-1][i]) - 1) for i in range(NUM_ENVS))
    assert not different([[vars(e) for e in one] for one in told[0]], [[vars(e) for e in one] for one in told[1]])
    alone = gymnasium.make("CartPole-v1")
    assert sum(map(len, told[0])) > 30
    for i, episodes in enumerate(told[0]):
        for number, episode in enumerate(episodes):
            assert not different(alone.reset(seed=derive(77, i, number))[0], episode.first)
            for action, *expected in episode.steps:
                obs, reward, terminated, truncated, _ = alone.step(action)
                got = [obs, np.float64(reward), np.bool_(terminated), np.bool_(truncated)]
                assert not different(got, expected)
    alone.close()


async def test_derived_seeds_are_those_of_the_root_whatever_the_mode_and_the_shards(url: str) -> None:
    async with Mesh(url) as m:
        for mode, shards in (("NextStep", 1), ("SameStep", 3), ("Disabled", 2)):
            envs = await m.vector("cartpole", 4, autoreset_mode=mode, seeding="derived", shards=shards)
            for root in (5, 6):
                await envs.reset(seed=root)
                assert await envs.get_attr("np_random_seed") == tuple(derive(root, i, 0) for i in range(4))
                await envs.reset()
                assert await envs.get_attr("np_random_seed") == tuple(derive(root, i, 1) for i in range(4))
                await envs.reset(options={"reset_mask": np.array([False, True, True, False])})
                expected = tuple(derive(root, i, 1 + (i in {1, 2})) for i in range(4))
                assert await envs.get_attr("np_random_seed") == expected
            with pytest.raises(InvalidSeed, match="one seed"):
                await envs.reset(seed=[1, 2, 3, 4])
            await envs.close()


async def test_a_first_derived_reset_without_a_seed_draws_one_root_for_all_and_keeps_it(url: str) -> None:
    async with Mesh(url) as m:
        roots = set()
        for shards in (1, 3):
            envs = await m.vector("cartpole", 3, seeding="derived", shards=shards)
            with pytest.raises(UnencodableValue):
                await envs.reset(options={"low": object()})  # nothing was sent, and no root is half told
            await envs.reset()
            root = envs.root
            assert root is not None
            roots.add(root)
            for number in range(3):
                assert await envs.get_attr("np_random_seed") == tuple(derive(root, i, number) for i in range(3))
                await envs.reset()
            await envs.close()
        assert len(roots) == 2


async def test_a_first_reset_without_a_seed_draws_seeds_that_give_the_same_again(url: str) -> None:
    async with Mesh(url) as m:
        envs = await m.vector("cartpole", 3, shards=3)
        local = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
        first = await envs.reset()
        seeds = list(await envs.get_attr("np_random_seed"))
        assert len(set(seeds)) == 3
        assert all(0 <= seed < 2**31 for seed in seeds)
        assert not different(first, local.reset(seed=seeds))
        assert not different(await envs.reset(), local.reset())
        await envs.close()
        local.close()
