from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage, MeshError, UnsupportedVersion
from meshrl.wire import messages, of_recordings
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import (
    MAX_BATCH,
    Advertisement,
    Ask,
    Close,
    Closed,
    Description,
    Drain,
    Drained,
    Full,
    Grant,
    Known,
    Load,
    Message,
    Open,
    Probe,
    Probed,
    Renew,
    Renewed,
    SessionState,
    check,
    parse,
)
from meshrl.wire.of_recordings import Keep, Kept, Read, Watch
from meshrl.wire.subjects import MAX_NAME_CHARS
from tests.unit.wire.strategies import values

DESCRIPTION = Description(kind="env", name="cartpole", worker="w1", versions={"python": "3.11"}, allow=["*"])
LOAD = Load(slots=8, free=3, waiting=2)
AD = Advertisement(kind="env", name="cartpole", worker="w1", slots=8, free=3, description="ab" * 16)
ONE_OF_EACH: list[Message] = [
    AD,
    AD.model_copy(update={"draining": True, "draining_s": 2.5, "left": True, "interval_s": 0.5}),
    DESCRIPTION,
    Ask(),
    Ask(kind="agent", name="random", worker="w2"),
    Known(advertisements=[AD], descriptions=[DESCRIPTION]),
    LOAD,
    Open(session="s1", name="cartpole"),
    Open(session="s1", epoch=3, name="x", kwargs={"a": [1, 2.5, None]}, believed_free=0, park_s=3.5, ticket="7"),
    Grant(
        session="s1",
        epoch=1,
        worker="w1",
        lease_s=15.0,
        grant_s=2.0,
        step_deadline_s=300.0,
        render_mode="rgb_array",
        description=DESCRIPTION,
        load=LOAD,
    ),
    Full(load=LOAD),
    Full(load=LOAD, ticket="9", bounced=True),
    Renew(sessions=[("s1", 1), ("s2", 4)]),
    Renewed(lease_s=15.0, lost=[("s1", "session_expired")], draining=True, draining_s=0.0),
    Probe(awaited=[("s1", 1, 0, 0), ("s2", 2, 0, 77)]),
    Probed(states=["unknown", "not_received", "running", "parked", "answered"]),
    Close(epoch=2),
    Closed(existed=False),
    Drain(seconds=2.5),
    Drained(sessions=3),
    Watch(env="x", seconds=8.0),
    Read(stream="MESHRL_EPISODES", which="last", subject="a.*"),
    Keep(env="x", consumer="c", position="7.1.0.0", message_id="m", after=0),
    Kept(seq=3),
    SessionState(session="s1", worker="w1", name="x", phase="running", episode=2, steps=3, total_steps=9, seed=0),
]
DEFINED = (vars(messages) | vars(of_recordings)).values()
MODELS = [value for value in DEFINED if isinstance(value, type) and issubclass(value, Message)]


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert parse(type(message), message.to_wire()) == message


def test_every_message_is_among_those_tested() -> None:
    assert {type(message) for message in ONE_OF_EACH} | {Message} == set(MODELS)


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_defaults_do_not_travel_but_the_version_does(message: Message) -> None:
    body = unpack(message.to_wire())
    assert body["v"] == 1
    for name, field in type(message).model_fields.items():
        if name != "v" and name in body and not field.is_required():
            assert getattr(message, name) != field.get_default(call_default_factory=True)


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_unknown_fields_are_ignored(message: Message) -> None:
    body = {**unpack(message.to_wire()), "of a later version": {"x": [1]}, "another": None}
    assert parse(type(message), pack(body)) == message


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_a_message_without_a_required_field_is_malformed_and_says_which(message: Message) -> None:
    body = unpack(message.to_wire())
    for name, field in type(message).model_fields.items():
        if field.is_required():
            with pytest.raises(MalformedMessage, match=name):
                check(type(message), {key: value for key, value in body.items() if key != name})


@pytest.mark.parametrize(
    "version",
    [0, 2, -1, "1", 1.5, None, True, [1], np.ones(3), pytest.param(10**5000, id="an int too long to print"), math.nan],
)
@pytest.mark.parametrize("model", MODELS)
def test_another_major_version_is_refused_by_name(model: type[Message], version: Any) -> None:
    with pytest.raises(UnsupportedVersion, match="version 1") as caught:
        check(model, {"v": version})
    assert model.__name__ in str(caught.value)
    assert caught.value.details == {"spoken": 1}


def test_a_body_that_says_no_version_is_taken_as_of_this_one() -> None:
    assert check(Close, {"epoch": 1}) == Close(epoch=1)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81", pack(None), pack([1]), pack("v"), pack(np.zeros(2))])
def test_bytes_that_are_no_map_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        parse(Close, data)


