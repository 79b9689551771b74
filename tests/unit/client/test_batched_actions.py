"""Which batches of actions are refused before anything is sent, and by which index (D4)."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshrl.client.actions import checker
from meshrl.client.batched_actions import batched_checker
from meshrl.errors import InvalidAction
from meshrl.wire.batches import batching
from tests.unit.wire.strategies import all_spaces, same

TWO = spaces.Discrete(2)
BOX = spaces.Box(-1, 1, (2,), np.float32)
WHOLE = spaces.Box(0, 9, (2,), np.int32)
POINT = spaces.Box(-1, 1, (), np.float32)
MULTI = spaces.MultiDiscrete([2, 3])
BITS = spaces.MultiBinary(3)
TEXT = spaces.Text(3)
NESTED = spaces.Dict({"a": TWO, "b": spaces.Tuple((BOX, MULTI))})
MIXED = spaces.Dict({"a": TWO, "b": TEXT})


class SmallBox(spaces.Box):
    """A subclass has rules of its own: whatever its ``contains`` says."""


def passed(space: spaces.Space[Any], actions: Any, n: int = 2, *, strict: bool = False) -> Any:
    return batched_checker(space, n, "env", strict=strict)(actions)


# --------------------------------------------------------------------------- what passes

FITS: list[tuple[spaces.Space[Any], Any, Any]] = [
    (TWO, [0, 1], np.array([0, 1])),
    (TWO, (0, 1), np.array([0, 1])),
    (TWO, range(2), np.array([0, 1])),
    (TWO, iter([0, 1]), np.array([0, 1])),
    (TWO, [np.int64(0), np.array(1)], np.array([0, 1])),
    (TWO, [True, False], np.array([1, 0])),
    (TWO, [np.uint64(1), np.int64(0)], np.array([1, 0])),
    (TWO, np.array([0, 1], object), np.array([0, 1])),
    (spaces.Discrete(3, start=-1), [-1, 1], np.array([-1, 1])),
    (BOX, [[0.0, 1.0], [2.0, 3.0]], np.array([[0.0, 1.0], [2.0, 3.0]])),
    (BOX, [np.zeros(2, np.float32), [1, 2]], np.array([[0.0, 0.0], [1, 2]])),
    (POINT, [0.5, 1], np.array([0.5, 1.0])),
    (WHOLE, [np.array([1, 2], np.uint64), np.array([3, 4])], np.array([[1, 2], [3, 4]])),
    (MULTI, [[0, 2], [1, 0]], np.array([[0, 2], [1, 0]])),
    (BITS, [[True, False, True], [False] * 3], np.array([[True, False, True], [False] * 3])),
    (TEXT, ["a", "b"], ("a", "b")),
    (TEXT, np.array(["a", "b"]), (np.str_("a"), np.str_("b"))),
    (
        NESTED,
        MappingProxyType({"b": [[[0, 1], [2, 3]], [[0, 1], [1, 2]]], "a": [True, True]}),
        {"a": np.array([1, 1]), "b": (np.array([[0, 1], [2, 3]]), np.array([[0, 1], [1, 2]]))},
    ),
    (spaces.Tuple((TWO, TWO)), np.array([[0, 1], [1, 0]]), (np.array([0, 1]), np.array([1, 0]))),
    (spaces.Tuple(()), (), ()),
    (SmallBox(-1, 1, (2,)), np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)),
]


@pytest.mark.parametrize(("space", "actions", "travels"), FITS)
def test_a_batch_that_fits_travels_as_arrays(space: spaces.Space[Any], actions: Any, travels: Any) -> None:
    made = passed(space, actions)
    assert same(made, travels)
    batching(space).check(made, 2, "actions", exact=False)


ARRAYS: list[tuple[spaces.Space[Any], np.ndarray[Any, Any]]] = [
    (TWO, np.array([0, 1], np.int64)),
    (TWO, np.array([0, 1], np.uint8)),
    (TWO, np.array([0, 1, 1, 0])[::2]),
    (BOX, np.zeros((2, 2), np.float64)),
    (BOX, np.full((2, 2), 1.0000001)),
    (BOX, np.full((2, 2), np.nan, np.float32)),
    (BOX, np.zeros((2, 2), ">f4")),
    (BOX, np.zeros((2, 2), np.int8)),
    (BOX, np.asfortranarray(np.zeros((2, 2)))),
    (POINT, np.zeros(2)),
    (WHOLE, np.zeros((2, 2), np.int64)),
    (MULTI, np.zeros((2, 2), np.int32)),
    (BITS, np.zeros((2, 3), bool)),
]


@pytest.mark.parametrize(("space", "actions"), ARRAYS)
def test_an_array_is_passed_through_as_it_is(space: spaces.Space[Any], actions: np.ndarray[Any, Any]) -> None:
    assert passed(space, actions) is actions
    nested = passed(spaces.Dict({"a": space, "b": TWO}), {"a": actions, "b": [True, False]})
    assert nested["a"] is actions  # even when another part had to be looked at one by one


def test_a_subclass_of_array_travels_as_an_array() -> None:
    actions = np.zeros((2, 2)).view(np.recarray)
    made = passed(BOX, actions)
    assert type(made) is np.ndarray
    assert np.shares_memory(made, actions)


# --------------------------------------------------------------------------- what is refused, and where

REFUSED: list[tuple[spaces.Space[Any], Any, int, str]] = [
    (TWO, [0, 1, 2, 5], 2, "is 2, not from 0 to 1"),
    (TWO, np.array([0, 1, -1, 2]), 2, "is -1"),
    (TWO, [0, 0, 0, 1.0], 3, "is float, not a whole number"),
    (TWO, np.zeros(4), 0, "is float64"),
    (TWO, np.zeros(4, bool), 0, "is bool"),
    (TWO, [0, None, 1, 0], 1, "is NoneType"),
    (TWO, [0, "1", 1, 0], 1, "is str"),
    (TWO, [0, 1, [1], 0], 2, "is list"),
    (TWO, np.zeros((4, 1), int), 0, r"shape \(1,\)"),
    (TWO, [0, 2**70, 0, 0], 1, "not from 0 to 1"),
    (BOX, np.zeros((4, 3)), 0, r"has shape \(3,\), not \(2,\)"),
    (BOX, np.zeros(4), 0, r"not an array of shape|has shape"),
    (BOX, [[0, 0], [0, 0], [0, 0, 0], [0, 0]], 2, r"has shape \(3,\)"),
    (BOX, [[0, 0], [0, 0], [0, 0], ["a", "b"]], 3, "has dtype"),
    (BOX, [[0, 0], [0, None], [0, 0], [0, 0]], 1, "has dtype object"),
    (BOX, np.zeros((4, 2), complex), 0, "has dtype complex128"),
    (WHOLE, np.zeros((4, 2)), 0, "has dtype float64, not int32"),
    (MULTI, np.array([[0, 0], [1, 2], [1, 3], [2, 0]]), 2, r"has 3 at index \[1\], not from 0 to 2"),
    (MULTI, [[0, 0], [0.0, 0], [0, 0], [0, 0]], 1, "has dtype float64"),
    (BITS, np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 2]]), 3, "has 2"),
    (TEXT, ("a", "b", "long text", "c"), 2, "not in the space"),
    (TEXT, ("a", 5, "long text", "c"), 1, "not in the space"),
    (
        NESTED,
        {"a": [0, 0, 0, 2], "b": (np.zeros((4, 2)), [[0, 0], [0, 9], [0, 0], [0, 0]])},
        1,
        r"at \['b'\]\[1\] has 9",
    ),
    (NESTED, {"a": [0, 2, 0, 0], "b": (np.zeros((4, 2)), [[0, 0], [0, 9], [0, 0], [0, 0]])}, 1, r"at \['a'\] is 2"),
    (MIXED, {"a": np.zeros(4, int), "b": ("a", "b", "c", 5)}, 3, r"at \['b'\]"),
    (spaces.Sequence(TWO, stack=True), (np.zeros(1, int), None, None, None), 1, "cannot be checked: TypeError"),
    (SmallBox(-1, 1, (2,)), np.array([[0, 0], [0, 5], [0, 0], [0, 0]], np.float32), 1, "not in the space"),
]


@pytest.mark.parametrize(("space", "actions", "index", "why"), REFUSED)
def test_the_first_bad_action_is_refused_by_its_index(
    space: spaces.Space[Any], actions: Any, index: int, why: str
) -> None:
    check = batched_checker(space, 4, "cart")
    with pytest.raises(InvalidAction, match=rf"cart, sub-environment {index}: the action .*({why})") as caught:
        check(actions)
    assert caught.value.details["env_id"] == index
    assert isinstance(caught.value.details["action"], str)
    with pytest.raises(InvalidAction, match=f"sub-environment {index + 20}:") as caught:
        check(actions, np.arange(20, 24))
    assert type(caught.value.details["env_id"]) is int
    assert caught.value.details["env_id"] == index + 20


WHOLLY_WRONG: list[tuple[spaces.Space[Any], Any, str]] = [
    (TWO, 1, "are int, not an array of 4"),
    (TWO, None, "are NoneType"),
    (TWO, np.array(1), "are ndarray"),
    (TWO, "0101", "are str"),
    (TWO, {"a": 1}, "are dict"),
    (TWO, [0, 1, 1], "are 3, not 4, one for each sub-environment"),
    (TWO, np.zeros(5, int), "are 5, not 4"),
    (TWO, [], "are 0, not 4"),
    (BOX, np.zeros((2, 4)), "are 2, not 4"),
    (TEXT, "abcd", "are str, not a tuple of 4"),
    (TEXT, ("a", "b", "c"), "are 3, not 4"),
    (NESTED, [0] * 4, "are list, not a dict of batches"),
    (NESTED, {"a": [0] * 4}, r"have the keys \['a'\], not \['a', 'b'\]"),
    (NESTED, {"a": [0] * 3, "b": (np.zeros((4, 2)), [[0, 0]] * 4)}, r"at \['a'\] are 3, not 4"),
    (NESTED, {"a": [0] * 4, "b": (np.zeros((4, 2)),)}, r"at \['b'\] have 1 parts, not 2"),
    (NESTED, {"a": [0] * 4, "b": 5}, r"at \['b'\] are int, not a tuple of 2"),
    (NESTED, {"a": [0] * 4, "b": (np.zeros((4, 2)), 0)}, r"at \['b'\]\[1\] are int"),
    (WHOLE, [np.full(2, 2**63, np.uint64), [-1, 0], [0, 0], [0, 0]], "no dtype in common"),
]


@pytest.mark.parametrize(("space", "actions", "why"), WHOLLY_WRONG)
def test_a_batch_of_the_wrong_length_or_structure_is_refused(space: spaces.Space[Any], actions: Any, why: str) -> None:
    with pytest.raises(InvalidAction, match=f"^cart: the actions .*{why}") as caught:
        batched_checker(space, 4, "cart")(actions)
    assert "env_id" not in caught.value.details


def test_a_subset_needs_one_action_for_each_of_its_env_ids() -> None:
    check = batched_checker(TWO, 64, "cart")
    actions = np.array([0, 1, 1])
    assert check(actions, [7, 63, 2]) is actions
    with pytest.raises(InvalidAction, match="are 3, not 64"):
        check(actions)
    with pytest.raises(InvalidAction, match="are 3, not 2"):
        check(actions, [7, 63])
    with pytest.raises(InvalidAction, match="sub-environment 63: the action is 2"):
        check([0, 2, 2], [7, 63, 2])


def test_a_boxs_bounds_are_checked_only_when_strict() -> None:
    for bad in (1.5, -1.1, np.nan):
        actions = np.array([[0, 0], [0, bad]])
        assert passed(BOX, actions) is actions
        with pytest.raises(InvalidAction, match="sub-environment 1: the action is outside the bounds") as caught:
            passed(BOX, actions, strict=True)
        assert caught.value.details["env_id"] == 1
    assert passed(BOX, np.ones((2, 2)), strict=True).dtype == np.float64


# --------------------------------------------------------------------------- over random spaces


def without_empty(space: spaces.Space[Any]) -> bool:
    """Gymnasium cannot iterate over a Dict or a Tuple without parts."""
    if isinstance(space, spaces.Dict):
        return bool(space.spaces) and all(map(without_empty, space.spaces.values()))
    return not isinstance(space, spaces.Tuple) or (bool(space.spaces) and all(map(without_empty, space.spaces)))


slow = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(all_spaces.filter(without_empty), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_whatever_the_batched_space_samples_passes_unchanged(space: spaces.Space[Any], n: int, seed: int) -> None:
    batched: Any = batch_space(space, n)
    batched.seed(seed)
    actions = batched.sample()
    before = copy.deepcopy(actions)
    made = passed(space, actions, n, strict=True)
    assert same(actions, before)
    # a Dict's batch may be in another order than the Dict
    assert same(list(batching(space).rows(made, n)), list(iterate(batched, actions)))


@st.composite
def damaged(draw: st.DrawFn, space: spaces.Space[Any], value: Any) -> Any:
    """One action, with something about it that may be wrong, but of a form that can be batched."""
    if isinstance(space, spaces.Dict) and space.spaces:
        key = draw(st.sampled_from(list(space.spaces)))
        return {**value, key: draw(damaged(space.spaces[key], value[key]))}
    if isinstance(space, spaces.Tuple) and space.spaces:
        i = draw(st.integers(0, len(space.spaces) - 1))
        return tuple(draw(damaged(space.spaces[i], part)) if k == i else part for k, part in enumerate(value))
    if isinstance(space, spaces.Discrete):
        start, n = int(space.start), int(space.n)
        return draw(
            st.sampled_from((start - 1, start + n, start + n - 1, float(start), str(start), None, [start], 2**65))
        )
    if isinstance(space, spaces.MultiDiscrete):
        values = np.array(value, np.int64)
        values.flat[draw(st.integers(0, values.size - 1))] += draw(st.sampled_from((-20, 0, 20)))
        return draw(st.sampled_from((values, values.astype(float), values[..., None], values.tolist())))
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        how = draw(st.sampled_from(("dtype", "axis", "big", "text", "same")))
        if how == "dtype":
            return value.astype(np.float64)
        if how == "axis":
            return value[None]
        if how == "big":
            return np.full(value.shape, 100, value.dtype)
        return np.full(value.shape, "a") if how == "text" else value
    return draw(st.sampled_from((value, None, 5, "text", ())))


def listed(space: spaces.Space[Any], actions: list[Any]) -> Any:
    """Single actions as a batch that keeps each as it is."""
    if isinstance(space, spaces.Dict):
        return {key: listed(part, [action[key] for action in actions]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(listed(part, [action[i] for action in actions]) for i, part in enumerate(space.spaces))
    return actions


def first_bad(space: spaces.Space[Any], actions: list[Any], *, strict: bool) -> int | None:
    single = checker(space, "env", strict=strict)
    for i, action in enumerate(actions):
        try:
            single(action)
        except Exception:  # a stacked Sequence's own contains() raises TypeError, and warns
            return i
    return None


@slow
@given(st.data(), all_spaces.filter(without_empty), st.integers(1, 5), st.booleans())
def test_the_batch_is_refused_at_the_first_index_whose_action_is(
    data: st.DataObject, space: spaces.Space[Any], n: int, strict: bool
) -> None:
    space.seed(data.draw(st.integers(0, 1000)))
    actions = [space.sample() for _ in range(n)]
    for i in data.draw(st.sets(st.integers(0, n - 1), max_size=2)):
        actions[i] = data.draw(damaged(space, actions[i]))
    given_actions = listed(space, actions)
    before = copy.deepcopy(given_actions)
    bad = first_bad(space, actions, strict=strict)
    if bad is None:
        made = passed(space, given_actions, n, strict=strict)
        batching(space).check(made, n, "actions", exact=False)
        assert first_bad(space, list(batching(space).rows(made, n)), strict=strict) is None
    else:
        with pytest.raises(InvalidAction) as caught:
            passed(space, given_actions, n, strict=strict)
        assert caught.value.details["env_id"] == bad
    assert same(given_actions, before)


@slow
@given(st.data(), st.sampled_from((TWO, MULTI, BITS, BOX, WHOLE, NESTED, MIXED)), st.booleans())
def test_arrays_are_refused_at_the_first_index_whose_row_is(
    data: st.DataObject, space: spaces.Space[Any], strict: bool
) -> None:
    n = data.draw(st.integers(1, 6))
    space.seed(data.draw(st.integers(0, 1000)))
    batch: Any = concatenate(space, [space.sample() for _ in range(n)], create_empty_array(space, n))  # type: ignore[arg-type]
    leaves = [space] if space.shape is not None else []
    array = batch if leaves else batch["a"]
    array[data.draw(st.integers(0, n - 1))] = data.draw(st.sampled_from((0, 1, 2, 3, 9, 100)))
    bad = first_bad(space, list(batching(space).rows(batch, n)), strict=strict)
    if bad is None:
        assert same(passed(space, batch, n, strict=strict), batch)
    else:
        with pytest.raises(InvalidAction) as caught:
            passed(space, batch, n, strict=strict)
        assert caught.value.details["env_id"] == bad


def test_what_travels_can_be_stacked_back_from_its_rows() -> None:
    batch = batching(NESTED).stack([{"a": 1, "b": (np.ones(2, np.float32), np.array([1, 2]))}] * 3)
    assert same(passed(NESTED, batch, 3), batch)
