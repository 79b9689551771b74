"""Infos over shards against Gymnasium's own loop over all sub-environments, through the real codec."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import event, given, settings
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage
from meshrl.wire.codec import pack, unpack
from meshrl.wire.infos import MAX_GROUPS, merge_infos, pack_infos
from meshrl.wire.merged_infos import pack_merged
from tests.unit.wire.strategies import same as same_leaf

Entries = Sequence[tuple[int, dict[Any, Any]]]
NAN = math.nan


def same(a: Any, b: Any) -> bool:
    """Whether two infos are of the same types, keys in the same order, bit by bit, object arrays looked into."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(type(k) is type(m) and same(a[k], b[m]) for k, m in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype == object:
        return a.shape == b.shape and all(same(x, y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
    return same_leaf(a, b)


def locally(entries: Entries, num_envs: int) -> dict[str, Any]:
    """What a SyncVectorEnv makes of the entries."""
    vector: VectorEnv[Any, Any, Any] = VectorEnv()
    vector.num_envs = num_envs
    infos: dict[str, Any] = {}
    for i, info in copy.deepcopy(list(entries)):
        infos = vector._add_info(infos, info, i)
    return infos


def outcome(make: Callable[[], dict[str, Any]]) -> Any:
    """What is made, or the type of what is raised."""
    try:
        return make()
    except Exception as exc:
        return type(exc)


def shards(num_envs: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [0, *sorted(cuts), num_envs]
    return [(low, high - low) for low, high in pairwise(bounds) if high > low]


def travelling(entries: Entries, num_envs: int, cuts: Sequence[int] = ()) -> list[tuple[Any, int, int]]:
    """The parts as they arrive."""
    parts = []
    for offset, count in shards(num_envs, cuts):
        own = [(i - offset, info) for i, info in entries if offset <= i < offset + count]
        parts.append((unpack(pack(pack_infos(own, count))), offset, count))
    return parts


def form(part: Any) -> str:
    return "nothing" if part is None else str(next(iter(part)))


def assert_as_local(entries: Entries, num_envs: int, cuts: Sequence[int] = ()) -> Any:
    expected = outcome(lambda: locally(entries, num_envs))
    merged = outcome(lambda: merge_infos(travelling(entries, num_envs, cuts), num_envs))
    assert same(merged, expected), f"{merged!r} is not {expected!r}"
    return merged


# --------------------------------------------------------------------------- the property

floats = st.one_of(st.floats(width=32), st.sampled_from((NAN, -NAN, -0.0, math.inf, 2.0**63, -(2.0**63), 1e300)))
ints = st.one_of(st.integers(-3, 3), st.sampled_from((2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**70)))
numpy_scalars = st.sampled_from(
    (
        *(kind(1.5) for kind in (np.float16, np.float32, np.float64, np.complex64)),
        *(kind(3) for kind in (np.int8, np.uint8, np.int64, np.uint64)),
        np.uint64(2**64 - 1),
        np.float32(NAN),
        np.bool_(True),
        np.str_("text"),
        np.bytes_(b"b"),
        np.datetime64("2020-01-01"),
        np.timedelta64(5, "us"),
    )
)
arrays = st.builds(
    lambda dtype, shape, fill: np.full(shape, fill).astype(dtype),
    st.sampled_from(("<f4", ">f4", "<f8", "|i1", "|b1", ">u2", "<U4", "|S3", "<M8[ns]", "<c8")),
    st.sampled_from(((), (0,), (1,), (2,), (2, 3))),
    st.integers(0, 3),
)
plain = st.one_of(
    floats,
    ints,
    st.booleans(),
    numpy_scalars,
    arrays,
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.builds(complex, st.floats(-2, 2), st.just(1.0)),
    st.lists(st.integers(0, 2), max_size=2),
    st.lists(st.integers(0, 2), max_size=2).map(tuple),
)
keys: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(("a", "b", "prob", "final_obs", "final_info", "nd")),
    st.sampled_from(("_a", "__a", "_", "", "py", 1, "1", "_1", (1, 2))),
)
wild_infos = st.recursive(
    st.dictionaries(keys, plain, max_size=3),
    lambda inner: st.dictionaries(keys, st.one_of(plain, inner), max_size=3),
    max_leaves=6,
)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 0) -> dict[str, Any]:
    """Keys with a strategy of values of one type, as most envs' infos have them."""
    number = st.sampled_from((np.float32, np.int16, np.float64)).map(lambda kind: st.integers(0, 9).map(kind))
    array = st.sampled_from(("<f4", ">f4", "|i1", "<U2")).flatmap(
        lambda dtype: st.sampled_from(((), (0,), (3,), (2, 2))).map(
            lambda shape: st.integers(0, 9).map(lambda fill: np.full(shape, fill).astype(dtype))
        )
    )
    leaf = st.one_of(
        st.sampled_from((st.integers(-(2**63), 2**63 - 1), floats, st.booleans(), st.none(), st.text(max_size=2))),
        number,
        array,
    )
    inner = st.one_of(leaf, schemas(depth=depth + 1)) if depth < 2 else leaf
    return draw(
        st.dictionaries(st.sampled_from(("a", "b", "c", "final_obs", "final_info")), inner, min_size=1, max_size=3)
    )


def of_schema(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {key: of_schema(value) if isinstance(value, dict) else value for key, value in schema.items()}
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[tuple[int, dict[Any, Any]]], int, list[int]]:
    """Entries of a vector, wild or mostly homogeneous, with how it is cut into shards."""
    num_envs = draw(st.integers(1, 12))
    if draw(st.integers(0, 3)) == 0:
        infos = wild_infos
        ended: Any = wild_infos
    else:
        known = draw(st.lists(schemas(), min_size=1, max_size=2))
        infos = st.sampled_from(known).flatmap(of_schema)
        ended = st.fixed_dictionaries({"final_obs": arrays, "final_info": of_schema(known[0])})
    entries = []
    same_step = draw(st.booleans())
    for i in range(num_envs):
        if same_step and draw(st.integers(0, 3)) == 0:
            entries.append((i, draw(ended)))
        entries.append((i, draw(infos)))
    return entries, num_envs, draw(st.lists(st.integers(0, num_envs), max_size=3))


@settings(max_examples=400)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
@given(steps())
def test_merged_infos_are_those_of_one_local_vector_whatever_the_shards(case: Any) -> None:
    entries, num_envs, cuts = case
    for part, _, _ in travelling(entries, num_envs, cuts):
        event(form(part))
    merged = assert_as_local(entries, num_envs, cuts)
    event("raises" if isinstance(merged, type) else "merges")


# --------------------------------------------------------------------------- the forms


def taxi(num_envs: int) -> list[tuple[int, dict[str, Any]]]:
    return [(i, {"prob": 1.0, "action_mask": np.full(6, i % 2, np.int8)}) for i in range(num_envs)]


HOMOGENEOUS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "taxi": taxi(4),
    "some sub-environments": [(i, {"prob": 0.5}) for i in (1, 2, 3)],
    "ints": [(i, {"n": i - 2**63 if i else 2**63 - 1}) for i in range(3)],
    "bools": [(i, {"won": bool(i % 2)}) for i in range(4)],
    "NaN": [(i, {"x": NAN}) for i in range(4)],
    "numpy scalars": [(i, {"x": np.float32(i), "y": np.uint64(2**64 - 1)}) for i in range(4)],
    "texts": [(i, {"text": "a" * i, "why": None if i % 2 else "because"}) for i in range(4)],
    "lists": [(i, {"moves": list(range(i)), "pair": (i, i)}) for i in range(4)],
    "0-d arrays": [(i, {"x": np.array(i, np.int16)}) for i in range(4)],
    "big-endian arrays": [(i, {"x": np.array([i, 1.5], ">f4")}) for i in range(4)],
    "empty arrays": [(i, {"x": np.zeros((0, 2))}) for i in range(4)],
    "nested": [(i, {"a": {"b": {"c": float(i)}, "d": np.arange(2)}, "e": {}}) for i in range(4)],
    "reserved keys": [(i, {"nd": 1.0, "py": {"complex": True}}) for i in range(4)],
    "an ended one": [
        (0, {"prob": 1.0}),
        (1, {"final_obs": np.arange(3.0), "final_info": {"prob": 0.5}}),
        *((i, {"prob": 1.0}) for i in (1, 2, 3)),
    ],
    "the first one ended": [
        (0, {"final_obs": {"x": np.ones(2)}, "final_info": {}}),
        *((i, {"prob": 1.0}) for i in range(4)),
    ],
    "two kinds in turn": [(i, {"a": 1.0} if i % 2 else {"b": True, "a": 2.0}) for i in range(4)],
    "an int, then floats": [(0, {"prob": 1}), *((i, {"prob": 1 / 3}) for i in (1, 2, 3))],
    "a float, then ints": [(0, {"prob": 0.5}), *((i, {"prob": 2**53 + 1}) for i in (1, 2, 3))],
    "an int, then NaN": [(0, {"prob": 1}), *((i, {"prob": NAN}) for i in (1, 2, 3))],
    "an int, then what no int holds": [(0, {"prob": 1}), *((i, {"prob": 2.0**63}) for i in (1, 2, 3))],
    "a bool, then floats": [(0, {"x": True}), *((i, {"x": 0.5}) for i in (1, 2, 3))],
    "a number, then texts": [(0, {"x": 1.0}), *((i, {"x": "text"}) for i in (1, 2, 3))],
    "a text, then numbers": [(0, {"x": "text"}), *((i, {"x": 1.0}) for i in (1, 2, 3))],
    "a text, then numpy scalars": [(0, {"x": "text"}), *((i, {"x": np.float64(1)}) for i in (1, 2, 3))],
    "a text, then arrays": [(0, {"x": "text"}), *((i, {"x": np.array(i)}) for i in (1, 2, 3))],
    "a dict, then numbers": [(0, {"x": {"y": 1}}), *((i, {"x": 1.0}) for i in (1, 2, 3))],
    "a key of both entries of one": [
        (0, {"a": 1.0, "b": 1}),
        *((i, {"a": 2.0}) for i in range(4)),
        (3, {"a": 1.0, "b": 2}),
    ],
}
"""Infos that travel as columns; not all of them can be merged as such."""

