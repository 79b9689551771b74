"""The part of the hostile corpus that chance makes: random bodies, messages cut off, messages with a fault in them.

The draws are seeded, so the bytes are the same each time. What random bytes come to is decided by msgpack's own
unpacker, as generous as it can be: what is not one value for it is none for anybody.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgpack

from schemas.entry import ANY, ARRAY, LANE, LANES, MALFORMED, Entry, whole_numbers

RANDOM = 200
MUTANTS = 12
# Maps and arrays of each header; an array of six would be a piece of a split message, which has entries of its own.
HEADERS = [bytes([n]) for n in (*range(0x80, 0x90), *range(0x90, 0xA0)) if n != 0x96]
LONG_HEADERS = [b"\xdc\x00", b"\xde\x00", b"\xdd\x00\x00\x00", b"\xdf\x00\x00\x00"]
# What stands in real messages, so that a decoder comes far before it finds the fault.
WORDS: list[Any] = [
    *(
        "epoch",
        "lane",
        "seq",
        "lanes",
        "seqs",
        "actions",
        "ids",
        "mask",
        "infos",
        "action",
        "session",
        "name",
        "obs",
        "nd",
        "type",
        "shape",
        "data",
        "py",
        "v",
        "complex",
    ),
    *(0, 1, -1, 127, 1 << 40, -(1 << 63), 1.5, float("nan")),
    *(True, False, None, "", b"", bytes(8), [], {}, [1], ARRAY),
]

_FLAGS: dict[str, Any] = {"nd": True, "type": "|b1", "kind": "", "shape": [3], "data": b"\x01\x00\x01"}
# Those of vectors and pools come after a reset.
_SECOND = {**LANE, "seq": 2}
_SECOND_LANES = {**LANES, "seqs": whole_numbers(2, 2, 2)}

_REPLAY: dict[str, Any] = {
    "journal": [["step", msgpack.packb({**LANES, "actions": whole_numbers(1, 0, 1)})]],
    "begins": whole_numbers(0, 0, 0),
    "ends": whole_numbers(0, 0, 0),
    "origins": [msgpack.packb({"seed": seed}) for seed in (7, 8, 9)],
    "digests": {**whole_numbers(1, 2, 3), "type": "<u8"},
}

# A right one of each message by who reads it: control messages of clients, session requests by their op, acts.
REQUESTS: dict[str, dict[str, Any]] = {
    "Open": {"v": 1, "session": "mutant", "name": "cartpole", "form": "vector", "num_envs": 2, "seeding": "derived"},
    "Renew": {"v": 1, "sessions": [["mutant", 1], ["mutant2", 3]]},
    "Probe": {"v": 1, "awaited": [["mutant", 1, 0, 2]]},
    "Ask": {"v": 1, "kind": "env"},
    "Close": {"v": 1, "epoch": 1},
    "act": {"obs": ARRAY, "seed": 1, "deterministic": True, "env_id": 3, "step": 4},
    "env:reset": {**LANE, "seed": 7, "options": {"low": 0.1}},
    "env:step": {**LANE, "action": {"nd": False, "type": "<i8", "data": bytes([1]) + bytes(7)}},
    "env:render": LANE,
    "env:state": LANE,
    "env:call": {**LANE, "name": "jump", "args": [1, ARRAY], "kwargs": {"far": True}},
    "env:get_attr": {**LANE, "name": "gravity"},
    "env:set_attr": {**LANE, "name": "gravity", "value": 9.8},
    "agent:reset": {**LANE, "seed": 7},
    "agent:act": {**LANE, "obs": ARRAY, "deterministic": False, "seed": 1},
    "agent:observe": {**LANE, "reward": 1.0, "terminated": False, "truncated": True},
    "vector:reset": {**_SECOND, "seeds": [7, None, 9], "options": {"low": 0.1}, "mask": _FLAGS},
    "vector:step": {**_SECOND, "actions": whole_numbers(1, 0, 1)},
    "vector:render": _SECOND,
    "vector:call": {**_SECOND, "name": "jump", "args": [1, ARRAY], "kwargs": {"far": True}, "ids": [0, 2]},
    "vector:get_attr": {**_SECOND, "name": "gravity", "ids": [2, 1]},
    "vector:set_attr": {**_SECOND, "name": "gravity", "values": [9.8, 9.9], "ids": [0, 1]},
    "vector:is_wrapped": {**_SECOND, "wrapper": "gymnasium.wrappers.common:TimeLimit"},
    "vector:replay": {**LANE, **_REPLAY},
    "pool:replay": {**LANES, **_REPLAY},
    "pool:reset": {**_SECOND_LANES, "seeds": [7, None, 9], "options": {"low": 0.1}},
    "pool:step": {**_SECOND_LANES, "actions": whole_numbers(1, 0, 1)},
    "Drain": {"seconds": 60.0},
    "Read": {"stream": "MESHRL_EPISODES", "subject": ">", "count": 2},
    "Keep": {"env": "e", "consumer": "c", "position": "1.1.1.1", "message_id": "m", "after": 0},
    "Watch": {"env": "n", "session": "s", "seconds": 8.0},
}
LOAD = {"slots": 4, "free": 3, "waiting": 1, "draining": False}
AD = {"kind": "env", "name": "n", "worker": "w", "slots": 1, "free": 1, "description": "d"}
# And of each message that a worker sends: what cuts them off is the same for whoever reads them.
ANSWERS: dict[str, dict[str, Any]] = {
    "Advertisement": AD,
    "Known": {"advertisements": [AD], "descriptions": []},
    "Grant": {"session": "s", "epoch": 1, "worker": "w", "lease_s": 15.0, "grant_s": 2.0, "load": LOAD},
    "Full": {"load": LOAD, "ticket": "t"},
    "Renewed": {"lease_s": 15.0, "lost": [["s", "session_expired"]]},
    "Probed": {"states": ["running", "parked"]},
    "Drained": {"sessions": 3},
    "Kept": {"seq": 3},
    "Closed": {"existed": True},
    "reply": {"obs": ARRAY, "reward": 1.0, "terminated": False, "truncated": False, "info": {}, "seq": 2},
    "vector reply": {"obs": ARRAY, "rewards": ARRAY, "infos": {"entries": [[1, {"lives": 3}]]}, "seq": 2},
    "pool reply": {**_SECOND_LANES, "obs": ARRAY, "first": True, "episodes": whole_numbers(1, 1, 1)},
    "error": {"error": {"code": "env_error", "message": "m", "details": {"type": "X"}, "traceback": "t"}, "seq": 2},
}


def noise() -> Iterator[Entry]:
    """Random bodies that begin like maps and arrays, and messages of every kind, cut off at several places."""
    draw = random.Random(21)  # noqa: S311  # the same bytes each time
    for number in range(RANDOM):
        yield Entry(f"random body {number}", "value", [_random_body(draw, words=number % 2 == 0)], MALFORMED)
    for name, body in {**REQUESTS, **ANSWERS}.items():
        whole = _pack(body)
        for at in sorted({1, 2, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 1} - {0}):
            yield Entry(f"{name} cut off after {at} of {len(whole)} bytes", "value", [whole[:at]], MALFORMED)


def mutants() -> Iterator[Entry]:
    """Right messages with one fault or a few; some are right all the same."""
    draw = random.Random(24)  # noqa: S311
    for name, body in REQUESTS.items():
        for number in range(MUTANTS):
            # Sessions of their own: an open of one that is under way is answered together with the first.
            fields = {**body, "session": f"mutant-{number}"} if name == "Open" else body
            faulty = _mutated(draw, _pack(fields)) if number % 2 else _pack(_with_wrong_field(draw, fields))
            yield Entry(f"{name} with a fault {number}", name, [faulty], ANY)


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _random_body(draw: random.Random, *, words: bool) -> bytes:
    """Up to some five hundred bytes that are not one msgpack value."""
    while True:
        header = draw.choice([*HEADERS, *(head + draw.randbytes(1) for head in LONG_HEADERS)])
        length = int(2 ** draw.uniform(0, 9))
        parts: list[bytes] = []
        while sum(map(len, parts)) < length:
            parts.append(_pack(draw.choice(WORDS)) if words and draw.random() < 0.95 else draw.randbytes(1))
        body = header + b"".join(parts)
        if not _is_value(body):
            return body


def _is_value(body: bytes) -> bool:
    """Whether these bytes are exactly one msgpack value, whatever its texts and keys are."""
    try:
        msgpack.unpackb(body, raw=True, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):  # TypeError: a key that Python cannot hash
        return False
    return True


def _with_wrong_field(draw: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """With one field of any value, one too many, or one missing."""
    field = draw.choice([*fields, *fields, "later"])
    if draw.random() < 0.8:
        return {**fields, field: draw.choice(WORDS)}
    return {name: value for name, value in fields.items() if name != field}


def _mutated(draw: random.Random, whole: bytes) -> bytes:
    body = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(body))
        match draw.randrange(5):
            case 0:
                body[at] ^= 1 << draw.randrange(8)
            case 1:
                body[at] = draw.randrange(256)
            case 2:
                body[at:at] = draw.randbytes(draw.choice((1, 1, 8)))
            case 3 if len(body) > 2:
                del body[at : at + draw.choice((1, 1, 4))]
            case _:  # a field, or a part of one, twice
                body[at:at] = body[at : at + draw.choice((1, 4, 16))]
    return bytes(body)
