from __future__ import annotations

import pytest

from meshrl.protocol.doubt import (
    AGAIN_IN_GRACE_S,
    DISCONNECTED_S,
    FROZEN_S,
    GRACE_AFTER_RECONNECT_S,
    GRACE_S,
    PROBE_AGAIN_S,
    QUIET_S,
    RESUMED_GRACE_S,
    RUNNING_AGAIN_MAX_S,
    Do,
    Doubt,
)

DEADLINE_S = 300.0
LONG_UP_S = 1e6
TICK_S = 0.05


def doubt(now: float = 0.0, **more: float) -> Doubt:
    return Doubt(now, **{"deadline_s": DEADLINE_S, **more})


def ticks(of: Doubt, since: float, until: float, *, connected: bool = True) -> list[tuple[float, Do]]:
    """What regular ticks say that is not WAIT, and when; they end with LOST."""
    said: list[tuple[float, Do]] = []
    steps = round((until - since) / TICK_S)
    for n in range(1, steps + 1):
        now = since + n * TICK_S
        if of.due() <= now or not connected:
            do = of.tick(now, connected=connected)
            if do is not Do.WAIT:
                said.append((now, do))
            if do is Do.LOST:
                break
    return said


@pytest.mark.parametrize(
    ("state", "do", "reason"),
    [
        ("running", Do.WAIT, ""),
        ("parked", Do.WAIT, ""),
        ("not_received", Do.SEND_AGAIN, ""),
        ("answered", Do.SEND_AGAIN, ""),
        ("unknown", Do.LOST, "session_unknown"),
    ],
)
def test_each_word_of_the_worker_decides(state: str, do: Do, reason: str) -> None:
    about = doubt()
    assert about.tick(QUIET_S, connected=True) is Do.PROBE
    assert about.heard(state, QUIET_S + 0.01) is do
    assert about.reason == reason


def test_a_request_is_left_alone_until_it_is_quiet_and_then_probed_once() -> None:
    about = doubt()
    assert about.due() == QUIET_S
    assert about.tick(QUIET_S - 0.01, connected=True) is Do.WAIT
    assert about.tick(QUIET_S, connected=True) is Do.PROBE
    assert about.due() == QUIET_S + PROBE_AGAIN_S
    assert about.tick(QUIET_S + 0.1, connected=True) is Do.WAIT


def test_silence_is_asked_again_and_given_up_in_the_end() -> None:
    about = doubt()
    said = ticks(about, 0.0, 60.0)
    assert {do for _, do in said[:-1]} == {Do.PROBE}
    assert len(said) > FROZEN_S / PROBE_AGAIN_S
    assert said[-1][1] is Do.LOST
    assert FROZEN_S <= said[-1][0] <= FROZEN_S + PROBE_AGAIN_S + QUIET_S
    assert about.reason == "worker_frozen"


def test_how_long_silence_may_last_is_the_callers_to_say() -> None:
    said = ticks(doubt(silence_s=3.0), 0.0, 60.0)
    assert 3.0 <= said[-1][0] <= 3.0 + PROBE_AGAIN_S + QUIET_S


def test_the_silence_is_counted_from_the_last_word() -> None:
    about = doubt()
    ticks(about, 0.0, 9.0)
    about.heard("running", 9.0)
    said = ticks(about, 9.0, 60.0)
    assert said[-1][1] is Do.LOST
    assert said[-1][0] >= 9.0 + FROZEN_S


def test_a_client_that_slept_asks_before_it_gives_up() -> None:
    about = doubt()
    assert about.tick(60.0, connected=True) is Do.PROBE


def test_what_runs_is_asked_about_ever_more_rarely_up_to_a_limit() -> None:
    about, now, pauses = doubt(), 0.0, []
    for _ in range(8):
        about.heard("running", now)
        pauses.append(about.due() - now)
        now = about.due()
        assert about.tick(now, connected=True) is Do.PROBE
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(2 * QUIET_S)
    assert pauses[-1] == pytest.approx(RUNNING_AGAIN_MAX_S)