MIXED: dict[str, list[tuple[Any, dict[Any, Any]]]] = {
    "one entry": [(2, {"a": 1.0})],
    "all different": [(0, {"a": 1}), (1, {"b": 1.0}), (2, {"c": None})],
    "long ints": [(i, {"n": 2**63}) for i in range(4)],
    "arrays, then 0-d arrays": [(i, {"x": np.ones(2) if i < 2 else np.array(float(i))}) for i in range(4)],
    "shapes that differ": [(i, {"x": np.ones(i)}) for i in range(4)],
    "dtypes that differ": [(i, {"x": np.ones(1, "<f4" if i else ">f4")}) for i in range(4)],
    "a key like a mask": [(i, {"x": 1.0, "_x": 2.0}) for i in range(4)],
    "a nested key like a mask": [(i, {"a": {"_x": 2.0}}) for i in range(4)],
    "keys that are no text": [(i, {1: 2.0, "1": 3.0}) for i in range(4)],
    "nested dicts that differ": [(i, {"a": {"b": 1.0} if i % 2 else {"c": 1.0}}) for i in range(4)],
    "timedeltas": [(i, {"t": np.timedelta64(i, "s")}) for i in range(4)],
    "one kind twice for one": [*((i, {"a": 1.0}) for i in range(4)), (3, {"a": 2.0})],
    "dicts of another class": [(i, {"a": type("Own", (dict,), {})(b=1)}) for i in range(4)],
}
"""Infos that travel as entries."""

