import json
import math
from typing import Any, cast

import gymnasium
import msgpack
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage, UnsupportedSpace
from meshrl.wire import codec
from meshrl.wire import spaces as wire_spaces
from meshrl.wire.spaces import MAX_SPACE_DEPTH, describe, rebuild, register
from tests.unit.wire.strategies import all_spaces, same

BOX = {"space": "box", "dtype": "<f4", "shape": [2], "low": -1.0, "high": 1.0}
DISCRETE = {"space": "discrete", "dtype": "<i8", "n": 3, "start": 0}
MULTI = {"space": "multi_discrete", "dtype": "<i8", "shape": [2], "nvec": [3, 4], "start": 0}
TEXT = {"space": "text", "min_length": 0, "max_length": 4, "charset": "ab"}


def through_json(description: Any) -> Any:
    return json.loads(json.dumps(description, allow_nan=False))


def assert_alike(made: Any, space: Any) -> None:
    """Equal, and the same in what equality does not look at."""
    assert type(made) is type(space)
    assert made == space
    assert made.dtype == space.dtype
    assert made.shape == space.shape
    for name in (
        "low",
        "high",
        "nvec",
        "start",
        "n",
        "min_length",
        "max_length",
        "character_list",
        "stack",
        "sort_keys",
    ):
        if hasattr(space, name):
            assert same(getattr(made, name), getattr(space, name)), name
    for name in ("bounded_below", "bounded_above"):
        if hasattr(space, name):
            np.testing.assert_array_equal(getattr(made, name), getattr(space, name))
    if isinstance(space, spaces.Dict):
        assert list(made.spaces) == list(space.spaces)
        for key in space.spaces:
            assert_alike(made.spaces[key], space.spaces[key])
    elif isinstance(space, (spaces.Tuple, spaces.OneOf)):
        for one, other in zip(made.spaces, space.spaces, strict=True):
            assert_alike(one, other)
    elif isinstance(space, spaces.Sequence):
        assert_alike(made.feature_space, space.feature_space)
    elif isinstance(space, spaces.Graph):
        assert_alike(made.node_space, space.node_space)
        if space.edge_space is not None:
            assert_alike(made.edge_space, space.edge_space)


def assert_same_samples(made: Any, space: Any) -> None:
    made.seed(11)
    space.seed(11)
    for _ in range(3):
        assert same(made.sample(), space.sample())


@given(all_spaces)
def test_every_space_comes_back_alike_through_msgpack_and_json(space: Any) -> None:
    description = describe(space)
    for made in (
        rebuild(msgpack.unpackb(msgpack.packb(description))) if ascii_only(space) else rebuild(description),
        rebuild(through_json(description)),
        rebuild(codec.unpack(codec.pack(description))),
    ):
        assert_alike(made, space)
        assert_same_samples(made, space)
        assert describe(made) == description


