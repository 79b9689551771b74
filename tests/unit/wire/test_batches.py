"""Batches are what Gymnasium makes of the same values, bit for bit, and a peer's are checked whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import utils as gymnasiums
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage
from meshrl.wire.batches import batching, form_of
from tests.unit.wire.strategies import all_spaces, plain_spaces, same

BOX = spaces.Box(-1, 1, (4,), np.float32)
TALL = spaces.Box(-1, 1, (2, 3), np.float32)
POINT = spaces.Box(-9, 9, (), np.float32)
WHOLE = spaces.Box(0, 9, (2,), np.int32)
NESTED = spaces.Dict({"b": spaces.Tuple((BOX, spaces.Discrete(5))), "a": spaces.Text(3)})


class Hand(spaces.Space[Any]):
    """A space of whose batches Gymnasium knows nothing."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Any:
        return ("card", int(self.np_random.integers(52)))

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hand)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:  # without an address: it names tests, which are the same in every process
        return type(self).__name__


class Mood(Hand):
    """A space whose batch is a text of one letter each, by functions registered with Gymnasium's."""

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Any:
        return "abc"[int(self.np_random.integers(3))]

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and x in "abc"


class Moods(Hand):
    """What Mood becomes."""


class SmallBox(spaces.Box):
    """A subclass that nobody registered is batched as what it is."""


_registered: Any = gymnasiums
_registered.batch_space.register(Mood)(lambda space, n=1: Moods())
_registered.iterate.register(Moods)(lambda space, items: iter(items))
_registered.concatenate.register(Mood)(lambda space, items, out: "".join(items))
_registered.create_empty_array.register(Mood)(lambda space, n=1, fn=np.zeros: "a" * n)

own_spaces = st.one_of(
    all_spaces,
    st.sampled_from(
        (
            Hand(),
            Mood(),
            spaces.Tuple((spaces.Discrete(3), Hand())),
            spaces.Dict({"a": Mood(), "b": BOX}),
            spaces.Tuple((Mood(), Hand())),
            SmallBox(0, 1, (3,), np.float64),
        )
    ),
)


def gymnasiums_stack(space: spaces.Space[Any], items: list[Any]) -> Any:
    out: Any = gymnasiums.create_empty_array(space, len(items))
    return gymnasiums.concatenate(space, items, out)


def samples(space: spaces.Space[Any], n: int, seed: int) -> list[Any]:
    space.seed(seed)
    return [space.sample() for _ in range(n)]


def has_empty(space: spaces.Space[Any]) -> bool:
    """Whether there is a Dict or Tuple without parts, which Gymnasium cannot iterate over."""
    if isinstance(space, spaces.Dict):
        return not space.spaces or any(has_empty(part) for part in space.spaces.values())
    if isinstance(space, spaces.Tuple):
        return not space.spaces or any(has_empty(part) for part in space.spaces)
    return False