CUTS: list[list[int]] = [[], [2], [1, 3], [1, 2, 3]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", [*HOMOGENEOUS, *MIXED])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_each_kind_of_infos_is_merged_as_locally(name: str, cuts: list[int]) -> None:
    assert_as_local({**HOMOGENEOUS, **MIXED}[name], 4, cuts)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_infos_of_few_kinds_travel_as_columns(name: str) -> None:
    assert form(pack_infos(HOMOGENEOUS[name], 4)) == "columns"


@pytest.mark.parametrize("name", MIXED)
def test_other_infos_travel_as_entries(name: str) -> None:
    assert form(pack_infos(MIXED[name], 4)) == "entries"


def test_nothing_travels_when_no_info_has_anything_in_it() -> None:
    assert pack_infos([(i, {}) for i in range(256)], 256) is None
    assert pack_infos([], 4) is None
    assert pack_merged({}, 4) is None
    assert merge_infos([(None, 0, 2), (None, 2, 2)], 4) == {}
    assert merge_infos([], 0) == {}


def test_columns_are_the_documented_ones() -> None:
    made = pack_infos(HOMOGENEOUS["taxi"], 4)
    assert same(
        made,
        {
            "columns": [
                {
                    "prob": ["scalar", np.ones(4)],
                    "action_mask": ["array", np.array([[i % 2] * 6 for i in range(4)], np.int8)],
                }
            ]
        },
    )
    made = pack_infos(HOMOGENEOUS["an ended one"], 4)
    assert list(made) == ["columns", "at", "group"]
    assert made["at"].tolist() == [0, 1, 1, 2, 3]
    assert made["group"].tolist() == [0, 1, 0, 0, 0]
    assert same(made["columns"][1]["final_info"], ["map", {"prob": ["scalar", np.array([0.5])]}])


def test_numpy_types_of_equal_width_make_arrays_of_equal_dtype() -> None:
    assert_as_local([(i, {"n": np.longlong(-i)}) for i in range(4)], 4)


def test_more_kinds_than_groups_travel_as_entries() -> None:
    entries = [(i, {f"key{i // 2}": 1.0}) for i in range(2 * MAX_GROUPS)]
    assert form(pack_infos(entries, len(entries))) == "columns"
    entries += [(2 * MAX_GROUPS + i, {"another": 1.0}) for i in range(2)]
    assert form(pack_infos(entries, len(entries))) == "entries"
    assert_as_local(entries, len(entries), [7])


def test_the_parts_may_come_in_any_order() -> None:
    parts = travelling(HOMOGENEOUS["an int, then floats"], 4, [1, 2])
    assert same(merge_infos(parts[::-1], 4), locally(HOMOGENEOUS["an int, then floats"], 4))


@pytest.mark.parametrize(
    "env_id", [max(name for name in gymnasium.registry if name.startswith("Taxi-")), "FrozenLake-v1"]
)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_entries_of_real_envs_are_merged_as_gymnasium_did(env_id: str, mode: AutoresetMode) -> None:
    class Listening(SyncVectorEnv):
        """Keeps what it adds; the inside of a final_info, which it adds by the same method, only as a part of that."""

        entries: list[tuple[int, dict[str, Any]]] = []
        inside = 0

        def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
            if not self.inside:
                self.entries.append((env_num, copy.deepcopy(env_info)))
            self.inside += 1
            infos = super()._add_info(vector_infos, env_info, env_num)
            self.inside -= 1
            return infos

    def one() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(env_id, max_episode_steps=7)

    envs = Listening([one] * 6, autoreset_mode=mode)
    _, expected = envs.reset(seed=3)
    envs.action_space.seed(3)
    for _ in range(30):
        for cuts in ([], [2], [1, 4]):
            assert same(merge_infos(travelling(envs.entries, 6, cuts), 6), expected)
        envs.entries = []
        expected = envs.step(envs.action_space.sample())[4]
    envs.close()


def arrays_in(value: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(value, dict):
        return [array for part in value.values() for array in arrays_in(part)]
    if isinstance(value, np.ndarray):
        inner = [array for item in value for array in arrays_in(item)] if value.dtype == object else []
        return [value, *inner]
    return []


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", ["taxi", "nested", "an ended one", "the first one ended", "a text, then arrays"])
def test_arrays_are_owned_writable_and_of_no_other_call(name: str, cuts: list[int]) -> None:
    entries = HOMOGENEOUS[name]
    sent = [
        (pack(pack_infos([(i - o, info) for i, info in entries if o <= i < o + n], n)), o, n)
        for o, n in shards(4, cuts)
    ]
    results = [merge_infos([(unpack(data), o, n) for data, o, n in sent], 4) for _ in range(2)]
    inputs = [array for _, info in entries for array in arrays_in(info)]
    seen: list[np.ndarray[Any, Any]] = []
    for infos in results:
        for array in arrays_in(infos):
            assert array.flags.owndata
            assert array.flags.writeable
            assert not any(np.shares_memory(array, other) for other in (*seen, *inputs))
            seen.append(array)


# --------------------------------------------------------------------------- hostile parts

ONES = np.ones(2)
BAD: dict[str, Any] = {
    "no map": [1],
    "a number": 7,
    "no known form": {"other": 1},
    "entries that are no list": {"entries": {}},
    "an entry that is no pair": {"entries": [[0]]},
    "an entry that is a tuple": {"entries": [(0, {})]},
    "an index of another type": {"entries": [[0.0, {}]]},
    "an index that is a bool": {"entries": [[True, {"a": 1}]]},
    "an index that is an array": {"entries": [[np.zeros(2, int), {"a": 1}]]},
    "a negative index": {"entries": [[-1, {"a": 1}]]},
    "an index of another shard": {"entries": [[2, {"a": 1}]]},
    "a huge index": {"entries": [[2**80, {"a": 1}]]},
    "descending indices": {"entries": [[1, {"a": 1}], [0, {"a": 1}]]},
    "an index three times": {"entries": [[1, {"a": 1}]] * 3},
    "an info that is no map": {"entries": [[0, [1]]]},
    "an info that is nothing": {"entries": [[0, None]]},
    "columns that are no list": {"columns": {}},
    "no groups": {"columns": []},
    "too many groups": {"columns": [{}] * (MAX_GROUPS + 1), "group": np.zeros(2, int)},
    "a group that is no map": {"columns": [[1]]},
    "groups that nothing tells apart": {"columns": [{"a": ["scalar", ONES]}] * 2},
    "a group without entries": {"columns": [{"a": ["scalar", ONES]}, {}], "group": np.zeros(2, int)},
    "group numbers that do not exist": {"columns": [{"a": ["scalar", ONES]}], "group": np.array([0, 1])},
    "negative group numbers": {"columns": [{"a": ["scalar", ONES]}], "group": np.array([0, -1])},
    "too few group numbers": {"columns": [{"a": ["scalar", ONES[:1]]}], "group": np.zeros(1, int)},
    "too many group numbers": {"columns": [{"a": ["scalar", np.ones(3)]}], "group": np.zeros(3, int)},
    "groups out of order": {
        "columns": [{"a": ["scalar", ONES[:1]]}, {"b": ["scalar", ONES[:1]]}],
        "group": np.array([1, 0]),
    },
    "group numbers as a list": {"columns": [{"a": ["scalar", ONES]}], "group": [0, 0]},
    "at as a list": {"columns": [{"a": ["scalar", ONES]}], "at": [0, 1]},
    "at of floats": {"columns": [{"a": ["scalar", ONES]}], "at": np.zeros(2)},
    "at of bools": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([False, True])},
    "at of two axes": {"columns": [{"a": ["scalar", ONES]}], "at": np.zeros((2, 1), int)},
    "an empty at": {"columns": [{"a": ["scalar", np.ones(0)]}], "at": np.zeros(0, int)},
    "a negative at": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([-1, 0])},
    "at of another shard": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([1, 2])},
    "at beyond int64": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([0, 2**64 - 1], np.uint64)},
    "a descending at": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([1, 0])},
    "at with one twice in its group": {"columns": [{"a": ["scalar", ONES]}], "at": np.array([1, 1])},
    "at with one twice in a group of two": {
        "columns": [{"a": ["scalar", ONES]}, {"b": ["scalar", ONES[:1]]}],
        "at": np.array([0, 0, 1]),
        "group": np.array([0, 0, 1]),
    },
    "at with one three times": {
        "columns": [{k: ["scalar", ONES[:1]]} for k in "abc"],
        "at": np.zeros(3, int),
        "group": np.arange(3),
    },
    "a key that is no text": {"columns": [{1: ["scalar", ONES]}]},
    "a key like a mask": {"columns": [{"a": ["scalar", ONES], "_a": ["scalar", ONES]}]},
    "a column without a kind": {"columns": [{"a": ONES}]},
    "a kind that is no text": {"columns": [{"a": [["scalar"], ONES]}]},
    "an unknown kind": {"columns": [{"a": ["pickle", ONES]}]},
    "a kind of merged infos": {"columns": [{"a": ["value", ONES]}]},
    "too few values": {"columns": [{"a": ["scalar", ONES[:1]]}]},
    "too many values": {"columns": [{"a": ["scalar", np.ones(3)]}]},
    "0-d values": {"columns": [{"a": ["array", np.array(1)]}]},
    "values as a list": {"columns": [{"a": ["scalar", [1.0, 1.0]]}]},
    "scalars of two axes": {"columns": [{"a": ["scalar", np.ones((2, 1))]}]},
    "scalars of text": {"columns": [{"a": ["scalar", np.array(["a", "b"])]}]},
    "numpy scalars of text": {"columns": [{"a": ["numpy", np.array(["a", "b"])]}]},
    "objects as an array": {"columns": [{"a": ["object", ONES]}]},
    "objects that are numbers": {"columns": [{"a": ["object", [None, 1.0]]}]},
    "objects that are dicts": {"columns": [{"a": ["object", [None, {"b": 1.0}]]}]},
    "objects that are arrays": {"columns": [{"a": ["object", [None, ONES]]}]},
    "too few objects": {"columns": [{"a": ["object", [None]]}]},
    "a map that is none": {"columns": [{"a": ["map", [1]]}]},
    "a map with too few values": {"columns": [{"a": ["map", {"b": ["scalar", ONES[:1]]}]}]},
    "merged that is no map": {"merged": [1]},
    "merged with too few values": {"merged": {"a": ["array", ONES[:1]]}},
    "merged with too few objects": {"merged": {"a": ["object", [1]]}},
    "merged of an unknown kind": {"merged": {"a": ["scalar", ONES]}},
    "merged without a kind": {"merged": {"a": ONES}},
    "merged with a bad map": {"merged": {"a": ["map", 3]}},
}


