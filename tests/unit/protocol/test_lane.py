from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import LaneBusy, MeshError, SequenceGap, StaleRequest
from meshrl.protocol.lane import Lane, Verdict

N = 5  # of the last request that began


def lane_at(seq: int, *, running: bool) -> Lane:
    lane = Lane()
    for n in range(1, seq + 1):
        assert lane.receive(n, f"inbox.{n}", float(n)) is Verdict.RUN
        if n < seq or not running:
            lane.answer(b"answer %d" % n)
    return lane


TABLE = [
    (N - 1, True, Verdict.STALE),
    (N, True, Verdict.JOIN),
    (N + 1, True, Verdict.BUSY),
    (N + 2, True, Verdict.GAP),
    (N - 1, False, Verdict.STALE),
    (N, False, Verdict.REPEAT),
    (N + 1, False, Verdict.RUN),
    (N + 2, False, Verdict.GAP),
]


@pytest.mark.parametrize(("seq", "running", "verdict"), TABLE)
def test_a_request_gets_the_verdict_of_its_cell(seq: int, running: bool, verdict: Verdict) -> None:
    assert lane_at(N, running=running).receive(seq, "inbox.new", 9.0) is verdict


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("seq", "verdict"), [(-(2**40), Verdict.STALE), (1, Verdict.STALE), (N + 3, Verdict.GAP), (2**63, Verdict.GAP)]
)
def test_far_below_is_stale_and_far_beyond_is_a_gap(seq: int, verdict: Verdict, running: bool) -> None:
    assert lane_at(N, running=running).receive(seq, "inbox.new", 9.0) is verdict


@pytest.mark.parametrize(
    ("seq", "verdict"), [(-1, Verdict.STALE), (0, Verdict.STALE), (1, Verdict.RUN), (2, Verdict.GAP)]
)
def test_a_new_lane_has_nothing_to_repeat_and_begins_with_1(seq: int, verdict: Verdict) -> None:
    assert Lane().receive(seq, "inbox", 0.0) is verdict


def test_run_begins_the_request() -> None:
    lane = Lane()
    assert lane.receive(1, "inbox.a", 3.5) is Verdict.RUN
    assert (lane.seq, lane.running, lane.reply_to, lane.began) == (1, True, "inbox.a", 3.5)


def test_join_begins_nothing_and_sends_the_answer_to_the_newest_reply_subject() -> None:
    lane = lane_at(N, running=True)
    assert lane.receive(N, "inbox.newest", 99.0) is Verdict.JOIN
    assert lane.began == float(N)
    assert lane.answer(b"done") == "inbox.newest"


def test_a_repeated_request_finds_the_very_bytes_until_the_next_one_is_answered() -> None:
    lane = lane_at(N, running=False)
    assert lane.receive(N, "inbox.again", 9.0) is Verdict.REPEAT
    assert lane.cached == b"answer 5"
    assert not lane.running


@pytest.mark.parametrize(
    ("seq", "running", "verdict"), [cell for cell in TABLE if cell[2] in {Verdict.STALE, Verdict.BUSY, Verdict.GAP}]
)
def test_a_refused_request_changes_nothing(seq: int, running: bool, verdict: Verdict) -> None:
    lane, before = lane_at(N, running=running), lane_at(N, running=running)
    assert lane.receive(seq, "inbox.new", 9.0) is verdict
    for name in Lane.__slots__:
        assert getattr(lane, name) == getattr(before, name)


@pytest.mark.parametrize("lane", [Lane(), lane_at(N, running=False)])
def test_only_a_running_request_is_answered(lane: Lane) -> None:
    with pytest.raises(AssertionError):
        lane.answer(b"late")


@pytest.mark.parametrize(
    ("verdict", "error"),
    [(Verdict.STALE, StaleRequest), (Verdict.GAP, SequenceGap), (Verdict.BUSY, LaneBusy)],
)
def test_a_refusal_is_an_error_of_its_own_with_the_facts(verdict: Verdict, error: type[MeshError]) -> None:
    refusal = lane_at(N, running=True).refusal(verdict, 7, "s1")
    assert type(refusal) is error
    assert refusal.details == {"session": "s1", "seq": 7, "last_seq": N}
    assert "s1" in str(refusal)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 8), st.none()), max_size=60))
def test_whatever_arrives_each_request_begins_once_and_in_order(events: list[int | None]) -> None:
    lane, began = Lane(), []
    for event in events:
        if event is None:
            if lane.running:
                lane.answer(b"x")
        elif lane.receive(event, "inbox", 0.0) is Verdict.RUN:
            began.append(event)
    assert began == list(range(1, len(began) + 1))
