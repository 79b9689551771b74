from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import gymnasium.error
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl import errors
from meshrl.errors import (
    EnvError,
    MalformedMessage,
    MeshError,
    ProtocolError,
    RecordingError,
    TransportError,
    UsageError,
    WorkerError,
    from_wire,
)
from meshrl.wire.codec import pack, unpack

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MeshError)]
TRAVELLING = [cls for cls in CLASSES if cls is not MeshError]
DETAILS = {"session": "s1", "last_seq": 3, "wait_s": 2.5, "near": ["a", "b"], "code": "x", "cls": 1, "wire": None}
STANDARD: dict[str, tuple[type[Exception], ...]] = {
    "InvalidAction": (ValueError,),
    "ResetNeeded": (gymnasium.error.ResetNeeded,),
    "UnencodableValue": (TypeError,),
    "UnsupportedSpace": (TypeError,),
    "NotAllowed": (PermissionError,),
    "KwargsNotAllowed": (PermissionError,),
    "SpacesDiffer": (ValueError,),
    "FormatCannotHold": (TypeError,),
    "InvalidSeed": (ValueError,),
    "InvalidName": (ValueError,),
    "MalformedMessage": (ValueError,),
    "MessageTooLarge": (ValueError,),
    "MeshUnreachable": (ConnectionError,),
    "LoginRefused": (PermissionError,),
    "SubjectNotPermitted": (PermissionError,),
    "RequestTimeout": (TimeoutError,),
    "BusClosed": (ConnectionError,),
    "StreamMissing": (LookupError,),
    "EpisodeUnknown": (LookupError,),
    "UnknownName": (LookupError,),
    "MeshFull": (TimeoutError,),
    "SessionUnknown": (LookupError,),
    "DeadlineExceeded": (TimeoutError,),
}


def equal(one: MeshError, other: MeshError) -> bool:
    return (type(one), one.message, one.details, one.remote_traceback, str(one), one.args) == (
        type(other),
        other.message,
        other.details,
        other.remote_traceback,
        str(other),
        other.args,
    )


def test_every_class_has_a_code_of_its_own() -> None:
    assert all("code" in cls.__dict__ for cls in CLASSES)
    assert [code for code, times in Counter(cls.code for cls in CLASSES).items() if times > 1] == []


@pytest.mark.parametrize("cls", TRAVELLING)
def test_a_code_is_the_name_of_its_class_in_snake_case(cls: type[MeshError]) -> None:
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
    families = {
        UsageError: "usage",
        ProtocolError: "protocol",
        TransportError: "transport",
        WorkerError: "worker",
        RecordingError: "recording",
    }
    assert cls.code == families.get(cls, name)


@pytest.mark.parametrize("cls", TRAVELLING)
def test_every_error_has_one_of_five_to_blame(cls: type[MeshError]) -> None:
    families = (UsageError, ProtocolError, TransportError, WorkerError, RecordingError)
    blamed = [family for family in families if issubclass(cls, family)]
    assert len(blamed) == 1
    assert cls.__name__ in str(errors.__doc__)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_caught_by_the_standard_class_a_user_expects(cls: type[MeshError]) -> None:
    expected = STANDARD.get(cls.__name__, ())
    assert all(issubclass(cls, one) for one in expected)
    for standard in (ValueError, TypeError, OSError, LookupError, gymnasium.error.Error):
        assert issubclass(cls, standard) is any(issubclass(one, standard) for one in expected)


@pytest.mark.parametrize("cls", TRAVELLING)
@pytest.mark.parametrize("traceback", [None, "Traceback (most recent call last):\n  boom\n"])
@pytest.mark.parametrize("details", [{}, DETAILS])
def test_every_class_comes_back_over_the_wire(
    cls: type[MeshError], traceback: str | None, details: dict[str, Any]
) -> None:
    exc = cls("what happened; what to do", remote_traceback=traceback, **details)
    assert equal(from_wire(unpack(pack(exc.to_wire()))), exc)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("traceback", [None, "Traceback"])
def test_every_class_comes_back_from_pickle_and_copy(cls: type[MeshError], traceback: str | None) -> None:
    exc = cls("what happened", remote_traceback=traceback, **DETAILS)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert equal(pickle.loads(pickle.dumps(exc, protocol)), exc)
    assert equal(copy.copy(exc), exc)
    assert equal(copy.deepcopy(exc), exc)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_says_its_message_and_the_remote_traceback_below(cls: type[MeshError]) -> None:
    assert str(cls("it broke", worker="w1")) == "it broke"
    assert str(cls("it broke", remote_traceback="line 1\nline 2\n")) == (
        "it broke\n\n--- remote traceback ---\nline 1\nline 2"
    )
    with pytest.raises(cls, match="it broke"):
        raise cls("it broke")


def test_what_is_empty_does_not_travel() -> None:
    assert EnvError("x").to_wire() == {"code": "env_error", "message": "x"}


@pytest.mark.parametrize("code", ["of a later version", "", "error", "EnvError", "MeshError"])
def test_an_unknown_code_is_an_error_of_the_worker_with_the_same_facts(code: str) -> None:
    exc = from_wire({"code": code, "message": "m", "details": {"a": 1}, "traceback": "t"})
    assert type(exc) is WorkerError
    assert (exc.message, exc.details, exc.remote_traceback) == ("m", {"a": 1}, "t")


@pytest.mark.parametrize(
    "wire",
    [
        None,
        7,
        "error",
        b"error",
        [],
        ["code", "message"],
        {},
        {"code": "env_error"},
        {"message": "m"},
        {"code": None, "message": "m"},
        {"code": ["env_error"], "message": "m"},
        {"code": {}, "message": "m"},
        {"code": b"env_error", "message": "m"},
        {"code": "env_error", "message": None},
        {"code": "env_error", "message": b"m"},
        {"code": "env_error", "message": ["m"]},
        {b"code": "env_error", b"message": "m"},
    ],
)
def test_what_is_no_error_is_malformed(wire: object) -> None:
    assert type(from_wire(wire)) is MalformedMessage


@pytest.mark.parametrize(
    ("details", "facts"),
    [
        (None, {}),
        ("text", {}),
        ([1, 2], {}),
        ({1: 2, b"b": 3, None: 4, "ok": 5}, {"ok": 5}),
        ({"message": "other", "self": 1, "remote_traceback": "forged", "cls": 2}, {"cls": 2}),
        ({"": 1, "with blank": 2, "__class__": 3}, {"": 1, "with blank": 2, "__class__": 3}),
    ],
)
@pytest.mark.parametrize("cls", TRAVELLING)
def test_hostile_details_are_facts_or_nothing(cls: type[MeshError], details: Any, facts: dict[str, Any]) -> None:
    exc = from_wire({"code": cls.code, "message": "m", "details": details})
    assert type(exc) is cls
    assert (exc.message, exc.details, exc.remote_traceback) == ("m", facts, None)


@pytest.mark.parametrize("traceback", [b"t", 7, ["t"], {"t": 1}])
def test_a_traceback_that_is_no_text_is_dropped(traceback: object) -> None:
    assert from_wire({"code": "env_error", "message": "m", "traceback": traceback}).remote_traceback is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(["code", "message", "details", "traceback", "x"]), ANYTHING) | ANYTHING,
    st.sampled_from(TRAVELLING),
)
def test_nothing_a_peer_sends_raises_here(wire: Any, cls: type[MeshError]) -> None:
    assert isinstance(from_wire(wire), MeshError)
    if isinstance(wire, dict):
        assert isinstance(from_wire({**wire, "code": cls.code, "message": "m"}), cls)
