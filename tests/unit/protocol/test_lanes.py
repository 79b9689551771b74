"""Many lanes' rule R1 against that of one lane, and exactly once over a network that does its worst."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshrl.errors import LaneBusy, SequenceGap, StaleRequest
from meshrl.protocol.lane import Lane, Verdict
from meshrl.protocol.lanes import Indices, Lanes, Received
from meshrl.protocol.session import ANY_LANE, Session, SessionTable

COUNT = 5


def indices(*values: int) -> Indices:
    return np.array(values, np.int64)


def ask(lanes: Lanes, which: list[int], seqs: list[int], reply_to: str = "r") -> Received:
    return lanes.receive(indices(*which), indices(*seqs), reply_to, 0.0)


def told(received: Received) -> tuple[list[int], list[bytes], list[tuple[int, Verdict]]]:
    return received.run.tolist(), [answer.packed for answer in received.repeat], received.refused


# --------------------------------------------------------------------------- as a table


def test_the_first_requests_of_all_lanes_run() -> None:
    lanes = Lanes(3)
    assert told(ask(lanes, [2, 0, 1], [1, 1, 1])) == ([0, 1, 2], [], [])
    assert lanes.running.all()
    assert repr(lanes) == "<3 lanes, 3 running>"
    assert len(lanes) == 3


def test_lanes_of_one_message_each_get_what_the_table_says() -> None:
    lanes = Lanes(6)
    ask(lanes, [0, 1, 2, 3, 4], [1, 1, 1, 1, 1])
    lanes.answer(indices(0, 1, 4), b"together")
    ask(lanes, [0], [2])
    # 0 runs its second, 1 has answered, 2 and 3 run their first, 4 has answered, 5 never had one
    received = ask(lanes, [0, 1, 2, 3, 4, 5], [1, 1, 1, 2, 2, 2])
    assert told(received) == ([4], [b"together"], [(0, Verdict.STALE), (3, Verdict.BUSY), (5, Verdict.GAP)])


def test_an_answer_that_lanes_share_is_repeated_once() -> None:
    lanes = Lanes(4)
    ask(lanes, [0, 1, 2, 3], [1, 1, 1, 1])
    lanes.answer(indices(0, 2), b"one")
    lanes.answer(indices(1, 3), b"two")
    assert told(ask(lanes, [3, 0, 1, 2], [1, 1, 1, 1])) == ([], [b"two", b"one"], [])


def test_an_answer_goes_to_the_newest_reply_subject_of_each_lane() -> None:
    lanes = Lanes(3)
    ask(lanes, [0, 1, 2], [1, 1, 1], "first")
    ask(lanes, [1], [1], "second")
    ask(lanes, [2], [3], "refused")
    assert lanes.answer(indices(0, 1, 2), b"x") == {"first", "second"}


def test_shared_bytes_count_once_until_no_lane_keeps_them() -> None:
    lanes = Lanes(3)
    ask(lanes, [0, 1, 2], [1, 1, 1])
    lanes.answer(indices(0, 1, 2), bytes(100))
    assert lanes.cached_bytes == 100
    ask(lanes, [0, 1], [2, 2])
    lanes.answer(indices(0), bytes(7))
    assert lanes.cached_bytes == 107
    lanes.answer(indices(1), bytes(7))
    assert lanes.cached_bytes == 114, "lane 2 keeps the first"
    ask(lanes, [2], [2])
    lanes.answer(indices(2), bytes(1))
    assert lanes.cached_bytes == 15


@pytest.mark.parametrize(
    ("seqs", "error", "named"),
    [([1, 1], StaleRequest, [0, 1]), ([4, 2], SequenceGap, [0]), ([2, 3], LaneBusy, [0, 1])],
)
def test_a_refusal_is_that_of_the_first_and_names_the_others(seqs: list[int], error: type, named: list[int]) -> None:
    lanes = Lanes(2)
    for seq in (1, 2):
        ask(lanes, [0, 1], [seq, seq])
        lanes.answer(indices(0, 1), b"x")
    if error is LaneBusy:
        lanes = Lanes(2)
        ask(lanes, [0, 1], [1, 1])
        ask(lanes, [1], [1])
        lanes.answer(indices(1), b"x")
        ask(lanes, [1], [2])
    which = indices(0, 1)
    received = lanes.receive(which, indices(*seqs), "r", 0.0)
    exc = lanes.refusal(received.refused, which, indices(*seqs), "s1")
    assert type(exc) is error
    assert exc.message.startswith("lane 0")
    assert set(exc.details["lanes"]) >= set(named)
    assert all(type(lane) is int for lane in exc.details["lanes"])


def test_the_largest_seq_is_a_gap_and_no_overflow() -> None:
    lanes = Lanes(1)
    assert told(ask(lanes, [0], [2**63 - 1])) == ([], [], [(0, Verdict.GAP)])


def test_a_probe_is_told_of_each_lane() -> None:
    lanes = Lanes(2)
    ask(lanes, [0, 1], [1, 1])
    lanes.answer(indices(1), b"x")
    assert [lanes.state_of(0, seq) for seq in (1, 2)] == ["running", "not_received"]
    assert [lanes.state_of(1, seq) for seq in (1, 2)] == ["answered", "not_received"]


def test_a_pools_session_is_asked_by_lane_and_ends_as_a_whole() -> None:
    table = SessionTable(4)
    _, session = table.open("u", "s", 1, "r", 0.0, num_envs=3, pool=True)
    assert session is not None
    assert session.lanes is not None
    assert session.lane is None
    table.granted(session, b"grant", 0.0)
    ask(session.lanes, [0, 1], [1, 1])
    assert table.answered_together(session.lanes, indices(0), b"xyz") == {"r"}
    assert (session.running, session.cached_bytes, table.cached_bytes) == (True, 3, 3)
    states = [table.probe(session.key, 1, lane, 1) for lane in (0, 1, 2, 3, -1)]
    assert states == ["answered", "running", "not_received", "unknown", "unknown"]
    assert table.probe(session.key, 2, 0, 1) == "unknown"
    table.ending(session, "ended", last=(1, ANY_LANE, 0, b"why"))
    assert [table.probe(session.key, 1, lane, seq) for lane, seq in ((0, 1), (2, 9))] == ["answered"] * 2
    assert table.last_answer(session.key, 1, 2, 9) == b"why"
    assert table.last_answer(session.key, 2, 2, 9) is None
    table.answered_together(session.lanes, indices(1), b"late")
    table.ended(session)
    assert (table.cached_bytes, table.free) == (0, 4)
    assert table.last_answer(session.key, 1, 0, 1) == b"why"


# --------------------------------------------------------------------------- against one lane at a time


SUBSET = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True)


class AgainstOneLane(RuleBasedStateMachine):
    """Any requests at all; each lane is to do what a :class:`Lane` of its own does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SessionTable(COUNT)
        _, session = self.table.open("u", "s", 1, "", 0.0, num_envs=COUNT, pool=True)
        assert session is not None
        assert session.lanes is not None
        self.session: Session = session
        self.lanes: Lanes = session.lanes
        self.single = [Lane() for _ in range(COUNT)]
        self.number = 0

    @rule(which=SUBSET, ahead=st.lists(st.sampled_from([-1, 0, 0, 1, 1, 1, 2, 9]), min_size=COUNT, max_size=COUNT))
    def receive(self, which: list[int], ahead: list[int]) -> None:
        seqs = [max(1, self.single[lane].seq + step) for lane, step in zip(which, ahead, strict=False)]
        self.number += 1
        reply_to = f"r{self.number}"
        run, refused, repeat = [], [], []
        for at, (lane, seq) in enumerate(zip(which, seqs, strict=True)):
            verdict = self.single[lane].receive(seq, reply_to, 0.0)
            if verdict is Verdict.RUN:
                run.append(at)
            elif verdict is Verdict.REPEAT:
                repeat.append(self.single[lane].cached)
            elif verdict is not Verdict.JOIN:
                refused.append((at, verdict))
        assert told(ask(self.lanes, which, seqs, reply_to)) == (run, list(dict.fromkeys(repeat)), refused)

    @precondition(lambda self: self.lanes.running.any())
    @rule(data=st.data(), size=st.integers(0, 50))
    def answer(self, data: Any, size: int) -> None:
        running = np.flatnonzero(self.lanes.running).tolist()
        which = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        self.number += 1
        packed = f"{self.number}".encode() + bytes(size)
        goes_to = {self.single[lane].answer(packed) for lane in which}
        assert self.table.answered_together(self.lanes, indices(*which), packed) == goes_to

    @invariant()
    def each_lane_is_where_the_single_one_is(self) -> None:
        assert self.lanes.seqs.tolist() == [lane.seq for lane in self.single]
        assert self.lanes.running.tolist() == [lane.running for lane in self.single]
        for n, lane in enumerate(self.single):
            for seq in (lane.seq - 1, lane.seq, lane.seq + 1):
                if seq > 0:
                    running = lane.running and seq == lane.seq
                    state = "not_received" if seq > lane.seq else "running" if running else "answered"
                    assert self.session.state_of(n, seq) == state

    @invariant()
    def the_cached_bytes_are_those_of_the_answers_that_are_kept(self) -> None:
        kept = {answer.packed for answer in self.lanes._answers.tolist() if answer is not None}
        assert self.lanes.cached_bytes == self.table.cached_bytes == sum(map(len, kept))

    def teardown(self) -> None:
        running = np.flatnonzero(self.lanes.running)
        self.table.ending(self.session, "closed")
        if len(running):
            self.table.answered_together(self.lanes, running, b"the last")
        self.table.ended(self.session)
        assert (self.table.cached_bytes, self.table.free) == (0, COUNT)


