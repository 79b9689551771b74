from __future__ import annotations

from typing import Any

import gymnasium
import pytest

from meshrl.adapters.spec import ENTRY_POINT, own_metadata, own_spec


def test_any_spec_makes_envs_and_vectors_and_a_vectors_has_the_limit_of_steps() -> None:
    remote = gymnasium.spec("CartPole-v1")
    env = own_spec("cartpole", ENTRY_POINT, {}, remote)
    vector = own_spec("cartpole", ENTRY_POINT, {"num_envs": 2}, remote, vector=True)
    for spec in (env, vector):
        assert (spec.entry_point, spec.vector_entry_point) == ("meshrl:make", "meshrl:make_vec")
        assert spec.reward_threshold == 475.0
    assert (env.max_episode_steps, vector.max_episode_steps) == (None, 500)
    assert vector.kwargs == {"name": "cartpole", "num_envs": 2}
    assert own_spec("cartpole", ENTRY_POINT, {}, None, vector=True).max_episode_steps is None


@pytest.mark.parametrize(
    ("modes", "env", "vector"),
    [
        (["rgb_array"], ["human", "rgb_array"], ["rgb_array"]),
        (["human", "rgb_array"], ["human", "rgb_array"], ["rgb_array"]),
        (["human", "ansi"], ["ansi"], ["ansi"]),
    ],
)
def test_a_vector_never_offers_to_show_itself(modes: list[str], env: list[str], vector: list[str]) -> None:
    said: dict[str, Any] = {"render_modes": modes}
    assert own_metadata(said) == {"render_modes": env}
    assert own_metadata(said, vector=True) == {"render_modes": vector}
    assert said == {"render_modes": modes}