def arrays(space: spaces.Space[Any], batched: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The batch's own arrays, not those of values that it passes on."""
    if form_of(space) == "array":
        yield batched
    elif form_of(space) == "dict":
        for key, part in space.spaces.items():  # type: ignore[attr-defined]
            yield from arrays(part, batched[key])
    elif form_of(space) == "tuple":
        for i, part in enumerate(space.spaces):  # type: ignore[attr-defined]
            yield from arrays(part, batched[i])


# --------------------------------------------------------------------------- stack


@settings(max_examples=100)
@given(own_spaces, st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_stack_gives_what_gymnasium_gives_in_arrays_of_its_own(space: spaces.Space[Any], n: int, seed: int) -> None:
    items = samples(space, n, seed)
    made = batching(space).stack(items)
    assert same(made, gymnasiums_stack(space, items))
    # again, because what was handed out is never reused
    again = list(arrays(space, batching(space).stack(items)))
    for array, other in zip(arrays(space, made), again, strict=True):
        assert array.flags.owndata
        assert array.flags.writeable
        assert not np.shares_memory(array, other)
        if array.size:
            array.view(np.uint8)[...] ^= 1
            assert not same(array, other)
    assert same(batching(space).stack(items), gymnasiums_stack(space, items))


@st.composite
def odd_items(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """What an env gives in place of an array of a space's shape: of other dtypes, shapes and types."""
    dtype = draw(st.sampled_from(("<f4", "<f8", "<i8", "|u1", "|b1", "<u8", ">f4", "<c8", "<U2", "<f2")))
    given_shape = draw(st.sampled_from((shape, shape, shape, (*shape, 1), shape[::-1], shape[1:], (5,), (3,), ())))
    made = np.zeros(given_shape, dtype)
    how = draw(st.sampled_from(("array", "array", "array", "list", "fortran", "item", "masked")))
    if how == "list":
        return made.tolist()
    if how == "fortran":
        return np.asfortranarray(made)
    if how == "masked":
        return np.ma.masked_array(made)
    if how == "item":
        return draw(st.sampled_from((0, True, 2**63, -(2**63), 1.5, np.float32(2), np.uint8(3), np.int64(-4), "a")))
    return made


def outcome(of: Any, *arguments: Any) -> Any:
    try:
        return of(*arguments)
    except Exception as exc:
        return type(exc)


@settings(max_examples=250)
@given(st.data())
def test_stack_casts_and_refuses_as_gymnasium_does(data: st.DataObject) -> None:
    space = data.draw(plain_spaces.filter(lambda space: not isinstance(space, spaces.Text)))
    assert space.shape is not None
    one = odd_items(space.shape)
    items = data.draw(
        st.one_of(st.lists(one, max_size=4), st.builds(lambda item, n: [item] * n, one, st.integers(1, 3)))
    )
    assert same(outcome(batching(space).stack, items), outcome(gymnasiums_stack, space, items))


@pytest.mark.parametrize(
    ("space", "items"),
    [
        (BOX, []),
        (BOX, [np.zeros(3, np.float32), np.zeros(5, np.float32)]),
        (BOX, [np.zeros((4, 1), np.float32), np.zeros((4, 1), np.float32)]),
        (BOX, [np.zeros((4, 2), np.float32), np.zeros((4, 0), np.float32)]),
        (BOX, [np.zeros(8, np.float32)]),
        (TALL, [np.zeros((1, 3), np.float32), np.zeros((3, 3), np.float32)]),
        (TALL, [np.zeros((2, 2), np.float32), np.zeros((2, 4), np.float32)]),
        (TALL, [np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)]),
        (TALL, [np.zeros(6, np.float32)]),
        (POINT, [np.zeros(1, np.float32)]),
        (POINT, ["a"]),
        (WHOLE, [np.zeros(2, np.float64)]),
        (spaces.Discrete(2), [0.5, 1.5]),
        (spaces.Discrete(2, dtype=np.uint8), [0, 1]),
        (spaces.Discrete(2), [None]),
        (NESTED, [{"a": "x"}]),
        (NESTED, [{"a": "x", "b": (np.zeros(4, np.float32),)}]),
        (NESTED, [5]),
    ],
    ids=repr,
)
def test_stack_raises_what_gymnasium_raises(space: spaces.Space[Any], items: list[Any]) -> None:
    raised = outcome(gymnasiums_stack, space, items)
    assert isinstance(raised, type)
    with pytest.raises(raised):
        batching(space).stack(items)


def test_stack_keeps_the_bits_of_nan_and_rounds_what_is_wider() -> None:
    odd = np.array([0x7FC00001, 0x80000000, 1, 0xFF800000], np.uint32).view(np.float32)
    assert batching(BOX).stack([odd, odd]).tobytes() == odd.tobytes() * 2
    wide = np.array([1.0000001, 0.1, 2.0**-140, -0.0])
    assert same(batching(BOX).stack([wide, odd])[0], wide.astype(np.float32))


# --------------------------------------------------------------------------- join, cut, pick


@settings(max_examples=100)
@given(own_spaces, st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_shards_joined_are_the_whole_and_the_whole_cut_is_the_shards(
    space: spaces.Space[Any], sizes: list[int], seed: int
) -> None:
    n = sum(sizes)
    items = samples(space, n, seed)
    ends = np.cumsum(sizes).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    parts = [batching(space).stack(items[start:stop]) for start, stop in bounds]
    whole = gymnasiums_stack(space, items)
    joined = batching(space).join(parts, sizes)
    assert same(joined, whole)
    assert same(batching(space).join(parts, sizes), whole)
    for array in arrays(space, joined):
        assert array.flags.owndata
        assert array.flags.writeable
        if len(parts) > 1:
            assert not any(np.shares_memory(array, own) for part in parts for own in arrays(space, part))
    for part, (start, stop) in zip(parts, bounds, strict=True):
        assert same(batching(space).cut(whole, start, stop), part)


@settings(max_examples=100)
@given(own_spaces, st.integers(1, 5), st.data())
def test_pick_gives_the_batch_of_the_picked_values(space: spaces.Space[Any], n: int, data: st.DataObject) -> None:
    items = samples(space, n, 0)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6))
    whole = gymnasiums_stack(space, items)
    picked = batching(space).pick(whole, np.array(indices))
    assert same(picked, gymnasiums_stack(space, [items[i] for i in indices]))
    for array, source in zip(arrays(space, picked), arrays(space, whole), strict=True):
        assert not np.shares_memory(array, source)


def test_the_arrays_of_a_single_part_are_given_back_as_they_are() -> None:
    part = {"a": ("x",), "b": (np.zeros((1, 4), np.float32), np.zeros(1, np.int64))}
    joined = batching(NESTED).join([part], [1])
    assert list(joined) == list(NESTED.spaces)
    assert joined["b"][0] is part["b"][0]
    assert joined["a"] is part["a"]


def test_cut_of_arrays_is_a_view() -> None:
    actions = np.zeros((4, 4), np.float64)
    assert np.shares_memory(batching(BOX).cut(actions, 1, 3), actions)


# --------------------------------------------------------------------------- rows


@settings(max_examples=100)
@given(own_spaces.filter(lambda space: not has_empty(space)), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_rows_are_those_of_gymnasiums_iterate(space: spaces.Space[Any], n: int, seed: int) -> None:
    batched = gymnasiums_stack(space, samples(space, n, seed))
    batching(space).check(batched, n, "actions", exact=False)
    made = list(batching(space).rows(batched, n))
    assert len(made) == n
    assert same(made, list(gymnasiums.iterate(gymnasiums.batch_space(space, n), batched)))


def test_rows_of_a_dict_made_of_pairs_are_in_its_batchs_order() -> None:
    space = spaces.Dict([("b", BOX), ("a", spaces.Discrete(2))])
    batched = batching(space).stack(samples(space, 2, 0))
    assert list(batched) == ["b", "a"]
    assert [list(row) for row in batching(space).rows(batched, 2)] == [["a", "b"]] * 2
    assert same(
        list(batching(space).rows(batched, 2)), list(gymnasiums.iterate(gymnasiums.batch_space(space, 2), batched))
    )


def test_rows_of_actions_are_of_the_dtype_they_came_in() -> None:
    actions = np.array([[0.1, 0, 0, 0], [1.0000001, 0, 0, 0]])
    batching(BOX).check(actions, 2, "actions", exact=False)
    first, second = batching(BOX).rows(actions, 2)
    assert first.dtype == np.float64
    assert np.shares_memory(second, actions)
    assert [type(row) for row in batching(spaces.Discrete(3)).rows(np.array([2, 1]), 2)] == [np.int64, np.int64]


@pytest.mark.parametrize(
    ("space", "batched", "row"),
    [
        (spaces.Dict({}), {}, {}),
        (spaces.Tuple([]), (), ()),
        (
            spaces.Dict({"a": spaces.Tuple([]), "b": spaces.Discrete(2)}),
            {"a": (), "b": np.ones(2, int)},
            {"a": (), "b": 1},
        ),
    ],
    ids=repr,
)
def test_spaces_without_parts_have_rows_too(space: spaces.Space[Any], batched: Any, row: Any) -> None:
    batching(space).check(batched, 2, "actions", exact=False)
    assert list(batching(space).rows(batched, 2)) == [row, row]


# --------------------------------------------------------------------------- what peers send

GOOD: dict[str, Any] = {"b": (np.zeros((2, 4), np.float32), np.zeros(2, np.int64)), "a": ("x", "y")}

MISSHAPEN: list[tuple[spaces.Space[Any], Any, str]] = [
    (BOX, None, "observations is NoneType, not an array"),
    (BOX, [[0.0] * 4] * 2, "observations is list"),
    (BOX, np.float32(1), "is float32"),
    (BOX, np.zeros((3, 4), np.float32), r"shape \(3, 4\), not \(2, 4\)"),
    (BOX, np.zeros((2, 5), np.float32), "shape"),
    (BOX, np.zeros(8, np.float32), "shape"),
    (BOX, np.zeros((), np.float32), "shape"),
    (spaces.Discrete(2), np.zeros((2, 1), np.int64), "shape"),
    (spaces.Text(3), ("x",), "has 1 values, not 2"),
    (spaces.Text(3), ("x", "y", "z"), "has 3 values, not 2"),
    (spaces.Text(3), ["x", "y"], "is list, not a tuple of 2"),
    (spaces.Text(3), "xy", "is str"),
    (NESTED, [GOOD], "is list, not a dict"),
    (NESTED, {"a": GOOD["a"]}, "has 1 keys"),
    (NESTED, {**GOOD, 10**5000: 1}, "has 3 keys"),
    (NESTED, {"a": GOOD["a"], 10**5000: 1}, "has 2 keys that are not"),
    (NESTED, {**GOOD, "a": ("x",)}, r"observations\['a'\] has 1"),
    (NESTED, {**GOOD, "b": GOOD["b"][:1]}, r"observations\['b'\] has 1 parts, not 2"),
    (NESTED, {**GOOD, "b": list(GOOD["b"])}, r"observations\['b'\] is list"),
    (NESTED, {**GOOD, "b": (GOOD["b"][0], GOOD["b"][1][:1])}, r"observations\['b'\]\[1\] has shape \(1,\)"),
    (Mood(), 5, "is no batch of"),
    (Mood(), "a", "has 1 values, not 2"),
    (Mood(), "abcab", "has more than 2 values"),
]
WRONG_DTYPES: list[tuple[spaces.Space[Any], Any, str]] = [
    (BOX, np.zeros((2, 4), np.float64), "dtype float64, not float32"),
    (BOX, np.zeros((2, 4), ">f4"), "dtype >f4"),
    (NESTED, {**GOOD, "b": (GOOD["b"][0], np.zeros(2, np.int32))}, r"\['b'\]\[1\] has dtype int32"),
]


@pytest.mark.parametrize(("space", "batched", "why"), [*MISSHAPEN, *WRONG_DTYPES])
@pytest.mark.parametrize("shards", [1, 2])
def test_join_refuses_a_part_that_is_no_batch_and_names_the_field(
    space: spaces.Space[Any], batched: Any, why: str, shards: int
) -> None:
    good = [batching(space).stack(samples(space, 3, 0))] * (shards - 1)
    with pytest.raises(MalformedMessage, match=why) as caught:
        batching(space).join([*good, batched], [3, 2][-shards:])
    assert caught.value.message.startswith(caught.value.details["field"])


@pytest.mark.parametrize(("space", "batched", "why"), MISSHAPEN)
def test_check_rows_refuses_what_has_no_rows_and_names_the_field(
    space: spaces.Space[Any], batched: Any, why: str
) -> None:
    with pytest.raises(MalformedMessage, match=why.replace("observations", "actions")) as caught:
        batching(space).check(batched, 2, "actions", exact=False)
    assert caught.value.details["field"].startswith("actions")


@pytest.mark.parametrize(("space", "batched", "why"), WRONG_DTYPES)
def test_check_rows_leaves_dtypes_to_the_env(space: spaces.Space[Any], batched: Any, why: str) -> None:
    batching(space).check(batched, 2, "actions", exact=False)


def test_join_wants_a_size_for_each_part() -> None:
    part = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="shorter"):
        batching(BOX).join([part, part], [2])


# --------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("space", "form"),
    [
        (BOX, "array"),
        (SmallBox(0, 1, (3,)), "array"),
        (spaces.Discrete(2), "array"),
        (NESTED, "dict"),
        (spaces.Tuple((BOX, Hand())), "tuple"),
        (Hand(), "items"),
        (spaces.OneOf((BOX,)), "items"),
        (Mood(), "registered"),
        (spaces.Dict({"a": Mood()}), "dict"),
        (spaces.Tuple((BOX, Mood())), "registered"),
    ],
    ids=str,
)
def test_the_form_of_a_batch_follows_what_is_registered(space: spaces.Space[Any], form: str) -> None:
    assert form_of(space) == form
