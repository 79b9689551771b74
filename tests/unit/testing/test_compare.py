"""Comparing values, episodes and spaces."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl.testing.compare import (
    Episode,
    Transition,
    arrays,
    difference,
    info_difference,
    same,
    short,
    why_outside,
)

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
NESTED = spaces.Dict({"a": BOX, "b": spaces.Tuple((spaces.Discrete(3), BOX))})


def array(*values: float, dtype: Any = np.float32) -> Any:
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("space", "value", "says"),
    [
        (BOX, [0.0, 0.0], "it is list, not an array of shape (2,) and dtype float32"),
        (BOX, array(0, 0, dtype=np.float64), "it has dtype float64, not float32"),
        (BOX, array(0, 0, 0), "it has shape (3,), not (2,)"),
        (BOX, array(0, np.nan), "it has NaN at index [1]"),
        (BOX, array(0, 1.5), "it has 1.5 at index [1], not from -1.0 to 1.0"),
        (spaces.Box(0, 1, (), np.float64), np.array(2.0), "it has 2.0, not from 0.0 to 1.0"),
        (spaces.Discrete(3), 3, "it is 3 (int), not in Discrete(3)"),
        (NESTED, (1, 2), "it is tuple, not a dict"),
        (NESTED, {"a": array(0, 0)}, "it has the keys ['a'], not ['a', 'b']"),
        (NESTED, {"a": array(0, 0), "b": [1, array(0, 0)]}, "at ['b'] it is list, not a tuple"),
        (NESTED, {"a": array(0, 0), "b": (1,)}, "at ['b'] it has 1 parts, not 2"),
        (NESTED, {"a": array(0, 0), "b": (1, array(0, 2))}, "at ['b'][1] it has 2.0 at index [1]"),
    ],
)
def test_reason_why_a_value_is_outside_names_the_place(space: Any, value: Any, says: str) -> None:
    reason = why_outside(space, value)
    assert reason is not None
    assert reason.startswith(says)
    assert not isinstance(value, np.ndarray) or not space.contains(value)


@pytest.mark.parametrize("space", [BOX, NESTED, spaces.Text(5), spaces.Graph(BOX, None), spaces.MultiBinary(3)])
def test_samples_are_inside(space: Any) -> None:
    space.seed(1)
    assert why_outside(space, space.sample()) is None


def test_same_means_same_bits_and_types() -> None:
    assert same({"a": array(np.nan)}, {"a": array(np.nan)})
    assert not same(1, 1.0)
    assert not same(0.0, -0.0)
    assert not same((1,), [1])
    assert not same(array(1.0), array(1.0, dtype=np.float64))


def episode(*rewards: float, obs: float = 0.0, info: dict[str, Any] | None = None) -> Episode:
    return Episode(
        "e1", array(obs), {}, [Transition(array(r), r, False, r == rewards[-1], info or {}) for r in rewards]
    )


def test_difference_names_the_first_place() -> None:
    assert difference(episode(1.0, 2.0), episode(1.0, 2.0)) is None
    assert str(difference(episode(1.0, obs=1.0), episode(1.0))).startswith("the observation of reset is")
    assert str(difference(episode(1.0, 2.0), episode(1.0, 3.0))).startswith("observation of step 2 is")
    one, other = episode(1.0, 2.0), episode(1.0, 2.0)
    other.steps[0].reward = 1
    assert difference(one, other) == "reward of step 1 is 1.0 and 1"
    other = episode(1.0, 2.0)
    other.steps.append(other.steps[-1])
    assert difference(one, other) == "one has 2 steps, the other 3"


def test_info_difference_names_the_key() -> None:
    assert info_difference(episode(1.0, info={"t": 1}), episode(1.0, info={"t": 1})) is None
    assert info_difference(episode(1.0, info={"t": 1}), episode(1.0, info={"t": 2})) == "info['t'] of step 1"
    assert info_difference(episode(1.0), episode(1.0, info={"t": 2})) == "info['t'] of step 1"


def test_arrays_are_found_however_deep() -> None:
    inner = array(1.0)
    assert list(arrays(OrderedDict(a=[1, (inner,)], b="text", c=inner))) == [inner, inner]


def test_short_texts_are_one_line_of_bounded_length() -> None:
    assert len(short(np.zeros((100, 100)))) <= 81
    assert "\n" not in short("a\nb" * 5)
