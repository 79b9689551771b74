"""Writes the hostile corpus, ``schemas/v1/hostile``: bytes that a peer may send, and what must happen.

::

    python -m schemas.hostile

Nothing but the standard library and msgpack makes the bytes, so that no check of the codec is in the way.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from schemas.entry import ACCEPTED, ARRAY, IGNORED, LANE, MALFORMED, VERSION, Entry
from schemas.hostile_vectors import lane_heads, pools, vectors
from schemas.noise import mutants, noise

HOSTILE = Path(__file__).parent / "v1" / "hostile"

EVIDENCE = "hostile-pickle-ran"
"""The file that appears in the working directory of a process that ran the pickle."""

# 4345 decimal digits: Python refuses to print an int of more than 4300
LONG: dict[str, Any] = {"py": "int", "v": "0x1" + "0" * 3608}
LONG_NEGATIVE: dict[str, Any] = {"py": "int", "v": "-0x1" + "0" * 3608}


# open(EVIDENCE, "w") as a pickle, written by hand: what pickle.dumps makes of it differs between versions of Python.
EVIL = b"cio\nopen\n(V" + EVIDENCE.encode() + b"\nVw\ntR."


def values() -> Iterator[Entry]:
    """Bytes that are no value at all: refused wherever they arrive."""
    for name, data in _broken():
        yield Entry(name, "value", [data], MALFORMED)
    for name, value in _false_forms():
        yield Entry(name, "value", [_map(value)], MALFORMED)


def _map(value: Any) -> bytes:
    packed: bytes = msgpack.packb({"x": value})
    return packed


def _broken() -> Iterator[tuple[str, bytes]]:
    whole = msgpack.packb({"epoch": 1, "lane": 0, "seq": 1, "action": ARRAY})
    yield "nothing", b""
    yield from ((f"cut off after {at} bytes", whole[:at]) for at in (1, 2, 7, len(whole) // 2, len(whole) - 1))
    yield "bytes after the message", whole + b"\x00"
    yield "two messages", whole * 2
    yield "the byte that msgpack never uses", b"\xc1"
    for name, head in (
        ("array", b"\xdd"),
        ("map", b"\xdf"),
        ("text", b"\xdb"),
        ("bin", b"\xc6"),
        ("extension", b"\xc9"),
    ):
        yield f"{name} that claims four gigabytes", head + b"\xff\xff\xff\xff" + b"\x01"
    yield "maps in maps, deeper than a stack", b"\x81\xa1a" * 3000 + b"\xc0"
    yield "arrays in arrays, deeper than a stack", b"\x81\xa1a" + b"\x91" * 3000 + b"\xc0"
    yield "text that is not UTF-8", b"\x81\xa1a\xa2\xff\xfe"
    yield "a map with a map as key", b"\x81\x81\xa1a\x01\x01"
    yield "an extension type", b"\x81\xa1x" + msgpack.packb(msgpack.ExtType(5, b"abc"))
    yield "a timestamp", b"\x81\xa1x" + msgpack.packb(msgpack.Timestamp(1))
    yield "an HTTP request", b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n"
    yield "JSON", b'{"epoch": 1, "lane": 0, "seq": 1}'


def _false_forms() -> Iterator[tuple[str, Any]]:
    old = {b"nd": True, b"type": b"|O", b"kind": b"O", b"shape": [1]}
    yield "a pickle as msgpack-numpy sends object arrays", {**old, b"data": EVIL}
    yield "the same with keys as text", {"nd": True, "type": "|O", "kind": "O", "shape": [1], "data": EVIL}
    yield "a pickle under an honest dtype", {**ARRAY, "kind": "O", "data": EVIL}
    for dtype in ("|O", "O", "<O8", "|V8", "O8", "object", "P", "p", "n", "q", "f", "float32", "<f4,<f4", "(2,)<f4"):
        yield f"an array of dtype {dtype}", {**ARRAY, "type": dtype}
    yield "a scalar that is a pointer", {"nd": False, "type": "|O", "data": b"\x41" * 8}
    yield "a dtype with fields", {**ARRAY, "type": [["a", "<f4"]], "kind": "V"}
    yield "a dtype of a huge item", {**ARRAY, "type": "|S9999999", "shape": [0], "data": b""}
    yield "a dtype of no size", {**ARRAY, "type": "|S0"}
    yield "a dtype that is a number", {**ARRAY, "type": 5}
    yield "a datetime of unknown unit", {**ARRAY, "type": "<M8[fortnight]"}
    for name, shape in (
        ("too long", [3]),
        ("too short", [1]),
        ("negative", [-2]),
        ("negative twice", [-1, -2]),
        ("of floats", [2.0]),
        ("of true", [True, 2]),
        ("a number", 2),
        ("missing", None),
        ("absurd", [1 << 62, 4]),
        ("whose product overflows to the right size", [1 << 32, 1 << 32, 2]),
        ("of a long int", [LONG, 0]),
        ("of 65 dimensions", [1] * 64 + [2]),
        ("of 10,000 dimensions", [1] * 10_000),
        ("empty and endless", [0, 1 << 62, 1 << 62]),
    ):
        yield f"an array with a shape {name}", {**ARRAY, "shape": shape}
    yield "an array without data", {"nd": True, "type": "<f4", "shape": [2]}
    yield "an array whose data is a text", {**ARRAY, "data": "12345678"}
    yield "an array whose nd is a number", {**ARRAY, "nd": 1}
    yield "an array of bool with a byte of 2", {**ARRAY, "type": "|b1", "data": b"\x02\x01"}
    yield "an array of text beyond Unicode", {**ARRAY, "type": "<U1", "data": struct.pack("<II", 0x110000, 65)}
    yield "a scalar with two items", {"nd": False, "type": "<f4", "data": bytes(8)}
    yield "a form of an unknown kind", {"py": "function", "v": "os.system"}
    yield "a form whose kind is a list", {"py": ["tuple"], "v": []}
    yield "a form with a third key", {"py": "tuple", "v": [], "w": 1}
    yield "a tuple that is a map", {"py": "tuple", "v": {}}
    yield "a set of lists", {"py": "set", "v": [[1]]}
    yield "a set with an item twice", {"py": "set", "v": [1, 1]}
    yield "a map whose pairs are three", {"py": "map", "v": [[1, 2, 3]]}
    yield "a map with a key twice", {"py": "map", "v": [[1, 2], [1, 3]]}
    yield "a map with an array as key", {"py": "map", "v": [[ARRAY, 1]]}
    yield "a long int in decimal", {"py": "int", "v": "12"}
    yield "a long int that is code", {"py": "int", "v": "0x1)+(1"}
    yield "a complex number that is code", {"complex": True, "data": "__import__('os').getpid()"}
    yield "a complex number without end", {"complex": True, "data": "1" * 1000 + "j"}
    yield "a complex number that is not", {"complex": False, "data": "1j"}
    yield "a graph of two parts", {"py": "graph", "v": [1, 2]}
    yield "surrogates that are no UTF-8", {"py": "str", "v": b"\xff"}


def parts() -> Iterator[Entry]:
    """Pieces of split messages; a subject without splitting takes them for maps that are none."""

    def part(*fields: Any) -> bytes:
        packed: bytes = msgpack.packb(list(fields))
        return packed

    yield Entry("a piece of a message that never comes", "part", [part(0, 1, 0, 0, 2, b"a")], IGNORED)
    yield Entry("the same piece twice", "part", [part(0, 2, 0, 0, 2, b"a")] * 2, IGNORED)
    yield Entry("a piece that contradicts itself", "part", [part(0, 3, 0, 0, 2, d) for d in (b"a", b"b")], MALFORMED)
    yield Entry(
        "pieces that disagree on their number",
        "part",
        [part(0, 4, 0, 0, 2, b"a"), part(0, 4, 0, 1, 3, b"a")],
        MALFORMED,
    )
    joined = [part(0, 5, 0, 0, 2, b"\x81"), part(0, 5, 0, 1, 2, b"\xc1")]
    yield Entry("pieces that join to no message", "part", joined, MALFORMED)
    inner = part(0, 1, 0, 0, 1, b"\xc1")
    yield Entry("a piece within a piece", "part", [part(0, 6, 0, 0, 1, inner)], MALFORMED)
    for name, fields in (
        ("a billion pieces", (0, 7, 0, 0, 10**9, b"a")),
        ("piece 2 of 2", (0, 7, 0, 2, 2, b"a")),
        ("piece -1", (0, 7, 0, -1, 2, b"a")),
        ("no pieces at all", (0, 7, 0, 0, 0, b"a")),
        ("a piece without bytes", (0, 7, 0, 0, 2, b"")),
        ("a piece of text", (0, 7, 0, 0, 2, "a")),
        ("a negative seq", (0, -7, 0, 0, 2, b"a")),
        ("a seq that is true", (0, True, 0, 0, 2, b"a")),
        ("a seq beyond 63 bit", (0, (1 << 64) - 1, 0, 0, 2, b"a")),
        ("a lane that is a float", (0.0, 7, 0, 0, 2, b"a")),
        ("a lane that is a list", ([], 7, 0, 0, 2, b"a")),
    ):
        yield Entry(f"a split message of {name}", "part", [part(*fields)], MALFORMED)
    yield Entry("a piece cut off", "part", [part(0, 8, 0, 0, 2, b"abc")[:-2]], MALFORMED)
    yield Entry("a piece that claims more bytes", "part", [b"\x96\x00\x09\x00\x00\x02\xc6\xff\xff\xff\xff"], MALFORMED)


# each control request with fields that are right, and what each field refuses
CONTROL: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "Open": (
        {"session": "hostile", "name": "cartpole"},
        {
            "session": [None, 5, "", "a.b", "a b", ">", "*", "a" * 65, "é", b"s1", [], ARRAY],
            "name": [None, 5, "", "a" * 129, b"cartpole", ["cartpole"], {"py": "str", "v": b"\xed\xa0\x80"}],
            "epoch": [None, 0, -1, 1 << 31, 1.5, 1.0, True, "1", LONG, LONG_NEGATIVE, ARRAY, [1]],
            "kind": [None, "worker", 1, ["env"]],
            "kwargs": [None, [], "gravity", {"py": "map", "v": [[1, 2]]}, ARRAY],
            "render_mode": [1, "a" * 65, b"rgb_array"],
            "key_style": [None, "text", 0],
            "form": [None, "", "many", 1, ["vector"]],
            "num_envs": [None, 0, -1, 65_537, 1 << 40, "1", 1.0, True, LONG, ARRAY],
            "first_env_id": [None, -1, 1 << 31, "1", 1.0, False, LONG],
            "autoreset_mode": [None, "NEXT_STEP", "nextstep", 0, {}],
            "seeding": [None, "random", 1, ["derived"]],
            "believed_free": [-1, 1 << 31, "1", False, 1.0, LONG],
            "park_s": [-1, 3601, float("nan"), float("inf"), "1", True, LONG, ARRAY],
            "ticket": [1, "a" * 65, b"t"],
        },
    ),
    "Renew": (
        {"sessions": [["hostile", 1]]},
        {
            "sessions": [
                None,
                {},
                "hostile",
                5,
                [["hostile"]],
                [["hostile", 1, 2]],
                [["hostile", "1"]],
                [["hostile", 1.0]],
                [["hostile", True]],
                [["a.b", 1]],
                [[1, "hostile"]],
                [{"hostile": 1}],
                [["hostile", 1]] * 1001,
                ARRAY,
            ]
        },
    ),
    "Probe": (
        {"awaited": [["hostile", 1, 0, 1]]},
        {
            "awaited": [
                None,
                {},
                [[]],
                [["hostile", 1, 0]],
                [["hostile", 1, 0, "1"]],
                [["hostile", 1, 0, ARRAY]],
                [["hostile", 1, 0, 1]] * 1001,
            ]
        },
    ),
    "Ask": ({}, {"kind": ["worker", 1], "name": ["", 5, "a" * 129, []], "worker": ["", "a.b", ">", 5, b"w"]}),
    "Read": (
        {"stream": "MESHRL_EPISODES"},
        {
            "stream": [None, "", "s" * 256, 5, b"s", "a b", "a.b", ">", "a\r\nPUB b 0\r\n"],
            "which": ["to", 1, None],
            "subject": ["", 5, "s" * 1025, []],
            "seq": [None, 0, -1, 1.0, True, "1", 2**63],
            "since_us": [-1, 1.0, True, "1", 2**53],
            "count": [None, 0, 257, True, "1"],
        },
    ),
    "Keep": (
        {"env": "e", "consumer": "c", "position": "1.1.1.1", "message_id": "m", "after": 0},
        {
            "env": [None, "", "e" * 129, 5],
            "consumer": [None, "", "c" * 129, 5],
            "position": [None, "", "1" * 257, b"1", 5],
            "message_id": [None, "", "m" * 129, 5, "a b", "a\r\nNats-Rollup: all"],
            "after": [None, -1, 1.0, True, "1", 2**63],
        },
    ),
    "Watch": (
        {"seconds": 1.0},
        {"seconds": [None, "1", 0.0, -1.0, 61.0, True, [], ARRAY], "env": [1, [], b"w"], "session": [1, [], b"w"]},
    ),
    "Drain": ({"seconds": 1.0}, {"seconds": [None, "1", -1.0, 1e9, True, [], ARRAY]}),
    "Close": ({"epoch": 1}, {"epoch": [None, "1", 1.0, True, [], ARRAY]}),
}


def control() -> Iterator[Entry]:
    """Control messages that are maps, with what does not belong in them."""
    versions = [2, 0, -1, "1", True, 1.0, None, [1], {"a": 1}, ARRAY, LONG, LONG_NEGATIVE, "a" * 500]
    for message, (right, wrong) in CONTROL.items():
        for number, version in enumerate(versions):
            yield _one(f"{message} of a wrong version {number}", message, {**right, "v": version}, VERSION)
        for field, refused in wrong.items():
            for number, value in enumerate(refused):
                yield _one(f"{message}.{field} wrong {number}", message, {**right, field: value}, MALFORMED)
        for field in right:
            rest = {name: value for name, value in right.items() if name != field}
            yield _one(f"{message} without {field}", message, rest, MALFORMED)
        for name, body in (("an array", [1]), ("a text", "open"), ("a number", 1), ("nothing", None)):
            yield _one(f"{message} that is {name}", message, body, MALFORMED)
    later = {**CONTROL["Renew"][0], "later": {"x": [1, 2]}, "": None}
    yield _one("Renew with fields of a later version", "Renew", later, ACCEPTED)
    twice = b"\x82\xa8sessions\x05\xa8sessions\x90"
    yield Entry("Renew with a field twice: the last counts", "Renew", [twice], ACCEPTED)
    spoilt = b"\x82\xa8sessions\x90\xa8sessions\x05"
    yield Entry("Renew with a field twice, the last wrong", "Renew", [spoilt], MALFORMED)
    hidden = b"\x83\xa1v\x01\xa8sessions\x90\xa1v\x02"
    yield Entry("Renew with its version twice", "Renew", [hidden], VERSION)


def _one(name: str, decoder: str, body: Any, expect: str) -> Entry:
    return Entry(name, decoder, [msgpack.packb(body)], expect)


def requests() -> Iterator[Entry]:
    """Session requests whose head is wrong, and those of a live env session whose fields are."""
    for field in LANE:
        wrong = [None, -1, "1", 1.0, True, 1 << 63, LONG, LONG_NEGATIVE, [1], ARRAY] + ([0] if field != "lane" else [])
        for number, value in enumerate(wrong):
            yield _one(f"request with a wrong {field} {number}", "request", {**LANE, field: value}, MALFORMED)
        rest = {name: value for name, value in LANE.items() if name != field}
        yield _one(f"request without {field}", "request", rest, MALFORMED)
    for name, body in (
        ("an array", [1, 0, 1]),
        ("a text", "step"),
        ("nothing", None),
        ("a tuple", {"py": "tuple", "v": []}),
    ):
        yield _one(f"request that is {name}", "request", body, MALFORMED)
    yield from lane_heads()
    operations: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("reset", {"seed": -1}, "invalid_seed"),
        ("reset", {"seed": "7"}, "invalid_seed"),
        ("reset", {"seed": 7.0}, "invalid_seed"),
        ("reset", {"seed": True}, "invalid_seed"),
        ("reset", {"seed": ARRAY}, "invalid_seed"),
        ("reset", {"seed": LONG_NEGATIVE}, "invalid_seed"),
        ("reset", {"options": [1]}, MALFORMED),
        ("step", {"action": 0}, "reset_needed"),
        ("render", {}, "reset_needed"),
        ("call", {"name": "_private"}, "not_allowed"),
        ("call", {"name": "close"}, "not_allowed"),
        ("call", {"name": "reset", "args": 5}, MALFORMED),
        ("call", {"name": 5}, MALFORMED),
        ("call", {"name": "a b"}, MALFORMED),
        ("call", {}, MALFORMED),
        ("get_attr", {"name": "__class__"}, "not_allowed"),
        ("get_attr", {"name": "_np_random"}, "not_allowed"),
        ("get_attr", {"name": "no_such_thing"}, "not_allowed"),
        ("get_attr", {"name": "unwrapped.__class__"}, MALFORMED),
        ("get_attr", {"name": "render"}, "unencodable_value"),
        ("set_attr", {"name": "gravity", "value": 1}, "not_allowed"),
        ("act", {"obs": 1}, MALFORMED),
        ("observe", {}, MALFORMED),
        ("fly", {}, MALFORMED),
        ("rerun", {}, MALFORMED),
        ("rerun", {"reset": 5, "actions": ["items", []]}, MALFORMED),
        ("rerun", {"actions": ["batch", 5]}, MALFORMED),
        ("rerun", {"actions": ["items", []], "render": 1}, MALFORMED),
        ("rerun", {"actions": ["items", [0]], "render": True}, "reset_needed"),
    )
    for number, (op, fields, expect) in enumerate(operations):
        yield _one(f"{op} that is {expect}, {number}", f"env:{op}", {**LANE, **fields}, expect)
    operations = (
        ("reset", {"seed": "7"}, "invalid_seed"),
        ("reset", {"seed": -1}, "invalid_seed"),
        ("reset", {"seed": ARRAY}, "invalid_seed"),
        ("act", {}, MALFORMED),
        ("act", {"obs": 1, "deterministic": ARRAY}, MALFORMED),
        ("act", {"obs": 1, "action_space": {"space": "os.system"}}, MALFORMED),
        ("observe", {}, MALFORMED),
        ("observe", {"reward": "1", "terminated": False, "truncated": False}, MALFORMED),
        ("observe", {"reward": ARRAY, "terminated": False, "truncated": False}, MALFORMED),
        ("observe", {"reward": 1.0, "terminated": ARRAY, "truncated": False}, MALFORMED),
        ("observe", {"reward": 1.0, "terminated": False, "truncated": "no"}, MALFORMED),
        ("observe", {"reward": LONG, "terminated": False, "truncated": False}, MALFORMED),
        ("step", {"action": 1}, MALFORMED),
    )
    for number, (op, fields, expect) in enumerate(operations):
        yield _one(f"an agent's {op} that is {expect}, {number}", f"agent:{op}", {**LANE, **fields}, expect)


def acts() -> Iterator[Entry]:
    """Acts of stateless agents."""
    yield _one("act without an observation", "act", {"seed": 1}, MALFORMED)
    yield _one("act that is an array", "act", [1], MALFORMED)
    wrong: list[Any] = ["yes", 1, [], ARRAY, None]
    for number, value in enumerate(wrong):
        yield _one(f"act with a wrong deterministic {number}", "act", {"obs": 1, "deterministic": value}, MALFORMED)
    deep: Any = {"space": "discrete", "dtype": "<i8", "n": 2, "start": 0}
    for _ in range(40):
        deep = {"space": "tuple", "spaces": [deep]}
    box = {"space": "box", "dtype": "<f4", "shape": [2], "low": 0, "high": 1}
    for name, space in (
        ("unknown", {"space": "os.system"}),
        ("that is a text", "discrete"),
        ("deeper than 32 levels", deep),
        ("of a terabyte", {**box, "shape": [1 << 20, 1 << 20]}),
        ("of a negative shape", {**box, "shape": [-1]}),
        ("of a shape with a long int", {**box, "shape": [LONG, LONG]}),
        ("of objects", {**box, "dtype": "|O"}),
        ("with a bound that is code", {**box, "low": "__import__('os')"}),
        ("of no choices", {"space": "discrete", "dtype": "<i8", "n": 0, "start": 0}),
        ("of endless text", {"space": "text", "min_length": 0, "max_length": LONG, "charset": "a"}),
    ):
        yield _one(f"act in a space {name}", "act", {"obs": 1, "action_space": space}, MALFORMED)


def replies() -> Iterator[Entry]:
    """What a hostile worker may answer to request 1."""
    wrong: list[Any] = [None, 2, -1, "1", 1.0, True, ARRAY, LONG, [1]]
    for number, value in enumerate(wrong):
        yield _one(f"reply with a wrong seq {number}", "reply", {"seq": value, "obs": 1}, MALFORMED)
    yield _one("reply that is an array", "reply", [1], MALFORMED)
    for number, error in enumerate(["boom", None, {}, {"code": 5, "message": "m"}, {"code": "env_error"}, [1]]):
        yield _one(f"reply with a wrong error {number}", "reply", {"seq": 1, "error": error}, MALFORMED)
    told = {"code": "of_the_future", "message": "m"}
    yield _one("an error of an unknown code", "reply", {"error": told}, "worker")
    taken = {"self": 1, "message": 2, "remote_traceback": 3, "__class__": 4}
    yield _one("an error whose details are arguments", "reply", {"error": {**told, "details": taken}}, "worker")
    yield _one("an error whose traceback is none", "reply", {"error": {**told, "traceback": 5}}, "worker")
    ad = {"kind": "env", "name": "n", "worker": "w", "slots": 1, "free": 1, "description": "d"}
    yield _one("an advertisement", "Advertisement", ad, ACCEPTED)
    bads: list[dict[str, Any]] = [
        {"slots": -1},
        {"free": "1"},
        {"interval_s": 0},
        {"interval_s": float("nan")},
        {"worker": "a.b"},
        {"kind": "x"},
    ]
    for number, bad in enumerate(bads):
        yield _one(f"an advertisement with a wrong field {number}", "Advertisement", {**ad, **bad}, MALFORMED)
    yield _one("descriptions that are text", "Known", {"advertisements": [ad], "descriptions": ["d"]}, MALFORMED)
    yield _one("a grant of nothing", "Grant", {"session": "s"}, MALFORMED)
    yield _one("states that are unheard of", "Probed", {"states": ["fine"]}, MALFORMED)
    yield _one("losses that are text", "Renewed", {"lease_s": 15.0, "lost": ["s1"]}, MALFORMED)


def corpus() -> dict[str, list[Entry]]:
    """Every entry by the file that it stands in."""
    sources = (values, parts, control, requests, vectors, pools, acts, replies, noise, mutants)
    return {source.__name__: list(source()) for source in sources}


def main() -> int:
    """Write the files."""
    for name, entries in corpus().items():
        lines = ",\n".join(
            json.dumps({**entry._asdict(), "messages": [message.hex() for message in entry.messages]})
            for entry in entries
        )
        (HOSTILE / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
