"""Which actions are refused before anything is sent (D4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.client.actions import checker
from meshrl.errors import InvalidAction
from tests.unit.wire.strategies import all_spaces

BOX = spaces.Box(-1, 1, (2,), np.float32)
WHOLE = spaces.Box(0, 9, (2,), np.int32)
NESTED = spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Tuple((BOX, spaces.MultiDiscrete([2, 3])))})

FITS: list[tuple[spaces.Space[Any], Any]] = [
    (spaces.Discrete(2), 1),
    (spaces.Discrete(2), np.int64(1)),
    (spaces.Discrete(2), np.uint8(1)),
    (spaces.Discrete(2), np.array(1)),
    (spaces.Discrete(2), True),
    (spaces.Discrete(3, start=-1), -1),
    (BOX, np.zeros(2, np.float64)),
    (BOX, np.array([1.0000001, -5.0])),
    (BOX, [0.0, 1.0]),
    (BOX, np.array([1, 0])),
    (spaces.Box(-1, 1, (), np.float32), 0.5),
    (WHOLE, np.array([1, 2], np.int64)),
    (spaces.MultiBinary(3), np.array([0, 1, 1], np.int8)),
    (spaces.MultiBinary(3), [True, False, True]),
    (spaces.MultiDiscrete([2, 3]), [1, 2]),
    (spaces.Text(3), "abc"),
    (NESTED, {"b": (np.zeros(2), [1, 2]), "a": 1}),
    (spaces.OneOf((spaces.Discrete(2), BOX)), (np.int64(1), np.zeros(2))),
    (spaces.Sequence(spaces.Discrete(2)), (0, 1, 1)),
]

REFUSED: list[tuple[spaces.Space[Any], Any, str]] = [
    (spaces.Discrete(2), 2, "is 2, not from 0 to 1"),
    (spaces.Discrete(2), -1, "is -1"),
    (spaces.Discrete(3, start=-1), 2, "not from -1 to 1"),
    (spaces.Discrete(2), 1.0, "is float"),
    (spaces.Discrete(2), np.float32(1), "is float32"),
    (spaces.Discrete(2), "1", "is str"),
    (spaces.Discrete(2), None, "is NoneType"),
    (spaces.Discrete(2), np.array([1]), r"shape \(1,\)"),
    (spaces.Discrete(2), np.array(1.0), "float64"),
    (BOX, np.zeros(3), r"shape \(3,\), not \(2,\)"),
    (BOX, np.zeros((1, 2)), "shape"),
    (BOX, np.array(["a", "b"]), "dtype"),
    (BOX, np.zeros(2, complex), "dtype"),
    (BOX, np.zeros(2, bool), "dtype"),
    (BOX, np.array([None, 1]), "dtype object"),
    (BOX, [[1.0], [1.0, 2.0]], "ragged"),
    (BOX, {"a": 1}, "is dict"),
    (WHOLE, np.zeros(2, np.float32), "dtype float32, not int32"),
    (spaces.MultiBinary(3), np.array([0, 2, 1]), r"has 2 at index \[1\]"),
    (spaces.MultiBinary(3), np.zeros(2, int), "shape"),
    (spaces.MultiDiscrete([2, 3]), np.array([1, 3]), r"index \[1\], not from 0 to 2"),
    (spaces.MultiDiscrete([2, 3]), np.array([1.0, 2.0]), "whole numbers"),
    (spaces.Text(3), "abcd", "not in the space"),
    (NESTED, {"a": 1}, "keys"),
    (NESTED, {"a": 1, "b": (np.zeros(2), [1, 3])}, r"\['b'\]\[1\]"),
    (NESTED, {"a": 1, "b": (np.zeros(2),)}, "1 parts, not 2"),
    (NESTED, (1, 2), "is tuple"),
    (spaces.OneOf((spaces.Discrete(2), BOX)), (2, 0), "chooses 2"),
    (spaces.OneOf((spaces.Discrete(2), BOX)), (0, 5), "is 5"),
    (spaces.OneOf((spaces.Discrete(2), BOX)), 0, "pair"),
    (spaces.Sequence(spaces.Discrete(2)), (0, 2), "is 2"),
]


@pytest.mark.parametrize(("space", "action"), FITS, ids=repr)
def test_an_action_that_fits_passes(space: spaces.Space[Any], action: Any) -> None:
    checker(space, "env")(action)


@pytest.mark.parametrize(("space", "action", "why"), REFUSED, ids=repr)
def test_an_action_that_does_not_fit_is_refused_with_the_reason(
    space: spaces.Space[Any], action: Any, why: str
) -> None:
    with pytest.raises(InvalidAction, match=why) as caught:
        checker(space, "env")(action)
    assert isinstance(caught.value, ValueError)


def test_strict_checks_a_boxs_bounds_and_refuses_nan() -> None:
    check = checker(BOX, "env", strict=True)
    check(np.ones(2))
    for action in (np.array([1.5, 0]), np.array([0, -1.1]), np.array([np.nan, 0])):
        with pytest.raises(InvalidAction, match="bounds"):
            check(action)


@settings(max_examples=150)
@given(all_spaces, st.integers(0, 2**31 - 1))
def test_whatever_a_space_samples_passes(space: spaces.Space[Any], seed: int) -> None:
    space.seed(seed)
    checker(space, "env", strict=True)(space.sample())
