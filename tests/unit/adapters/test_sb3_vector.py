"""What an SB3 VecEnv is made of, without Stable-Baselines3: groups of options, and infos at an episode's end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshrl.adapters.sb3_vector import ended, groups_of, only
from meshrl.errors import MalformedMessage, UnencodableValue


def seen(options: list[Any]) -> list[Any]:
    return [(mask if mask is None else mask.tolist(), of) for mask, of in groups_of(options)]


def test_equal_options_are_one_reset_of_all() -> None:
    assert seen([{}, None, {}]) == [(None, None)]
    assert seen([{"a": 1}, {"a": 1}]) == [(None, {"a": 1})]


def test_those_with_equal_options_are_reset_together() -> None:
    first, second = {"at": np.arange(2)}, {"at": np.arange(2)}
    (one, of), (none, nothing), (rest, other) = groups_of([first, {}, second, {"at": np.arange(3)}, None])
    assert [mask.tolist() for mask in (one, none, rest) if mask is not None] == [
        [True, False, True, False, False],
        [False, True, False, False, True],
        [False, False, False, True, False],
    ]
    assert nothing is None
    assert of is not None
    assert of["at"].tolist() == [0, 1]
    assert other is not None
    assert other["at"].tolist() == [0, 1, 2]


def test_options_of_other_types_are_other_options() -> None:
    assert len(groups_of([{"a": 1}, {"a": 1.0}, {"a": True}])) == 3


def test_options_that_cannot_travel_are_refused() -> None:
    with pytest.raises(UnencodableValue):
        groups_of([{"a": object()}])


FINAL = {"final_obs": 3, "final_info": {"a": 1}}


def test_an_end_has_the_last_info_and_observation_and_the_resets_info() -> None:
    assert ended([dict(FINAL)]) == ({"a": 1}, 3, {})
    assert ended([dict(FINAL), {"b": 2}]) == ({"a": 1}, 3, {"b": 2})
    assert only([]) == {}
    assert only([{"b": 2}]) == {"b": 2}


@pytest.mark.parametrize(
    "told", [[], [{"a": 1}], [{"final_obs": 3, "final_info": 4}], [dict(FINAL), {"a": 1}, {"b": 2}]], ids=repr
)
def test_an_end_without_its_last_observation_and_info_is_refused(told: Any) -> None:
    with pytest.raises(MalformedMessage):
        ended(told)


def test_two_infos_without_an_end_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        only([dict(FINAL), {}])
