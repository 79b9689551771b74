"""``MeshVecEnv`` against ``DummyVecEnv`` over local envs: the same values, types and bits.

A random script of operations is played on three at once: the local one, a remote one of one shard and one of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from meshrl.adapters.sb3 import MeshVecEnv
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.test_vector_parity import different
from tests.sb3 import envs

NUM_ENVS = 5
STEPS = 420  # Pendulum's episodes end after 200, and there are no resets in the second half


class Played(NamedTuple):
    """What a script does to one env besides stepping it."""

    reads: tuple[str, ...]
    options: tuple[dict[str, Any], ...] = ()


PLAYED = {
    "CartPole-v1": Played(("state", "gravity"), ({"low": -0.1, "high": 0.1}, {"low": -0.01})),
    "Pendulum-v1": Played(("state", "g"), ({"x_init": 1.0, "y_init": 0.5}, {"x_init": np.float64(0.3)})),
    "FrozenLake-v1": Played(("s", "lastaction")),
    TAXI: Played(("s", "lastaction"), ({"unknown": [1]},)),
    "OfDicts": Played(("steps", "wind"), ({"a": (1, 2)}, {"array": np.arange(3)})),
    "OfTuples": Played(("steps", "wind"), ({"b": None},)),
    "OfActions": Played(("steps", "wind")),
}


def local_env(name: str, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    made: gymnasium.Env[Any, Any]
    made = getattr(envs, name)(render_mode) if hasattr(envs, name) else gymnasium.make(name, render_mode=render_mode)
    return made


class Script:
    """Plays the same on a local VecEnv and on remote ones, and compares what each gives.

    Attributes:
        ends: episodes that ended.
    """

    def __init__(self, name: str, venvs: list[VecEnv], seed: int) -> None:
        self.name = name
        self.local, *self.remotes = venvs
        self.venvs = venvs
        self.played = PLAYED[name]
        self.draw = np.random.default_rng(seed)
        self.ends = 0
        self.local.action_space.seed(seed)

    def same(self, what: str, do: Callable[[VecEnv], Any]) -> Any:
        expected = do(self.local)
        for remote in self.remotes:
            found = different(do(remote), expected, what)
            assert not found, f"{found} ({len(remote.shards)} shards)"
        return expected

    def reset(self) -> None:
        self.same("reset", lambda venv: venv.reset())
        self.same("reset_infos", lambda venv: venv.reset_infos)

    def seed(self) -> None:
        seed = int(self.draw.integers(2**32))
        self.same("seed", lambda venv: venv.seed(seed))

    def set_options(self) -> None:
        kinds: list[Any] = [{}, *self.played.options]
        if self.draw.random() < 0.5:
            options = kinds[self.draw.integers(len(kinds))]
        else:
            options = [kinds[i] for i in self.draw.integers(len(kinds), size=NUM_ENVS)]
        self.same("set_options", lambda venv: venv.set_options(options))

    def step(self) -> None:
        actions: Any = [self.local.action_space.sample() for _ in range(NUM_ENVS)]
        if not isinstance(actions[0], dict) and self.draw.random() < 0.9:
            actions = np.array(actions)
        _, _, dones, _ = self.same("step", lambda venv: venv.step(actions))
        self.same("reset_infos", lambda venv: venv.reset_infos)
        self.ends += int(dones.sum())

    def indices(self) -> Any:
        several = self.draw.integers(-NUM_ENVS, NUM_ENVS, size=int(self.draw.integers(4))).tolist()
        return [None, int(self.draw.integers(NUM_ENVS)), several, range(1, 4)][int(self.draw.integers(4))]

    def look(self) -> None:
        name, indices = self.played.reads[int(self.draw.integers(len(self.played.reads)))], self.indices()
        self.same(name, lambda venv: venv.get_attr(name, indices))

    def change(self) -> None:
        indices, value = self.indices(), [1.5, "text", [1, 2], (3,)][int(self.draw.integers(4))]
        self.same("set_attr", lambda venv: venv.set_attr("label", value))
        self.same("set_attr", lambda venv: venv.set_attr("label", None, indices))
        self.same("label", lambda venv: venv.get_attr("label"))
        if "wind" in self.played.reads:  # of those that no wrapper is around
            wind = float(self.draw.random())
            self.same("set_attr", lambda venv: venv.set_attr("wind", wind, indices))
            self.same("gust", lambda venv: venv.env_method("gust", 0.5, indices=indices, times=2))

    def play(self, steps: int) -> None:
        # The first reset of all, already, with options that differ.
        self.same("seed", lambda venv: venv.seed(3))
        self.set_options()
        self.reset()
        for step in range(steps):
            self.step()
            for chance, do in ((0.03, self.look), (0.03, self.change)):
                if self.draw.random() < chance:
                    do()
            if step < steps // 2 and self.draw.random() < 0.06:
                for do in (self.seed, self.set_options):
                    if self.draw.random() < 0.6:
                        do()
                self.reset()


@pytest.mark.parametrize("name", PLAYED)
def test_a_script_of_steps_resets_and_reads_gives_what_the_local_one_gives(mesh: dict[str, Any], name: str) -> None:
    local = DummyVecEnv([lambda: local_env(name)] * NUM_ENVS)
    remotes = [MeshVecEnv(name, NUM_ENVS, mesh=mesh, shards=shards) for shards in (1, 2)]
    try:
        assert [len(remote.shards) for remote in remotes] == [1, 2]
        for remote in remotes:
            for fact in ("num_envs", "observation_space", "action_space", "metadata", "render_mode", "reset_infos"):
                assert getattr(remote, fact) == getattr(local, fact), fact
        script = Script(name, [local, *remotes], seed=sum(map(ord, name)))
        script.play(STEPS)
        assert script.ends >= NUM_ENVS
    finally:
        for venv in (local, *remotes):
            venv.close()


def test_a_first_reset_with_options_of_their_own_gives_each_what_it_gives_locally(mesh: dict[str, Any]) -> None:
    local = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
    remote = MeshVecEnv("CartPole-v1", 3, mesh=mesh)
    options = [{"low": -0.01, "high": 0.01}, {}, {"low": 0.2, "high": 0.3}]
    for venv in (local, remote):
        venv.seed(7)
        venv.set_options(options)
    assert not different(remote.reset(), local.reset())
    assert not different(remote.reset(), local.reset(), "the seeds and options are used once")
    remote.close()


def test_arrays_that_were_handed_out_never_change(mesh: dict[str, Any]) -> None:
    remote: VecEnv = MeshVecEnv("CartPole-v1", 3, mesh=mesh)
    remote.seed(1)
    kept = [remote.reset()]
    actions = np.zeros(3, np.int64)
    for _ in range(30):
        remote.step_async(actions)
        actions[:] = 1  # those that are under way are another copy
        observations, rewards, dones, infos = remote.step_wait()
        actions[:] = 0
        kept += [
            observations,
            rewards,
            dones,
            *(i["terminal_observation"] for i in infos if "terminal_observation" in i),
        ]
    copies = [one.copy() for one in kept]
    for one in kept:
        assert one.flags.writeable
        assert one.flags.owndata or one.base.flags.owndata
    remote.step(np.ones(3, np.int64))
    remote.reset()
    assert all(np.array_equal(one, copy) for one, copy in zip(kept, copies, strict=True))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(kept) for b in kept[:i])
    remote.close()


@pytest.mark.parametrize("render_mode", ["rgb_array", "ansi", None])
def test_renders_are_the_local_ones(mesh: dict[str, Any], render_mode: str | None) -> None:
    local = DummyVecEnv([lambda: local_env("OfDicts", render_mode)] * 3)
    remote = MeshVecEnv("OfDicts", 3, mesh=mesh, render_mode=render_mode)
    assert remote.render_mode == local.render_mode == render_mode
    told: list[list[Any]] = []
    for venv in (local, remote):
        venv.seed(2)
        venv.reset()
        venv.step(np.zeros((3, 2), np.float32))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            got = [venv.get_images(), venv.render(), venv.render("rgb_array"), venv.render("other")]
            got.append(venv.env_method("render", indices=[2, 0]))
        told.append([got, [str(one.message) for one in warned if one.category is UserWarning]])
        venv.close()
    assert told[0][1], "in each of the modes something is warned of"
    assert not different(told[1], told[0])


def test_images_of_cartpole_are_the_local_ones(mesh: dict[str, Any]) -> None:
    local = DummyVecEnv([lambda: gymnasium.make("CartPole-v1", render_mode="rgb_array")] * 2)
    remote = MeshVecEnv("CartPole-v1", 2, mesh=mesh, render_mode="rgb_array")
    for venv in (local, remote):
        venv.seed(2)
        venv.reset()
    assert not different(list(remote.get_images()), list(local.get_images()))
    assert not different(remote.render(), local.render())
    assert remote.metadata == local.metadata
    for venv in (local, remote):
        venv.close()
