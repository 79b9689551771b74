"""Medians, paired ratios and their intervals on data of which the answer is known."""

import numpy as np
import pytest

from benchmarks import estimates


def test_the_median_leaves_out_rounds_without_a_value() -> None:
    assert estimates.median([3.0, None, 1.0, 2.0, None]) == 2.0


def test_a_median_of_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="no round"):
        estimates.median([None, None])


def test_an_interval_of_equal_rounds_is_a_point() -> None:
    one = estimates.estimate([5.0] * 10)
    assert (one.value, one.low, one.high, one.rounds) == (5.0, 5.0, 5.0, 10)


def test_an_interval_holds_the_median_and_lies_within_the_values() -> None:
    one = estimates.estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert 1.0 <= one.low <= one.value == 3.0 <= one.high <= 100.0


def test_the_interval_is_that_of_the_bootstrap_at_95_percent() -> None:
    # Of three values the median of a resample is the least with probability 7/27, the greatest with the same.
    one = estimates.estimate([1.0, 2.0, 3.0])
    assert (one.low, one.value, one.high) == (1.0, 2.0, 3.0)


def test_an_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(7)
    runs = [estimates.estimate(generator.normal(10.0, 1.0, 20).tolist()) for _ in range(200)]
    assert 0.88 <= sum(one.low <= 10.0 <= one.high for one in runs) / len(runs) <= 0.99


def test_the_same_values_give_the_same_interval() -> None:
    values = [1.0, 5.0, 2.0, 8.0, 3.0]
    assert estimates.estimate(values) == estimates.estimate(list(values))


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was twice as fast for both: over medians the ratio would be no 3 everywhere.
    one = estimates.ratio([30.0, 60.0, 33.0], [10.0, 20.0, 11.0])
    assert (one.value, one.low, one.high) == (3.0, 3.0, 3.0)


def test_a_ratio_leaves_out_rounds_that_lack_a_side() -> None:
    one = estimates.ratio([4.0, None, 9.0, 8.0], [2.0, 1.0, None, 4.0])
    assert (one.value, one.rounds) == (2.0, 2)


def test_a_difference_is_taken_within_each_round() -> None:
    assert estimates.difference([110.0, 250.0, 160.0], [100.0, 200.0, 150.0]).value == 10.0


def test_sides_of_different_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        estimates.ratio([1.0, 2.0], [1.0])


def test_quantiles_begin_with_the_least_and_end_with_the_greatest() -> None:
    found = estimates.quantiles([5.0, 1.0, 3.0], parts=4)
    assert found == [1.0, 2.0, 3.0, 4.0, 5.0]
