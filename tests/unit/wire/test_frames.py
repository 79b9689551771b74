from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from meshrl.errors import EnvError, MalformedMessage, MeshError, ResetNeeded, SequenceGap
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import OPS, check_lanes, check_reply, check_request, error_reply, is_of_lanes
from tests.unit.wire.strategies import values

GOOD: dict[str, Any] = {"epoch": 1, "lane": 0, "seq": 1}


@pytest.mark.parametrize(
    ("epoch", "lane", "seq"), [(1, 0, 1), (7, 3, 900), (2**31, 2**31, 2**40), (2**63 - 1, 2**63 - 1, 2**63 - 1)]
)
def test_a_request_is_read_as_its_epoch_lane_and_seq(epoch: int, lane: int, seq: int) -> None:
    body = {"epoch": epoch, "lane": lane, "seq": seq, "action": 1}
    assert check_request(unpack(pack(body))) == (epoch, lane, seq)


@pytest.mark.parametrize("name", ["epoch", "lane", "seq"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        -1,
        1.0,
        True,
        "1",
        b"1",
        [1],
        {},
        np.int64(1),
        np.ones(1, np.int64),
        2**63,
        pytest.param(10**5000, id="an int too long to print"),
        float("nan"),
    ],
)
def test_a_request_with_a_field_that_is_no_whole_number_is_malformed(name: str, value: Any) -> None:
    with pytest.raises(MalformedMessage):
        check_request({**GOOD, name: value})


@pytest.mark.parametrize("name", ["epoch", "lane", "seq"])
def test_a_request_without_one_of_the_three_is_malformed(name: str) -> None:
    with pytest.raises(MalformedMessage):
        check_request({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("name", ["epoch", "seq"])
def test_epochs_and_sequence_numbers_begin_at_1(name: str) -> None:
    with pytest.raises(MalformedMessage):
        check_request({**GOOD, name: 0})


@given(values)
def test_any_value_at_all_is_a_request_or_malformed(value: Any) -> None:
    for body in (value, {"epoch": value, "lane": 0, "seq": 1}, {"epoch": 1, "lane": value, "seq": value}):
        try:
            numbers = check_request(body)
        except MalformedMessage:
            continue
        assert all(type(number) is int for number in numbers)


def test_a_reply_is_given_as_it_came() -> None:
    body = {"seq": 3, "obs": 1, "later field": 2}
    assert check_reply(body, 3) is body


@pytest.mark.parametrize(
    "seq",
    [2, 4, 0, -3, None, "3", 3.0, np.int64(3), np.array([3, 3]), pytest.param(10**5000, id="an int too long to print")],
)
def test_a_reply_to_another_request_is_malformed(seq: Any) -> None:
    with pytest.raises(MalformedMessage):
        check_reply({"seq": seq}, 3)


def test_true_is_not_the_reply_to_request_1() -> None:
    with pytest.raises(MalformedMessage):
        check_reply({"seq": True}, 1)


@pytest.mark.parametrize("body", [None, [], "seq", 3, b"", np.zeros(3)])
def test_a_reply_that_is_no_map_is_malformed(body: Any) -> None:
    with pytest.raises(MalformedMessage):
        check_reply(body, 3)


@given(values)
def test_any_value_at_all_is_a_reply_or_an_error_of_meshrl(value: Any) -> None:
    for body in (value, {"seq": value}, {"error": value}, {"error": {"code": value, "message": value}}):
        try:
            assert check_reply(body, 3)["seq"] == 3
        except MeshError:
            continue


@pytest.mark.parametrize(
    "exc",
    [
        EnvError("it raised", remote_traceback="Traceback ...", type="ValueError"),
        ResetNeeded("reset first"),
        SequenceGap("a gap", seq=5, last_seq=3),
    ],
)
@pytest.mark.parametrize("seq", [3, None])
def test_an_error_reply_raises_the_same_error_at_the_client(exc: MeshError, seq: int | None) -> None:
    frame = unpack(pack(error_reply(exc, seq)))
    assert frame.get("seq") == seq
    with pytest.raises(type(exc)) as caught:
        check_reply(frame, 3)
    assert type(caught.value) is type(exc)
    assert (caught.value.message, caught.value.details) == (exc.message, exc.details)
    assert caught.value.remote_traceback == exc.remote_traceback


def test_the_ops_are_those_of_the_design() -> None:
    of_envs = {"reset", "step", "render", "state", "call", "get_attr", "set_attr", "is_wrapped", "replay"}
    assert of_envs | {"rerun", "act", "observe"} == OPS


def of(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


LANES: dict[str, Any] = {"epoch": 2, "lanes": of(4, 0, 2), "seqs": of(7, 1, 2**63 - 1)}


def test_a_message_of_lanes_is_read_as_its_epoch_lanes_and_seqs() -> None:
    body = unpack(pack({**LANES, "actions": [1]}))
    assert is_of_lanes(body)
    epoch, lanes, seqs = check_lanes(body, 5)
    assert (epoch, lanes.tolist(), seqs.tolist()) == (2, [4, 0, 2], [7, 1, 2**63 - 1])


def test_a_reply_of_lanes_has_no_epoch() -> None:
    assert check_lanes({"lanes": of(0), "seqs": of(1)}, 1)[0] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"lanes": of(4, 0, 5)},
        {"lanes": of(4, 0, -1)},
        {"lanes": of(4, 0, 4)},
        {"lanes": of(4, 0)},
        {"lanes": of()},
        {"lanes": of(), "seqs": of()},
        {"lanes": of(4, 0, 2)[None], "seqs": of(1, 1, 1)[None]},
        {"lanes": np.array(3), "seqs": np.array(3)},
        {"lanes": np.array([4, 0, 2], np.int32)},
        {"lanes": np.array([4, 0, 2], np.uint64)},
        {"lanes": np.array([4, 0, 2], ">i8")},
        {"lanes": np.array([4.0, 0.0, 2.0])},
        {"lanes": np.array(["4", "0", "2"])},
        {"lanes": [4, 0, 2]},
        {"lanes": None},
        {"lanes": 4, "seqs": 1},
        {"seqs": of(1, 1, 0)},
        {"seqs": of(1, 1, -5)},
        {"seqs": of(1, 1)},
        {"seqs": np.array([1, 1, 1], np.int32)},
        {"seqs": [1, 1, 1]},
        {"seqs": None},
        {"epoch": -1},
        {"epoch": True},
        {"epoch": 1.0},
        {"epoch": "1"},
        {"epoch": None},
        {"epoch": 2**63},
    ],
    ids=str,
)
def test_a_message_whose_lanes_are_none_is_malformed(fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="lanes"):
        check_lanes({**LANES, **fields}, 5)


def test_lanes_without_seqs_are_malformed() -> None:
    with pytest.raises(MalformedMessage):
        check_lanes({"lanes": of(0)}, 1)


@given(values)
def test_any_value_at_all_is_of_lanes_or_malformed(value: Any) -> None:
    for body in (value, {"lanes": value, "seqs": of(1)}, {"lanes": of(0), "seqs": value}, {**LANES, "epoch": value}):
        if not is_of_lanes(body):
            continue
        try:
            epoch, lanes, seqs = check_lanes(body, 5)
        except MalformedMessage:
            continue
        assert type(epoch) is int
        assert lanes.dtype == seqs.dtype == np.int64
        assert lanes.shape == seqs.shape
