from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from meshrl.errors import MalformedMessage
from meshrl.protocol import journal as journals
from meshrl.protocol.digest import Digest
from meshrl.protocol.journal import Journal
from meshrl.wire.codec import pack


def noted(*ops: str) -> Journal:
    """``reset!`` is one with a seed; each body is the op with its position, each answer has that as its observation."""
    journal = Journal()
    for n, op in enumerate(ops):
        journal.note(op.rstrip("!"), f"{op}{n}".encode(), answer(n), seeded=op.endswith("!"))
    return journal


def answer(n: int) -> bytes:
    return pack({"seq": 1, "obs": n})


def of_answers(*numbers: int) -> bytes:
    return digest(*({"obs": n} for n in numbers))


def kept(journal: Journal) -> list[str]:
    return [body.decode() for _, body in journal.entries]


def test_it_holds_what_was_asked_since_the_last_seeded_reset() -> None:
    journal = noted("reset!", "step", "reset!", "step", "reset", "step")
    assert kept(journal) == ["reset!2", "step3", "reset4", "step5"]
    assert [op for op, _ in journal.entries] == ["reset", "step", "reset", "step"]
    assert (journal.digest, journal.lacking, len(journal)) == (of_answers(2, 3, 4, 5), "", 4)


def test_what_was_set_outlives_a_seeded_reset() -> None:
    assert kept(noted("set_attr", "reset!", "step", "set_attr", "step", "reset!")) == [
        "set_attr0",
        "set_attr3",
        "reset!5",
    ]


def test_once_a_method_was_called_nothing_is_dropped() -> None:
    ops = ["reset!", "step", "call", "step", "reset!", "step"]
    journal = noted(*ops)
    assert len(journal) == len(ops)
    assert journal.digest == of_answers(4, 5), "that begins anew all the same"


def test_the_digest_is_that_of_all_answers_but_those_to_set_attr() -> None:
    assert noted("reset!", "set_attr", "step", "call").digest == of_answers(0, 2, 3)
    assert Journal().digest is None


def test_however_often_it_is_asked_for_it_goes_on() -> None:
    journal = noted("reset!", "step")
    assert journal.digest == journal.digest == of_answers(0, 1)
    journal.note("step", b"", answer(7))
    copy = journal.copy()
    assert journal.digest == of_answers(0, 1, 7)
    copy.note("step", b"", answer(8))
    assert (copy.digest, journal.digest) == (of_answers(0, 1, 7, 8), of_answers(0, 1, 7))


def test_answers_beyond_a_number_of_bytes_are_counted_as_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "UNCOUNTED_BYTES", 3 * len(answer(0)))
    journal = noted("reset!", *["step"] * 9)
    assert not journal.lacking
    assert repr(journal._uncounted) == f"<Uncounted: 3 answers, {3 * len(answer(0))} bytes>"
    assert journal.digest == of_answers(*range(10))


@pytest.mark.parametrize("steps", [journals.TOGETHER - 1, journals.TOGETHER, 3 * journals.TOGETHER + 5])
def test_steps_that_were_put_aside_are_noted_before_anybody_looks(steps: int) -> None:
    bodies = ["reset!0", *(f"step{n + 1}" for n in range(steps))]
    looks: list[Callable[[Journal], Any]] = [
        lambda journal: kept(journal) == bodies,
        lambda journal: kept(journal.copy()) == bodies,
        lambda journal: len(journal) == steps + 1,
        lambda journal: journal.digest == of_answers(*range(steps + 1)),
        lambda journal: len(journal.fields()["journal"]) == steps + 1,
        lambda journal: repr(journal).startswith(f"<Journal of {steps + 1} requests"),
        lambda journal: after(journal, lambda: journal.note("call", b"c", answer(0)), kept) == [*bodies, "c"],
        lambda journal: after(journal, journal.forget, kept) == [],
        lambda journal: after(journal, lambda: journal.unsure("step"), lambda one: one.lacking) == "answer_lost",
    ]
    for look in looks:
        assert look(noted("reset!", *["step"] * steps))
    journal = Journal()
    for _ in range(steps):
        journal.note("step", b"", answer(0), 0.5)
    assert journal.seconds == 0.5 * steps


@pytest.mark.parametrize("counted", [True, False])
def test_what_is_put_aside_is_bounded_by_bytes(counted: bool) -> None:
    journal = noted("reset!")
    for _ in range(journals.TOGETHER - 1):
        journal.note("step", b"s", bytes(100_000), digest=b"d" if counted else None)
        kept_bytes = sum(len(answer) for _, answer, _, _ in journal._aside)
        assert kept_bytes <= (0 if counted else journals.UNCOUNTED_BYTES)


def after(journal: Journal, do: Callable[[], object], look: Callable[[Journal], Any]) -> Any:
    do()
    return look(journal)


def test_a_worker_may_count_itself() -> None:
    journal = Journal()
    journal.note("reset", b"r", answer(0), seeded=True, digest=b"0")
    journal.note("set_attr", b"s", b"")
    assert journal.digest == b"0"
    journal.note("step", b"s", answer(1), digest=b"1")
    assert (journal.digest, journal.lacking) == (b"1", "")
    journal.note("step", b"s", answer(1))
    assert journal.lacking == "answer_lost", "what of it was counted?"


