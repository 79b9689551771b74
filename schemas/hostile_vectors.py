"""The part of the hostile corpus that is for vectors and pools, of three CartPoles each.

An entry whose sequence numbers are 2 comes after a reset.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from schemas.entry import ARRAY, LANE, LANES, MALFORMED, Entry, whole_numbers

NUM_ENVS = 3

_FLAGS: dict[str, Any] = {"nd": True, "type": "|b1", "kind": "", "shape": [3], "data": b"\x01\x00\x01"}
_LONG: dict[str, Any] = {"py": "int", "v": "0x1" + "0" * 3608}
_BAD_SEEDS: list[Any] = [["7", 8, 9], [-1, 8, 9], [7, 8, 1.5], [True, 8, 9], [7, 8, ARRAY], [7, 8, [9]]]
# What is no batch of three actions of a Discrete space.
_NO_ACTIONS: list[Any] = [
    *(None, 1, "101", b"101", [1, 0, 1], {}, {"a": 1}, True, _LONG),
    *(whole_numbers(1, 0), whole_numbers(1, 0, 1, 0), whole_numbers()),
    {**whole_numbers(1, 0, 1), "shape": [3, 1]},
    {**whole_numbers(1), "shape": []},
    {"nd": False, "type": "<i8", "data": bytes(8)},
    {"py": "tuple", "v": [1, 0, 1]},
]
_NO_IDS: list[Any] = [[3], [-1], [True], [1.0], ["0"], "012", 1, {}, [_LONG], whole_numbers(0, 1)]

_STEP = msgpack.packb({**LANE, "actions": whole_numbers(1, 0, 1)})
_LANES_STEP = msgpack.packb({**LANES, "actions": whole_numbers(1, 0, 1)})
_DIGESTS: dict[str, Any] = {**whole_numbers(0, 0, 0), "type": "<u8"}
_NOTHING: dict[str, Any] = {
    "journal": [],
    "begins": whole_numbers(-1, -1, -1),
    "ends": whole_numbers(-1, -1, -1),
    "origins": [None, None, None],
    "digests": _DIGESTS,
}
# Journals that are none; each is that of a vector or a pool, whatever it is sent to.
_NO_REPLAYS: list[dict[str, Any]] = [
    {},
    *(
        {**_NOTHING, "journal": journal}
        for journal in (None, 5, {}, "[]", [5], [["step"]], [["step", "x"]], [["fly", b"x"]])
    ),
    *({**_NOTHING, "journal": [["step", body]]} for body in (b"", b"\xc1", b"\x01", _STEP[:-3], _STEP + b"x")),
    *(
        {**_NOTHING, "journal": [["step", msgpack.packb({**LANE, "actions": bad})]]}
        for bad in (None, whole_numbers(1), "x")
    ),
    {**_NOTHING, "journal": [["step", msgpack.packb({**LANES, "lanes": whole_numbers(0, 1, 3), "actions": bytes(3)})]]},
    {**_NOTHING, "journal": [["reset", msgpack.packb({**LANE, "seeds": [1]})]]},
    {**_NOTHING, "journal": [["reset", msgpack.packb({**LANE, "mask": [True]})]]},
    {**_NOTHING, "journal": [["set_attr", msgpack.packb({**LANE, "name": "x", "values": 3})]]},
    *({**_NOTHING, field: value} for field in ("begins", "ends") for value in (None, [], whole_numbers(0), _DIGESTS)),
    *({**_NOTHING, "digests": value} for value in (None, whole_numbers(0, 0, 0), b"")),
    *({**_NOTHING, "origins": value} for value in (None, [], [None], [1, 2, 3], {})),
    *({**_NOTHING, "begins": whole_numbers(*at)} for at in ((0, 0, 0), (5, -1, -1), (-2, -1, -1))),
    {**_NOTHING, "ends": whole_numbers(0, 0, 0)},
    {**_NOTHING, "origins": [msgpack.packb({"seed": 1}), None, None]},
    *(
        {
            **_NOTHING,
            "journal": [["step", step]],
            "begins": whole_numbers(0, 0, 0),
            "origins": [msgpack.packb(origin)] * 3,
        }
        for origin in ({}, {"state": b"x"}, {"state": 5}, {"seed": 1, "episode": -1}, {"seed": 1, "episode": "x"})
        for step in (_STEP,)
    ),
]
Ops = tuple[tuple[str, dict[str, Any], str], ...]
_REPLAYS: Ops = (
    *(("replay", fields, MALFORMED) for fields in _NO_REPLAYS),
    ("replay", {**_NOTHING, "digests": {**whole_numbers(1, 2, 3), "type": "<u8"}}, "replay_diverged"),
    ("replay", {**_NOTHING, "journal": [["step", _LANES_STEP]], "ends": whole_numbers(0, 0, 0)}, "replay_diverged"),
)

_VECTOR: Ops = (
    *(("reset", {"seeds": seeds}, "invalid_seed") for seeds in (7, [7], [7, 8, 9, 10], "789", {}, *_BAD_SEEDS)),
    ("reset", {"seeds": whole_numbers(7, 8, 9)}, "invalid_seed"),
    ("reset", {"options": [1]}, MALFORMED),
    *(("reset", {"mask": mask}, MALFORMED) for mask in ([True, False, True], 5, True, whole_numbers(1, 0, 1))),
    ("reset", {"mask": {**_FLAGS, "shape": [3, 1]}}, MALFORMED),
    ("reset", {"mask": {**_FLAGS, "shape": [2], "data": bytes(2)}}, MALFORMED),
    ("reset", {"mask": _FLAGS}, "reset_needed"),
    ("step", {"actions": whole_numbers(1, 0, 1)}, "reset_needed"),
    ("render", {}, "reset_needed"),
    ("call", {"name": "_private"}, "not_allowed"),
    ("call", {"name": "close"}, "not_allowed"),
    ("call", {"name": "reset", "args": 5}, MALFORMED),
    ("call", {"name": "a b"}, MALFORMED),
    ("call", {}, MALFORMED),
    ("get_attr", {"name": "__class__"}, "not_allowed"),
    ("get_attr", {"name": "no_such_thing"}, "not_allowed"),
    ("get_attr", {"name": "render"}, "unencodable_value"),
    ("set_attr", {"name": "gravity", "values": [1, 1, 1]}, "not_allowed"),
    ("is_wrapped", {}, MALFORMED),
    ("is_wrapped", {"wrapper": ["os", "system"]}, MALFORMED),
    *(("get_attr", {"name": "gravity", "ids": ids}, MALFORMED) for ids in _NO_IDS),
    *((op, {"name": "gravity", "wrapper": "a:B", "ids": [3]}, MALFORMED) for op in ("call", "is_wrapped")),
    ("state", {}, MALFORMED),
    ("act", {"obs": 1}, MALFORMED),
    ("fly", {}, MALFORMED),
    *_REPLAYS,
)
_POOL: Ops = (
    *(("reset", {"seeds": seeds}, MALFORMED) for seeds in (7, [7], [7, 8, 9, 10], "789", {}, whole_numbers(7, 8, 9))),
    *(("reset", {"seeds": seeds}, "invalid_seed") for seeds in _BAD_SEEDS),
    ("reset", {"options": [1]}, MALFORMED),
    ("step", {"actions": whole_numbers(1, 0, 1)}, "reset_needed"),
    *((op, {"name": "gravity"}, MALFORMED) for op in ("render", "state", "call", "get_attr", "set_attr", "is_wrapped")),
    ("act", {"obs": 1}, MALFORMED),
    ("fly", {}, MALFORMED),
    *_REPLAYS,
)


def lane_heads() -> Iterator[Entry]:
    """Requests of several lanes whose head is wrong for every session."""
    numbers: dict[str, list[Any]] = {
        "negative": [whole_numbers(-1, 0, 1)],
        "of another count": [whole_numbers(0, 1), whole_numbers(0, 1, 2, 3)],
    }
    forms: list[Any] = [
        *(None, 0, "012", True, [0, 1, 2], {}, _LONG, whole_numbers(), ARRAY, _FLAGS),
        {"py": "tuple", "v": [0, 1, 2]},
        {**whole_numbers(0, 1, 2), "shape": [3, 1]},
        {**whole_numbers(0), "shape": []},
        {**whole_numbers(1, 2, 3), "type": ">i8"},
        {**whole_numbers(1, 2, 3), "type": "<u8"},
        {"nd": False, "type": "<i8", "data": bytes(8)},
    ]
    for field in ("lanes", "seqs"):
        for number, value in enumerate(forms):
            if field == "lanes" or value is not None:
                yield _one(f"request with {field} of a wrong form {number}", "request", {**LANES, field: value})
        for what, values in numbers.items():
            for number, value in enumerate(values):
                yield _one(f"request with {field} {what} {number}", "request", {**LANES, field: value})
    yield _one("request with a lane twice", "request", {**LANES, "lanes": whole_numbers(0, 1, 1)})
    yield _one("request with a lane beyond every pool", "request", {**LANES, "lanes": whole_numbers(0, 1, 65_536)})
    yield _one("request with a seq of 0 on a lane", "request", {**LANES, "seqs": whole_numbers(1, 0, 1)})
    yield _one("request with lanes and no seqs", "request", {"epoch": 1, "lanes": LANES["lanes"]})
    yield _one("request with lanes and one seq", "request", {"epoch": 1, "lanes": LANES["lanes"], "seq": 1})
    for number, value in enumerate([None, -1, "1", 1.0, True, 1 << 63, _LONG, [1], ARRAY]):
        yield _one(f"request of lanes with a wrong epoch {number}", "request", {**LANES, "epoch": value})


def vectors() -> Iterator[Entry]:
    """Requests of a vector, the fields of which are wrong."""
    yield from _of("vector", LANE, {**LANE, "seq": 2}, _VECTOR)


def pools() -> Iterator[Entry]:
    """Requests of a pool, the fields of which are wrong."""
    yield from _of("pool", LANES, {**LANES, "seqs": whole_numbers(2, 2, 2)}, _POOL)


def _of(form: str, first: dict[str, Any], second: dict[str, Any], operations: Ops) -> Iterator[Entry]:
    for number, (op, fields, expect) in enumerate(operations):
        yield _one(f"{form} {op} that is {expect}, {number}", f"{form}:{op}", {**first, **fields}, expect)
    yield _one(f"{form} step without actions", f"{form}:step", second)
    for number, actions in enumerate(_NO_ACTIONS):
        yield _one(f"{form} step with wrong actions {number}", f"{form}:step", {**second, "actions": actions})


def _one(name: str, decoder: str, body: Any, expect: str = MALFORMED) -> Entry:
    return Entry(name, decoder, [msgpack.packb(body)], expect)
