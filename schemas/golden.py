"""Adds golden vectors to ``schemas/v1/golden``; those that stand there are never written again.

::

    python -m schemas.golden

A vector's bytes are a promise to peers in other languages. Where the code comes to write others, its tests fail: that
is a new major version, or a mistake.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, GraphInstance, Tuple

from meshrl.errors import SequenceGap
from meshrl.wire import messages as m
from meshrl.wire import spaces
from meshrl.wire.arrays import KeyStyle
from meshrl.wire.codec import Codec
from meshrl.wire.frames import error_reply
from meshrl.wire.parts import split
from schemas.notation import Notation, note

GOLDEN = Path(__file__).parent / "v1" / "golden"

ARRAY_DTYPES = (
    *("|b1", "|i1", "|u1"),
    *(order + width for order in "<>" for width in ("i2", "i4", "i8", "u2", "u4", "u8")),
    *(order + width for order in "<>" for width in ("f2", "f4", "f8", "c8", "c16")),
    *("|S3", "<U2", ">U2", "<M8[ns]", ">M8[D]", "<m8[s]", "<M8[25us]"),
)


def values() -> Iterator[tuple[str, Any]]:
    """Python's types, and what has a form of its own."""
    yield from {
        "none": None,
        "true": True,
        "false": False,
        "int zero": 0,
        "int one byte": 127,
        "int negative": -33,
        "int 64 bit": -(1 << 63),
        "int unsigned 64 bit": (1 << 64) - 1,
        "int beyond 64 bit": 1 << 64,
        "int far below zero": -(1 << 100),
        "float": 1.5,
        "float negative zero": -0.0,
        "float infinity": float("inf"),
        "float nan": float("nan"),
        "complex": 1 + 2j,
        "complex with nan": complex(float("nan"), -0.0),
        "text": "grün",
        "text empty": "",
        "text with a lone surrogate": "\ud800",
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"\x00\xff"),
        "list": [1, "a", None],
        "tuple": (1, ("a",)),
        "set": {7},
        "frozenset": frozenset({7}),
        "dict": {"a": 1, "b": {"c": []}},
        "dict with keys that are numbers": {1: "a", 2.5: "b"},
        "dict with keys that are tuples": {(0, 1): True},
        "dict with a reserved key": {"nd": 1},
        "graph": GraphInstance(np.zeros((2, 1), np.float32), None, np.array([[0, 1]])),
    }.items()


def arrays() -> Iterator[tuple[str, Any]]:
    """An array and a scalar of each dtype, and the shapes that are special."""
    for text in ARRAY_DTYPES:
        kind = text[1]
        items: list[Any] = ["ab", "c"] if kind in "SU" else [True, False] if kind == "b" else [1, 2]
        array = np.array(items, np.int64).astype(text) if kind in "Mm" else np.array(items).astype(text)
        yield f"array {text}", array
        if text[0] != ">":  # a scalar has no byte order
            yield f"scalar {text}", array[0]
    yield "array 0-d", np.array(3.0, np.float32)
    yield "array empty", np.zeros((0, 4), np.float32)
    yield "array of three dimensions", np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    yield "array with nan and infinity", np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)


def frames() -> Iterator[tuple[str, Any]]:
    """Requests and replies of an episode."""
    obs = np.array([0.03, -0.01, 0.02, 0.04], np.float32)
    lane = {"epoch": 1, "lane": 0}
    yield "reset request", {**lane, "seq": 1, "seed": 7}
    yield "reset reply", {"obs": obs, "info": {}, "seq": 1}
    yield "step request", {**lane, "seq": 2, "action": np.int64(1)}
    step = {"obs": obs, "reward": 1.0, "terminated": False, "truncated": False, "info": {"lives": 3}}
    yield "step reply", {**step, "seq": 2}
    yield "render request", {**lane, "seq": 3}
    yield "render reply", {"frame": np.zeros((2, 2, 3), np.uint8), "seq": 3}
    yield "call request", {**lane, "seq": 4, "name": "jump", "args": [1], "kwargs": {"far": True}}
    yield "call reply", {"value": (1, 2), "seq": 4}
    yield "act request", {"obs": obs, "seed": 1, "step": 3, "action_space": spaces.describe(Discrete(2))}
    yield "act reply", {"action": np.int64(0)}
    yield "error reply", error_reply(SequenceGap("request 9 skips some", seq=9, last_seq=4), 9)


