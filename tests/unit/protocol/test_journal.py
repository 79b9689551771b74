from __future__ import annotations

import numpy as np
import pytest

from meshrl.protocol import journal as journals
from meshrl.protocol.digest import Digest
from meshrl.protocol.journal import Journal


def noted(*ops: str) -> Journal:
    """``reset!`` is one with a seed; each body is the op with its position."""
    journal = Journal()
    for n, op in enumerate(ops):
        journal.note(op.rstrip("!"), f"{op}{n}".encode(), bytes([n]), seeded=op.endswith("!"))
    return journal


def kept(journal: Journal) -> list[str]:
    return [body.decode() for _, body in journal.entries]


def test_it_holds_what_was_asked_since_the_last_seeded_reset() -> None:
    journal = noted("reset!", "step", "reset!", "step", "reset", "step")
    assert kept(journal) == ["reset!2", "step3", "reset4", "step5"]
    assert [op for op, _ in journal.entries] == ["reset", "step", "reset", "step"]
    assert (journal.digest, journal.lacking, len(journal)) == (b"\5", "", 4)


def test_what_was_set_outlives_a_seeded_reset() -> None:
    assert kept(noted("set_attr", "reset!", "step", "set_attr", "step", "reset!")) == [
        "set_attr0",
        "set_attr3",
        "reset!5",
    ]


def test_once_a_method_was_called_nothing_is_dropped() -> None:
    ops = ["reset!", "step", "call", "step", "reset!", "step"]
    assert len(noted(*ops)) == len(ops)


def test_what_has_no_digest_leaves_the_last_one() -> None:
    journal = noted("reset!", "step")
    journal.note("set_attr", b"x", None)
    assert journal.digest == b"\1"


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_ENTRIES"])
def test_beyond_its_bound_it_is_given_up_until_it_begins_anew(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(journals, bound, 20 if bound == "MAX_BYTES" else 3)
    journal = noted("reset!", "step", "step", "step", "step")
    assert (journal.lacking, len(journal)) == ("journal_full", 0)
    journal.note("reset", b"", b"!", seeded=True)
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
    journal.note("reset", b"r", None, seeded=True)
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


def digest(*frames: dict[str, object]) -> bytes:
    made = Digest()
    for frame in frames:
        made.add(frame)
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