@pytest.mark.parametrize("others", [None, {"columns": [{"a": ["scalar", ONES]}]}, {"merged": {"a": ["array", ONES]}}])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_form_of_infos_is_refused(name: str, others: Any) -> None:
    with pytest.raises(MalformedMessage):
        merge_infos([(unpack(pack(BAD[name])), 0, 2), (others, 2, 2)], 4)
    with pytest.raises(MalformedMessage):
        merge_infos([(others, 0, 2), (unpack(pack(BAD[name])), 2, 2)], 4)


@pytest.mark.parametrize("kind", ["entries", "columns", "merged"])
def test_infos_nested_too_deeply_are_refused(kind: str) -> None:
    value: Any = {}
    for _ in range(5000):
        value = {"a": value} if kind == "entries" else {"a": ["map", value]}
    part = {"entries": {"entries": [[0, value]]}, "columns": {"columns": [value]}, "merged": {"merged": value}}[kind]
    with pytest.raises(MalformedMessage):
        merge_infos([(part, 0, 1)], 1)


junk = st.recursive(
    st.one_of(
        st.none(),
        st.integers(-3, 5),
        st.sampled_from(("scalar", "numpy", "array", "object", "map", "value", 2**70, NAN)),
        st.sampled_from((ONES, np.arange(2), np.array([1, 0]), np.array(3), np.zeros((2, 0)), np.array(["a", "b"]))),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(st.sampled_from(("scalar", "numpy", "array", "object", "map", "value")), inner).map(list),
        st.dictionaries(
            st.sampled_from(("columns", "entries", "merged", "at", "group", "a", "b", "_a")), inner, max_size=4
        ),
    ),
    max_leaves=10,
)


