"""The sub-environments by name: attributes, methods, wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import OrderEnforcing, RecordEpisodeStatistics, TimeLimit
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from meshrl.adapters.sb3 import MeshVecEnv
from meshrl.errors import NotAllowed, UnencodableValue
from tests.sb3 import envs


@pytest.fixture
def remote(mesh: dict[str, Any]) -> Iterator[MeshVecEnv]:
    venv = MeshVecEnv("OfDicts", 4, mesh=mesh, shards=2)
    venv.reset()
    yield venv
    venv.close()


@pytest.fixture
def local() -> DummyVecEnv:
    venv = DummyVecEnv([envs.OfDicts] * 4)
    venv.reset()
    return venv


INDICES: list[Any] = [None, 0, 3, -1, [2, 0], (1, 1), range(3), iter([3, 2]), [], [-4, 3], np.array([1, 3])]


@pytest.mark.parametrize("indices", INDICES, ids=lambda indices: repr(indices).partition(" object at")[0])
def test_values_come_in_the_order_of_the_indices(remote: MeshVecEnv, indices: Any) -> None:
    for i in range(4):
        remote.set_attr("wind", float(i), indices=i)
    asked: Any = list(indices) if hasattr(indices, "__iter__") else indices
    every = [0.0, 1.0, 2.0, 3.0]
    ids = range(4) if asked is None else asked if isinstance(asked, list) else [asked]
    expected = [every[i] for i in ids]
    assert remote.get_attr("wind", asked) == expected
    assert remote.env_method("gust", 0.0, indices=asked) == expected
    assert remote.env_is_wrapped(TimeLimit, asked) == [False] * len(expected)
    remote.set_attr("wind", 9.0, indices=asked)
    assert remote.get_attr("wind").count(9.0) == len(set(expected))


@pytest.mark.parametrize("index", [4, -5, [0, 4]])
def test_an_index_of_no_sub_environment_is_an_index_error_as_locally(
    remote: MeshVecEnv, local: DummyVecEnv, index: Any
) -> None:
    for venv in (local, remote):
        with pytest.raises(IndexError):
            venv.get_attr("wind", index)
        with pytest.raises(IndexError):
            venv.set_attr("wind", 1.0, index)
        with pytest.raises(IndexError):
            venv.env_method("gust", 1.0, indices=index)
        with pytest.raises(IndexError):
            venv.env_is_wrapped(TimeLimit, index)
    assert remote.get_attr("wind") == [0.0] * 4


def test_one_value_is_set_on_all_also_if_it_is_a_list(remote: MeshVecEnv, local: DummyVecEnv) -> None:
    for venv in (local, remote):
        venv.set_attr("wind", [1, 2, 3, 4])
        assert venv.get_attr("wind") == [[1, 2, 3, 4]] * 4


def test_a_method_takes_arguments_and_keywords(remote: MeshVecEnv, local: DummyVecEnv) -> None:
    for venv in (local, remote):
        assert venv.env_method("gust", 0.5, indices=[1, 2], times=3) == [1.5, 1.5]
        assert venv.get_attr("wind") == [0.0, 1.5, 1.5, 0.0]


def test_what_is_not_there_is_an_attribute_error_as_locally(remote: MeshVecEnv, local: DummyVecEnv) -> None:
    for venv in (local, remote):
        assert not venv.has_attr("nothing")
        assert venv.has_attr("wind")
        assert venv.has_attr("gust")
        with pytest.raises(AttributeError):
            venv.get_attr("nothing")
        with pytest.raises(AttributeError):
            venv.env_method("nothing")
    assert remote.get_attr("wind") == [0.0] * 4


def test_a_private_attribute_stays_on_its_worker(remote: MeshVecEnv) -> None:
    assert not remote.has_attr("_told")
    with pytest.raises(AttributeError, match="only public names"):
        remote.get_attr("_told")


def test_a_method_that_was_read_calls_its_sub_environment(remote: MeshVecEnv, local: DummyVecEnv) -> None:
    for venv in (local, remote):
        for i, gust in enumerate(venv.get_attr("gust")):
            gust(float(i))
        assert venv.get_attr("wind") == [0.0, 1.0, 2.0, 3.0]


def test_a_value_that_cannot_travel_says_so_and_the_session_goes_on(remote: MeshVecEnv) -> None:
    with pytest.raises(UnencodableValue):
        remote.get_attr("unwrapped")
    assert remote.get_attr("wind") == [0.0] * 4


def test_spaces_and_specs_are_read_like_other_attributes(mesh: dict[str, Any]) -> None:
    local = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    remote = MeshVecEnv("CartPole-v1", 2, mesh=mesh)
    for name in ("observation_space", "action_space", "spec", "metadata", "render_mode"):
        assert remote.get_attr(name) == local.get_attr(name)
    assert remote.get_attr("action_space", 0)[0] is not remote.action_space
    remote.close()


def test_wrappers_on_the_worker_are_seen_by_their_class(mesh: dict[str, Any]) -> None:
    for name, make in (("CartPole-v1", lambda: gymnasium.make("CartPole-v1")), ("monitored", envs.monitored)):
        local = DummyVecEnv([make] * 2)
        remote = MeshVecEnv(name, 2, mesh=mesh)
        for wrapper in (TimeLimit, OrderEnforcing, Monitor, RecordEpisodeStatistics, gymnasium.Wrapper):
            assert remote.env_is_wrapped(wrapper) == local.env_is_wrapped(wrapper), wrapper
        remote.close()


def test_set_attr_reaches_no_further_than_that_of_the_local_envs(mesh: dict[str, Any]) -> None:
    """DummyVecEnv sets it on the outermost wrapper, where an env that is wrapped does not see it."""
    local: Any = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")])
    remote: Any = MeshVecEnv("CartPole-v1", 1, mesh=mesh)
    for venv in (local, remote):
        venv.seed(1)
    assert np.array_equal(remote.reset(), local.reset())
    for venv in (local, remote):
        venv.set_attr("gravity", 0.5)
    assert remote.get_attr("gravity") == local.get_attr("gravity") == [0.5]
    for _ in range(5):
        assert np.array_equal(remote.step(np.array([1]))[0], local.step(np.array([1]))[0])
    remote.close()


def test_masks_of_actions_are_those_of_the_local_envs(mesh: dict[str, Any]) -> None:
    local = DummyVecEnv([envs.Masked] * 3)
    remote = MeshVecEnv("Masked", 3, mesh=mesh)
    for venv in (local, remote):
        venv.seed(4)
        venv.reset()
        assert is_masking_supported(venv)
    for _ in range(20):
        masks = get_action_masks(local)
        for got in (get_action_masks(remote), np.stack([masks_of() for masks_of in remote.get_attr("action_masks")])):
            assert got.dtype == masks.dtype
            assert np.array_equal(got, masks)
        actions = masks.argmax(axis=1)
        assert np.array_equal(remote.step(actions)[0], local.step(actions)[0])
    remote.close()


def test_what_the_operator_does_not_allow_is_refused_by_that_name(guarded: dict[str, Any]) -> None:
    remote = MeshVecEnv("Counter", 2, mesh=guarded)
    try:
        assert remote.get_attr("limit") == [10, 10]
        with pytest.raises(NotAllowed, match=r"allow=\('limit',\)"):
            remote.set_attr("limit", 3)
        with pytest.raises(NotAllowed, match=r"allow=\('doubled',\)"):
            remote.env_method("doubled", 2)
        with pytest.raises(NotAllowed):
            remote.get_attr("doubled")[0](2)
        assert remote.has_attr("doubled")
        assert remote.get_attr("limit") == [10, 10]
    finally:
        remote.close()