def control() -> Iterator[tuple[str, m.Message]]:
    """One of each control message, with every field."""
    load = m.Load(slots=4, free=3, waiting=1, draining=True)
    ad = m.Advertisement(kind="env", name="CartPole-v1", worker="e1", slots=4, free=3, description="ab12")
    description = m.Description(
        kind="env",
        name="CartPole-v1",
        worker="e1",
        observation_space=spaces.describe(Dict({"a": Box(-1.0, np.inf, (2,), np.float32), "b": Tuple([Discrete(3)])})),
        action_space=spaces.describe(Discrete(2)),
        metadata={"render_fps": 50},
        capabilities={"gpu": True},
        allow=["jump"],
        versions={"gymnasium": "1.2.2"},
    )
    yield "Advertisement", ad
    yield "Description", description
    yield "Ask", m.Ask(kind="env", name="CartPole-v1")
    yield "Known", m.Known(advertisements=[ad], descriptions=[description])
    yield "Load", load
    yield "Open", m.Open(session="s1", name="CartPole-v1", kwargs={"gravity": 9.8}, believed_free=3, park_s=5.0)
    yield (
        "Grant",
        m.Grant(
            session="s1",
            epoch=1,
            worker="e1",
            lease_s=15.0,
            grant_s=2.0,
            step_deadline_s=300.0,
            description=description,
            load=load,
        ),
    )
    yield "Full", m.Full(load=load, ticket="t1")
    yield "Renew", m.Renew(sessions=[("s1", 1), ("s2", 3)])
    yield "Renewed", m.Renewed(lease_s=15.0, lost=[("s2", "session_expired")])
    yield "Probe", m.Probe(awaited=[("s1", 1, 0, 2)])
    yield "Probed", m.Probed(states=["running"])
    yield "Close", m.Close(epoch=1)
    yield "Closed", m.Closed(existed=True)
    yield (
        "SessionState",
        m.SessionState(
            session="s1", worker="e1", name="CartPole-v1", phase="running", episode=1, steps=2, total_steps=2, seed=7
        ),
    )


def vectors() -> dict[str, list[Notation]]:
    """Every vector by the file it belongs to."""
    made: dict[str, list[Notation]] = {"values": [], "arrays": [], "frames": [], "control": [], "parts": []}
    for file, source in (("values", values), ("arrays", arrays), ("frames", frames)):
        for name, value in source():
            for style in _styles(value):
                hexed = Codec(style).pack(value).hex()
                made[file].append({"name": name, "key_style": style, "value": note(value), "hex": hexed})
    for name, message in control():
        fields = {"v": message.v, **message.model_dump(exclude_defaults=True)}
        made["control"].append({"name": name, "message": name, "value": note(fields), "hex": message.to_wire().hex()})
    body = bytes(i % 251 for i in range(2100))
    cut = {"max_payload": 1024, "lane": 0, "seq": 5, "attempt": 1}
    parts = [part.hex() for part in split(body, 1024, lane=0, seq=5, attempt=1)]
    made["parts"].append({"name": "a message of three parts", **cut, "body": body.hex(), "parts": parts})
    return made


def _styles(value: Any) -> tuple[KeyStyle, ...]:
    """Both, where they differ."""
    return ("str",) if Codec("str").pack(value) == Codec("bytes").pack(value) else ("str", "bytes")


def main() -> int:
    """Add what is new."""
    for file, new in vectors().items():
        path = GOLDEN / f"{file}.json"
        known = json.loads(path.read_text("utf-8")) if path.is_file() else []
        names = {(vector["name"], vector.get("key_style")) for vector in known}
        known += [vector for vector in new if (vector["name"], vector.get("key_style")) not in names]
        lines = ",\n".join(json.dumps(vector) for vector in known)
        path.write_text(f"[\n{lines}\n]\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
