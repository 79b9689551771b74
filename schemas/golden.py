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
from meshrl.wire.audited import Audited
from meshrl.wire.codec import Codec
from meshrl.wire.frames import error_reply
from meshrl.wire.infos import pack_infos
from meshrl.wire.merged_infos import pack_merged
from meshrl.wire.of_recordings import Keep, Kept, Read, Watch
from meshrl.wire.parts import split
from meshrl.wire.record import Record
from meshrl.wire.recorded import Recorded
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
    yield from vector_frames()
    yield from pool_frames()


def vector_frames() -> Iterator[tuple[str, Any]]:
    """Requests and replies of a shard of sub-environments in lockstep."""
    lane = {"epoch": 1, "lane": 0}
    obs = np.arange(8, dtype=np.float32).reshape(2, 4)
    flags = np.array([False, True])
    yield "vector_reset request", {**lane, "seq": 1, "seeds": [7, 8]}
    yield "vector_reset reply", {"obs": obs, "seq": 1}
    some = {"seeds": [None, 9], "options": {"low": -0.1}, "mask": flags}
    yield "vector_reset request of some", {**lane, "seq": 2, **some}
    yield "vector_step request", {**lane, "seq": 3, "actions": np.array([1, 0], np.int64)}
    nested = {"gear": np.array([1, 0], np.int64), "say": (("go", "stop"), np.zeros((2, 3), np.float32))}
    yield "vector_step request of a Dict", {**lane, "seq": 3, "actions": nested}
    none = np.zeros(2, np.bool_)
    step = {"obs": obs, "rewards": np.array([1.0, 0.5]), "terminations": flags, "truncations": none}
    yield "vector_step reply", {**step, "seq": 3}
    final = {"final_obs": obs[0], "final_info": {"lives": 0}}
    entries = pack_infos([(1, final), (1, {"lives": 3})], 2)
    yield "vector_step reply with infos as entries", {**step, "infos": entries, "seq": 3}
    infos = [{"lives": 3, "at": obs[0], "who": "a", "of": {"x": np.float32(0.5)}} for _ in range(4)]
    columns = pack_infos([*enumerate(infos), (4, {"late": 1.5}), (5, {"late": 2.5})], 7)
    yield "vector_step reply with infos as columns", {**step, "infos": columns, "seq": 3}
    merged = pack_merged({"lives": np.array([3, 2]), "_lives": np.array([True, True]), "level": "one"}, 2)
    yield "vector_step reply with merged infos", {**step, "infos": merged, "seq": 3}
    yield "vector_render request", {**lane, "seq": 4}
    yield "vector_render reply", {"frames": [np.zeros((1, 2, 3), np.uint8)] * 2, "seq": 4}
    yield "vector_call request", {**lane, "seq": 5, "name": "jump", "args": [1], "kwargs": {"far": True}, "ids": [1, 0]}
    yield "vector_call reply", {"values": [(1, 2), None], "seq": 5}
    yield "vector_get_attr request", {**lane, "seq": 6, "name": "gravity"}
    yield "vector_get_attr reply", {"values": [9.8, 9.8], "seq": 6}
    yield "vector_set_attr request", {**lane, "seq": 7, "name": "gravity", "values": [9.0], "ids": [1]}
    yield "vector_set_attr reply", {"seq": 7}
    yield "vector_is_wrapped request", {**lane, "seq": 8, "wrapper": "gymnasium.wrappers.common:TimeLimit"}
    yield "vector_is_wrapped reply", {"values": [True, True], "seq": 8}


def pool_frames() -> Iterator[tuple[str, Any]]:
    """Requests and replies of a shard whose sub-environments are a lane each."""

    def of(lanes: list[int], seqs: list[int]) -> dict[str, Any]:
        return {"lanes": np.array(lanes, np.int64), "seqs": np.array(seqs, np.int64)}

    obs = np.arange(8, dtype=np.float32).reshape(2, 4)
    none = np.zeros(2, np.bool_)
    yield "pool_reset request", {"epoch": 1, **of([0, 1, 2], [1, 1, 1]), "seeds": [7, 8, 9], "options": {}}
    began = {"obs": obs, "rewards": np.zeros(2), "terminations": none, "truncations": none, "first": True}
    began |= {"episodes": np.array([1, 1], np.int64), "steps": np.array([0, 0], np.int64)}
    yield "pool_reset reply", {**of([2, 0], [1, 1]), **began}
    yield "pool_step request", {"epoch": 1, **of([2, 0], [2, 2]), "actions": np.array([1, 0], np.int64)}
    ended = np.array([True, False])
    step = {"obs": obs, "rewards": np.ones(2), "terminations": ended, "truncations": none, "first": False}
    step |= {"episodes": np.array([1, 1], np.int64), "steps": np.array([1, 1], np.int64)}
    infos = pack_infos([(0, {"final_obs": obs[1], "final_info": {}})], 2)
    yield "pool_step reply", {**of([2, 0], [2, 2]), **step, "infos": infos}
    gap = SequenceGap("lane 1 of session s1: request 9 skips some", seq=9, last_seq=1, lanes=[1])
    yield "error reply of some lanes", {**error_reply(gap), **of([1], [9])}