@given(junk, junk)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_columns_a_worker_sends_they_merge_or_are_refused(columns: Any, at: Any) -> None:
    for part in ({"columns": [{"a": columns, "b": at}]}, {"columns": columns, "at": at}, {"merged": columns}):
        try:
            infos = merge_infos([(copy.deepcopy(part), 0, 2), ({"columns": [{"a": ["scalar", ONES]}]}, 2, 2)], 4)
        except MalformedMessage:
            event("refused")
        except (TypeError, ValueError, OverflowError):
            event("of the form, and no array takes it")  # an error of the env's, as it is locally
        else:
            event("merged")
            assert all(len(array) == 4 for array in infos.values() if isinstance(array, np.ndarray))


@pytest.mark.parametrize("cuts", [[], [1], [2]], ids=str)
@pytest.mark.parametrize("first", [1.0, None, np.ones(2)], ids=str)
def test_a_dict_where_others_have_something_else_is_the_error_that_it_is_locally(first: Any, cuts: list[int]) -> None:
    entries: Entries = [(0, {"a": first}), (1, {"a": first}), (2, {"a": {"b": 1.0}}), (3, {"a": {"b": 1.0}})]
    assert assert_as_local(entries, 4, cuts) in (AttributeError, IndexError)


# --------------------------------------------------------------------------- merged by the implementation


