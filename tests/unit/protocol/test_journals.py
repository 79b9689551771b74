"""The journals of a shard's sub-environments, as a table of what each request makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshrl.protocol import journals
from meshrl.protocol.journals import Journals
from meshrl.wire.codec import pack

ALL = slice(None)
BOTH = np.array([0, 1])


def digests(*values: int) -> Any:
    return np.array(values, np.uint64)


def asked(journal: Journals, op: str, body: bytes, *origins: tuple[int, bytes]) -> int:
    """A request of both that was answered."""
    at = journal.asked(op, body)
    journal.told(at, ALL, journal.digests + np.uint64(1), origins)
    return at


def lacking(journal: Journals) -> str:
    return journal.lacking


def sent(journal: Journals) -> tuple[list[bytes], list[int], list[int], list[Any]]:
    fields = journal.fields()
    bodies = [body for _, body in fields["journal"]]
    return bodies, fields["begins"].tolist(), fields["ends"].tolist(), fields["origins"]


def test_a_new_one_has_nothing_to_do_again() -> None:
    journal = Journals(2)
    assert len(journal) == 0
    assert not journal.lacking
    assert sent(journal) == ([], [-1, -1], [-1, -1], [None, None])


def test_a_journal_begins_with_the_request_that_told_an_origin_and_ends_with_the_last() -> None:
    journal = Journals(2)
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "step", b"s1")
    asked(journal, "step", b"s2", (1, b"state x"))
    asked(journal, "step", b"s3")
    assert sent(journal) == ([b"r", b"s1", b"s2", b"s3"], [0, 2], [3, 3], [b"seed 1", b"state x"])


def test_what_no_sub_environment_needs_any_more_is_dropped() -> None:
    journal = Journals(2)
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
    journal = Journals(2)
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
    journal = Journals(2)
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
    journal = Journals(2)
    asked(journal, "reset", b"r1", (0, b"seed 1"), (1, b"seed 2"))
    asked(journal, "call", b"c")
    asked(journal, "reset", b"r2", (0, b"seed 3"), (1, b"seed 4"))
    assert sent(journal)[:3] == ([b"r1", b"c", b"r2"], [0, 0], [2, 2])


def test_a_request_counts_for_those_that_have_answered_it() -> None:
    journal = Journals(2)
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    one, other = journal.asked("step", b"of 0"), journal.asked("step", b"of 1")
    journal.told(other, np.array([1]), digests(8))
    assert sent(journal)[1:3] == ([0, 0], [0, 2])
    journal.told(one, np.array([0]), digests(7))
    assert sent(journal)[1:3] == ([0, 0], [1, 2])
    assert journal.fields()["digests"].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("op", "why"), [("step", "answer_lost"), ("reset", "answer_lost"), ("call", "attributes_lost")]
)
def test_after_an_error_nobody_knows_what_was_done_until_it_begins_anew(op: str, why: str) -> None:
    journal = Journals(2)
    asked(journal, "reset", b"r", (0, b"seed 1"), (1, b"seed 2"))
    journal.unsure(np.array([1]), op)
    assert journal.lacking == why
    asked(journal, "step", b"s", (0, b"state x"))
    assert journal.lacking == why
    asked(journal, "step", b"s", (1, b"state x"))
    assert journal.lacking == ("" if why == "answer_lost" else why)
    journal.forget()
    assert not journal.lacking


def test_without_digests_nothing_can_be_proved() -> None:
    journal = Journals(2)
    journal.told(journal.asked("reset", b"r"), ALL, None)
    assert journal.lacking == "not_resumable"
    assert len(journal) == 0


def test_those_that_go_back_farthest_are_given_up_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 100)
    journal = Journals(2)
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
