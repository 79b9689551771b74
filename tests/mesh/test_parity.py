"""``meshrl.make`` against ``gymnasium.make``: the same values, types, bits, warnings."""

import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match

import meshrl
from meshrl.adapters.gymnasium import MeshEnv
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.gymnasium_ids import PARITY_IDS
from tests.mesh.worker_process import WorkerProcess

STEPS = 500


@pytest.fixture(scope="module")
def mesh() -> Iterator[dict[str, Any]]:
    with EmbeddedServer.start() as server, WorkerProcess(server.url, {name: name for name in PARITY_IDS}):
        yield {"url": server.url}


@pytest.fixture(params=PARITY_IDS)
def pair(request: pytest.FixtureRequest, mesh: dict[str, Any]) -> Iterator[tuple[gymnasium.Env, gymnasium.Env]]:
    with gymnasium.make(request.param) as local, meshrl.make(request.param, mesh=mesh) as remote:
        yield local, remote


def bits(value: Any) -> Any:
    """A form of ``value`` that is equal only for equal types, shapes, orders of keys and bits (NaN included)."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return kind, [bits(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return kind, struct.pack("d", value)
    return kind, value


def test_what_counts_as_equal_tells_types_and_bits_apart() -> None:
    pairs = [(1, 1.0), (1, True), (0.0, -0.0), (1.0, np.float64(1)), (np.float32(1), np.float64(1)), ((1,), [1])]
    assert all(bits(a) != bits(b) for a, b in pairs)
    assert bits({"a": float("nan")}) == bits({"a": float("nan")})


def test_gymnasium_finds_that_the_environments_match(pair: tuple[gymnasium.Env, gymnasium.Env]) -> None:
    check_environments_match(*pair, num_steps=STEPS)


def test_every_type_and_bit_is_the_local_envs(pair: tuple[gymnasium.Env, gymnasium.Env]) -> None:
    local, remote = pair
    local.action_space.seed(3)
    assert bits(local.reset(seed=11)) == bits(remote.reset(seed=11))
    for step in range(STEPS):
        action = local.action_space.sample()
        ours, theirs = remote.step(action), local.step(action)
        assert bits(ours) == bits(theirs)
        if theirs[2] or theirs[3] or step % 97 == 96:
            assert bits(remote.reset()) == bits(local.reset())  # unseeded: both generators go on
    assert bits(remote.reset(seed=12, options={})) == bits(local.reset(seed=12, options={}))


def test_spaces_and_facts_are_the_local_envs(pair: tuple[gymnasium.Env, gymnasium.Env]) -> None:
    local, remote = pair
    assert remote.observation_space == local.observation_space
    assert remote.action_space == local.action_space
    assert remote.observation_space.dtype == local.observation_space.dtype
    # Gymnasium 1.2's SyncVectorEnv writes its own mode into the class's metadata, for all envs of this process.
    assert remote.metadata == {key: value for key, value in local.metadata.items() if key != "autoreset_mode"}
    assert isinstance(remote, MeshEnv)
    assert remote.remote_spec is not None
    assert local.spec is not None
    assert remote.remote_spec.id == local.spec.id
    assert remote.remote_spec.max_episode_steps == local.spec.max_episode_steps


def test_a_first_reset_without_a_seed_tells_the_seed_it_used(pair: tuple[gymnasium.Env, gymnasium.Env]) -> None:
    local, remote = pair
    first = remote.reset()
    assert bits(first) == bits(local.reset(seed=remote.np_random_seed))
    assert isinstance(remote, MeshEnv)
    assert remote.state().seed == remote.np_random_seed


def test_a_seed_read_before_the_first_reset_is_the_one_it_uses(mesh: dict[str, Any]) -> None:
    with gymnasium.make("CartPole-v1") as local, meshrl.make("CartPole-v1", mesh=mesh) as remote:
        seed = remote.np_random_seed
        assert bits(remote.reset()) == bits(local.reset(seed=seed))
        assert remote.np_random_seed == seed


@pytest.mark.parametrize("mode", ["rgb_array", "ansi", "rgb_array_list"])
def test_renders_are_the_local_envs(mesh: dict[str, Any], mode: str) -> None:
    with (
        gymnasium.make("FrozenLake-v1", render_mode=mode) as local,
        meshrl.make("FrozenLake-v1", render_mode=mode, mesh=mesh) as remote,
    ):
        assert remote.render_mode == local.render_mode
        local.reset(seed=1)
        remote.reset(seed=1)
        for action in (2, 1, 1):
            local.step(action)
            remote.step(action)
        assert bits(remote.render()) == bits(local.render())


def warned(env: gymnasium.Env) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    # The class of the env stands in some of them.
    return sorted(re.sub(r"<.*>", "<env>", str(w.message)) for w in caught if issubclass(w.category, UserWarning))


@pytest.mark.parametrize("name", PARITY_IDS)
def test_check_env_passes_and_warns_as_for_the_local_env(
    mesh: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with gymnasium.make(name) as local, meshrl.make(name, mesh=mesh) as remote:
        expected = warned(local.unwrapped)
        assert warned(remote) == expected


def test_wrong_uses_raise_what_gymnasium_raises(mesh: dict[str, Any]) -> None:
    with gymnasium.make("CartPole-v1") as local, meshrl.make("CartPole-v1", mesh=mesh) as remote:
        for env in (local, remote):
            with pytest.raises(gymnasium.error.ResetNeeded):
                env.step(0)
        remote.reset(seed=1)
        with pytest.raises(meshrl.errors.InvalidAction):
            remote.step(2)
        remote.step(1)  # nothing was sent, and nothing is broken


def test_sync_vector_env_of_remotes_is_that_of_locals(mesh: dict[str, Any]) -> None:
    local = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
    remote = gymnasium.vector.SyncVectorEnv([lambda: meshrl.make("CartPole-v1", mesh=mesh)] * 3)
    local.action_space.seed(5)
    try:
        assert bits(remote.reset(seed=7)) == bits(local.reset(seed=7))
        for _ in range(100):
            actions = local.action_space.sample()
            assert bits(remote.step(actions)) == bits(local.step(actions))
        assert remote.get_attr("gravity") == local.get_attr("gravity")
    finally:
        local.close()
        remote.close()
