"""Infos taken apart again: those of each sub-environment are what its env gave, whatever the shards."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage
from meshrl.wire.codec import pack, unpack
from meshrl.wire.infos import pack_infos, split_infos
from meshrl.wire.merged_infos import pack_merged
from tests.unit.wire.strategies import same as same_leaf


def same(a: Any, b: Any) -> bool:
    """Whether two values are of the same types, keys in the same order, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return same_leaf(a, b)


VALUES: list[Any] = [
    1,
    2.5,
    True,
    None,
    "text",
    b"bytes",
    np.float32(0.5),
    np.int64(3),
    np.bool_(True),
    np.arange(4, dtype=np.int16).reshape(2, 2),
    np.array(1.5),
    (1, [2.0, None]),
    {"deep": {"x": 1.0, "y": np.float64(2.0)}},
    {},
]
INFO = st.dictionaries(st.sampled_from(["a", "b", "c", "_a"]), st.sampled_from(VALUES), max_size=3)
FINAL = st.fixed_dictionaries({"final_obs": st.sampled_from(VALUES), "final_info": INFO})
ONE = st.one_of(INFO.map(lambda info: [info]), st.tuples(FINAL, INFO).map(list))


@given(st.lists(ONE, min_size=1, max_size=9), st.integers(0, 9))
def test_each_sub_environment_has_its_own_infos_back(told: list[list[dict[str, Any]]], cut: int) -> None:
    expected = [[info for info in infos if info] for infos in copy.deepcopy(told)]
    parts = []
    for low, high in ((0, min(cut, len(told))), (min(cut, len(told)), len(told))):
        if high > low:
            entries = [(i, info) for i, infos in enumerate(told[low:high]) for info in infos]
            parts.append((unpack(pack(pack_infos(entries, high - low))), low, high - low))
    assert same(split_infos(parts, len(told)), expected)
    assert same(split_infos([], len(told)), [[] for _ in told])


@pytest.mark.parametrize("equal", [True, False], ids=["columns", "entries"])
def test_arrays_are_owned_writable_and_nobody_elses(equal: bool) -> None:
    entries: list[Any] = [(i, {"seen": np.zeros(3), **({} if equal else {f"of {i}": i})}) for i in range(20)]
    part = unpack(pack(pack_infos(entries, 20)))
    assert ("columns" in part) is equal
    arrays = [info["seen"] for (info,) in split_infos([(part, 0, 20)], 20)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert [array[0] for array in arrays] == list(range(20))


@pytest.mark.parametrize("part", [pack_merged({"a": np.zeros(2)}, 2), {}, [], 1, {"entries": [[2, {}]]}], ids=repr)
def test_what_cannot_be_taken_apart_is_refused(part: Any) -> None:
    with pytest.raises(MalformedMessage):
        split_infos([(part, 0, 2)], 2)
