from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import InvalidSeed
from meshrl.protocol.seeding import Seeding, Seedings
from meshrl.protocol.seeds import derive

FIRST_DRAWN = 1000


def seeding(how: Seedings = "derived", first: int = 0, size: int = 3) -> Seeding:
    drawn = count(FIRST_DRAWN)
    return Seeding(how, first, size, lambda: next(drawn))


# ---------------------------------------------------------------- gymnasium


def test_a_given_seed_is_passed_on() -> None:
    seeds = seeding("gymnasium")
    assert [seeds.reset(i, 7 + i) for i in range(3)] == [7, 8, 9]


def test_a_first_reset_without_a_seed_draws_one_and_later_ones_go_on() -> None:
    seeds = seeding("gymnasium")
    assert [seeds.reset(i, None) for i in (0, 0, 1, 1)] == [FIRST_DRAWN, None, FIRST_DRAWN + 1, None]


def test_after_a_seeded_reset_nothing_is_drawn() -> None:
    seeds = seeding("gymnasium")
    assert [seeds.reset(0, 5), seeds.next(0), seeds.reset(0, None), seeds.reset(0, 6)] == [5, None, None, 6]


# ---------------------------------------------------------------- derived


def test_a_given_seed_is_the_root_and_episodes_are_numbered_from_it() -> None:
    seeds = seeding(first=4)
    assert [seeds.reset(1, 9), seeds.next(1), seeds.reset(1, None), seeds.next(1)] == [
        derive(9, 5, n) for n in range(4)
    ]


def test_another_root_begins_at_episode_0_again() -> None:
    seeds = seeding()
    seeds.reset(0, 1)
    seeds.next(0)
    assert [seeds.reset(0, 2), seeds.next(0)] == [derive(2, 0, 0), derive(2, 0, 1)]
    assert [seeds.reset(0, 1), seeds.next(0)] == [derive(1, 0, 0), derive(1, 0, 1)]


def test_each_sub_environment_counts_its_own_episodes() -> None:
    seeds = seeding()
    for i in range(3):
        seeds.reset(i, 3)
    for _ in range(5):
        seeds.next(1)
    assert [seeds.next(i) for i in range(3)] == [derive(3, 0, 1), derive(3, 1, 6), derive(3, 2, 1)]


def test_a_first_reset_without_a_seed_draws_a_root_and_keeps_it() -> None:
    seeds = seeding()
    drawn = [seeds.reset(0, None), seeds.next(0), seeds.reset(0, None)]
    assert drawn == [derive(FIRST_DRAWN, 0, n) for n in range(3)]


@given(
    st.integers(0, 2**40),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 15), st.booleans()), max_size=40),
)
def test_shards_change_no_seed(root: int, sizes: list[int], episodes: list[tuple[int, bool]]) -> None:
    size = sum(sizes)
    whole = seeding(size=size)
    shards = [(seeding(first=sum(sizes[:k]), size=sizes[k]), sum(sizes[:k])) for k in range(len(sizes))]

    def of(i: int) -> tuple[Seeding, int]:
        shard, first = [(shard, first) for shard, first in shards if first <= i][-1]
        return shard, i - first

    for i in range(size):
        shard, own = of(i)
        assert whole.reset(i, root) == shard.reset(own, root) == derive(root, i, 0)
    for i, explicit in ((i % size, explicit) for i, explicit in episodes):
        shard, own = of(i)
        if explicit:
            assert whole.reset(i, None) == shard.reset(own, None)
        else:
            assert whole.next(i) == shard.next(own)


# ---------------------------------------------------------------- what a peer sent


def test_seeds_of_a_reset_are_one_a_sub_environment_or_none() -> None:
    seeds = seeding()
    assert seeds.check(None) == [None, None, None]
    assert seeds.check([1, None, 2**70]) == [1, None, 2**70]
    assert seeds.check((0, 1, np.int64(2))) == [0, 1, 2]
    assert seeds.check_one(None) is None
    assert seeds.check_one(5) == 5


@pytest.mark.parametrize("wrong", [[], [1, 2], [1, 2, 3, 4], 5, "123", {0: 1, 1: 2, 2: 3}, np.arange(3)])
def test_any_other_number_or_form_of_seeds_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidSeed, match="3 sub-environments"):
        seeding().check(wrong)


@pytest.mark.parametrize("wrong", [-1, True, 1.0, "1", [1]])
def test_what_is_no_seed_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidSeed):
        seeding().check([0, wrong, 1])
    with pytest.raises(InvalidSeed):
        seeding().check_one(wrong)