def merged_parts(*infos: tuple[dict[str, Any] | None, int]) -> list[tuple[Any, int, int]]:
    parts, offset = [], 0
    for info, count in infos:
        packed = None if info is None else unpack(pack(pack_merged(info, count)))
        parts.append((packed, offset, count))
        offset += count
    return parts


def objects(*items: Any) -> np.ndarray[Any, Any]:
    return np.fromiter(items, object, len(items))


MERGED = {
    "lives": np.array([1, 2], np.int32),
    "_lives": np.array([True, False]),
    "final_obs": objects(np.arange(3.0), None),
    "players": {"env_id": np.arange(2), "deep": {"x": np.ones((2, 3), ">f4")}, "empty": {}},
    "version": "1.0",
    "scale": np.ones(3),
    "0-d": np.array(2),
    "a list": [1, 2],
}


def test_merged_infos_of_the_only_shard_are_given_back_as_they_were() -> None:
    assert same(merge_infos(merged_parts((MERGED, 2)), 2), MERGED)
    deep: dict[str, Any] = {"x": np.ones(2)}
    for _ in range(60):
        deep = {"a": deep}
    assert same(merge_infos(merged_parts((deep, 2)), 2), deep)


def test_merged_infos_of_several_shards_are_joined_by_key() -> None:
    infos = merge_infos(
        merged_parts(
            ({"a": np.ones(2), "m": {"x": np.ones((2, 2), "i1")}}, 2),
            ({"a": np.zeros(1), "m": {"x": np.full((1, 2), 3, "i1")}}, 1),
        ),
        3,
    )
    assert same(infos, {"a": np.array([1.0, 1.0, 0.0]), "m": {"x": np.array([[1, 1], [1, 1], [3, 3]], "i1")}})


