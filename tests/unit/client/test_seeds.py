from __future__ import annotations

import pytest

from meshrl.client.seeds import Seeds
from meshrl.errors import InvalidSeed
from meshrl.wire.messages import Vectors


def test_a_root_counts_once_it_was_sent() -> None:
    seeds = Seeds("derived", 3, "env")
    drawn = seeds.of_reset(None)
    assert drawn is not None
    assert len(set(drawn)) == 1
    assert seeds.roots == (None, None, None)
    assert seeds.of_reset(None) == drawn, "what was drawn for a reset that was not sent is kept"
    seeds.sent(seeds.of_reset(7), range(3))
    assert seeds.root == 7
    assert seeds.of_reset(None) is None


def test_each_sub_environment_has_the_root_that_it_was_sent() -> None:
    seeds = Seeds("derived", 3, "env")
    seeds.sent(seeds.of_reset(1), [0, 1])
    assert (seeds.root, seeds.roots) == (1, (1, 1, None))
    seeds.sent(seeds.of_reset(2), [1])
    assert (seeds.root, seeds.roots) == (None, (1, 2, None))


def test_what_was_refused_is_sent_again_and_nothing_else() -> None:
    seeds = Seeds("derived", 3, "env")
    seeds.sent(seeds.of_reset(5), range(3))
    seeds.refused([1])
    assert seeds.of_reset(None) == [None, 5, None]
    seeds.sent(seeds.of_reset(None), range(3))
    assert seeds.of_reset(None) is None


def test_a_root_that_is_due_is_sent_to_all_others_at_their_next_reset() -> None:
    seeds = Seeds("derived", 3, "env")
    seeds.sent(seeds.of_reset(5), [0, 1])
    seeds.sent(seeds.of_reset(6), [0])
    seeds.due(6, [0])
    assert seeds.of_reset(None) == [None, 6, 6]
    assert seeds.roots == (6, 5, None)


@pytest.mark.parametrize("bad", [[1, 2, 3], 1.5, "7", -1, True])
def test_a_root_is_one_seed(bad: object) -> None:
    with pytest.raises(InvalidSeed):
        Seeds("derived", 3, "env").of_reset(bad)  # type: ignore[arg-type]


def test_with_gymnasiums_seeding_there_is_no_root() -> None:
    seeds = Seeds("gymnasium", 2, "env")
    seeds.sent(seeds.of_reset(5), range(2))
    assert (seeds.root, seeds.of_reset(None), seeds.of_reset([3, None])) == (None, None, [3, None])


@pytest.mark.parametrize("good", [7, [4, 5, 6], [None, None, None], None])
def test_of_what_follows_one_seed_a_list_of_what_comes_of_one_may_be_asked(good: object) -> None:
    seeds = Seeds("gymnasium", 3, "env", [Vectors(implementation="own", one_seed=True, seeds_below=10)])
    assert seeds.of_reset(good) == ([7, 8, 9] if good == 7 else good)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "why"),
    [([4, 6, 5], "consecutive"), ([4, None, 6], "consecutive"), ([None, 5, 6], "consecutive"), (8, "below 10")],
)
def test_what_workers_say_of_seeds_is_asked_of_all_before_any_is_sent(bad: object, why: str) -> None:
    others = [Vectors(), Vectors(implementation="own", one_seed=True), Vectors(implementation="own", seeds_below=10)]
    with pytest.raises(InvalidSeed, match=f"implementation own.*{why}"):
        Seeds("gymnasium", 3, "env", others).of_reset(bad)  # type: ignore[arg-type]
    assert Seeds("gymnasium", 3, "env", [Vectors()]).of_reset(bad)  # type: ignore[arg-type]
