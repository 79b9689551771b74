from __future__ import annotations

import math

import pytest

from meshrl.protocol.pace import FAST_S, FAST_STEPS, SLOW_S, Pace

FAST, BETWEEN, SLOW = FAST_S / 2, (FAST_S + SLOW_S) / 2, SLOW_S * 2


def paced(*runs: tuple[float, int]) -> Pace:
    pace = Pace()
    for seconds, times in runs:
        for _ in range(times):
            pace.took(seconds)
    return pace


def test_an_env_starts_on_a_thread() -> None:
    assert not Pace().inline


@pytest.mark.parametrize(("steps", "inline"), [(FAST_STEPS - 1, False), (FAST_STEPS, True), (FAST_STEPS + 1, True)])
def test_a_hundred_fast_steps_in_a_row_earn_the_loop(steps: int, inline: bool) -> None:
    assert paced((FAST, steps)).inline is inline


@pytest.mark.parametrize("between", [FAST_S, BETWEEN, SLOW_S, SLOW])
def test_a_step_that_is_not_fast_begins_the_row_anew(between: float) -> None:
    assert not paced((FAST, FAST_STEPS - 1), (between, 1), (FAST, FAST_STEPS - 1)).inline
    assert paced((FAST, FAST_STEPS - 1), (between, 1), (FAST, FAST_STEPS)).inline


@pytest.mark.parametrize("seconds", [0.0, FAST, FAST_S, BETWEEN, SLOW_S])
def test_up_to_ten_milliseconds_keep_the_loop(seconds: float) -> None:
    assert paced((FAST, FAST_STEPS), (seconds, 1000)).inline


@pytest.mark.parametrize("seconds", [math.nextafter(SLOW_S, 1), SLOW, 60.0])
def test_one_slow_step_loses_the_loop_which_has_to_be_earned_again(seconds: float) -> None:
    assert not paced((FAST, FAST_STEPS), (seconds, 1)).inline
    assert not paced((FAST, FAST_STEPS), (seconds, 1), (FAST, FAST_STEPS - 1)).inline
    assert paced((FAST, FAST_STEPS), (seconds, 1), (FAST, FAST_STEPS)).inline


def test_a_step_of_exactly_a_millisecond_is_not_fast() -> None:
    assert not paced((FAST_S, 1000)).inline
    assert paced((math.nextafter(FAST_S, 0), FAST_STEPS)).inline