def test_a_shard_without_a_key_has_zeros_none_and_false_there() -> None:
    first = {"a": np.ones(1), "_a": np.array([True]), "o": objects("text"), "m": {"x": np.ones(1, np.int8)}}
    second = {"b": np.ones((2, 2), ">f4"), "_b": np.array([True, False]), "a": np.full(2, 5.0), "_a": np.ones(2, bool)}
    infos = merge_infos(merged_parts((first, 1), (None, 1), (second, 2)), 4)
    assert same(
        infos,
        {
            "a": np.array([1.0, 0.0, 5.0, 5.0]),
            "_a": np.array([True, False, True, True]),
            "o": objects("text", None, None, None),
            "m": {"x": np.array([1, 0, 0, 0], np.int8)},
            "b": np.array([[0, 0], [0, 0], [1, 1], [1, 1]], ">f4"),
            "_b": np.array([False, False, True, False]),
        },
    )


def test_the_only_shard_that_says_something_is_padded_to_the_whole_vector() -> None:
    infos = merge_infos(merged_parts((None, 2), ({"a": np.ones(1), "m": {"x": np.ones(1)}}, 1)), 3)
    assert same(infos, {"a": np.array([0.0, 0.0, 1.0]), "m": {"x": np.array([0.0, 0.0, 1.0])}})


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        (np.ones(2), np.array([1]), objects(np.float64(1), np.float64(1), np.int64(1))),
        (np.ones((2, 1)), np.ones((1, 2)), objects(np.ones(1), np.ones(1), np.ones(2))),
        (objects("a", "b"), np.ones(1), objects("a", "b", np.float64(1))),
        ("1.0", "2.0", objects("1.0", "1.0", "2.0")),
        (np.ones(3), np.ones(4), objects(np.ones(3), np.ones(3), np.ones(4))),
        ({"x": np.ones(2)}, np.ones(1), objects({"x": np.ones(2)}, {"x": np.ones(2)}, np.float64(1))),
    ],
)
def test_what_cannot_be_joined_becomes_an_object_array(first: Any, second: Any, joined: Any) -> None:
    infos = merge_infos(merged_parts(({"a": first}, 2), ({"a": second}, 1)), 3)
    assert same(infos, {"a": joined})


