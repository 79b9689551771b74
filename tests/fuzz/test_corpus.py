"""Replays what the coverage-guided fuzzer has found so far, without the fuzzer; and sees that the targets can fail."""

from __future__ import annotations

import numpy as np
import pytest

from meshrl.protocol.lane import Lane
from meshrl.protocol.lanes import Lanes
from meshrl.protocol.session import SessionTable
from tests.fuzz.coverage import inputs
from tests.fuzz.targets import TARGETS, same


def replay(target: str) -> None:
    for data in inputs(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_that_is_kept_is_taken(target: str) -> None:
    assert len(inputs(target)) > 20
    replay(target)


@pytest.mark.parametrize("target", ["lanes", "sessions"])
def test_a_lane_that_ran_a_request_twice_would_be_found(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Lane, reply: bytes) -> str:
        self.running = False
        self.cached = reply
        self.seq -= 1
        return self.reply_to

    monkeypatch.setattr(Lane, "answer", forgets)
    with pytest.raises(AssertionError):
        replay(target)


def test_lanes_that_took_a_stale_request_for_a_gap_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lanes.state_of
    monkeypatch.setattr(Lanes, "state_of", lambda self, lane, seq: right(self, lane, seq + 1))
    with pytest.raises(AssertionError):
        replay("lanes")


def test_a_table_that_lost_a_slot_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SessionTable.ended

    def loses(self: SessionTable, session: object) -> None:
        right(self, session)  # type: ignore[arg-type]
        self._taken += 1

    monkeypatch.setattr(SessionTable, "ended", loses)
    with pytest.raises(AssertionError):
        replay("sessions")


def test_values_are_the_same_only_with_their_types_and_bits() -> None:
    nan = float("nan")
    assert same([nan, {"a": (1, np.float32(2))}], [nan, {"a": (1, np.float32(2))}])
    for one, other in ((1, 1.0), (1, True), ([1], (1,)), (np.float32(1), np.float64(1)), ({1}, frozenset({1}))):
        assert not same(one, other)
    assert not same(np.zeros(2), np.zeros((2, 1)))
    assert not same(np.array([0.0]), np.array([-0.0]))
