"""The journals of a shard's sub-environments, as a table of what each request makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl.errors import MalformedMessage
from meshrl.protocol import journals
from meshrl.protocol import told as told_
from meshrl.protocol.digests import Digests
from meshrl.protocol.journal import TOGETHER
from meshrl.protocol.journals import Journals
from meshrl.protocol.told import Answer
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack

ALL = slice(None)
BOTH = np.array([0, 1])
SPACE = spaces.Discrete(100)
FLAGS = {"terminations": np.zeros(2, np.bool_), "truncations": np.zeros(2, np.bool_)}


def two() -> Journals:
    return Journals(2, batching(SPACE))


def answer(at: int, op: str, which: Any = ALL, *rows: int, n: int = 0, origins: Sequence[Any] = ()) -> Answer:
    """One whose first observation is ``n``."""
    frame: dict[str, Any] = {"obs": np.arange(n, n + 2), **FLAGS, "rewards": np.ones(2)}
    if origins:
        frame["origins"] = [part for origin in origins for part in origin]
    return at, pack(frame), op, which, np.array(rows) if rows else None


def asked(journal: Journals, op: str, body: bytes, *origins: tuple[int, bytes]) -> int:
    """A request of both that was answered."""
    at = journal.asked(op, body)
    if op in {"call", "set_attr"}:
        journal.changed(at)
    else:
        journal.told(answer(at, op, origins=origins), origins=origins)
    return at


def digests(*told: tuple[Any, int, Sequence[int]]) -> list[int]:
    """Of observations that a shard of two told: whose, the first of them, and the rows that began anew."""
    made = Digests(2, batching(SPACE))
    for which, n, anew in told:
        obs = np.arange(n, n + 2)[which]
        nothing = np.zeros(len(obs), np.bool_)
        made.add(which, obs, np.ones(len(obs)), nothing, nothing, anew)
    return list(map(int, made.values))


def lacking(journal: Journals) -> str:
    return journal.lacking


def sent(journal: Journals) -> tuple[list[bytes], list[int], list[int], list[Any]]:
    fields = journal.fields()
    bodies = [body for _, body in fields["journal"]]
    return bodies, fields["begins"].tolist(), fields["ends"].tolist(), fields["origins"]


def test_a_new_one_has_nothing_to_do_again() -> None:
    journal = two()
    assert len(journal) == 0
    assert not journal.lacking
    assert sent(journal) == ([], [-1, -1], [-1, -1], [None, None])


def test_a_journal_begins_with_the_request_that_told_an_origin_and_ends_with_the_last() -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "step", b"s1")
    asked(journal, "step", b"s2", (1, b"state x"))
    asked(journal, "step", b"s3")
    assert sent(journal) == ([b"r", b"s1", b"s2", b"s3"], [0, 2], [3, 3], [b"seed 1", b"state x"])


def test_what_no_sub_environment_needs_any_more_is_dropped() -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "step", b"s1", (0, b"state a"))
    asked(journal, "step", b"s2", (1, b"state b"))
    asked(journal, "step", b"s3")
    assert sent(journal) == ([b"s1", b"s2", b"s3"], [0, 1], [2, 2], [b"state a", b"state b"])
    asked(journal, "step", b"s4", (0, b"state c"), (1, b"state d"))
    assert sent(journal) == ([b"s4"], [0, 0], [0, 0], [b"state c", b"state d"])


def setting(name: str, *ids: int) -> bytes:
    return pack({"name": name, "values": [1] * (len(ids) or 2), **({"ids": list(ids)} if ids else {})})


def test_attributes_that_were_set_outlive_what_is_dropped() -> None:
    a1, a2 = setting("a"), setting("b")
    journal = two()
    asked(journal, "set_attr", a1)
    asked(journal, "reset", b"r1", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "set_attr", a2)
    asked(journal, "step", b"s")
    asked(journal, "reset", b"r2", (0, b"seed 3"), (1, b"seed 4"))
    assert sent(journal)[:3] == ([a1, a2, b"r2"], [2, 2], [2, 2])
    journal.forget()
    assert sent(journal) == ([a1, a2], [-1, -1], [1, 1], [None, None])
    asked(journal, "reset", b"r3", (0, b"seed 5"), (1, b"seed 6"))
    assert sent(journal)[:3] == ([a1, a2, b"r3"], [2, 2], [2, 2])


def test_of_an_attribute_what_was_set_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 1000)
    journal = two()
    for n in range(100):
        asked(journal, "set_attr", setting("a"))
        asked(journal, "set_attr", last := setting("b", n % 2))
        asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    assert sent(journal)[0] == [setting("b", 0), setting("a"), last, b"r"]
    assert lacking(journal) == ""
    asked(journal, "set_attr", both := setting("b"))
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    assert sent(journal)[0] == [setting("a"), both, b"r"]
    for _ in range(20):
        journal.forget()
        asked(journal, "reset", b"r" * 100, (0, b"seed 1"), (1, b"seed 2"))
    assert lacking(journal) == ""


def test_once_a_method_was_called_nothing_begins_anew() -> None:
    journal = two()
    asked(journal, "reset", b"r1", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "call", b"c")
    asked(journal, "reset", b"r2", (0, b"seed 3"), (1, b"seed 4"))
    assert sent(journal)[:3] == ([b"r1", b"c", b"r2"], [0, 0], [2, 2])


def test_a_request_counts_for_those_that_have_answered_it() -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    one, other = journal.asked("step", b"of 0"), journal.asked("step", b"of 1")
    journal.told(answer(other, "step", np.array([1]), 1, n=8))
    assert sent(journal)[1:3] == ([0, 0], [0, 2])
    journal.told(answer(one, "step", np.array([0]), 0, n=7))
    assert sent(journal)[1:3] == ([0, 0], [1, 2])
    of_0, of_1 = (np.array([0]), 7, ()), (np.array([1]), 8, ())
    assert journal.fields()["digests"].tolist() == digests((BOTH, 0, (0, 1)), of_1, of_0)


@pytest.mark.parametrize(
    ("op", "why"), [("step", "answer_lost"), ("reset", "answer_lost"), ("call", "attributes_lost")]
)
def test_after_an_error_nobody_knows_what_was_done_until_it_begins_anew(op: str, why: str) -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    journal.unsure(np.array([1]), op)
    assert journal.lacking == why
    asked(journal, "step", b"s", (0, b"state x"))
    assert journal.lacking == why
    asked(journal, "step", b"s", (1, b"state x"))
    assert journal.lacking == ("" if why == "answer_lost" else why)
    journal.forget()
    assert not journal.lacking


def test_where_the_first_reset_tells_no_origin_nothing_can_be_proved() -> None:
    journal = two()
    asked(journal, "reset", b"r")
    assert journal.lacking == "not_resumable"
    assert len(journal) == 0


def test_answers_are_counted_from_where_each_began() -> None:
    journal = two()
    origins = [(0, b"seed 1"), (1, b"seed 2")]
    journal.told(answer(journal.asked("reset", b"r"), "reset", n=5, origins=origins), origins=origins)
    journal.told(answer(journal.asked("step", b"s"), "step", n=6))
    again = [(1, b"state x")]
    journal.told(answer(journal.asked("step", b"s"), "step", n=7, origins=again), origins=again)
    told = [(BOTH, 5, (0, 1)), (BOTH, 6, ()), (BOTH, 7, (1,))]
    assert journal.fields()["digests"].tolist() == digests(*told)
    journal.told(answer(journal.asked("step", b"s"), "step", n=8))
    assert journal.fields()["digests"].tolist() == digests(*told, (BOTH, 8, ()))


def test_answers_beyond_a_number_of_bytes_are_counted_and_those_before_all_journals_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = len(answer(0, "step")[1])
    monkeypatch.setattr(told_, "UNCOUNTED_BYTES", 3 * size)
    journal, origins = two(), ((0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "reset", b"r", *origins)
    for _ in range(9):
        asked(journal, "step", b"s")
    assert not journal.lacking
    assert repr(journal._told._uncounted) == f"<Uncounted: 3 answers, {3 * size} bytes>"
    assert journal.fields()["digests"].tolist() == digests((BOTH, 0, (0, 1)), *[(BOTH, 0, ())] * 9)
    asked(journal, "step", b"s")
    asked(journal, "reset", b"r", *origins)
    assert len(journal._told._uncounted) == 1
    assert journal.fields()["digests"].tolist() == digests((BOTH, 0, (0, 1)))


@pytest.mark.parametrize("steps", [TOGETHER - 1, TOGETHER, 3 * TOGETHER + 5])
def test_what_was_put_aside_is_noted_before_anybody_looks(steps: int) -> None:
    looks: list[Callable[[Journals], Any]] = [
        lambda journal: len(journal) == steps + 1,
        lambda journal: len(journal.fields()["journal"]) == steps + 1,
        lambda journal: journal.seconds == 0.5 * steps,
        lambda journal: repr(journal).startswith(f"<Journals of 2: {steps + 1} requests"),
        lambda journal: after(journal, journal.forget, len) == 0,
        lambda journal: after(journal, lambda: journal.unsure(ALL, "step"), lacking) == "answer_lost",
        lambda journal: after(journal, lambda: asked(journal, "set_attr", setting("a")), len) == steps + 2,
    ]
    for look in looks:
        journal = two()
        asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
        for n in range(steps):
            if n % 3:
                journal.stepped(b"s", answer(0, "step")[1], 0.5)
            else:
                journal.told(answer(journal.asked("step", b"s"), "step"), seconds=0.5)
        assert look(journal)


def after(journal: Journals, do: Callable[[], object], look: Callable[[Journals], Any]) -> Any:
    do()
    return look(journal)


def test_a_worker_may_count_itself() -> None:
    journal, of_1 = two(), np.array([1])
    origins = [(0, b"seed 1"), (1, b"seed 2")]
    reset = answer(journal.asked("reset", b"r"), "reset", n=5, origins=origins)
    journal.told(reset, origins=origins, digests=np.array([1, 2], np.uint64))  # of what was before: begun anew
    began = digests((BOTH, 5, (0, 1)))
    journal.told(answer(journal.asked("step", b"s"), "step", of_1, 1, n=6), digests=np.array(began[1:], np.uint64))
    expected = digests((BOTH, 5, (0, 1)), (of_1, 6, ()))
    assert journal.fields()["digests"].tolist() == expected
    assert journal.fields()["digests"].tolist() == expected, "nothing is counted twice"
    said = np.array(expected, np.uint64)
    journal.told(answer(journal.asked("step", b"s"), "step", n=7), digests=said)
    journal.told(answer(journal.asked("step", b"s"), "step", n=8), digests=(said := said * 3))  # whatever it says
    journal.told(answer(journal.asked("step", b"s"), "step", of_1, 1, n=9), digests=said[1:])
    made = Digests(2, batching(SPACE))
    made.values[:] = said
    nothing = np.zeros(1, np.bool_)
    for lane, n in ((0, 8), (1, 9 + 1)):
        made.add(np.array([lane]), np.array([n]), np.ones(1), nothing, nothing)
    assert journal.fields()["digests"].tolist() == made.values.tolist()


def test_of_two_workers_only_one_may_count() -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    journal.told(answer(journal.asked("step", b"s"), "step", n=6))
    said = np.array(journal.fields()["digests"])
    journal.told(answer(journal.asked("step", b"s"), "step", n=7), digests=said)
    journal.told(answer(journal.asked("step", b"s"), "step", n=8))
    told = [(BOTH, 0, (0, 1)), (BOTH, 6, ()), (BOTH, 7, ()), (BOTH, 8, ())]
    assert journal.fields()["digests"].tolist() == digests(*told)


def test_of_answers_that_their_worker_counts_the_last_of_each_is_kept() -> None:
    journal, said = two(), np.zeros(2, np.uint64)
    origins = [(0, b"seed 1"), (1, b"seed 2")]
    journal.told(answer(journal.asked("reset", b"r"), "reset", origins=origins), origins=origins, digests=said)
    first = answer(journal.asked("step", b"s"), "step")
    journal.told(first, digests=said)
    for _ in range(2000):
        journal.told(answer(journal.asked("step", b"s"), "step", np.array([1]), 1), digests=said[1:])
    assert len(journal._told._uncounted) == len(journal._aside) == 0
    assert journal._told._lasts[0].answer == first


def test_how_long_calls_took_counts_for_a_replay() -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    journal.changed(journal.asked("call", b"c"), 60.0)
    assert journal.seconds == 60.0


@pytest.mark.parametrize("counted", [True, False])
def test_what_is_put_aside_is_bounded_by_bytes(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "UNCOUNTED_BYTES", 1000)
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    said = np.array([1, 2], np.uint64) if counted else None
    for _ in range(TOGETHER // 2 - 1):
        journal.told(answer(journal.asked("step", b"s"), "step"), digests=said)
        kept = sum(len(what[0][1]) for _, what in journal._aside if len(what) == 4)
        assert kept == journal._aside_bytes <= (0 if counted else 1000)


def test_of_a_registered_space_too_nobody_has_told_anything_in_a_reset_of_none() -> None:
    space = spaces.Dict({"own": Registered()})
    journal = Journals(2, batching(space))
    data = pack({"obs": {"own": ("a", "b")}, "origins": [0, b"seed 1", 1, b"seed 2"]})
    journal.told((journal.asked("reset", b"r"), data, "reset", ALL, None), [(0, b"seed 1"), (1, b"seed 2")])
    before = journal.fields()["digests"].tolist()
    none = np.array([], np.int64)
    journal.told((journal.asked("reset", b"r"), data, "reset", none, none))
    assert journal.fields()["digests"].tolist() == before


class Registered(spaces.Text):
    """As a space of a user's own."""

    def __init__(self) -> None:
        super().__init__(4)


