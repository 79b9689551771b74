"""The JSON Schemas that no pydantic model stands for: frames, values, arrays, spaces, infos, errors and parts.

Written by hand, after :mod:`meshrl.wire.codec`, :mod:`meshrl.wire.arrays`, :mod:`meshrl.wire.spaces`,
:mod:`meshrl.wire.infos` and :mod:`meshrl.wire.parts`; frames from the tables of :mod:`schemas.ops`. Each describes
msgpack as a plain decoder gives it, before any form becomes a value; a bin is
``{"type": "string", "contentEncoding": "base64"}``, because JSON has no bytes.
"""

from __future__ import annotations

from meshrl.errors import MeshError
from meshrl.wire.infos import MAX_GROUPS
from meshrl.wire.subjects import VERSION
from schemas.ops import BY_LANE, COLUMN, FORMS, MAX_INTEGER, OFFERED, VALUE, Schema

DIALECT = "https://json-schema.org/draft/2020-12/schema"

BIN: Schema = {"type": "string", "contentEncoding": "base64"}
DTYPE = (
    r"^(\|b1|\|i1|\|u1|[<>][iu][248]|[<>]f[248]|[<>]c(8|16)|\|S[1-9][0-9]{0,5}|[<>]U[1-9][0-9]{0,5}"
    r"|[<>][Mm]8(\[([1-9][0-9]{0,5})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)$"
)
# Text scalars may be empty, and longer than the items of an array.
SCALAR_DTYPE = DTYPE[:-2] + r"|\|S(0|[1-9][0-9]{0,8})|[<>]U(0|[1-9][0-9]{0,8}))$"

_ARRAYS: Schema = {"$ref": "array.json#/$defs/array"}
_EPOCH: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER, "description": "Of the grant."}
_LANE_HEAD: Schema = {
    "epoch": _EPOCH,
    "lane": {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_INTEGER,
        "description": "0 where the session has one.",
    },
    "seq": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_INTEGER,
        "description": "1 for a lane's first request, then one more each, errors included. The same number "
        "again runs nothing: it gets the same bytes.",
    },
}
_LANE_NAMED: Schema = {"seq": {"type": "integer", "minimum": 1, "description": "Of the request."}}
_POOL_HEAD: Schema = {
    "epoch": _EPOCH,
    "lanes": {**BY_LANE, "description": "Indices of sub-environments within the shard, each once."},
    "seqs": {**BY_LANE, "description": "A number for each lane, as seq is for the one of other sessions."},
}
_POOL_NAMED: Schema = {
    "lanes": {**BY_LANE, "description": "The lanes whose results these are: those that finished together."},
    "seqs": {**BY_LANE, "description": "Of the requests that they answer."},
}


def frames() -> dict[str, Schema]:
    """Every hand-written schema by file name."""
    written: dict[str, Schema] = {
        "value.json": _value(),
        "array.json": _array(),
        "space.json": _space(),
        "infos.json": _infos(),
        "error.json": _error(),
        "part.json": _part(),
        "act_anywhere.request.json": _object(
            "An act of a stateless agent. It has no seq: it may run more than once (R12).",
            {
                "name": {"type": "string", "description": "Which agent; needed on worker.<worker>.act of several."},
                "obs": VALUE,
                **OFFERED,
            },
            ["obs"],
        ),
        "found.json": _object(
            "One of several answers to a read: a message of the stream, or that there are no more.",
            {
                "stored": {
                    "type": "array",
                    "description": "Its number, microseconds of the server's clock since 1970, subject, id and body.",
                    "prefixItems": [
                        {"type": "integer", "minimum": 1},
                        {"type": "integer", "minimum": 0},
                        {"type": "string"},
                        {"type": "string"},
                        {"type": "string", "contentEncoding": "base64"},
                    ],
                    "minItems": 5,
                    "items": False,
                },
                "end": {"const": True, "description": "There are no more."},
            },
            [],
        ),
        "act_anywhere.reply.json": _object("Its answer.", {"action": VALUE}, ["action"]),
        "chunk.json": _chunk(),
        "entry.json": _entry(),
    }
    for form, table in FORMS.items():
        head, named = (_POOL_HEAD, _POOL_NAMED) if form == "pool_" else (_LANE_HEAD, _LANE_NAMED)
        for op, (purpose, asked, needed, told, sure) in table.items():
            written[f"{form}{op}.request.json"] = _object(purpose, {**head, **asked}, [*head, *needed])
            reply = _object(f"The answer to {op}.", {**named, **told}, [*named, *sure])
            written[f"{form}{op}.reply.json"] = reply
    return {name: {"$schema": DIALECT, "title": name.removesuffix(".json"), **s} for name, s in written.items()}


