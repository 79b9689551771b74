from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.client.ready import PoolBatch, Ready, Results
from meshrl.errors import MalformedMessage
from meshrl.wire.infos import pack_infos

SPACE = spaces.Dict({"at": spaces.Box(-1e9, 1e9, (2,), np.float32), "n": spaces.Discrete(10**9)})


def ready(
    env_ids: list[int], values: list[int], size: int = 0, infos: list[dict[str, Any]] | None = None, **fields: Any
) -> Ready:
    """An answer whose every field tells its value; with ``size``, there are more lanes in it, which are not wanted."""
    size = size or len(env_ids)
    rows = np.arange(size - len(env_ids), size)
    column = np.full(size, -1, np.int64)
    column[rows] = values
    at = np.stack([column, column], axis=1).astype(np.float32)
    frame: dict[str, Any] = {
        "obs": {"at": at, "n": column.copy()},
        "rewards": column.astype(np.float64),
        "terminations": column % 2 == 0,
        "truncations": column % 3 == 0,
        "first": False,
        "episodes": column + 1,
        "steps": column + 2,
    }
    if infos is not None:
        frame["infos"] = pack_infos([(int(row), info) for row, info in zip(rows, infos, strict=True) if info], size)
    return Ready({**frame, **fields}, size, rows, np.array(env_ids, np.int64))


def results(*added: Ready, num_envs: int = 10, fair: bool = False) -> Results:
    made = Results(SPACE, num_envs, fair=fair)
    for one in added:
        made.add(one)
    return made


def rows(batch: PoolBatch) -> list[tuple[int, int]]:
    """Env_ids and values, after a look whether all fields are of the same."""
    values = [int(value) for value in batch.observations["n"]]
    assert batch.observations["at"].tolist() == [[value, value] for value in values]
    assert batch.rewards.tolist() == values
    assert batch.terminations.tolist() == [value % 2 == 0 for value in values]
    assert batch.truncations.tolist() == [value % 3 == 0 for value in values]
    assert batch.episodes.tolist() == [value + 1 for value in values]
    assert batch.steps.tolist() == [value + 2 for value in values]
    assert batch.rewards.dtype == np.float64
    assert batch.first.dtype == np.bool_
    assert len(batch) == len(values) == len(batch.first)
    return list(zip(batch.env_ids.tolist(), values, strict=True))


def test_results_come_in_order_of_arrival_and_answers_are_cut_where_the_limit_is() -> None:
    made = results(ready([3, 1], [30, 10]), ready([2, 5, 0], [20, 50, 1], size=5))
    assert made.count == 5
    assert rows(made.take(1)) == [(3, 30)]
    assert rows(made.take(3)) == [(1, 10), (2, 20), (5, 50)]
    assert made.count == 1
    assert rows(made.take(100)) == [(0, 1)]
    assert made.count == 0


def test_first_is_of_each_row() -> None:
    batch = results(ready([0, 1], [1, 2], first=True), ready([2], [3])).take(10)
    assert batch.first.tolist() == [True, True, False]


def test_infos_are_merged_by_row_and_go_with_their_env() -> None:
    made = results(
        ready([4, 2, 6], [4, 2, 6], size=5, infos=[{"a": 4}, {}, {"a": 6, "b": "six"}]),
        ready([1], [1], infos=[{"a": 1}]),
    )
    first = made.take(2)
    assert first.infos["a"].tolist() == [4, 0]
    assert first.infos["_a"].tolist() == [True, False]
    rest = made.take(2)
    assert rest.env_ids.tolist() == [6, 1]
    assert rest.infos["a"].tolist() == [6, 1]
    assert rest.infos["b"].tolist() == ["six", None]
    assert "b" not in first.infos


def test_no_infos_are_an_empty_map() -> None:
    assert results(ready([0], [1])).take(1).infos == {}
    assert results(ready([0, 1], [1, 2], infos=[{}, {"a": 1}])).take(1).infos == {}


def test_what_is_handed_out_is_the_receivers_own() -> None:
    made = results(ready([0, 1, 2], [1, 2, 3], infos=[{"a": np.zeros(2)}, {"a": np.zeros(2)}, {"a": np.zeros(2)}]))
    one, rest = made.take(1), made.take(5)
    for batch in (one, rest):
        for array in (
            batch.env_ids,
            batch.observations["at"],
            batch.rewards,
            batch.first,
            batch.steps,
            batch.infos["a"],
        ):
            assert array.flags.writeable
            array[...] = 1
    one.observations["n"][:] = 77
    assert rest.observations["n"].tolist() == [2, 3]


def test_dropped_results_are_not_handed_out() -> None:
    made = results(ready([3, 1], [30, 10]), ready([2], [20]), ready([5, 4], [50, 40]))
    made.drop(np.array([1, 2, 5, 9]))
    assert made.count == 2
    assert rows(made.take(10)) == [(3, 30), (4, 40)]


def test_of_more_than_the_limit_a_fair_pool_gives_the_least_handed_out() -> None:
    made = results(fair=True, num_envs=4)
    for _ in range(2):
        made.add(ready([0, 3], [1, 2]))
        made.take(2)
    made.add(ready([0], [5]))
    made.take(1)
    # handed out: 0 three times, 3 twice, 1 and 2 never
    made.add(ready([0, 2], [10, 12]))
    made.add(ready([3, 1], [13, 11]))
    assert sorted(rows(made.take(1))) == [(2, 12)]
    assert sorted(rows(made.take(2))) == [(1, 11), (3, 13)]
    assert rows(made.take(2)) == [(0, 10)]