def control() -> Iterator[tuple[str, m.Message]]:
    """Each control message, with every field; those of vectors and pools beside the others."""
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
    can = m.Vectors(
        implementation="gymnasium",
        autoreset_modes=["NextStep"],
        seedings=["implementation"],
        reset_mask=False,
        attributes=False,
        pool=False,
    )
    yield "Description with vectors", description.model_copy(update={"vectors": can})
    yield "Ask", m.Ask(kind="env", name="CartPole-v1")
    yield "Known", m.Known(advertisements=[ad], descriptions=[description])
    yield "Load", load
    yield "Open", m.Open(session="s1", name="CartPole-v1", kwargs={"gravity": 9.8}, believed_free=3, park_s=5.0)
    shard = {"num_envs": 4, "first_env_id": 8, "seeding": "derived"}
    vector = {"session": "s1", "name": "CartPole-v1", "form": "vector", "autoreset_mode": "SameStep", **shard}
    yield "Open of a vector", m.Open.model_validate(vector)
    yield "Open of a pool", m.Open.model_validate({"session": "s1", "name": "CartPole-v1", "form": "pool", **shard})
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
    yield "Full for a share", m.Full(load=load, ticket="t1", share=2, held=2)
    yield "Renew", m.Renew(sessions=[("s1", 1), ("s2", 3)])
    yield "Renewed", m.Renewed(lease_s=15.0, lost=[("s2", "session_expired")])
    yield "Probe", m.Probe(awaited=[("s1", 1, 0, 2)])
    yield "Probed", m.Probed(states=["running"])
    yield "Read", Read(stream="MESHRL_EPISODES", subject="meshrl.v1.default.episodes.*.*", since_us=5, count=9)
    yield "Keep", Keep(env="CartPole-v1", consumer="dqn", position="7.1.0.3", message_id="a", after=6)
    yield "Kept", Kept(seq=7)
    yield "Watch", Watch(env="CartPole-v1", seconds=8.0)
    yield "Drain", m.Drain(seconds=60.0)
    yield "Drained", m.Drained(sessions=3)
    yield "Recorded", Recorded(session="s1", worker="e1", user="ann", name="CartPole-v1", description=description)
    yield "Close", m.Close(epoch=1)
    yield "Close of one that moved", m.Close(epoch=1, moved=True)
    asked = Record(level="full", every=10, labels={"run": "a"}, policy="dqn")
    yield "Open of a recorded session", m.Open(session="s1", name="CartPole-v1", record=asked)
    yield "Closed", m.Closed(existed=True)
    yield (
        "SessionState",
        m.SessionState(
            session="s1", worker="e1", name="CartPole-v1", phase="running", episode=1, steps=2, total_steps=2, seed=7
        ),
    )


def audit() -> Iterator[tuple[str, m.Message]]:
    """An entry of each kind."""
    who = {"worker": "e1", "user": "ann", "session": "s1", "epoch": 1, "kind": "env", "name": "CartPole-v1"}
    pool = {"form": "pool", "num_envs": 4}
    yield "Audited", Audited.model_validate({**who, "n": 1, "event": "opened", "kwargs": {"gravity": 9.8}})
    ended = {"event": "ended", "reason": "ended", "code": "env_error", "type": "ValueError", "lasted_s": 1.5}
    yield "Audited of an end", Audited.model_validate({**who, **pool, **ended, "n": 2, "ago_s": 0.25})
    refused = {"event": "refused", "code": "kwargs_not_allowed", "kwargs": {"shell": "rm"}, "render_mode": "human"}
    yield "Audited of a refusal", Audited.model_validate({**who, **refused, "n": 3})


def vectors() -> dict[str, list[Notation]]:
    """Every vector by the file it belongs to."""
    made: dict[str, list[Notation]] = {"values": [], "arrays": [], "frames": [], "control": [], "parts": []}
    for file, source in (("values", values), ("arrays", arrays), ("frames", frames)):
        for name, value in source():
            for style in _styles(value):
                hexed = Codec(style).pack(value).hex()
                made[file].append({"name": name, "key_style": style, "value": note(value), "hex": hexed})
    for name, message in (*control(), *audit()):
        fields = {"v": message.v, **message.model_dump(exclude_defaults=True)}
        entry = {"name": name, "message": type(message).__name__, "value": note(fields), "hex": message.to_wire().hex()}
        made["control"].append(entry)
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
