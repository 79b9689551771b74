"""Polling as a table: a clock, a share of it in which the thread runs, and answers, all passed in."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from meshrl.bus import polling
from meshrl.bus.polling import LONGEST_REST_S, POLL_S, POLLS_JUDGED, POLLS_ON_TRIAL, SHORTEST_REST_S, Polling, may_poll

TURN_S = POLL_S / 50


class Stage:
    """An event loop that turns by hand; each turn takes ``TURN_S``, of which the thread runs for ``share``."""

    def __init__(self) -> None:
        self.now = self.ran = 1000.0
        self.share = 1.0
        self.awaited: set[int] = set()
        self.soon: list[Callable[[], None]] = []
        self.turns = 0
        self.polling = Polling(self.awaited, clock=lambda: self.now, running=lambda: self.ran, soon=self.soon.append)
        self._rid = 0

    def ask(self) -> int:
        self._rid += 1
        self.awaited.add(self._rid)
        self.polling.asked(self._rid)
        return self._rid

    def turn(self) -> None:
        self.now += TURN_S
        self.ran += TURN_S * self.share
        calls, self.soon[:] = list(self.soon), []
        for call in calls:
            self.turns += 1
            call()

    def step(self, seconds: float) -> bool:
        """One request, answered after so long; gives whether it was polled for at all."""
        rid = self.ask()
        polled = bool(self.soon)
        end = self.now + seconds
        while self.now < end:
            self.turn()
        self.awaited.discard(rid)
        self.turn()
        assert self.soon == [], "the answer is there"
        return polled

    def rest(self) -> float:
        """Waits until it rests no more; gives how long that was."""
        seconds = self.polling.rests_until - self.now
        self.now += max(seconds, 0.0)
        return seconds


def test_the_loop_is_kept_awake_from_a_request_to_its_answer() -> None:
    stage = Stage()
    rid = stage.ask()
    for _ in range(10):
        stage.turn()
        assert len(stage.soon) == 1
    stage.awaited.remove(rid)
    stage.turn()
    assert stage.soon == []
    assert stage.turns == 11


def test_several_requests_are_polled_for_once_until_the_last_answer() -> None:
    stage = Stage()
    first, second, third = [stage.ask() for _ in range(3)]
    assert len(stage.soon) == 1
    for rid in (second, first):
        stage.awaited.remove(rid)
        stage.turn()
        assert len(stage.soon) == 1
    stage.awaited.remove(third)
    stage.turn()
    assert stage.soon == []


def test_an_answer_that_takes_its_time_is_not_polled_for_all_the_while() -> None:
    stage = Stage()
    stage.ask()
    while stage.soon:
        stage.turn()
    assert stage.turns * TURN_S == pytest.approx(POLL_S, abs=2 * TURN_S)


def test_requests_that_overlap_do_not_hide_one_that_is_slow_nor_a_thread_that_cannot_run() -> None:
    stage = Stage()
    slow = stage.ask()
    for _ in range(10 * POLLS_JUDGED):
        rid = stage.ask()
        stage.turn()
        stage.awaited.remove(rid)
    assert slow in stage.awaited
    while stage.soon:
        stage.turn()
    stage = Stage()
    stage.share = 0.1
    older = stage.ask()
    for _ in range(2 * POLLS_JUDGED * POLLS_JUDGED * 50):  # as many turns as it may take to be judged, twice
        rid = stage.ask()
        stage.turn()
        stage.awaited.remove(older)
        older = rid
        if stage.polling.rests_until > stage.now:
            break
    assert stage.polling.rests_until > stage.now


def test_a_look_that_was_interrupted_is_made_up_for() -> None:
    stage = Stage()
    rid = stage.ask()
    stage.soon.clear()  # as if it had raised
    stage.awaited.remove(rid)
    assert not stage.step(POLL_S / 2), "it is believed to be on its way"
    stage.now += polling.LOST_S
    assert stage.step(POLL_S / 2)


def test_near_answers_are_polled_for_for_ever() -> None:
    stage = Stage()
    assert all(stage.step(POLL_S / 2) for _ in range(20 * POLLS_JUDGED))


def test_one_slow_answer_in_four_does_no_harm() -> None:
    stage = Stage()
    assert all(stage.step(2 * POLL_S if number % 4 == 3 else POLL_S / 2) for number in range(20 * POLLS_JUDGED))


def test_a_request_that_is_never_answered_costs_one_poll_alone() -> None:
    stage = Stage()
    stage.ask()
    while stage.soon:
        stage.turn()
    assert all(stage.step(POLL_S / 2) for _ in range(5 * POLLS_JUDGED))


def test_polls_in_vain_are_given_up_and_tried_again_ever_more_rarely() -> None:
    stage = Stage()
    tried, rests = [], []
    for _ in range(8):
        polled = 0
        while stage.step(2 * POLL_S):
            polled += 1
        tried.append(polled)
        rests.append(stage.rest())
    assert tried[0] == POLLS_JUDGED // 3 + 1
    assert set(tried[1:]) == {POLLS_ON_TRIAL // 3 + 1}
    assert rests[0] == pytest.approx(SHORTEST_REST_S, abs=5 * POLL_S)
    assert rests[1] == pytest.approx(2 * SHORTEST_REST_S, abs=5 * POLL_S)
    assert rests[-1] == rests[-2] == pytest.approx(LONGEST_REST_S, abs=5 * POLL_S)


def test_a_thread_that_others_keep_from_running_does_not_poll() -> None:
    stage = Stage()
    stage.share = 0.3
    polled = 0
    while stage.step(POLL_S / 2):
        polled += 1
    assert polled == POLLS_JUDGED
    assert not stage.step(POLL_S / 2)


def test_it_is_trusted_again_once_answers_are_near_again() -> None:
    stage = Stage()
    for _ in range(6):
        while stage.step(2 * POLL_S):
            pass
        stage.rest()
    assert all(stage.step(POLL_S / 2) for _ in range(10 * POLLS_JUDGED))
    polled = 0
    while stage.step(2 * POLL_S):
        polled += 1
    assert polled > POLLS_ON_TRIAL
    assert stage.rest() == pytest.approx(SHORTEST_REST_S, abs=5 * POLL_S)


@pytest.mark.parametrize(
    ("processors", "setting", "polls"),
    [(2, None, True), (64, "1", True), (1, None, False), (2, "0", False)],
)
def test_it_needs_two_processors_and_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, processors: int, setting: str | None, polls: bool
) -> None:
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(processors)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: processors)
    if setting is None:
        monkeypatch.delenv("MESHRL_POLL", raising=False)
    else:
        monkeypatch.setenv("MESHRL_POLL", setting)
    assert may_poll() is polls