def test_an_answer_that_cannot_be_counted_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "UNCOUNTED_BYTES", 2)
    journal = noted("reset!")
    journal.note("step", b"s", b"\xc1\xc1\xc1")
    assert journal.lacking == "answer_lost"
    monkeypatch.undo()
    journal = noted("reset!")
    journal.note("step", b"s", b"\xc1")
    with pytest.raises(MalformedMessage):
        journal.fields()
    assert journal.lacking == "answer_lost", "and not all well when somebody asks again"


def test_an_env_that_tells_no_origin_with_its_first_reset_cannot_be_resumed() -> None:
    assert noted("reset", "step").lacking == "not_resumable"
    assert noted("reset!", "reset", "step").lacking == ""
    assert noted("call", "reset!", "reset").lacking == ""


@pytest.mark.parametrize(("op", "later"), [("set_attr", ""), ("call", "attributes_lost")])
def test_what_lasts_is_noted_also_where_the_rest_was_given_up(
    monkeypatch: pytest.MonkeyPatch, op: str, later: str
) -> None:
    monkeypatch.setattr(journals, "MAX_ENTRIES", 2)
    journal = noted("reset!", "step", "step", op)
    assert journal.lacking
    journal.note("reset", b"r", answer(4), seeded=True)
    assert (kept(journal), journal.lacking) == (["set_attr3", "r"] if op == "set_attr" else [], later)


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_ENTRIES"])
def test_beyond_its_bound_it_is_given_up_until_it_begins_anew(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(journals, bound, 20 if bound == "MAX_BYTES" else 3)
    journal = noted("reset!", "step", "step", "step", "step")
    assert (journal.lacking, len(journal)) == ("journal_full", 0)
    journal.note("reset", b"", answer(9), seeded=True)
    assert (journal.lacking, len(journal)) == ("", 1)


@pytest.mark.parametrize("lasting", ["set_attr", "call"])
def test_where_something_lasting_was_given_up_with_it_no_reset_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, lasting: str
) -> None:
    monkeypatch.setattr(journals, "MAX_ENTRIES", 3)
    journal = noted("reset!", lasting, "step", "step", "step", "reset!", "step")
    assert (journal.lacking, len(journal)) == ("attributes_lost", 0)
    journal.forget()
    assert (journal.lacking, journal.digest, len(journal)) == ("", None, 0)


@pytest.mark.parametrize(("op", "why"), [("step", "answer_lost"), ("call", "attributes_lost")])
def test_what_was_answered_with_an_error_leaves_nothing_to_replay(op: str, why: str) -> None:
    journal = noted("set_attr", "reset!", "step")
    journal.unsure(op)
    assert journal.lacking == why
    journal.note("reset", b"r", answer(9), seeded=True)
    assert (journal.lacking, len(journal)) == (("", 2) if op == "step" else (why, 0))


def test_what_was_set_is_known_when_the_state_is_gone() -> None:
    journal = noted("set_attr", "reset!", "step")
    journal.forget()
    assert kept(journal) == ["set_attr0"]


# --------------------------------------------------------------------------- digests

TOLD = {"obs": np.arange(4, dtype=np.float32), "reward": 1.0, "terminated": False, "truncated": False}
OTHERS = [
    {"obs": np.arange(1, 5, dtype=np.float32)},
    {"obs": -TOLD["obs"]},  # type: ignore[operator]
    {"reward": np.nextafter(1.0, 2.0).item()},
    {"reward": -0.0},
    {"terminated": True},
    {"truncated": True},
]


def digest(*frames: Mapping[str, Any]) -> bytes:
    made = Digest()
    for frame in frames:
        made.add(dict(frame))
    return made.value


@pytest.mark.parametrize("other", OTHERS)
def test_it_tells_apart_what_differs_in_one_bit(other: dict[str, object]) -> None:
    assert digest(TOLD) != digest({**TOLD, **other})
    assert digest(TOLD, TOLD) != digest({**TOLD, **other}, TOLD)
    assert digest({**TOLD, "reward": 0.0}) != digest({**TOLD, "reward": -0.0})


def test_it_runs_and_says_the_same_of_the_same() -> None:
    made = Digest()
    assert made.add(TOLD) == digest(TOLD)
    assert made.add(TOLD) == made.value == digest(TOLD, TOLD) != digest(TOLD)
    assert len(made.value) == 16


def test_infos_do_not_count() -> None:
    assert digest({**TOLD, "info": {"t": 1.0}}) == digest({**TOLD, "info": {"t": 2.0}})


@pytest.mark.parametrize(
    "obs",
    [
        np.arange(6).reshape(2, 3)[:, ::2],
        np.array(3.5),
        np.zeros((0, 4)),
        np.array(["2026-01-01"], "M8[D]"),
        np.array([True, False]),
        np.array(["a", "bc"]),
        {"a": np.ones(2), "b": (1, np.float32(2.0), "text")},
        [1, None, b"x", 2**80],
        np.int64(5),
    ],
    ids=str,
)
def test_any_observation_that_travels_has_one(obs: object) -> None:
    assert digest({"obs": obs}) == digest({"obs": obs}) != digest({"obs": None})


def test_the_places_of_values_count() -> None:
    assert digest({"obs": {"a": 1, "b": 2}}) != digest({"obs": {"a": 2, "b": 1}})
    assert digest({"obs": (1, 2)}) != digest({"obs": (2, 1)})
