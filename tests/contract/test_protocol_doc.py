"""docs/protocol.md says what the code does: its tables, its numbers and its worked example."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from meshrl import errors
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import MeshError
from meshrl.protocol.doubt import Do, Doubt
from meshrl.protocol.lane import Lane
from meshrl.protocol.session import SessionTable, State
from meshrl.protocol.turn import READING, Phase, Turn
from meshrl.wire import codec, forms, frames, messages, spaces
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Message
from meshrl.wire.subjects import Subjects
from meshrl.worker.env_worker import EnvWorker
from schemas.generate import models
from schemas.ops import FORMS, POOL_OPS, SINGLE_OPS, VECTOR_OPS, Op
from tests.contract.document import TEXT, Row, coded, section, table

MODELS = {model.__name__: model for model in models().values()}
UNITS = {"s": 1.0, "MiB": float(1 << 20), "GiB": float(1 << 30), "": 1.0}


# --------------------------------------------------------------------------- subjects


def test_the_subjects_are_those_that_the_code_builds() -> None:
    at = Subjects()
    built = {
        at.advertisement("KIND", "NAME", "WORKER"),
        at.ask,
        at.audit("WORKER"),
        at.recording("NAME", "SESSION").replace("NAME", "ENV"),
        at.episodes("NAME", "SESSION").replace("NAME", "ENV"),
        at.position("USER", "ENV", "CONSUMER"),
        *(at.tapped("NAME", "SESSION", what).replace("NAME", "ENV") for what in ("about", "rows")),
        at.tapping("USER"),
        *(at.recordings(what, "USER") for what in ("read", "keep")),
        *(at.worker("WORKER", op, "USER") for op in ("open", "renew", "probe", "drain", "act")),
        at.any_open("NAME", "USER"),
        at.any_act("NAME", "USER"),
        at.session("WORKER", "USER", "SESSION", "OP"),
        at.session("WORKER", "USER", "SESSION", "close"),
    }
    told = {coded(row["subject, below the prefix"])[0] for row in table("Subjects", "subject, below the prefix")}
    assert {at.prefix + re.sub(r"<(\w+)>", lambda place: place[1].upper(), subject) for subject in told} == built
    assert f"`{at.prefix.replace('default', '<namespace>')}`" in TEXT


def test_every_body_and_answer_of_a_subject_is_a_message_of_the_code() -> None:
    for row in table("Subjects", "subject, below the prefix"):
        for name in coded(row["body"]) + coded(row["answer"]):
            assert name == "name" or name in MODELS


# --------------------------------------------------------------------------- encoding


def test_the_fields_of_control_messages_are_those_of_the_models() -> None:
    def fields(cell: str) -> set[str]:
        return set(coded(cell))

    rows = {coded(row["message"])[0]: row for row in table("Encoding", "message")}
    assert set(rows) == set(MODELS) - {"SessionState"}
    for name, row in rows.items():
        known = MODELS[name].model_fields
        assert fields(row["needed"]) == {field for field in known if known[field].is_required()}, name
        assert fields(row["optional"]) == {f for f in known if not known[f].is_required()} - {"v"}, name


def test_the_forms_of_values_are_those_of_the_codec() -> None:
    assert {coded(row["form"])[0] for row in table("Encoding", "form")} == set(forms.REVIVE)


def test_the_kinds_of_spaces_are_gymnasiums() -> None:
    own = {kind for kind, known in spaces._BY_KIND.items() if known.cls.__module__.startswith("gymnasium.")}
    assert {coded(row["`space`"])[0] for row in table("Encoding", "`space`")} == own


# --------------------------------------------------------------------------- opening and lanes


def _session_in(state: str) -> SessionTable:
    """A table with the session (u, s) of epoch 2 in a state."""
    made = SessionTable(2)
    if state == "none":
        return made
    _, session = made.open("u", "s", 2, "inbox", 0.0)
    assert session is not None
    if state != "opening":
        made.granted(session, b"grant", 0.0)
        made.used(session, 0.0)
    if state in {"ending", "gone"}:
        made.ending(session, "session_expired")
    if state == "gone":
        made.ended(session)
    return made


@pytest.mark.parametrize("row", table("Opening", "session"), ids=lambda row: row["session"])
def test_the_table_of_opens_is_that_of_the_code(row: Row) -> None:
    for head, epoch in (("same", 2), ("higher", 3), ("lower", 1)):
        opening, _ = _session_in(row["session"]).open("u", "s", epoch, "inbox", 1.0)
        assert coded(row[f"open, {head} epoch"]) == [opening.value]
    here = _session_in(row["session"])
    assert row["renew"] == ("renewed" if here.renew(("u", "s"), 2, 1.0) is None else "lost")
    session = here.get(("u", "s"))
    serves = session is not None and session.state is State.OPEN
    assert row["request"] == ("its lane's" if serves else "unknown")
    assert row["close, same epoch"] == ("nothing" if session is None else "ending")


def test_every_state_of_a_session_has_its_row() -> None:
    told = {row["session"] for row in table("Opening", "session")}
    assert told == {state.value for state in State} | {"none", "gone"}


def test_the_table_of_a_lane_at_the_worker_is_that_of_the_code() -> None:
    seqs = {"below n": 2, "n": 3, "n + 1": 4, "beyond": 5}
    rows = table("Lanes", "seq")
    assert [row["seq"] for row in rows] == list(seqs)
    for row in rows:
        for head, running in (("while n is running", True), ("after n was answered", False)):
            lane = Lane()
            for seq in (1, 2, 3):
                lane.receive(seq, "inbox", 0.0)
                if seq < 3 or not running:
                    lane.answer(b"")
            assert coded(row[head]) == [lane.receive(seqs[row["seq"]], "inbox", 0.0).value]


def _turn_in(phase: str) -> Turn:
    made = Turn("env")
    if phase != "free":
        made.begin("step")
    if phase == "unsettled":
        made.cancelled()
    assert made.phase.value == phase
    return made


@pytest.mark.parametrize("row", table("Lanes", "the last request"), ids=lambda row: row["the last request"])
def test_the_table_of_a_lane_at_the_client_is_that_of_the_code(row: Row) -> None:
    phase = coded(row["the last request"])[0]
    turn = _turn_in(phase)
    try:
        turn.may_begin("step")
        turn.begin("step")
        came = turn.phase.value
    except MeshError as exc:
        came = exc.code
    assert coded(row["a new one"]) == [came]
    if phase == "free":
        return
    turn = _turn_in(phase)
    turn.cancelled()
    assert (coded(row["its waiter is cancelled"]) or [phase]) == [turn.phase.value]
    turn = _turn_in(phase)
    turn.answered()
    assert coded(row["it is answered"])[0] == turn.phase.value


def test_the_client_table_has_every_phase_and_the_ops_that_change_nothing() -> None:
    assert [coded(row["the last request"])[0] for row in table("Lanes", "the last request")] == [p.value for p in Phase]
    told = re.search(r"anything after a (.*?), which change nothing", " ".join(section("Lanes").split()))
    assert told is not None
    assert set(coded(told[1])) == READING


# --------------------------------------------------------------------------- ops


def test_the_ops_and_their_fields_are_those_of_the_schemas_and_the_code() -> None:
    assert {op for ops in FORMS.values() for op in ops} == frames.OPS
    _check_ops("Ops", SINGLE_OPS)
    _check_ops("Vectors", VECTOR_OPS)
    _check_ops("Pools", POOL_OPS)


def _check_ops(title: str, ops: dict[str, Op]) -> None:
    rows = {coded(row["op"])[0]: row for row in table(title, "op")}
    assert set(rows) == set(ops)
    for op, row in rows.items():
        _, asked, needed, told, sure = ops[op]
        assert set(coded(row["request's own fields"])) == {f if f in needed else f"{f}?" for f in asked}, op
        may = {f if f in sure or title == "Ops" else f"{f}?" for f in told}
        assert set(coded(row["reply's own fields"])) == may, op


# --------------------------------------------------------------------------- errors


def _classes() -> dict[str, type[MeshError]]:
    found: list[type[MeshError]] = [MeshError]
    for cls in found:
        found += [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    return {cls.code: cls for cls in found}


BLAME = {
    "you": errors.UsageError,
    "peer": errors.ProtocolError,
    "network": errors.TransportError,
    "worker": errors.WorkerError,
    "recording": errors.RecordingError,
}


def test_every_error_code_is_told_of_once_with_who_is_to_blame() -> None:
    rows = table("Errors", "code")
    codes = [coded(row["code"])[0] for row in rows]
    classes = _classes()
    assert sorted(codes) == sorted(classes)
    for code, row in zip(codes, rows, strict=True):
        families = [name for name, family in BLAME.items() if issubclass(classes[code], family)]
        assert [row["blame"]] == (families or ["none"]), code


def test_no_other_text_of_the_document_looks_like_an_error_code_but_is_none() -> None:
    told = re.findall(r"(?:error|answered|errors) `([a-z_]+)`", TEXT)
    assert told
    words = {"answered", "not_received", "running", "parked", "unknown"}
    assert set(told) - words <= set(_classes())


# --------------------------------------------------------------------------- doubt


def test_what_to_do_on_each_word_of_a_probe_is_what_the_code_does() -> None:
    actions = {"wait": Do.WAIT, "send again": Do.SEND_AGAIN, "lost": Do.LOST}
    rows = {coded(row["the worker's word"])[0]: row["do"] for row in table("Doubt", "the worker's word")}
    states = messages.Probed.model_fields["states"].annotation
    assert states is not None
    assert set(rows) == set(states.__args__[0].__args__)
    for word, do in rows.items():
        assert Doubt(0.0, deadline_s=300.0).heard(word, 1.0) is actions[do.partition(";")[0]], word


# --------------------------------------------------------------------------- numbers


def _number(text: str) -> float:
    value, _, unit = text.partition(" ")
    return float(value.replace(",", "")) * UNITS[unit]


@pytest.mark.parametrize("row", table("Constants", "value"), ids=lambda row: row["constant"])
def test_each_constant_has_the_value_that_the_code_has(row: Row) -> None:
    module, _, name = coded(row["constant"])[0].rpartition(".")
    assert getattr(importlib.import_module(module), name) == _number(row["value"])


def test_every_duration_and_size_in_the_text_is_one_of_the_constants() -> None:
    known = {row["value"] for row in table("Constants", "value")}
    text = TEXT.replace(section("Constants"), "")
    told = {f"{value} {unit}" for value, unit in re.findall(r"([\d.,]*\d)\s(s|MiB|GiB)\b", text)}
    assert told
    assert told <= known


def test_every_constant_of_doubt_is_told_of() -> None:
    from meshrl.protocol import doubt

    told = {coded(row["constant"])[0] for row in table("Constants", "value")}
    assert {f"{doubt.__name__}.{name}" for name in vars(doubt) if name.endswith("_S")} <= told


# --------------------------------------------------------------------------- the worked example


def exchange() -> list[tuple[str, bytes, bytes]]:
    """Subject, body and answer of each message of the example; no answer stands for one as above."""
    found = re.findall(
        r"^> (\S+)\n((?:  [0-9a-f]+\n)+)<\n((?:  [0-9a-f]+\n)+|  a grant, as above\n)",
        section("A worked example"),
        re.MULTILINE,
    )
    return [
        (subject, bytes.fromhex(body), b"" if "grant" in answer else bytes.fromhex(answer))
        for subject, body, answer in found
    ]


def _shape(value: Any) -> Any:
    """A value without what depends on the machine: numbers of arrays, and what a description says of versions."""
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape)
    if isinstance(value, dict):
        return {k: _shape(v) for k, v in value.items() if k not in {"versions", "spec", "metadata", "fingerprint"}}
    return value


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(private=False) as running:
        yield running


async def test_the_worked_example_is_what_a_worker_answers(server: EmbeddedServer) -> None:
    told = exchange()
    assert [subject.rpartition("anon")[0].split(".")[3] for subject, _, _ in told].count("session") == 13
    (recorded,) = {subject.split(".")[4] for subject, _, _ in told}
    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, server.url, slots=2) as worker,
        connect(server.url) as connection,
    ):
        assert len(worker.id) == len(recorded)
        for subject, body, answer in told:
            came = await connection.ask(subject.replace(recorded, worker.id), body, 10.0)
            assert came is not None
            if not answer:  # a grant, as above
                grant = messages.parse(messages.Grant, came)
                assert (grant.session, grant.load.free) == (unpack(body)["session"], 0)
                continue
            wanted = answer.replace(recorded.encode(), worker.id.encode())
            assert _shape(unpack(came)) == _shape(unpack(wanted)), subject
            for field, value in unpack(answer).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_allclose(unpack(came)[field], value, rtol=1e-5)


def test_the_requests_of_the_example_are_what_the_code_writes() -> None:
    models: dict[str, type[Message]] = {
        "open": messages.Open,
        "renew": messages.Renew,
        "probe": messages.Probe,
        "close": messages.Close,
    }
    for subject, body, _ in exchange():
        op = next(part for part in reversed(subject.split(".")) if part in {*models, *frames.OPS})
        if op in models:
            assert messages.parse(models[op], body).to_wire() == body
        else:
            assert codec.pack(unpack(body)) == body


def test_the_same_seq_in_the_example_gets_the_same_bytes() -> None:
    steps = [(body, answer) for subject, body, answer in exchange() if subject.endswith(".step")]
    assert steps[0] == steps[1]
