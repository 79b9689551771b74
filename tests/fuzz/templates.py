"""What is mutated: right messages by who reads them, of the golden vectors and of the hostile corpus."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import msgpack

from meshrl.wire.frames import OPS
from schemas.noise import REQUESTS
from tests.contract.reading import corpus

# Of a session that is live, by its form: what its clients may ask, without the head of the request.
Fields = dict[str, Any]
HEAD = ("epoch", "lane", "seq", "lanes", "seqs")
# As the hostile corpus calls them, and the golden vectors.
FORMS = {"env": "", "agent": "", "vector": "vector_", "pool": "pool_"}


class Bodies(NamedTuple):
    """Of one message.

    Attributes:
        right: as clients send it.
        hostile: as they should not.
    """

    right: list[bytes]
    hostile: list[bytes]


@cache
def control(message: str) -> Bodies:
    """Of a control message, or of an act of a stateless agent."""
    if message == "act":
        right = [msgpack.packb({**REQUESTS["act"], "name": name}) for name in ("still", "still too")]
    else:
        right = [bytes.fromhex(entry["hex"]) for entry in corpus("golden", "control") if entry["message"] == message]
    hostile = [
        bytes.fromhex(body)
        for file in ("control", "acts", "mutants", "noise", "values")
        for entry in corpus("hostile", file)
        if entry["decoder"] in {message, "value"}
        for body in entry["messages"]
    ]
    return Bodies(right, hostile)


@cache
def anything() -> list[bytes]:
    """Bodies of every kind: to be mixed with, and for whom they are not meant."""
    golden = [bytes.fromhex(entry["hex"]) for file in ("frames", "control") for entry in corpus("golden", file)]
    parts = [bytes.fromhex(part) for entry in corpus("golden", "parts") for part in entry["parts"]]
    hostile = [
        bytes.fromhex(body)
        for file in ("requests", "vectors", "pools", "replies", "parts", "noise")
        for entry in corpus("hostile", file)
        for body in entry["messages"]
    ]
    return [body for body in [*golden, *parts, *hostile] if body]


@cache
def requests(form: str) -> list[tuple[str, Fields]]:
    """Ops of a session of that form, each with fields of its own that were right, or nearly."""
    found: list[tuple[str, bytes]] = []
    for entry in corpus("golden", "frames"):
        what, _, kind = entry["name"].partition(" ")
        prefix = FORMS[form]
        if kind.startswith("request") and what.startswith(prefix) and (prefix or "_" not in what.replace("_attr", "")):
            found.append((what.removeprefix(prefix), bytes.fromhex(entry["hex"])))
    before = len(found)
    for file in ("mutants", "requests", "vectors", "pools"):
        for entry in corpus("hostile", file):
            decoder, _, op = entry["decoder"].partition(":")
            if decoder == form:
                found += [(op, bytes.fromhex(body)) for body in entry["messages"]]
    hostile = len(found) - before
    result: list[tuple[str, Fields]] = []
    for op, body in found:
        try:
            value = msgpack.unpackb(body, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException):
            continue
        if isinstance(value, dict):
            result.append((op, {key: item for key, item in value.items() if key not in HEAD}))
    journal = [["reset", msgpack.packb({"epoch": 1, "lane": 0, "seq": 1, "seed": 1})]]
    result += [("reset", {}), ("state", {}), ("replay", {"journal": journal, "digest": bytes(16)}), ("fly", {})]
    right = _steps(form)
    golden = [(op, fields) for op, fields in result[: len(found) - hostile] if op in OPS]
    return [*result, *golden * (1 + len(result) // (2 * len(golden))), *[right] * len(result)]


def _steps(form: str) -> tuple[str, Fields]:
    body = REQUESTS["agent:act" if form == "agent" else f"{form}:step"]
    return "act" if form == "agent" else "step", {key: item for key, item in body.items() if key not in HEAD}