def test_shards_that_merge_and_shards_that_do_not_are_joined() -> None:
    entries = [(0, {"prob": 0.5}), (1, {"prob": 1.0})]
    parts = [
        (unpack(pack(pack_infos(entries, 2))), 0, 2),
        *((part, 2, count) for part, _, count in merged_parts(({"prob": np.ones(1), "_prob": np.ones(1, bool)}, 1))),
        (unpack(pack(pack_infos([(0, {"text": "x"})], 1))), 3, 1),
    ]
    assert same(
        merge_infos(parts, 4),
        {
            "prob": np.array([0.5, 1.0, 1.0, 0.0]),
            "_prob": np.array([True, True, True, False]),
            "text": objects(None, None, None, "x"),
            "_text": np.array([False, False, False, True]),
        },
    )


def test_joined_arrays_are_owned_writable_and_of_no_other_call() -> None:
    first = {"a": np.ones((2, 2)), "o": objects(np.ones(2), None), "v": np.ones(3)}
    parts = (first, 2), ({"a": np.ones((1, 3))}, 1)
    seen: list[np.ndarray[Any, Any]] = arrays_in(first)
    for given_parts, num_envs in ((parts, 3), (parts[:1], 2)):
        for array in arrays_in(merge_infos(merged_parts(*given_parts), num_envs)):
            assert array.flags.owndata
            assert array.flags.writeable
            assert not any(np.shares_memory(array, other) for other in seen)
            seen.append(array)