def ascii_only(space: Any) -> Any:
    return str(space).isascii()  # plain msgpack has no lone surrogates; the codec does


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-math.inf, math.inf, (), np.float64),
        spaces.Box(np.array([0.1, -math.inf], np.float32), np.array([0.2, math.inf], np.float32)),
        spaces.Box(-math.inf, 5, (3,), np.int32),
        spaces.Box(-math.inf, math.inf, (2, 2), np.int8),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Box(0, 2**63 - 2, (1,), np.uint64),
        spaces.Box(0, 1, (3,), cast("Any", np.bool_)),
        spaces.Box(0, 1, (0, 3), np.float16),
        spaces.Box(-1, 1, (2,), np.dtype(">f4")),
        spaces.Box(np.zeros((2, 2), np.float32), np.arange(4, dtype=np.float32).reshape(2, 2)),
        spaces.Discrete(5),
        spaces.Discrete(5, start=-3),
        spaces.Discrete(200, dtype=np.uint8),
        spaces.Discrete(3, start=2**62),
        spaces.MultiDiscrete([5, 2, 2]),
        spaces.MultiDiscrete(np.array([[1, 2], [3, 4]]), start=np.array([[0, -1], [2, 9]])),
        spaces.MultiDiscrete([3, 3], dtype=np.int16),
        spaces.MultiBinary(5),
        spaces.MultiBinary([3, 2]),
        spaces.MultiBinary((1,)),
        spaces.Text(5),
        spaces.Text(7, min_length=0, charset="zyx"),
        spaces.Text(3, charset=frozenset("abc")),
        spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Discrete(3)}),
        spaces.Dict([("b", spaces.Discrete(2)), ("a", spaces.Discrete(3)), ("seed", spaces.Discrete(4))]),
        spaces.Dict({}),
        spaces.Dict(cast("Any", {1: spaces.Discrete(2), 0: spaces.Discrete(3)})),
        spaces.Tuple([]),
        spaces.Tuple([spaces.Tuple([spaces.Discrete(2)]), spaces.Text(2)]),
        spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1)]),
        spaces.Sequence(spaces.Box(0, 1)),
        spaces.Sequence(spaces.Dict(a=spaces.Box(0, 1), b=spaces.Discrete(3)), stack=True),
        spaces.Graph(spaces.Box(-1, 1, (3,)), None),
        spaces.Graph(spaces.Discrete(5), spaces.Box(-1, 1, (2,))),
    ],
    ids=str,
)
def test_edges_of_every_kind_come_back_alike(space: Any) -> None:
    made = rebuild(through_json(describe(space)))
    assert_alike(made, space)
    assert_same_samples(made, space)
    assert_alike(rebuild(codec.unpack(codec.pack(describe(space)))), space)


@pytest.mark.skipif(not hasattr(spaces.Dict({}), "sort_keys"), reason="of later Gymnasium versions")
def test_whether_a_dict_sorts_its_keys_comes_back() -> None:
    space = spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Discrete(2)}, sort_keys=False)
    assert_alike(rebuild(describe(space)), space)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "Blackjack-v1", "FrozenLake-v1"])
def test_spaces_of_known_envs_come_back(name: Any) -> None:
    env = gymnasium.make(name)
    for space in (env.observation_space, env.action_space):
        assert_alike(rebuild(through_json(describe(space))), space)
        assert_same_samples(rebuild(describe(space)), space)
    env.close()


def test_uniform_bounds_take_one_number_whatever_the_size() -> None:
    assert len(codec.pack(describe(spaces.Box(-1, 1, (1000,))))) < 100
    assert describe(spaces.Box(0, 255, (300, 300, 3), np.uint8)) == {
        "space": "box",
        "dtype": "|u1",
        "shape": [300, 300, 3],
        "low": 0,
        "high": 255,
    }


def test_bounds_of_infinity_are_text_because_json_has_none() -> None:
    description = describe(spaces.Box(-math.inf, np.array([1, math.inf], np.float32), (2,)))
    assert description["low"] == "-inf"
    assert description["high"] == [1.0, "inf"]


def test_the_sign_of_a_zero_bound_comes_back() -> None:
    low = np.array([-0.0, 0.0])
    made = rebuild(through_json(describe(spaces.Box(low, 1, dtype=np.float64))))
    assert isinstance(made, spaces.Box)
    assert same(made.low, low)


def test_a_rebuilt_space_shares_nothing_with_its_description() -> None:
    description = describe(spaces.Box(np.zeros(2, np.float32), np.array([1, 2], np.float32)))
    made = rebuild(description)
    assert isinstance(made, spaces.Box)
    made.high[:] = 9
    assert description["high"] == [1.0, 2.0]