def test_what_runs_is_lost_at_the_step_deadline_and_not_before() -> None:
    about = doubt()
    assert about.heard("running", DEADLINE_S - 0.01) is Do.WAIT
    assert about.heard("running", DEADLINE_S) is Do.LOST
    assert about.reason == "step_deadline"


@pytest.mark.parametrize("state", ["parked", "not_received"])
def test_the_step_deadline_does_not_count_what_was_before_it_began(state: str) -> None:
    about = doubt()
    about.heard(state, 290.0)
    assert about.heard("running", 290.0 + DEADLINE_S - 0.01) is Do.WAIT
    assert about.heard("running", 290.0 + DEADLINE_S) is Do.LOST


@pytest.mark.parametrize("state", ["parked", "not_received", "answered"])
def test_work_is_not_bounded_while_it_has_not_begun_or_is_done(state: str) -> None:
    about, now = doubt(), 0.0
    while now < 3 * DEADLINE_S:
        now = about.due()
        assert about.tick(now, connected=True) is Do.PROBE
        assert about.heard(state, now) in {Do.WAIT, Do.SEND_AGAIN}


# ---------------------------------------------------------------- nobody listens


def alone_for(about: Doubt, since: float, up_for: float) -> float | None:
    """When it is lost, if each sending is answered at once by the word that nobody listens."""
    now = since
    if about.alone(now, up_for) is Do.LOST:
        return now
    while now < since + 60.0:
        now = max(now, about.due())
        assert about.tick(now, connected=True) is Do.SEND_AGAIN
        if about.alone(now, up_for + now - since) is Do.LOST:
            return now
    return None


@pytest.mark.parametrize(
    ("up_for", "grace_s"),
    [
        (LONG_UP_S, GRACE_S),
        (GRACE_AFTER_RECONNECT_S + 0.01, GRACE_S),
        (GRACE_AFTER_RECONNECT_S - 0.01, GRACE_AFTER_RECONNECT_S),
        (0.0, GRACE_AFTER_RECONNECT_S),
    ],
)
def test_nobody_is_tried_again_and_again_for_a_grace_and_then_dead(up_for: float, grace_s: float) -> None:
    about = doubt()
    lost = alone_for(about, 1.0, up_for)
    assert lost == pytest.approx(1.0 + grace_s, abs=AGAIN_IN_GRACE_S + 0.01)
    assert about.reason == "worker_lost"


def test_of_a_session_that_can_be_opened_again_the_grace_is_shorter_but_not_after_a_reconnect() -> None:
    about = Doubt(0.0, deadline_s=DEADLINE_S, grace_s=RESUMED_GRACE_S)
    assert alone_for(about, 1.0, LONG_UP_S) == pytest.approx(1.0 + RESUMED_GRACE_S, abs=AGAIN_IN_GRACE_S + 0.01)
    about = Doubt(0.0, deadline_s=DEADLINE_S, grace_s=RESUMED_GRACE_S)
    assert alone_for(about, 1.0, 0.0) == pytest.approx(1.0 + GRACE_AFTER_RECONNECT_S, abs=AGAIN_IN_GRACE_S + 0.01)


def test_a_word_from_the_worker_ends_the_grace() -> None:
    about = doubt()
    about.alone(1.0, LONG_UP_S)
    assert about.heard("running", 1.5) is Do.WAIT
    assert about.tick(about.due(), connected=True) is Do.PROBE
    assert about.alone(1.9, LONG_UP_S) is Do.WAIT


def test_a_worker_that_came_back_and_fell_silent_is_given_up_like_any_other() -> None:
    about = doubt()
    about.alone(1.0, LONG_UP_S)
    said = ticks(about, 1.0, 60.0)
    assert said[0][1] is Do.SEND_AGAIN
    assert said[0][0] == pytest.approx(1.0 + AGAIN_IN_GRACE_S)
    assert {do for _, do in said[1:-1]} == {Do.PROBE}
    assert said[-1][1] is Do.LOST
    assert said[-1][0] <= 1.0 + FROZEN_S + PROBE_AGAIN_S + QUIET_S
    assert about.reason == "worker_frozen"