@pytest.mark.parametrize("odd", [{"origins": None}, {"lanes": 3}, {"lanes": None}])
def test_odd_fields_of_an_answer_change_nothing(odd: dict[str, Any]) -> None:
    journal, plain = two(), two()
    for one, more in ((journal, odd), (plain, {})):
        asked(one, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
        frame = {"obs": np.arange(2), **FLAGS, "rewards": np.ones(2), **more}
        one.told((one.asked("step", b"s"), pack(frame), "step", ALL, None))
    assert journal.fields()["digests"].tolist() == plain.fields()["digests"].tolist()


@pytest.mark.parametrize(
    "broken",
    [
        {"obs": np.zeros(3, np.int64)},
        {"rewards": np.zeros(1)},
        {"truncations": None},
        {"lanes": np.arange(3)},
        {"origins": 7},
    ],
)
def test_of_an_answer_that_is_none_nobody_knows_what_it_told(broken: dict[str, Any]) -> None:
    journal = two()
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    frame = {"obs": np.arange(2), **FLAGS, "rewards": np.ones(2), **broken}
    journal.told((journal.asked("step", b"s"), pack(frame), "step", ALL, None))
    assert journal.lacking == "", "nobody has looked yet"
    with pytest.raises(MalformedMessage):
        journal.fields()
    assert journal.lacking == "answer_lost"


def test_those_that_go_back_farthest_are_given_up_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 100)
    journal = two()
    asked(journal, "reset", b"r" * 10, (0, b"seed 1"), (1, b"seed 2"))
    for _ in range(8):
        asked(journal, "step", b"s" * 10, (1, b"state x"))
    assert lacking(journal) == ""
    asked(journal, "step", b"s" * 10)
    asked(journal, "step", b"s" * 10)
    assert lacking(journal) == "journal_full"
    assert len(journal) == 5
    asked(journal, "reset", b"r", (0, b"seed 1"))
    assert lacking(journal) == ""
    bodies, begins, *_ = sent(journal)
    assert bodies[begins[0]] == b"r"
    assert bodies[begins[1]] == b"s" * 10
    assert begins[1] == 0, "what it needs was kept"