def test_in_a_fair_pool_equals_come_in_order_of_arrival() -> None:
    made = results(ready([2, 0], [2, 1]), ready([1], [3]), fair=True, num_envs=3)
    assert rows(made.take(2)) == [(2, 2), (0, 1)]


@pytest.mark.parametrize("field", ["obs", "rewards", "terminations", "truncations", "first", "episodes", "steps"])
def test_an_answer_that_lacks_a_field_is_not_taken(field: str) -> None:
    made, bad = results(ready([0], [1])), ready([1], [2])
    del bad.frame[field]
    with pytest.raises(MalformedMessage, match=field):
        made.add(bad)
    assert made.count == 1
    assert rows(made.take(5)) == [(0, 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"rewards": np.zeros(1)},
        {"rewards": np.zeros((2, 1))},
        {"rewards": np.zeros(2, np.float32)},
        {"rewards": [0.0, 0.0]},
        {"rewards": None},
        {"terminations": np.zeros(2, np.int8)},
        {"steps": np.zeros(2, np.int32)},
        {"first": 1},
        {"first": np.True_},
        {"obs": None},
        {"obs": {"at": np.zeros((2, 2), np.float32)}},
        {"obs": {"at": np.zeros((2, 2), np.float64), "n": np.zeros(2, np.int64)}},
        {"obs": {"at": np.zeros((3, 2), np.float32), "n": np.zeros(3, np.int64)}},
    ],
    ids=str,
)
def test_an_answer_with_a_field_of_another_form_is_not_taken(fields: dict[str, Any]) -> None:
    made = results(ready([0], [1]))
    with pytest.raises(MalformedMessage):
        made.add(ready([1, 2], [2, 3], **fields))
    assert rows(made.take(5)) == [(0, 1)]


@pytest.mark.parametrize("fair", [False, True])
def test_infos_that_cannot_be_merged_keep_their_results_and_those_can_be_had_one_by_one(fair: bool) -> None:
    made = results(
        ready([0, 1], [1, 2], infos=[{"a": 1}, {"a": "one"}]), ready([2], [3], infos=[{"a": {"b": 1}}]), fair=fair
    )
    for limit in (3, 2, 3):
        with pytest.raises(MalformedMessage, match="max=1"):
            made.take(limit)
        assert made.count == 3
    assert sorted(rows(made.take(1))[0] for _ in range(3)) == [(0, 1), (1, 2), (2, 3)]
    assert made.count == 0


@pytest.mark.parametrize("infos", ["text", {}, {"entries": 3}, {"entries": [[7, {}]]}, {"merged": {}}, [1]], ids=str)
def test_an_answer_with_infos_that_are_none_is_not_taken(infos: Any) -> None:
    made, bad = results(ready([2], [3])), ready([0, 1], [1, 2])
    bad.frame["infos"] = infos
    with pytest.raises(MalformedMessage):
        made.add(bad)
    made.add(ready([0], [5]))
    assert rows(made.take(5)) == [(2, 3), (0, 5)]


@pytest.mark.parametrize("fair", [False, True])
def test_infos_that_no_merging_takes_cost_their_own_rows_alone(fair: bool) -> None:
    huge = {"a": 1 << 80}
    made = results(
        ready([0, 1, 4], [1, 2, 3], size=5, infos=[{"a": 1}, huge, {}]), ready([2], [4], infos=[huge]), fair=fair
    )
    with pytest.raises(MalformedMessage) as told:
        made.take(10)
    assert sorted(told.value.details["env_ids"]) == [1, 2]
    assert sorted(rows(made.take(10))) == [(0, 1), (4, 3)]
    assert made.count == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    fair=st.booleans(),
    moves=st.lists(
        st.one_of(
            st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
            st.integers(1, 10),
            st.tuples(st.integers(0, 9), st.integers(0, 9)),
        ),
        max_size=40,
    ),
)
def test_each_result_is_handed_out_once_unless_it_is_dropped(fair: bool, moves: list[Any]) -> None:
    made, value = results(fair=fair), 0
    waiting: dict[int, int] = {}
    handed = [0] * 10
    for move in moves:
        if isinstance(move, list):
            env_ids = [i for i in move if i not in waiting]
            if env_ids:
                values = list(range(value, value + len(env_ids)))
                value += len(env_ids)
                made.add(ready(env_ids, values, size=len(env_ids) + value % 3))
                waiting.update(zip(env_ids, values, strict=True))
        elif isinstance(move, tuple):
            made.drop(np.array(move))
            for i in move:
                waiting.pop(i, None)
        elif waiting:
            got = rows(made.take(move))
            assert len(got) == min(move, len(waiting))
            if fair:
                left = [handed[i] for i in waiting if i not in dict(got)]
                assert max(handed[i] for i, _ in got) <= min(left, default=10**9)
            else:
                assert [v for _, v in got] == sorted(waiting.values())[: len(got)]
            for i, v in got:
                assert waiting.pop(i) == v
                handed[i] += 1
        assert made.count == len(waiting)
