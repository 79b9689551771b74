from __future__ import annotations

from typing import Any

import gymnasium
import pytest

from meshrl.adapters.spec import ENTRY_POINT, own_metadata, own_spec


def test_an_envs_spec_makes_envs_and_vectors_a_vectors_spec_vectors_alone() -> None:
    env, vector = own_spec("cartpole", ENTRY_POINT, {}, None), own_spec("cartpole", None, {"num_envs": 2}, None)
    assert (env.entry_point, env.vector_entry_point) == ("meshrl:make", "meshrl:make_vec")
    assert (vector.entry_point, vector.vector_entry_point) == (None, "meshrl:make_vec")
    assert vector.kwargs == {"name": "cartpole", "num_envs": 2}
    with pytest.raises(gymnasium.error.Error, match="entry_point"):
        gymnasium.make(vector)


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
