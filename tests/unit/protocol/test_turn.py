from __future__ import annotations

import pytest

from meshrl.errors import ConcurrentStep, NothingUnsettled, StepUnsettled
from meshrl.protocol.turn import READING, Begin, Phase, Turn

OPS = ["reset", "step", "render", "state", "call", "get_attr", "set_attr", "act", "observe"]


def turn_in(phase: Phase, op: str = "step") -> Turn:
    turn = Turn("env cartpole")
    if phase is not Phase.FREE:
        turn.begin(op)
    if phase is Phase.UNSETTLED:
        turn.cancelled()
    assert turn.phase is phase
    return turn


@pytest.mark.parametrize("op", OPS)
def test_a_free_lane_takes_any_request_at_once(op: str) -> None:
    turn = turn_in(Phase.FREE)
    assert turn.may_begin(op) is Begin.NOW
    assert turn.begin(op) == 1
    assert (turn.phase, turn.op) == (Phase.WAITING, op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("under_way", OPS)
def test_while_one_waits_any_other_is_concurrent(op: str, under_way: str) -> None:
    turn = turn_in(Phase.WAITING, under_way)
    with pytest.raises(ConcurrentStep) as caught:
        turn.may_begin(op)
    assert caught.value.details == {"op": op, "under_way": under_way}
    assert (turn.phase, turn.seq, turn.op) == (Phase.WAITING, 1, under_way)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("last", OPS)
def test_after_a_cancelled_request_only_reset_goes_on_unless_it_changed_nothing(op: str, last: str) -> None:
    turn = turn_in(Phase.UNSETTLED, last)
    if op == "reset" or last in READING:
        assert turn.may_begin(op) is Begin.AFTER_LAST
    else:
        with pytest.raises(StepUnsettled, match="settle") as caught:
            turn.may_begin(op)
        assert caught.value.details == {"op": last, "seq": 1}
    assert (turn.phase, turn.seq, turn.op) == (Phase.UNSETTLED, 1, last)


@pytest.mark.parametrize(
    ("phase", "after"),
    [(Phase.FREE, Phase.FREE), (Phase.WAITING, Phase.UNSETTLED), (Phase.UNSETTLED, Phase.UNSETTLED)],
)
def test_cancelling_leaves_a_waiting_request_unsettled(phase: Phase, after: Phase) -> None:
    turn = turn_in(phase)
    turn.cancelled()
    assert turn.phase is after


@pytest.mark.parametrize(
    ("phase", "after"),
    [(Phase.FREE, Phase.FREE), (Phase.WAITING, Phase.FREE), (Phase.UNSETTLED, Phase.UNSETTLED)],
)
def test_an_answer_frees_the_lane_only_for_who_waits(phase: Phase, after: Phase) -> None:
    turn = turn_in(phase)
    turn.answered()
    assert turn.phase is after


def test_an_answer_in_the_moment_of_the_cancelling_can_still_be_settled() -> None:
    turn = turn_in(Phase.WAITING)
    turn.cancelled()
    turn.answered()
    with pytest.raises(StepUnsettled):
        turn.may_begin("step")
    assert turn.settling() == "step"
    turn.answered()
    assert turn.may_begin("step") is Begin.NOW


@pytest.mark.parametrize("last", [op for op in OPS if op not in READING])
def test_settling_waits_again_and_may_be_cancelled_again(last: str) -> None:
    turn = turn_in(Phase.UNSETTLED, last)
    for _ in range(2):
        assert turn.settling() == last
        with pytest.raises(ConcurrentStep):
            turn.may_begin("reset")
        turn.cancelled()
    assert turn.seq == 1


@pytest.mark.parametrize("last", sorted(READING))
def test_a_cancelled_reading_call_is_nothing_to_settle_but_is_dropped(last: str) -> None:
    turn = turn_in(Phase.UNSETTLED, last)
    with pytest.raises(NothingUnsettled):
        turn.settling()
    assert turn.may_begin("step") is Begin.AFTER_LAST
    assert turn.discarding() == last
    turn.answered()
    assert turn.may_begin("step") is Begin.NOW


def test_there_is_nothing_to_settle_on_a_free_lane() -> None:
    with pytest.raises(NothingUnsettled):
        turn_in(Phase.FREE).settling()


def test_settling_what_nobody_cancelled_is_concurrent() -> None:
    turn = turn_in(Phase.WAITING)
    with pytest.raises(ConcurrentStep) as caught:
        turn.settling()
    assert caught.value.details == {"under_way": "step"}
    assert turn.phase is Phase.WAITING


def test_sequence_numbers_rise_by_one_a_request_settled_ones_included() -> None:
    turn = Turn("env cartpole")
    seqs = []
    for cancelled in (False, True, True, False):
        seqs.append(turn.begin("step"))
        if cancelled:
            turn.cancelled()
            turn.settling()
        turn.answered()
    assert seqs == [1, 2, 3, 4]


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.UNSETTLED])
def test_nothing_begins_out_of_turn(phase: Phase) -> None:
    with pytest.raises(AssertionError):
        turn_in(phase).begin("step")
