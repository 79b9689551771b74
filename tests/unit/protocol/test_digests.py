"""The running digests of many sub-environments: whatever is told otherwise is another digest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from meshrl.protocol.digests import MANY_ROWS, SHORT_BYTES, Digests, hashes_of
from meshrl.wire.batches import batching
from meshrl.wire.large import LARGE_BYTES, Rows

ALL = slice(None)
SPACES: list[spaces.Space[Any]] = [
    spaces.Box(-1, 1, (4,), np.float32),
    spaces.Box(0, 255, (SHORT_BYTES + 1,), np.uint8),
    spaces.Box(-1, 1, (), np.float64),
    spaces.Discrete(5),
    spaces.MultiBinary(11),
    spaces.Text(8),
    spaces.Sequence(spaces.Discrete(4)),
    spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Tuple((spaces.Box(0, 1, (2, 3)), spaces.Text(4)))}),
]


def outcome(n: int, reward: float = 1.0) -> tuple[Any, Any, Any]:
    return np.full(n, reward), np.zeros(n, np.bool_), np.zeros(n, np.bool_)


def batches(space: spaces.Space[Any], n: int, count: int) -> list[Any]:
    batched = batch_space(space, n)
    batched.seed(3)
    return [batched.sample() for _ in range(count)]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_rows_told_together_and_those_of_one_alone_come_to_the_same(space: spaces.Space[Any]) -> None:
    together, alone, of = Digests(3, batching(space)), Digests(3, batching(space)), batching(space)
    told = batches(space, 3, 4)
    for obs in told:
        together.add(ALL, obs, *outcome(3))
    for i in range(3):
        own = of.stack([list(of.rows(obs, 3))[i] for obs in told])
        alone.chain(i, own, *outcome(4), anew=False)
    assert together.values.tolist() == alone.values.tolist()
    assert len(set(together.values.tolist())) == 3


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_another_observation_is_another_digest(space: spaces.Space[Any]) -> None:
    one, other = Digests(3, batching(space)), Digests(3, batching(space))
    first, second = batches(space, 3, 2)
    one.add(ALL, first, *outcome(3))
    other.add(ALL, second, *outcome(3))
    of = batching(space)
    for i, (a, b) in enumerate(zip(of.rows(first, 3), of.rows(second, 3), strict=True)):
        assert (one.values[i] == other.values[i]) == (repr(a) == repr(b))


def test_reward_and_flags_count_and_so_does_the_order() -> None:
    space = SPACES[0]
    first, second = batches(space, 1, 2)
    yes, no = np.ones(1, np.bool_), np.zeros(1, np.bool_)
    told = [
        [(first, np.ones(1), no, no)],
        [(first, np.zeros(1), no, no)],
        [(first, -np.zeros(1), no, no)],
        [(first, np.full(1, np.nan), no, no)],
        [(first, np.ones(1), yes, no)],
        [(first, np.ones(1), no, yes)],
        [(first, np.ones(1), no, no), (second, np.ones(1), no, no)],
        [(second, np.ones(1), no, no), (first, np.ones(1), no, no)],
        [(first, np.ones(1), no, no)] * 2,
    ]
    values = []
    for rows in told:
        digests = Digests(1, batching(space))
        for row in rows:
            digests.add(ALL, *row)
        values.append(int(digests.values[0]))
    assert len(set(values)) == len(values)


def test_where_a_journal_begins_anew_what_was_told_before_is_forgotten_and_the_end_before_too() -> None:
    space = SPACES[0]
    (first, second) = batches(space, 2, 2)
    with_past, without = Digests(2, batching(space)), Digests(2, batching(space))
    with_past.add(ALL, first, *outcome(2))
    ends = np.array([5.0, 6.0]), np.array([True, False]), np.array([False, True])
    with_past.add(ALL, second, *ends, [0])
    without.add(ALL, second, *outcome(2, 0.0), [0])
    assert with_past.values[0] == without.values[0]
    assert with_past.values[1] != without.values[1]


def test_some_of_them_may_tell_something() -> None:
    space = SPACES[0]
    digests, all_of_them = Digests(4, batching(space)), Digests(4, batching(space))
    (obs,) = batches(space, 4, 1)
    told = digests.add(np.array([3, 1]), obs[[3, 1]], *outcome(2))
    all_of_them.add(ALL, obs, *outcome(4))
    assert told.tolist() == all_of_them.values[[3, 1]].tolist()
    assert digests.values[[0, 2]].tolist() == [0, 0]


def test_large_arrays_count_the_same_whether_they_were_stacked_or_not() -> None:
    space = spaces.Box(0, 255, (LARGE_BYTES,), np.uint8)
    (obs,) = batches(space, 2, 1)
    rows, stacked = Digests(2, batching(space)), Digests(2, batching(space))
    rows.add(ALL, Rows(list(obs)), *outcome(2))
    stacked.add(ALL, obs, *outcome(2))
    assert rows.values.tolist() == stacked.values.tolist()


@pytest.mark.parametrize("signs", [(1, -1, 1, -1), (-1, -1, 1, 1), (-1, -1, -1, -1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_mirrored_is_something_else(signs: Any, dtype: Any) -> None:
    space = spaces.Box(-9, 9, (4,), dtype)
    obs = np.array([[1, 2, 3, 4]], dtype)
    one, other = Digests(1, batching(space)), Digests(1, batching(space))
    one.add(ALL, obs, *outcome(1))
    other.add(ALL, obs * np.array(signs, dtype), *outcome(1))
    assert one.values[0] != other.values[0]
    other = Digests(1, batching(space))
    other.add(ALL, obs * np.array([-1, 1, 1, 1], dtype), *outcome(1, -1.0))
    assert one.values[0] != other.values[0]


def test_small_rows_count_the_same_in_a_large_batch() -> None:
    space = spaces.Box(-9, 9, (17,), np.float64)
    obs = batches(space, 600, 1)[0]
    together, alone = Digests(600, batching(space)), Digests(600, batching(space))
    together.add(ALL, Rows(list(obs)), *outcome(600))
    for i in (0, 599):
        alone.chain(i, obs[i : i + 1], *outcome(1), anew=False)
        assert together.values[i] == alone.values[i]


@pytest.mark.parametrize(
    "space",
    [
        *SPACES,
        spaces.Dict({}),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Box(-1, 1, (5,), np.float32),
        spaces.Box(-1, 1, (2, 2), np.float64),
        spaces.Box(-1, 1, (9,), np.float32),
        spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (3,), np.dtype(">f4")), spaces.MultiBinary(4))),
        spaces.Tuple((spaces.Text(4), spaces.MultiBinary(3))),
    ],
    ids=str,
)
def test_many_rows_count_the_same_as_few_of_them_at_a_time(space: spaces.Space[Any]) -> None:
    of, rng, size = batching(space), np.random.default_rng(1), MANY_ROWS // 4
    rewards = rng.normal(size=5 * size)
    terminations, truncations = rng.random((2, 5 * size)) < 0.3
    told = batches(space, size, 5)
    anew = sorted(rng.choice(5 * size, 40, replace=False).tolist())
    few = []
    for k, obs in enumerate(told):
        part = slice(k * size, (k + 1) * size)
        own = [row - part.start for row in anew if part.start <= row < part.stop]
        leaves = list(of.leaves(obs, size))
        few += hashes_of(leaves, rewards[part], terminations[part], truncations[part], own).tolist()
    leaves = list(of.leaves(of.joined(told, [size] * 5), 5 * size))
    assert hashes_of(leaves, rewards, terminations, truncations, anew).tolist() == few
    assert hashes_of(leaves, rewards, terminations, truncations).tolist() != few


@given(st.data())
def test_no_bit_of_an_observation_can_be_changed_unnoticed(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    space = spaces.Box(0, 255, (size,), np.uint8)
    obs = np.frombuffer(data.draw(st.binary(min_size=2 * size, max_size=2 * size)), np.uint8).reshape(2, size)
    changed = obs.copy()
    changed[0, data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    one, other = Digests(2, batching(space)), Digests(2, batching(space))
    one.add(ALL, obs, *outcome(2))
    other.add(ALL, changed, *outcome(2))
    assert one.values[0] != other.values[0]
    assert one.values[1] == other.values[1]