def test_a_worker_that_came_back_and_runs_the_request_is_held_to_the_deadline() -> None:
    about = doubt()
    about.alone(1.0, LONG_UP_S)
    assert [do for _, do in ticks(about, 1.0, 1.3)] == [Do.SEND_AGAIN, Do.PROBE]
    assert about.heard("running", 1.3) is Do.WAIT
    assert about.heard("running", DEADLINE_S) is Do.LOST


def test_an_old_word_found_after_a_sleep_begins_a_new_grace() -> None:
    about = doubt()
    about.alone(1.0, LONG_UP_S)
    about.tick(1.1, connected=True)
    assert about.alone(61.0, LONG_UP_S) is Do.WAIT
    assert alone_for(about, 61.1, LONG_UP_S) == pytest.approx(61.0 + GRACE_S, abs=AGAIN_IN_GRACE_S + 0.01)


# ---------------------------------------------------------------- disconnected


def test_while_disconnected_nothing_is_done_and_nobody_is_given_up() -> None:
    about = doubt()
    ticks(about, 0.0, 5.0)
    back = 5.0 + DISCONNECTED_S - 1.0
    assert ticks(about, 5.0, back, connected=False) == []
    said = ticks(about, back, back + 60.0)
    assert said[0][1] is Do.PROBE
    assert said[0][0] == pytest.approx(back + QUIET_S, abs=2 * TICK_S)
    assert said[-1][0] >= back + FROZEN_S


def test_a_client_that_stays_disconnected_is_told_so_in_the_end() -> None:
    about = doubt()
    said = ticks(about, 5.0, 120.0, connected=False)
    assert [do for _, do in said] == [Do.LOST]
    assert said[0][0] == pytest.approx(5.0 + DISCONNECTED_S, abs=3 * TICK_S)
    assert about.reason == "disconnected"


def test_patience_with_a_lost_connection_is_never_shorter_than_with_a_silent_worker() -> None:
    about = doubt(silence_s=2 * DISCONNECTED_S)
    assert ticks(about, 0.0, 2 * DISCONNECTED_S - 1.0, connected=False) == []


def test_a_reconnect_begins_the_patience_with_a_lost_connection_again() -> None:
    about = doubt()
    for start in (0.0, 40.0, 80.0):
        assert ticks(about, start, start + DISCONNECTED_S - 1.0, connected=False) == []
        about.reconnected(start + 39.0)


def test_time_that_the_client_slept_without_a_connection_does_not_count() -> None:
    about = doubt()
    ticks(about, 0.0, 5.0, connected=False)
    about.deaf(1000.0)
    assert ticks(about, 1000.0, 1000.0 + DISCONNECTED_S - 6.0, connected=False) == []


def test_a_client_that_was_deaf_blames_nobody_for_the_silence() -> None:
    about = doubt()
    ticks(about, 0.0, 5.0)
    about.deaf(50.0)
    said = ticks(about, 50.0, 100.0)
    assert said[0][1] is Do.PROBE
    assert said[-1][0] >= 50.0 + FROZEN_S


def test_a_grace_does_not_run_on_while_disconnected() -> None:
    about = doubt()
    about.alone(1.0, LONG_UP_S)
    ticks(about, 1.0, 30.0, connected=False)
    assert about.alone(30.1, LONG_UP_S) is Do.WAIT


@pytest.mark.parametrize("before", ["fresh", "probed", "running", "alone"])
def test_when_the_connection_is_back_it_asks_at_once(before: str) -> None:
    about = doubt()
    if before == "probed":
        ticks(about, 0.0, 1.0)
    elif before == "running":
        for now in range(10):
            about.heard("running", float(now))
    elif before == "alone":
        about.alone(1.0, LONG_UP_S)
    about.reconnected(20.0)
    assert about.due() == 20.0
    assert about.tick(20.0, connected=True) is Do.PROBE
    said = ticks(about, 20.0, 60.0)
    assert said[-1][0] >= 20.0 + FROZEN_S