BAD: list[tuple[type[Message], dict[str, Any]]] = [
    *[
        (Open, {"session": bad, "name": "x"})
        for bad in ["", "a.b", "a*", ">", "a b", "s\n", "ä", "x" * 65, 7, None, b"s1"]
    ],
    *[(Open, {"session": "s", "name": bad}) for bad in ["", "x" * (MAX_NAME_CHARS + 1), 7, None]],
    *[(Open, {"session": "s", "name": "x", "epoch": bad}) for bad in [0, -1, 2**31, 1.0, True, "1", np.ones(1)]],
    *[(Open, {"session": "s", "name": "x", "num_envs": bad}) for bad in [0, 65_537, True, 1.0]],
    *[(Open, {"session": "s", "name": "x", "park_s": bad}) for bad in [-0.1, 3600.1, math.nan, math.inf, "1"]],
    *[(Open, {"session": "s", "name": "x", "believed_free": bad}) for bad in [-1, 2**31, 1.5, np.zeros(2)]],
    (Open, {"session": "s", "name": "x", "kwargs": [1]}),
    (Open, {"session": "s", "name": "x", "key_style": "utf-16"}),
    (Open, {"session": "s", "name": "x", "kind": "learner"}),
    (Open, {"session": "s", "name": "x", "ticket": "9" * 65}),
    (Renew, {"sessions": [["s", 1, 2]]}),
    (Renew, {"sessions": [["s"]]}),
    (Renew, {"sessions": [["a.b", 1]]}),
    (Renew, {"sessions": [["s", 1]] * (MAX_BATCH + 1)}),
    (Probe, {"awaited": [["s", 1, 0, 0]] * (MAX_BATCH + 1)}),
    (Probe, {"awaited": [["s", 1, 0]]}),
    (Probe, {"awaited": {"s": 1}}),
    (Probed, {"states": ["asleep"]}),
    (Advertisement, {**AD.model_dump(), "interval_s": 0.0}),
    (Advertisement, {**AD.model_dump(), "free": -1}),
    (Advertisement, {**AD.model_dump(), "description": "x" * 65}),
    (Renewed, {"lease_s": math.nan}),
    (Renewed, {"lease_s": -1.0}),
    (Drain, {"seconds": math.nan}),
    (Drain, {"seconds": math.inf}),
]


@pytest.mark.parametrize(("model", "body"), BAD)
def test_a_field_out_of_its_bounds_is_malformed(model: type[Message], body: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match=rf"^{model.__name__}\."):
        check(model, body)


@settings(max_examples=60)
@given(st.sampled_from(ONE_OF_EACH), st.data(), values)
def test_any_value_in_any_field_is_taken_or_an_error_of_meshrl(
    message: Message, data: st.DataObject, value: Any
) -> None:
    body = unpack(message.to_wire())
    name = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    try:
        again = check(type(message), {**body, name: value})
    except MeshError:
        return
    assert isinstance(again, type(message))


def test_entries_of_batches_travel_as_plain_arrays() -> None:
    import msgpack

    for message, name in [
        (Renew(sessions=[("s1", 1)]), "sessions"),
        (Probe(awaited=[("s1", 1, 0, 2)]), "awaited"),
        (Renewed(lease_s=15.0, lost=[("s1", "closed")]), "lost"),
    ]:
        [entry] = msgpack.unpackb(message.to_wire())[name]
        assert type(entry) is list


def test_the_largest_advertisement_is_below_a_kilobyte() -> None:
    ad = Advertisement(
        kind="agent",
        name="\U0001f916" * MAX_NAME_CHARS,
        worker="w" * 64,
        slots=2**31 - 1,
        free=2**31 - 1,
        waiting=2**31 - 1,
        draining=True,
        draining_s=1e300,
        left=True,
        interval_s=0.1,
        description="f" * 64,
    )
    assert len(ad.to_wire()) <= 1024


def test_a_full_batch_stays_below_100_kilobytes() -> None:
    session = "s" * 64
    assert len(Renew(sessions=[(session, 2**31 - 1)] * MAX_BATCH).to_wire()) < 100_000
    assert len(Probe(awaited=[(session, 2**31 - 1, 1000, 2**63 - 1)] * MAX_BATCH).to_wire()) < 100_000


def test_the_digest_is_that_of_everything_but_the_worker() -> None:
    assert DESCRIPTION.digest() == DESCRIPTION.model_copy(update={"worker": "w2"}).digest()
    assert parse(Description, DESCRIPTION.to_wire()).digest() == DESCRIPTION.digest()
    assert len(DESCRIPTION.digest()) == 32
    changes: list[dict[str, Any]] = [{"name": "pong"}, {"allow": []}, {"step_deadline_s": 1.0}, {"stateful": True}]
    for changed in changes:
        assert DESCRIPTION.model_copy(update=changed).digest() != DESCRIPTION.digest()


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = DESCRIPTION.model_copy(update={"capabilities": {"gpu": 1, "cpu": 2}})
    other = DESCRIPTION.model_copy(update={"capabilities": {"cpu": 2, "gpu": 1}})
    assert one.digest() == other.digest()