def _object(description: str, properties: Schema, required: list[str]) -> Schema:
    made: Schema = {"description": description, "type": "object", "properties": properties}
    return {**made, "required": required} if required else made


def _form(kind: str, value: Schema, description: str) -> Schema:
    return {
        "description": description,
        "type": "object",
        "properties": {"py": {"const": kind}, "v": value},
        "required": ["py", "v"],
        "maxProperties": 2,
    }


def _value() -> Schema:
    items: Schema = {"type": "array", "items": {"$ref": "#"}}
    pair: Schema = {"type": "array", "prefixItems": [{"$ref": "#"}, {"$ref": "#"}], "minItems": 2, "maxItems": 2}
    forms: dict[str, Schema] = {
        "tuple": _form("tuple", items, "A Python tuple."),
        "set": _form("set", items, "A set; no item twice."),
        "frozenset": _form("frozenset", items, "An immutable set."),
        "map": _form(
            "map", {"type": "array", "items": pair}, "A map with keys that are not text, or with a reserved one."
        ),
        "int": _form("int", {"type": "string", "pattern": "^-?0x[0-9a-f]+$"}, "An integer beyond 64 bit."),
        "complex_bits": _form(
            "complex",
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            "A complex number with NaN: real and imaginary part.",
        ),
        "graph": _form(
            "graph", {**items, "minItems": 3, "maxItems": 3}, "Gymnasium's GraphInstance: nodes, edges, links."
        ),
        "bytearray": _form("bytearray", BIN, "A mutable bytes."),
        "str": _form("str", BIN, "A text with lone surrogates, as UTF-8 that passes them."),
        "complex": {
            "description": "A complex number as Python writes it.",
            "type": "object",
            "properties": {"complex": {"const": True}, "data": {"type": "string", "maxLength": 64}},
            "required": ["complex", "data"],
            "maxProperties": 2,
        },
    }
    reserved = [{"required": [key]} for key in ("nd", "py", "complex")]
    return {
        "description": "Any value that travels. A map with one of the keys nd, py and complex is a form that stands "
        "for a value of another type; every other map is a map.",
        "if": {"type": "object", "anyOf": reserved},
        "then": {"oneOf": [{"$ref": "array.json"}, *({"$ref": f"#/$defs/{name}"} for name in forms)]},
        "else": {
            "anyOf": [{"type": ["null", "boolean", "number", "string", "array", "object"]}, BIN],
            "items": {"$ref": "#"},
            "additionalProperties": {"$ref": "#"},
        },
        "$defs": forms,
    }


def _array() -> Schema:
    return {
        "description": "An array or a NumPy scalar, as msgpack-numpy writes it, with keys as text. An open with "
        "key_style bytes gets the same keys as bins, which JSON cannot show. data is the items' bytes in C order; its "
        "length is the product of shape times the item's size, exactly.",
        "oneOf": [{"$ref": "#/$defs/array"}, {"$ref": "#/$defs/scalar"}],
        "$defs": {
            "array": {
                "type": "object",
                "properties": {
                    "nd": {"const": True},
                    "type": {"type": "string", "pattern": DTYPE, "description": "Byte order, kind, bytes an item."},
                    "kind": {"const": "", "description": "Empty. The others of msgpack-numpy (V, O) never travel."},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 64},
                    "data": BIN,
                },
                "required": ["nd", "type", "shape", "data"],
            },
            "scalar": {
                "type": "object",
                "properties": {
                    "nd": {"const": False},
                    "type": {"type": "string", "pattern": SCALAR_DTYPE},
                    "data": BIN,
                },
                "required": ["nd", "type", "data"],
            },
        },
    }


