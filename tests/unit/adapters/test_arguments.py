"""What is written for the arguments of the synchronous faces, and what is refused with the right one's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import meshrl
from meshrl.adapters.arguments import check_vectors_kwargs, count_of, kwargs_of_one, mesh_arguments, served_name
from meshrl.adapters.vector import MeshVectorEnv
from meshrl.errors import UsageError


def test_a_mesh_that_is_a_text_is_its_url() -> None:
    assert mesh_arguments("nats://host:4222") == {"url": "nats://host:4222"}
    assert mesh_arguments(None) == mesh_arguments({}) == {}
    assert mesh_arguments({"namespace": "lab"}) == {"namespace": "lab"}
    with pytest.raises(UsageError, match=r"a url or a dict .* not 4222"):
        mesh_arguments(4222)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_envs", "count"), [(3, 3), (np.int64(3), 3)])
def test_num_envs_is_any_whole_number(num_envs: Any, count: int) -> None:
    assert (count_of(num_envs), type(count_of(num_envs))) == (count, int)


@pytest.mark.parametrize(
    ("num_envs", "says"),
    [
        (0, "num_envs is at least 1, not 0"),
        (-2, "num_envs is at least 1, not -2"),
        (8.0, r"whole number, not 8\.0"),
        ("8", "whole number, not str"),
        (True, "whole number, not True"),
        (None, "whole number, not None"),
    ],
)
def test_a_num_envs_that_is_none_is_refused_by_the_face_itself(num_envs: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        meshrl.make_vec("CartPole-v1", num_envs, mesh="nats://nowhere")


def test_functions_are_no_name() -> None:
    with pytest.raises(UsageError) as refused:
        served_name("MeshVecEnv", [lambda: None])
    assert refused.value.message == (
        'MeshVecEnv takes the name of a served env, not functions: MeshVecEnv("CartPole-v1", 8)'
    )
    with pytest.raises(UsageError, match=r'not functions: make\("CartPole-v1"\)'):
        meshrl.make(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not 5"):
        MeshVectorEnv(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("vectorization_mode", "workers decide"),
        ("vector_kwargs", "workers decide"),
        ("wrappers", "wrap the vector, or serve a wrapped env"),
        ("env_kwargs", r"pass them as keyword arguments: make_vec\('CartPole-v1', ..., size=5\)"),
        ("n_envs", "it is num_envs"),
        ("autoreset", "it is autoreset_mode"),
        ("seed", r"reset\(seed=...\)"),
    ],
)
def test_arguments_of_other_libraries_are_named_with_what_they_are_here(argument: str, says: str) -> None:
    given: dict[str, Any] = {argument: "sync"}
    with pytest.raises(UsageError, match=f"make_vec has no {argument}: .*{says}"):
        meshrl.make_vec("CartPole-v1", 2, mesh="nats://nowhere", **given)
    with pytest.raises(UsageError, match=f"make has no {argument}: "):
        meshrl.make("CartPole-v1", mesh="nats://nowhere", **given)


def test_a_vectors_arguments_are_none_of_one_env() -> None:
    with pytest.raises(UsageError, match=r"make has no num_envs: .* meshrl.make_vec\('CartPole-v1', num_envs\)"):
        meshrl.make("CartPole-v1", mesh="nats://nowhere", num_envs=2)


def test_arguments_of_the_env_itself_pass() -> None:
    given = {"size": 5, "max_episode_steps": 9}
    check_vectors_kwargs("name", given)
    assert kwargs_of_one("name", given) == given


def test_what_a_vectors_spec_says_of_the_vector_is_left_out_of_one_env() -> None:
    said = {"size": 5, "num_envs": 8, "seeding": "derived", "shards": 2, "vectorization_mode": "vector_entry_point"}
    assert kwargs_of_one("name", said) == {"size": 5}