# --------------------------------------------------------------------------- exactly once


class ExactlyOnce(RuleBasedStateMachine):
    """A client that keeps the rules, a worker, and all that was ever sent arriving in any order, often or never."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(COUNT)
        self.ran: defaultdict[int, list[int]] = defaultdict(list)
        self.running: dict[int, int] = {}
        self.requests: list[tuple[list[int], list[int], str]] = []
        self.answers: list[tuple[str, list[int], list[int]]] = []
        self.by_bytes: dict[bytes, tuple[list[int], list[int]]] = {}
        self.seqs = [0] * COUNT  # the client's
        self.waits = [False] * COUNT
        self.got: defaultdict[int, list[int]] = defaultdict(list)

    @rule(which=SUBSET)
    def send(self, which: list[int]) -> None:
        free = [lane for lane in which if not self.waits[lane]]
        for lane in free:
            self.seqs[lane] += 1
            self.waits[lane] = True
        if free:
            self.requests.append((free, [self.seqs[lane] for lane in free], f"r{len(self.requests)}"))

    @precondition(lambda self: self.requests)
    @rule(back=st.integers(1, 12))
    def send_again_what_of_it_has_no_answer(self, back: int) -> None:
        which, seqs, reply = self.requests[-min(back, len(self.requests))]
        left = [(lane, seq) for lane, seq in zip(which, seqs, strict=True) if self.awaits(lane, seq)]
        if left:
            self.requests.append(([lane for lane, _ in left], [seq for _, seq in left], reply))

    @precondition(lambda self: self.requests)
    @rule(back=st.integers(1, 12))
    def a_request_arrives(self, back: int) -> None:
        which, seqs, reply = self.requests[-min(back, len(self.requests))]
        received = ask(self.lanes, which, seqs, reply)
        for at in received.run.tolist():
            self.ran[which[at]].append(seqs[at])
            self.running[which[at]] = seqs[at]
        for answer in received.repeat:
            self.answers.append((reply, *self.by_bytes[answer.packed]))
        for at, verdict in received.refused:
            assert not self.awaits(which[at], seqs[at]), f"what is awaited is refused: {verdict}"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def some_finish(self, data: Any) -> None:
        which = data.draw(st.lists(st.sampled_from(sorted(self.running)), min_size=1, unique=True))
        seqs = [self.running.pop(lane) for lane in which]
        packed = f"{which} {seqs}".encode()
        assert packed not in self.by_bytes
        self.by_bytes[packed] = (which, seqs)
        for reply in self.lanes.answer(indices(*which), packed):
            self.answers.append((reply, which, seqs))

    @precondition(lambda self: self.answers)
    @rule(back=st.integers(1, 12))
    def an_answer_arrives(self, back: int) -> None:
        _, which, seqs = self.answers[-min(back, len(self.answers))]
        for lane, seq in zip(which, seqs, strict=True):
            if self.awaits(lane, seq):
                self.waits[lane] = False
                self.got[lane].append(seq)

    def awaits(self, lane: int, seq: int) -> bool:
        return self.waits[lane] and self.seqs[lane] == seq

    @invariant()
    def each_request_ran_at_most_once_and_in_order(self) -> None:
        for ran in self.ran.values():
            assert ran == list(range(1, len(ran) + 1))

    @invariant()
    def each_result_came_once_and_in_order_and_was_run(self) -> None:
        for lane, got in self.got.items():
            assert got == self.ran[lane][: len(got)]

    def teardown(self) -> None:
        """When the network heals, whatever is awaited is had by sending it again."""
        for lane in [lane for lane in range(COUNT) if self.waits[lane]]:
            received = ask(self.lanes, [lane], [self.seqs[lane]], "last")
            assert not received.refused
            if len(received.run):
                self.ran[lane].append(self.seqs[lane])
            assert received.repeat or self.lanes.running[lane]
        self.each_request_ran_at_most_once_and_in_order()


_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAgainstOneLane = AgainstOneLane.TestCase
TestAgainstOneLane.settings = _SETTINGS
TestExactlyOnce = ExactlyOnce.TestCase
TestExactlyOnce.settings = _SETTINGS
