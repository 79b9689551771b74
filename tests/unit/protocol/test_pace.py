from __future__ import annotations

import math

import pytest

from meshrl.protocol.pace import (
    FAST_S,
    FAST_STEPS,
    NARROW_AGAIN,
    SLOW_S,
    TRIAL_AFTER,
    TRIAL_AFTER_AT_MOST,
    TRIAL_MISSES,
    TRIAL_STEPS,
    BatchPace,
    Pace,
)

FAST, BETWEEN, SLOW = FAST_S / 2, (FAST_S + SLOW_S) / 2, SLOW_S * 2


def paced(*runs: tuple[float, int]) -> Pace:
    pace = Pace()
    for seconds, times in runs:
        for _ in range(times):
            pace.took(seconds)
    return pace


def inline_after(pace: Pace, seconds: float) -> bool:
    pace.took(seconds)
    return pace.inline


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


# --------------------------------------------------------------------------- where threads fight for the interpreter

CROWDED = [(BETWEEN, TRIAL_AFTER - 1), (FAST, 1)]  # slow nearly always, as it looks from its thread


def test_one_that_is_fast_now_and_then_on_its_thread_is_tried_inline() -> None:
    assert not paced((BETWEEN, 1000)).inline
    assert not paced((FAST, 1), (BETWEEN, TRIAL_AFTER - 2)).inline
    assert paced((FAST, 1), (BETWEEN, TRIAL_AFTER - 1)).inline
    assert paced((BETWEEN, 5000), (FAST, 1)).inline


def test_a_trial_that_shows_it_fast_earns_the_loop() -> None:
    assert paced(*CROWDED, (BETWEEN, TRIAL_MISSES), (FAST, TRIAL_STEPS - TRIAL_MISSES), (BETWEEN, 1000)).inline


@pytest.mark.parametrize("shown", [[(SLOW, 1)], [(FAST, 5), (SLOW, 1)], [(FAST, 5), (FAST_S, TRIAL_MISSES + 1)]])
def test_a_trial_that_shows_it_slow_ends_there_and_the_next_comes_after_twice_as_many_steps(
    shown: list[tuple[float, int]],
) -> None:
    assert paced(*CROWDED, *shown[:-1], (shown[-1][0], shown[-1][1] - 1)).inline
    steps, pace = TRIAL_AFTER, paced(*CROWDED, *shown)
    for _ in range(10):
        assert not pace.inline
        steps = min(2 * steps, TRIAL_AFTER_AT_MOST)
        before = [inline_after(pace, BETWEEN) for _ in range(steps - 1)]
        assert (any(before), inline_after(pace, FAST)) == (False, True)
        for seconds, times in shown:
            for _ in range(times):
                pace.took(seconds)


def test_a_trial_that_went_well_forgives_those_that_did_not() -> None:
    failed = (*CROWDED, (SLOW, 1))
    passed = ((BETWEEN, 2 * TRIAL_AFTER - 1), (FAST, 1), (FAST, TRIAL_STEPS))
    assert not paced(*failed, *passed, (SLOW, 1), *CROWDED[:-1]).inline
    assert paced(*failed, *passed, (SLOW, 1), *CROWDED).inline


# --------------------------------------------------------------------------- of many in one message


def batched(count: int, *runs: tuple[float, int]) -> BatchPace:
    """Messages of all ``count``, each env of which took that long, so many times."""
    pace = BatchPace(count)
    for seconds, times in runs:
        for _ in range(times):
            pace.took(seconds * count)
    return pace


def test_the_envs_of_a_message_start_on_threads_one_after_another() -> None:
    pace = BatchPace(64)
    assert not pace.inline
    assert not pace.wide
    assert not pace.inline_for(1)


@pytest.mark.parametrize(("count", "messages"), [(1, FAST_STEPS), (7, 15), (64, 2), (100, 1), (1000, 1)])
def test_a_hundred_fast_steps_in_whatever_messages_earn_the_loop(count: int, messages: int) -> None:
    fast = FAST_S / 1000
    assert batched(count, (fast, messages)).inline
    assert not batched(count, (fast, messages - 1)).inline


def test_fast_envs_are_not_stepped_inline_where_all_together_take_long() -> None:
    assert batched(16, (FAST, 100)).inline
    assert not batched(32, (FAST, 100)).inline
    assert not batched(32, (FAST, 100)).wide


@pytest.mark.parametrize(("count", "inline"), [(1, True), (19, True), (20, False), (1000, False)])
def test_how_many_come_in_the_next_message_decides(count: int, inline: bool) -> None:
    """A pool's messages are of one lane, and then of a thousand."""
    pace = BatchPace(1000)
    for _ in range(FAST_STEPS):
        pace.took(FAST, 1)
    assert pace.inline_for(count) is inline


def test_one_message_that_is_not_fast_loses_the_loop() -> None:
    pace = batched(4, (FAST, 100), (SLOW, 1))
    assert not pace.inline
    assert not pace.inline_for(1)
    assert pace.wide
    for _ in range(FAST_STEPS // 4 - 1):
        pace.took(FAST * 4)
        assert not pace.inline
    pace.took(FAST * 4)
    assert pace.inline


def test_slow_envs_get_a_thread_each_and_one_thread_now_and_then_to_see_whether_they_still_are() -> None:
    pace = BatchPace(4)
    wide = []
    for _ in range(4 * NARROW_AGAIN):
        pace.took(SLOW * 4)
        wide.append(pace.wide)
    assert wide.count(False) == 4


def test_envs_that_have_become_fast_share_a_thread_again() -> None:
    pace = batched(4, (SLOW, 3))
    assert pace.wide
    for _ in range(FAST_STEPS // 4):
        pace.took(FAST * 4)
    assert not pace.wide
