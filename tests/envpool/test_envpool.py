"""Vectors that EnvPool hosts against EnvPool in this process: the same values, types and bits, whatever the shards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import envpool
import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from meshrl import EnvWorker, Mesh
from meshrl.errors import InvalidAction, InvalidName, InvalidSeed, NotAllowed, ResetNeeded, UsageError
from meshrl.wire.messages import Vectors
from tests.envpool.conftest import SERVED, SLOTS
from tests.mesh.test_vector_parity import different

# Of EnvPool's own float64 bounds, where it makes spaces of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")

N = 6
STEPS = 300
NAMES = pytest.mark.parametrize("name", SERVED)
SHARDS = pytest.mark.parametrize("shards", [1, 2], ids="{}_shards".format)


def local(name: str, seed: int, num_envs: int = N) -> Any:
    """EnvPool in this process."""
    return envpool.make_gymnasium(name, num_envs=num_envs, seed=seed)


@NAMES
async def test_spaces_are_envpools_and_what_it_can_do_is_said(url: str, name: str) -> None:
    theirs = local(name, 0)
    async with Mesh(url) as m:
        assert (await m.describe(name)).vectors == Vectors(
            implementation="envpool",
            autoreset_modes=["NextStep"],
            seedings=["gymnasium", "implementation"],
            reset_mask=False,
            options=False,
            one_seed=True,
            seeds_below=1 << 31,
            attributes=False,
            pool=False,
        )
        async with await m.vector(name, N) as envs:
            assert envs.single_observation_space == theirs.observation_space
            assert envs.single_action_space == theirs.action_space
            assert envs.observation_space == batch_space(theirs.observation_space, N)
            assert envs.action_space == batch_space(theirs.action_space, N)
            assert envs.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    theirs.close()


@SHARDS
@NAMES
@pytest.mark.parametrize("seeding", ["gymnasium", "implementation"])
async def test_three_hundred_steps_are_those_of_a_local_envpool(url: str, name: str, seeding: Any, shards: int) -> None:
    theirs = local(name, 7)
    async with Mesh(url) as m, await m.vector(name, N, seeding=seeding, shards=shards) as envs:
        assert len(envs.shards) == shards
        assert not different(await envs.reset(seed=7), theirs.reset())
        envs.action_space.seed(1)
        ended = 0
        for number in range(STEPS):
            actions = envs.action_space.sample()
            stepped = await envs.step(actions)
            assert not different(stepped, theirs.step(actions)), f"step {number}"
            ended += int((stepped[2] | stepped[3]).sum())
        assert ended >= N
        assert not different(await envs.reset(), theirs.reset()), "without a seed it goes on"
        assert not different(await envs.step(actions), theirs.step(actions))
    theirs.close()


@SHARDS
async def test_infos_are_those_of_all_whatever_the_shards(url: str, shards: int) -> None:
    async with Mesh(url) as m, await m.vector("CartPole-v1", N, shards=shards) as envs:
        _, infos = await envs.reset(seed=1)
        assert infos["env_id"].tolist() == infos["players"]["env_id"].tolist() == list(range(N))
        *_, infos = await envs.step([0] * N)
        assert infos["env_id"].tolist() == infos["players"]["env_id"].tolist() == list(range(N))
        assert infos["elapsed_step"].tolist() == [1] * N


@SHARDS
async def test_a_reset_with_a_seed_is_a_new_envpools(url: str, shards: int) -> None:
    async with Mesh(url) as m, await m.vector("CartPole-v1", N, shards=shards) as envs:
        drawn = (await envs.reset())[0]
        assert len({row.tobytes() for row in drawn}) == N
        for seed, first in ((3, 3), (list(range(4, 4 + N)), 4), (3, 3), ((1 << 31) - N, (1 << 31) - N)):
            theirs = local("CartPole-v1", first)
            assert not different(await envs.reset(seed=seed), theirs.reset())
            for _ in range(3):
                assert not different(await envs.step([1] * N), theirs.step(np.ones(N, np.int64)))
            theirs.close()


async def test_a_first_reset_without_a_seed_is_another_each_time(url: str) -> None:
    async with Mesh(url) as m, await m.vector("CartPole-v1", 2) as one, await m.vector("CartPole-v1", 2) as other:
        assert different((await one.reset())[0], (await other.reset())[0])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"autoreset_mode": AutoresetMode.SAME_STEP}, "NextStep"),
        ({"autoreset_mode": AutoresetMode.DISABLED}, "NextStep"),
        ({"seeding": "derived"}, "gymnasium, implementation"),
        ({"render_mode": "rgb_array"}, "not rendered"),
    ],
)
async def test_modes_and_seedings_that_it_does_not_have_are_refused_at_open(
    url: str, asked: dict[str, Any], says: str
) -> None:
    async with Mesh(url) as m:
        with pytest.raises(UsageError, match=says):
            await m.vector("CartPole-v1", 2, **asked)


async def test_pools_are_refused_at_open(url: str) -> None:
    async with Mesh(url) as m:
        with pytest.raises(UsageError, match="pool"):
            await m.pool("CartPole-v1", 2)


@SHARDS
async def test_what_it_cannot_do_is_refused_and_it_goes_on(url: str, shards: int) -> None:
    theirs = local("CartPole-v1", 5)
    async with Mesh(url) as m, await m.vector("CartPole-v1", N, shards=shards) as envs:
        with pytest.raises(ResetNeeded):
            await envs.step([0] * N)
        assert not different(await envs.reset(seed=5, options={}), theirs.reset())
        for chosen in (np.arange(N) < 3, np.ones(N, np.bool_)):
            with pytest.raises(UsageError, match="all of its sub-environments or none"):
                await envs.reset(options={"reset_mask": chosen})
        with pytest.raises(UsageError, match="takes no reset options, and was given 'low'"):
            await envs.reset(seed=6, options={"low": -0.1})
        for seeds in ([1, 2, 3, 4, 5, 7], [1, 2, 3, 7, 8, 9], [1] * N, [None, 2, 3, 4, 5, 6], (1 << 31) - N + 1):
            with pytest.raises(InvalidSeed):
                await envs.reset(seed=seeds)
        for call in (
            envs.get_attr("gravity"),
            envs.call("close"),
            envs.set_attr("gravity", 1.0),
            envs.is_wrapped(gymnasium.wrappers.TimeLimit),
        ):
            with pytest.raises(NotAllowed, match="implementation envpool"):
                await call
        with pytest.raises(UsageError, match="render_mode"):
            await envs.render()
        with pytest.raises(InvalidAction):
            await envs.step([0, 1, 2, 0, 1, 0])
        assert not different(await envs.step([1] * N), theirs.step(np.ones(N, np.int64)))
    theirs.close()


async def test_closing_frees_its_slots(url: str) -> None:
    async with Mesh(url) as m:
        for seed in range(3):
            async with await m.vector("CartPole-v1", 2 * SLOTS, shards=2) as envs:  # all that there are
                await envs.reset(seed=seed)
                await envs.step([0] * 2 * SLOTS)


@pytest.fixture
def unknown() -> Iterator[str]:
    """The id of an env that Gymnasium has and EnvPool has not."""
    gymnasium.register("ForTest/Unknown-v0", entry_point="tests.mesh.envs:Hooked")
    yield "ForTest/Unknown-v0"
    del gymnasium.registry["ForTest/Unknown-v0"]


async def test_an_env_that_envpool_does_not_have_is_an_error_at_the_start(url: str, unknown: str) -> None:
    with pytest.raises(InvalidName, match="EnvPool does not make ForTest/Unknown-v0"):
        async with EnvWorker({"env": unknown}, url, vectors="envpool"):
            pass


@NAMES
async def test_what_envpool_told_is_on_record(url: str, name: str) -> None:
    async with Mesh(url) as m:
        async with await m.vector(name, N, shards=1, record="full") as envs:
            obs, _ = await envs.reset(seed=3)
            envs.action_space.seed(1)
            told: list[list[Any]] = [[one] for one in obs]
            over = np.zeros(N, bool)
            number = np.zeros(N, int)
            ended = {}
            for _ in range(STEPS):
                obs, _, terminations, truncations, _ = await envs.step(envs.action_space.sample())
                for i in range(N):
                    if over[i]:
                        told[i], number[i] = [obs[i]], number[i] + 1
                        continue
                    told[i].append(obs[i])
                    if terminations[i] or truncations[i]:
                        ended[i, int(number[i])] = np.array(told[i])
                over = terminations | truncations
        by_id = {}
        for _ in range(200):
            by_id = {tuple(map(int, one.episode_id.split(".")[1:])): one.episode_id async for one in m.episodes(name)}
            if ended.keys() <= by_id.keys():
                break
            await asyncio.sleep(0.1)
        for key, observations in ended.items():
            episode = await m.episode(by_id[key])
            assert episode.observations.dtype == observations.dtype
            assert np.array_equal(episode.observations, observations)
        assert (await m.verify(next(iter(by_id.values())))).reasons == ("implementation",)