def _space() -> Schema:
    number: Schema = {"anyOf": [{"type": ["number", "boolean"]}, {"enum": ["inf", "-inf"]}]}
    numbers: Schema = {"anyOf": [number, {"type": "array", "items": number}]}
    shape: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 64}
    dtype: Schema = {"type": "string", "pattern": DTYPE}
    parts: Schema = {"type": "array", "items": {"$ref": "#"}}
    entry: Schema = {
        "type": "array",
        "prefixItems": [{"type": ["string", "integer"]}, {"$ref": "#"}],
        "minItems": 2,
        "maxItems": 2,
    }
    whole: Schema = {"type": "integer"}
    kinds: dict[str, tuple[Schema, list[str]]] = {
        "box": (
            {
                "dtype": dtype,
                "shape": shape,
                "low": numbers,
                "high": numbers,
                "bounded_below": numbers,
                "bounded_above": numbers,
            },
            ["dtype", "shape", "low", "high"],
        ),
        "discrete": ({"dtype": dtype, "n": whole, "start": whole}, ["dtype", "n", "start"]),
        "multi_discrete": (
            {"dtype": dtype, "shape": shape, "nvec": numbers, "start": numbers},
            ["dtype", "shape", "nvec", "start"],
        ),
        "multi_binary": ({"n": {"anyOf": [whole, shape]}}, ["n"]),
        "text": (
            {"min_length": whole, "max_length": whole, "charset": {"type": "string"}},
            ["min_length", "max_length", "charset"],
        ),
        "dict": ({"spaces": {"type": "array", "items": entry}, "sort_keys": {"type": "boolean"}}, ["spaces"]),
        "tuple": ({"spaces": parts}, ["spaces"]),
        "one_of": ({"spaces": parts}, ["spaces"]),
        "sequence": ({"feature": {"$ref": "#"}, "stack": {"type": "boolean"}}, ["feature", "stack"]),
        "graph": ({"node": {"$ref": "#"}, "edge": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, ["node", "edge"]),
    }
    return {
        "description": "A space of Gymnasium's. One number stands for an array whose items are all the same. Kinds "
        "that are not listed are an operator's own; a client that does not know one can still step the env.",
        "type": "object",
        "properties": {"space": {"type": "string"}},
        "required": ["space"],
        "allOf": [
            {
                "if": {"properties": {"space": {"const": kind}}},
                "then": {"properties": properties, "required": required},
            }
            for kind, (properties, required) in kinds.items()
        ],
    }


def _infos() -> Schema:
    def pair(first: Schema, second: Schema) -> Schema:
        return {"type": "array", "prefixItems": [first, second], "minItems": 2, "maxItems": 2}

    whole: Schema = {
        "$ref": "array.json#/$defs/array",
        "properties": {"type": {"pattern": "^(\\|[iu]1|[<>][iu][248])$"}},
    }
    arrays: Schema = {"$ref": "array.json#/$defs/array"}
    objects: Schema = {"type": "array", "items": VALUE}

    def columns(inner: str, **kinds: Schema) -> Schema:
        """Columns by key, of these kinds and of maps."""
        every = {**kinds, "map": {"$ref": f"#/$defs/{inner}"}}
        return {
            "type": "object",
            "additionalProperties": {"oneOf": [pair({"const": kind}, values) for kind, values in every.items()]},
        }

    by_key = columns("group", scalar=arrays, numpy=arrays, array=arrays, object=objects)
    return {
        "description": "The infos of a vector's or a pool's sub-environments, in one of three forms. Indices are those "
        "within the shard; in a pool's answer, within its lanes.",
        "oneOf": [
            _object(
                "entries: [index, info], in the order in which they are to be merged.",
                {"entries": {"type": "array", "items": pair({"type": "integer", "minimum": 0}, {"type": "object"})}},
                ["entries"],
            ),
            _object(
                "columns: the same on its side, infos of the same keys and types in one group.",
                {
                    "columns": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/group"},
                        "minItems": 1,
                        "maxItems": MAX_GROUPS,
                    },
                    "at": {**whole, "description": "The index of each entry; without it, one entry for each in order."},
                    "group": {**whole, "description": "The number of each entry's group; without it, there is one."},
                },
                ["columns"],
            ),
            _object(
                "merged: what a vector implementation merged itself, masks included.",
                {"merged": {"$ref": "#/$defs/merged"}},
                ["merged"],
            ),
        ],
        "$defs": {
            "group": {
                **by_key,
                "propertyNames": {"pattern": "^[^_]|^$"},
                "description": "A column by key; each has a value of each entry of the group.",
            },
            "merged": {
                **columns("merged", array=arrays, object=objects, value=VALUE),
                "description": "A column by key; each has a value of each sub-environment, but for the kind value: "
                "that is one of the whole shard.",
            },
        },
    }