NO_LOWS: list[Any] = [
    None,
    2.0,
    math.nan,
    "nan",
    "-Infinity",
    1e300,
    0.1,
    True,
    [],
    [0.0],
    [0.0] * 3,
    [0.0, None],
    [[0.0, 0.0]],
    {},
    10**400,
    2**60 + 1,
]
NO_PARTS: list[Any] = [None, {}, 5, [5], [None]]
WRONG: list[Any] = [
    *(None, 5, [], "box", {}, {"space": None}, {"space": "no such"}, {"space": ["box"]}),
    {"space": "box"},
    *({**BOX, "dtype": text} for text in ("O", "|O8", "float32", "<c8", "<U3", "<M8", None, 5)),
    *({**BOX, "shape": shape} for shape in (None, 2, [-2], [2.0], ["2"], [True], [1] * 65, "2")),
    *({**BOX, "shape": shape} for shape in ([2**40], [2**63], [2**32, 2**32], [100_000, 100_000])),
    *({**BOX, "low": low} for low in NO_LOWS),
    *({**BOX, "dtype": "|u1", "low": low, "high": 255} for low in (-1, 256, 0.0, "-inf", True)),
    *({**BOX, "bounded_below": flags} for flags in (1, "yes", [True], [True, 1])),
    *({**DISCRETE, "n": n} for n in (0, -1, 2.0, None, "3", True, 2**63)),
    *({**DISCRETE, "start": start} for start in (None, 0.0, 2**63, -(2**64))),
    *({**DISCRETE, "dtype": text} for text in ("<f4", "|b1", "O", None)),
    *({**MULTI, "nvec": nvec} for nvec in ([3], [0, 1], [-1, 1], [1.0, 2.0], None, "34", [[3, 4]], [2**63, 1])),
    {**MULTI, "shape": [2**40], "nvec": 3},
    {**MULTI, "start": [0]},
    *({"space": "multi_binary", "n": n} for n in (0, -1, None, 1.5, [0], [2**40, 2], 2**40, "3", True)),
    *({**TEXT, "min_length": n} for n in (-1, 5, None, 1.0, True)),
    *({**TEXT, "max_length": n} for n in (-1, 2**63, None, "4")),
    {**TEXT, "charset": ["ab"]},
    *({"space": kind, "spaces": parts} for kind in ("tuple", "one_of", "dict") for parts in NO_PARTS),
    {"space": "one_of", "spaces": []},
    *(
        {"space": "dict", "spaces": pairs}
        for pairs in ([["a"]], [[1.5, DISCRETE]], [["a", DISCRETE]] * 2, [[[], DISCRETE]])
    ),
    {"space": "sequence", "feature": DISCRETE},
    {"space": "sequence", "feature": None, "stack": False},
    {"space": "sequence", "feature": DISCRETE, "stack": 1},
    {"space": "graph", "node": None, "edge": None},
    {"space": "graph", "node": DISCRETE, "edge": 5},
]


@pytest.mark.parametrize("description", WRONG, ids=lambda value: str(value)[:60])
def test_descriptions_that_are_none_are_malformed(description: Any) -> None:
    with pytest.raises(MalformedMessage):
        rebuild(description)
    with pytest.raises(MalformedMessage):
        rebuild({"space": "tuple", "spaces": [DISCRETE, description]})


def test_nesting_is_bounded() -> None:
    description = DISCRETE
    for _ in range(MAX_SPACE_DEPTH):
        description = {"space": "tuple", "spaces": [description]}
    rebuild(description)
    with pytest.raises(MalformedMessage):
        rebuild({"space": "tuple", "spaces": [description]})


def test_memory_is_bounded_over_all_parts_together(monkeypatch: Any) -> None:
    monkeypatch.setattr(wire_spaces, "MAX_SPACE_BYTES", 1024 * 1024)
    large = {**BOX, "shape": [20_000]}
    rebuild({"space": "tuple", "spaces": [large] * 2})
    with pytest.raises(MalformedMessage, match="MiB"):
        rebuild({"space": "tuple", "spaces": [large] * 3})


