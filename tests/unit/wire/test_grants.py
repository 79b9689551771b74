"""Grants: written with a description that was packed before, read with one that was read before."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest

from meshrl.errors import MalformedMessage, UnsupportedVersion
from meshrl.wire.codec import pack, unpack
from meshrl.wire.grants import parse_answer
from meshrl.wire.messages import Full, Grant, Load, check, parse
from meshrl.worker.describe import describe_env


def grant(session: str = "s1", **changed: Any) -> Grant:
    env = gymnasium.make("CartPole-v1")
    description = describe_env(
        env, name="cartpole", worker="w1", capabilities={"gpu": True}, allow_kwargs=(), allow=(), step_deadline_s=300.0
    )
    env.close()
    fields: dict[str, Any] = {
        "session": session,
        "epoch": 1,
        "worker": "w1",
        "lease_s": 15.0,
        "grant_s": 2.0,
        "step_deadline_s": 300.0,
        "render_mode": "rgb_array",
        "description": description.model_copy(update=changed),
        "load": Load(slots=64, free=3),
    }
    return Grant(**fields)


def test_a_description_packed_before_makes_the_same_message() -> None:
    granted = grant()
    spliced = granted.to_wire_with(granted.description.packed())
    assert unpack(spliced) == unpack(granted.to_wire())
    assert parse(Grant, spliced) == granted


@pytest.mark.parametrize("spliced", [True, False])
def test_a_grant_is_read_as_it_was_written(spliced: bool) -> None:
    granted = grant()
    data = granted.to_wire_with(granted.description.packed()) if spliced else granted.to_wire()
    assert check(Grant, parse_answer(data)) == granted


def test_grants_of_one_env_share_its_description_and_others_do_not() -> None:
    one, two, other = (
        check(Grant, parse_answer(each.to_wire()))
        for each in (grant("s1"), grant("s2"), grant("s3", capabilities={"gpu": False}))
    )
    assert one.session != two.session
    assert one.description is two.description
    assert other.description.capabilities == {"gpu": False}


def test_the_description_is_found_wherever_it_stands() -> None:
    body = unpack(grant().to_wire())
    turned = dict(reversed(body.items()))
    assert list(turned) != list(body)
    assert check(Grant, parse_answer(pack(turned))) == grant()


def test_what_has_no_description_of_its_own_is_read_as_ever() -> None:
    full = Full(load=Load(slots=1, free=0), ticket="description").to_wire()
    assert parse_answer(full) == unpack(full)
    inside = pack({"error": {"code": "worker", "message": "no", "details": {"description": {"a": 1}}}})
    assert parse_answer(inside) == unpack(inside)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack({"description": 3, "session": "s1"}),
        pack({"description": {"kind": "env"}}),
        grant().to_wire()[:-1],
        grant().to_wire() + b"\x00",
    ],
)
def test_what_is_no_grant_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        check(Grant, parse_answer(data))


def test_what_no_map_of_text_is_goes_on_to_those_who_refuse_it() -> None:
    for data in (pack([1, 2]), b"\x81\x01\x02", pack("text")):
        with pytest.raises(MalformedMessage):
            check(Grant, parse_answer(data))


def test_a_description_of_another_major_version_is_refused_by_name() -> None:
    body = unpack(grant().to_wire())
    body["description"]["v"] = 2
    with pytest.raises(UnsupportedVersion, match="version 2"):
        parse_answer(pack(body))