def _error() -> Schema:
    known = [{"const": code, "description": text} for code, text in sorted(_codes().items())]
    error: Schema = {
        "type": "object",
        "properties": {
            "code": {"anyOf": [*known, {"type": "string", "description": "Of a later version: take it for worker."}]},
            "message": {"type": "string", "description": "What happened, to what, and what to do."},
            "details": {"type": "object", "description": "Facts by name; numbers carry their unit in it."},
            "traceback": {"type": "string", "description": "Of remote code, where some raised."},
        },
        "required": ["code", "message"],
    }
    properties: Schema = {
        "error": error,
        "seq": {"type": "integer", "description": "Of the request, if it had one."},
        "lanes": {**BY_LANE, "description": "Of a pool: the lanes that it concerns; without it, the whole request."},
        "seqs": {**BY_LANE, "description": "Of the requests on these lanes."},
    }
    return _object("What any request may be answered with in place of its own reply.", properties, ["error"])


def _codes() -> dict[str, str]:
    """Each code that can travel, and the first line of its class's docstring."""
    found: dict[str, str] = {}
    classes: list[type[MeshError]] = [MeshError]
    while classes:
        cls = classes.pop()
        # unescaped by the generator, as the docstrings of messages are
        found[cls.code] = (cls.__doc__ or "").strip().splitlines()[0]
        classes += cls.__subclasses__()
    return found


def _chunk() -> Schema:
    """After :mod:`meshrl.protocol.chunks`."""
    row: Schema = {"type": "integer", "minimum": 0}
    rows = ("lanes", "resets", "rewards", "terminations", "truncations", "digests", "at_us")
    lanes = ("numbers", "steps", "returns", "over", "first")
    properties: Schema = {
        "v": {"type": "integer", "const": VERSION},
        "n": {"type": "integer", "minimum": 1, "description": "Its number in the session."},
        **{name: {**_ARRAYS, "description": "One a row: a reset or a step of one lane."} for name in rows},
        **{name: {**_ARRAYS, "description": "One a lane: where it was before the first row."} for name in lanes},
        "actions": {**COLUMN, "description": "One a step."},
        "started": {
            "type": "array",
            "minItems": 4,
            "maxItems": 4,
            "description": "Of each reset: the episode's number, seed, state and options; nil for a column of nils.",
        },
        "observations": {
            "anyOf": [_ARRAYS, COLUMN],
            "description": "One a row, where they are recorded; a batch that is one array stands there as it is.",
        },
        "infos": {"type": "array", "items": {"type": "array", "prefixItems": [row, {"type": "object"}]}},
        "changes": {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [row, row, {"enum": ["call", "set_attr"]}, {"type": "object"}],
                "minItems": 4,
                "maxItems": 4,
            },
            "description": "Before which row, of which lane, what else was asked that changes an env.",
        },
        "policies": {"type": "array", "items": {"type": "array", "prefixItems": [row, {"type": "integer"}]}},
        "touched": {"type": "array", "items": row, "description": "Lanes of which an earlier chunk has changes."},
        "lost": {
            "type": "array",
            "items": row,
            "description": "Lanes of whose episode something before this is missing.",
        },
        "end": {"type": "string", "description": "Why the session ended, where that ends its episodes."},
    }
    needed = ["n", *rows, *lanes, "actions", "started"]
    return _object(
        "What lanes of a session did, in a Zstandard frame that says its size and is checked.", properties, needed
    )


def _entry() -> Schema:
    """After :class:`meshrl.wire.recorded.Entry`."""
    columns = ("lanes", "numbers", "steps", "returns", "reasons", "first")
    natural: Schema = {"type": "integer", "minimum": 0}
    properties: Schema = {
        "v": {"type": "integer", "const": VERSION},
        "session": {"type": "string", "description": "Whose."},
        "chunk": {"type": "integer", "minimum": 1, "description": "The number of the chunk in its session."},
        "described": {"type": "integer", "minimum": 1, "description": "Where the last Recorded stands in the stream."},
        "after": {**natural, "description": "The last message of the recording before the chunk, by its number."},
        "first_env_id": natural,
        "user": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "policy": {"type": ["string", "null"]},
        "manifest": {"type": ["string", "null"]},
        **{name: {**_ARRAYS, "description": "One an episode."} for name in columns},
    }
    return _object(
        "The episodes that ended in one chunk.", properties, ["session", "chunk", "described", "after", *columns]
    )


def _part() -> Schema:
    natural: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
    return {
        "description": "A piece of a message over the server's payload limit: lane, seq, attempt, index, count, bytes. "
        "Every other message is a map, so the first byte (0x96) tells. The bytes of all count pieces, in order of "
        "index, are the message. Only on directed subjects; a sending again has the next attempt.",
        "type": "array",
        "prefixItems": [natural, natural, natural, natural, {**natural, "minimum": 1, "maximum": 65536}, BIN],
        "minItems": 6,
        "maxItems": 6,
    }