def test_memory_is_bounded_where_gymnasium_copies_parts() -> None:
    description = {**BOX, "shape": [1000]}
    for _ in range(30):
        description = {"space": "sequence", "feature": description, "stack": True}
    with pytest.raises(MalformedMessage, match="MiB"):
        rebuild(description)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@given(st.sampled_from([BOX, DISCRETE, MULTI, TEXT, {"space": "dict", "spaces": [["a", BOX]]}]), st.data())
def test_a_changed_field_makes_another_space_or_a_malformed_message(description: Any, data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(description)))
    try:
        made = rebuild({**description, name: data.draw(json_values)})
    except MalformedMessage:
        return
    assert isinstance(made, spaces.Space)


class MissionSpace(spaces.Space[str]):
    """As MiniGrid's: texts that a function makes of one of several places."""

    def __init__(self, places: Any, seed: Any = None) -> None:
        self.places = places
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        return f"go to {self.places[int(self.np_random.integers(len(self.places)))]}"

    def contains(self, x: Any) -> Any:
        return x in [f"go to {place}" for place in self.places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MissionSpace) and self.places == other.places

    def __hash__(self) -> int:
        return hash(tuple(self.places))


@pytest.fixture
def registry(monkeypatch: Any) -> None:
    monkeypatch.setattr(wire_spaces, "_BY_KIND", dict(wire_spaces._BY_KIND))
    monkeypatch.setattr(wire_spaces, "_BY_CLASS", dict(wire_spaces._BY_CLASS))


def test_a_space_of_another_class_is_refused_with_the_line_that_registers_it() -> None:
    with pytest.raises(UnsupportedSpace) as caught:
        describe(spaces.Dict(mission=MissionSpace(["a"])))
    message = str(caught.value)
    assert "\n" not in message
    assert 'meshrl.wire.spaces.register("MissionSpace", MissionSpace, ' in message
    with pytest.raises(MalformedMessage, match="register"):
        rebuild({"space": "mission", "places": ["a"]})


def test_a_subclass_of_a_known_space_is_not_taken_for_it() -> None:
    class Narrow(spaces.Discrete):
        pass

    with pytest.raises(UnsupportedSpace):
        describe(Narrow(3))


@pytest.mark.usefixtures("registry")
def test_a_registered_space_comes_back_nested_too() -> None:
    register("mission", MissionSpace, lambda s: {"places": s.places}, lambda d: MissionSpace(d["places"]))
    space = spaces.Dict(mission=MissionSpace(["a", "b"]), x=spaces.Discrete(2))
    made = rebuild(through_json(describe(space)))
    assert made == space
    assert_same_samples(made, space)
    assert describe(space["mission"]) == {"space": "mission", "places": ["a", "b"]}
    with pytest.raises(MalformedMessage):
        rebuild({"space": "mission"})


@pytest.mark.usefixtures("registry")
def test_a_kind_belongs_to_one_class() -> None:
    register("mission", MissionSpace, lambda s: {"places": s.places}, lambda d: MissionSpace(d["places"]))
    register("mission", MissionSpace, lambda s: {"places": s.places}, lambda d: MissionSpace(d["places"]))
    with pytest.raises(ValueError, match="box"):
        register("box", MissionSpace, lambda s: {}, lambda d: MissionSpace([]))
    with pytest.raises(ValueError):
        register("", MissionSpace, lambda s: {}, lambda d: MissionSpace([]))


def test_a_charset_of_longer_texts_is_refused() -> None:
    class Pairs:
        character_list = ("ab", "c")

    with pytest.raises(UnsupportedSpace):
        wire_spaces._describe_text(cast("Any", Pairs()))


def test_a_dict_with_keys_beyond_text_and_int_is_refused() -> None:
    with pytest.raises(UnsupportedSpace):
        describe(spaces.Dict(cast("Any", [((1, 2), spaces.Discrete(2))])))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_a_box_of_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(UnsupportedSpace):
        describe(spaces.Box(0, 1, (2,), np.longdouble))
