"""What the requests and replies of sessions carry: one table for each form of session.

A single env or a leased agent, a vector, and a pool have other fields under the same op; a worker knows the form by the
session's open. After :mod:`meshrl.wire.frames` and the hosts under :mod:`meshrl.worker`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Schema = dict[str, Any]

MAX_INTEGER = (1 << 63) - 1

VALUE: Schema = {"$ref": "value.json"}
# An array of whole numbers, one a lane.
BY_LANE: Schema = {
    "$ref": "array.json#/$defs/array",
    "properties": {"type": {"const": "<i8"}, "shape": {"minItems": 1, "maxItems": 1, "items": {"minimum": 1}}},
}


class Op(NamedTuple):
    """One op in one form of session.

    Attributes:
        purpose: what it is for.
        asked: the request's own fields.
        needed: which of them must be there.
        told: the reply's own fields.
        sure: which of them are always there.
    """

    purpose: str
    asked: Schema
    needed: list[str]
    told: Schema
    sure: list[str]


_SEED: Schema = {
    "description": "A whole number from 0; null, or no field at all, for none.",
    "anyOf": [
        {"type": ["integer", "null"], "minimum": 0},
        {"$ref": "value.json#/$defs/int"},
        {"$ref": "array.json#/$defs/scalar"},
    ],
}
_OPTIONS: Schema = {"type": ["object", "null"]}
_NAME: Schema = {"type": "string", "minLength": 1, "description": "An identifier; one that begins with _ is refused."}
_ARGS: Schema = {"anyOf": [{"type": "array", "items": VALUE}, {"$ref": "value.json#/$defs/tuple"}]}
OFFERED: Schema = {
    "info": {**VALUE, "description": "The env's info; legal actions as action_mask in it."},
    "deterministic": {"type": "boolean", "description": "The best action rather than a sample."},
    "seed": {**VALUE, "description": "With env_id and step it makes a random policy's answer repeatable."},
    "env_id": {**VALUE, "description": "Index of the sub-environment; 0 when absent."},
    "step": {**VALUE, "description": "Number of the step in its episode; 0 when absent."},
    "action_space": {
        "anyOf": [{"$ref": "space.json"}, {"type": "null"}],
        "description": "Told to agents that declare none.",
    },
}
BYTES: Schema = {"type": "string", "contentEncoding": "base64"}
_DIGEST: Schema = {**BYTES, "description": "16 bytes: xxh3-128 of what the lane has told since its journal began."}
_JOURNAL: Schema = {
    "type": "array",
    "items": {
        "type": "array",
        "prefixItems": [{"enum": ["reset", "step", "call", "set_attr"]}, BYTES],
        "minItems": 2,
        "maxItems": 2,
    },
    "description": "Of each request the op and the body, as it was sent; the oldest first.",
}
_STATE: Schema = {
    **VALUE,
    "description": "What outlives a reset of such an env, as it was right before one without a seed.",
}
_NTH: Schema = {
    "type": "integer",
    "minimum": 0,
    "description": "Where it is recorded: which episode begins, for whoever does it again.",
}
_POLICY: Schema = {
    "type": "integer",
    "description": "The version of whoever chooses the actions from now on, where it is recorded.",
}
_LISTED: Schema = {"type": "array", "items": VALUE}
COLUMN: Schema = {
    "description": "Values of a space: as a batch of it, or one by one.",
    "type": "array",
    "prefixItems": [{"enum": ["batch", "items"]}, VALUE],
    "minItems": 2,
    "maxItems": 2,
}
_OUTCOME: Schema = {"reward": VALUE, "terminated": VALUE, "truncated": VALUE}

SINGLE_OPS: dict[str, Op] = {
    "reset": Op(
        "Begin an episode. An agent's reply has neither obs nor info.",
        {"seed": _SEED, "options": _OPTIONS},
        [],
        {
            "obs": VALUE,
            "info": VALUE,
            "seed": {
                "type": "integer",
                "minimum": 0,
                "description": "Given or drawn, if any; of who asked for digests.",
            },
            "state": _STATE,
            "nth": _NTH,
            "digest": _DIGEST,
        },
        [],
    ),
    "step": Op(
        "One step of the env.",
        {"action": VALUE, "policy": _POLICY},
        ["action"],
        {"obs": VALUE, **_OUTCOME, "info": VALUE, "digest": _DIGEST},
        ["obs", "reward", "terminated", "truncated", "info"],
    ),
    "replay": Op(
        "Do again what a lost session was asked; the first request of one that takes its place.",
        {
            "journal": _JOURNAL,
            "digest": {"anyOf": [_DIGEST, {"type": "null"}]},
        },
        ["journal"],
        {},
        [],
    ),
    "rerun": Op(
        "A part of a recorded episode once more: maybe a reset, and steps up to an end; several requests as one.",
        {
            "reset": {
                "type": "object",
                "properties": {
                    "seed": _SEED,
                    "options": _OPTIONS,
                    "state": VALUE,
                    "last_seed": {"type": "integer", "minimum": 0},
                    "nth": _NTH,
                },
            },
            "actions": COLUMN,
            "render": {
                "type": "boolean",
                "description": "Render the env after each of them; the answer has fewer where frames are large.",
            },
        },
        ["actions"],
        {
            "obs": _LISTED,
            "rewards": _LISTED,
            "terminated": _LISTED,
            "truncated": _LISTED,
            "infos": {"type": "array", "items": {"type": "object"}},
            "frames": {**_LISTED, "description": "As render gives them, after the reset and each step; if asked for."},
            "digest": _DIGEST,
            "seed": {"type": "integer", "minimum": 0},
            "state": _STATE,
        },
        ["obs", "rewards", "terminated", "truncated", "infos"],
    ),
    "render": Op("A picture, in the render_mode that the open asked for.", {}, [], {"frame": VALUE}, ["frame"]),
    "state": Op("Where the session stands.", {}, [], {"state": {"$ref": "session_state.json"}}, ["state"]),
    "call": Op(
        "Call a method that the operator allows.",
        {"name": _NAME, "args": _ARGS, "kwargs": {"type": "object"}},
        ["name"],
        {"value": VALUE},
        ["value"],
    ),
    "get_attr": Op("Read a public attribute.", {"name": _NAME}, ["name"], {"value": VALUE}, ["value"]),
    "set_attr": Op(
        "Set an attribute that the operator allows.",
        {"name": _NAME, "value": VALUE},
        ["name", "value"],
        {},
        [],
    ),
    "act": Op("An action of a leased agent.", {"obs": VALUE, **OFFERED}, ["obs"], {"action": VALUE}, ["action"]),
    "observe": Op(
        "Tell a leased agent what its action led to.",
        {
            "reward": {"anyOf": [{"type": "number"}, {"$ref": "array.json#/$defs/scalar"}]},
            "terminated": {"anyOf": [{"type": "boolean"}, {"$ref": "array.json#/$defs/scalar"}]},
            "truncated": {"anyOf": [{"type": "boolean"}, {"$ref": "array.json#/$defs/scalar"}]},
        },
        ["reward", "terminated", "truncated"],
        {},
        [],
    ),
}

# --------------------------------------------------------------------------- vectors

_ARRAY: Schema = {"$ref": "array.json#/$defs/array"}
_BATCH: Schema = {**VALUE, "description": "A batch: one value of each, in the form of the space's batches."}
_BATCHED_OUTCOME: Schema = {"obs": _BATCH, "rewards": _ARRAY, "terminations": _ARRAY, "truncations": _ARRAY}
_INFOS: Schema = {"$ref": "infos.json"}
_SEEDS: Schema = {
    "description": "A seed of each; null for none.",
    "anyOf": [{"type": ["array", "null"], "items": _SEED}, {"$ref": "value.json#/$defs/tuple"}],
}
_MASK: Schema = {
    "description": "Bools: which to reset; null, or no field at all, for all of them.",
    "anyOf": [{"type": "null"}, {"$ref": "array.json#/$defs/array", "properties": {"type": {"const": "|b1"}}}],
}
_VALUES: Schema = {"type": "array", "items": VALUE, "description": "One of each, in their order."}
_IDS: Schema = {
    "type": ["array", "null"],
    "items": {"type": "integer", "minimum": 0},
    "description": "Indices within the shard; null, or no field at all, for all of them.",
}

_EPISODES: Schema = {
    "description": "How many episodes each has had, where a root or a count goes on; null or absent for none.",
    "type": ["array", "null"],
    "items": {"type": "integer", "minimum": 0},
}
_BY_NUMBER: Schema = {"$ref": "array.json#/$defs/array", "properties": {"type": {"enum": ["<i8", "<u8"]}}}
_PROOF: Schema = {
    "digests": {
        **_BY_NUMBER,
        "description": "Where the worker says them: unsigned 64-bit numbers, of all before it.",
    },
    "origins": {
        "type": "array",
        "items": {"anyOf": [{"type": "integer", "minimum": 0}, BYTES]},
        "description": "A row and a packed map by turns: of those that were reset and whose journals can begin there.",
    },
}
_REPLAY = Op(
    "Do again what a lost session was asked; the first request of one that takes its place.",
    {
        "journal": _JOURNAL,
        "begins": {**_BY_NUMBER, "description": "Of each the position of the request that reset it; -1: none did."},
        "ends": {**_BY_NUMBER, "description": "Of each the position of its last request."},
        "origins": {"type": "array", "items": {"anyOf": [BYTES, {"type": "null"}]}},
        "digests": {**_BY_NUMBER, "description": "What each must come to."},
    },
    ["journal", "begins", "ends", "origins", "digests"],
    {},
    [],
)

VECTOR_OPS: dict[str, Op] = {
    "reset": Op(
        "Begin episodes; the reply has the observations of all sub-environments.",
        {"seeds": _SEEDS, "episodes": _EPISODES, "options": _OPTIONS, "mask": _MASK},
        [],
        {"obs": _BATCH, "infos": _INFOS, **_PROOF},
        ["obs"],
    ),
    "step": Op(
        "One step of each sub-environment.",
        {"actions": _BATCH, "policy": _POLICY},
        ["actions"],
        {**_BATCHED_OUTCOME, "infos": _INFOS, **_PROOF},
        list(_BATCHED_OUTCOME),
    ),
    "replay": _REPLAY,
    "render": Op("A picture of each.", {}, [], {"frames": _VALUES}, ["frames"]),
    "call": Op(
        "Call a method that the operator allows, of each.",
        {"name": _NAME, "args": _ARGS, "kwargs": {"type": "object"}, "ids": _IDS},
        ["name"],
        {"values": _VALUES},
        ["values"],
    ),
    "get_attr": Op(
        "Read a public attribute of each.", {"name": _NAME, "ids": _IDS}, ["name"], {"values": _VALUES}, ["values"]
    ),
    "set_attr": Op(
        "Set an attribute that the operator allows, of each.",
        {
            "name": _NAME,
            "values": _VALUES,
            "ids": _IDS,
            "outermost": {"type": "boolean", "description": "On the outermost wrapper, not where the attribute is."},
        },
        ["name", "values"],
        {},
        [],
    ),
    "is_wrapped": Op(
        "Whether a wrapper of a class, or of one derived from it, is around each.",
        {"wrapper": {"type": "string", "description": "The class, as module:Class."}, "ids": _IDS},
        ["wrapper"],
        {"values": {"type": "array", "items": {"type": "boolean"}}},
        ["values"],
    ),
}

# --------------------------------------------------------------------------- pools

_POOL_OUTCOME: Schema = {
    **_BATCHED_OUTCOME,
    "first": {"type": "boolean", "description": "Whether the observations begin episodes that a reset asked for."},
    "episodes": {**BY_LANE, "description": "The number of each one's episode, from 1."},
    "steps": {**BY_LANE, "description": "How many steps it has."},
}
POOL_OPS: dict[str, Op] = {
    "reset": Op(
        "Begin an episode on each lane that is named.",
        {"seeds": _SEEDS, "episodes": _EPISODES, "options": _OPTIONS},
        [],
        {**_POOL_OUTCOME, "infos": _INFOS, **_PROOF},
        list(_POOL_OUTCOME),
    ),
    "step": Op(
        "One step on each lane that is named.",
        {"actions": _BATCH, "policy": _POLICY},
        ["actions"],
        {**_POOL_OUTCOME, "infos": _INFOS, **_PROOF},
        list(_POOL_OUTCOME),
    ),
    "replay": _REPLAY,
}

# The tables by what stands before the op in the name of a schema.
FORMS: dict[str, dict[str, Op]] = {"": SINGLE_OPS, "vector_": VECTOR_OPS, "pool_": POOL_OPS}
# Every op that a session's subject may end with, and what it is for.
OPS: dict[str, str] = {op: row.purpose for table in (POOL_OPS, VECTOR_OPS, SINGLE_OPS) for op, row in table.items()}


def forms_of(op: str) -> list[str]:
    """The names of an op's schemas, without what makes them a request or a reply."""
    return [f"{form}{op}" for form, table in FORMS.items() if op in table]
