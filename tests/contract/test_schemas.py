"""The schemas and the code hold one another to the same contract, in both directions."""

import fnmatch
import json
import re
from collections.abc import Callable
from typing import Any

import gymnasium.spaces as gs
import msgpack
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from meshrl.errors import MalformedMessage, MeshError
from meshrl.wire import frames, infos, messages, spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.merged_infos import pack_merged
from meshrl.wire.parts import split
from meshrl.wire.subjects import Subjects, token
from schemas import generate
from schemas.ops import FORMS, OPS
from tests.contract.reading import asyncapi, corpus, fault, schemas

MODELS = generate.models()
GOLDEN = {vector["message"]: bytes.fromhex(vector["hex"]) for vector in corpus("golden", "control")}
FIELDS = [(name, field) for name, model in MODELS.items() for field in model.model_fields]

# What a field of any type may be made of; each is right for some and wrong for most.
PROBES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.0, 1.5, -0.5, 3600, 3601, 1 << 31, (1 << 31) - 1, 1 << 40),
    *("", "a", "env", "str", "new", "a.b", "é", "x" * 65, "x" * 129, b"a"),
    *([], ["a"], ["running"], [1], [["a", 1]], [["a", "b"]], [["a", 1, 0, 1]], [["a", 1]] * 1001),
    *({}, {"a": 1}, {"a": "b"}, {"v": 1}, {"v": 2}),
]


# --------------------------------------------------------------------------- the files


def test_the_generator_would_write_what_is_there() -> None:
    assert generate.stale() == [], "run: python -m schemas.generate"


@pytest.mark.parametrize("name", sorted(schemas()))
def test_each_schema_is_valid(name: str) -> None:
    Draft202012Validator.check_schema(schemas()[name])
    assert fault(name, pack([])) or name == "value"  # every reference is found


def test_each_schema_but_those_of_parts_of_messages_is_a_message_of_some_channel() -> None:
    within = {"value", "array", "space", "infos", "load", "description", "session_state"}
    assert set(schemas()) == set(asyncapi()["components"]["messages"]) | within


# --------------------------------------------------------------------------- control messages


@pytest.mark.parametrize("name", MODELS)
def test_what_the_code_writes_is_valid(name: str) -> None:
    assert fault(name, GOLDEN[MODELS[name].__name__]) == ""


@pytest.mark.parametrize("name", MODELS)
def test_fields_of_a_later_version_are_ignored_by_both(name: str) -> None:
    model = MODELS[name]
    body = {**msgpack.unpackb(GOLDEN[model.__name__]), "of_the_future": [1], "": None}
    assert fault(name, msgpack.packb(body)) == ""
    assert messages.parse(model, msgpack.packb(body)).to_wire() == GOLDEN[model.__name__]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_code_and_schema_accept_the_same_values_of_a_field(name: str, field: str) -> None:
    model = MODELS[name]
    body = msgpack.unpackb(GOLDEN[model.__name__])
    # The code leaves spaces to who rebuilds them: an unknown kind is no reason to refuse a description.
    probes = [p for p in PROBES if not (field.endswith("_space") and isinstance(p, dict))]
    for probe in probes:
        data = msgpack.packb({**body, field: probe})
        assert (fault(name, data) == "") == _parses(model, data), f"{field}: {probe!r:.60}: {fault(name, data)}"


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_code_and_schema_need_the_same_fields(name: str, field: str) -> None:
    model = MODELS[name]
    body = msgpack.unpackb(GOLDEN[model.__name__])
    body.pop(field, None)
    assert (fault(name, msgpack.packb(body)) == "") == _parses(model, msgpack.packb(body))


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_the_schema_tells_the_default_that_the_code_has(name: str, field: str) -> None:
    default = MODELS[name].model_fields[field].default
    told = schemas()[name]["properties"][field]
    if MODELS[name].model_fields[field].is_required() or MODELS[name].model_fields[field].default_factory:
        assert "default" not in told
    else:
        assert json.dumps(told["default"]) == json.dumps(default)


def _parses(model: type[messages.Message], data: bytes) -> bool:
    try:
        messages.parse(model, data)
    except MeshError:
        return False
    return True


# Not for JSON Schema to see: what is not finite, and what no JSON has.
UNSEEN = re.compile(r"Open\.park_s wrong [23]$|Renew with a field twice, the last wrong")
REFUSED = [entry for entry in corpus("hostile", "control") if entry["expect"] == "malformed_message"]


def test_the_schemas_refuse_the_hostile_control_messages_too() -> None:
    names = {model.__name__: name for name, model in MODELS.items()}
    passed = []
    for entry in REFUSED:
        try:
            told = fault(names[entry["decoder"]], bytes.fromhex(entry["messages"][0]))
        except ValueError:
            continue  # a form within a key
        if not told and not UNSEEN.search(entry["name"]):
            passed.append(entry["name"])
    # These are forms, which a schema of plain fields takes for maps; or text that the last of two fields decides.
    assert [name for name in passed if "kwargs wrong" not in name] == []


# --------------------------------------------------------------------------- frames


@pytest.mark.parametrize("vector", corpus("golden", "frames"), ids=lambda vector: vector["name"])
def test_the_golden_frames_are_valid(vector: dict[str, Any]) -> None:
    if vector["key_style"] == "bytes":
        return  # the same, with keys that JSON cannot show
    name = ".".join(vector["name"].split()[:2])
    names = {"error.reply": "error", "act.request": "act_anywhere.request", "act.reply": "act_anywhere.reply"}
    assert fault(names.get(name, name), bytes.fromhex(vector["hex"])) == ""


@pytest.mark.parametrize("vector", corpus("golden", "values") + corpus("golden", "arrays"), ids=lambda v: v["name"])
def test_the_golden_values_are_valid(vector: dict[str, Any]) -> None:
    if vector["key_style"] == "str":
        assert fault("value", bytes.fromhex(vector["hex"])) == ""


REQUESTS = [entry for entry in corpus("hostile", "requests") if entry["decoder"] == "request"]


# Not for JSON Schema to see: what numbers the bytes of an array are.
UNSEEN_HEADS = re.compile(r"negative|of another count|twice|beyond every pool|a seq of 0 on a lane")


@pytest.mark.parametrize("entry", REQUESTS, ids=lambda entry: entry["name"])
def test_the_schemas_refuse_the_hostile_heads_of_requests_too(entry: dict[str, Any]) -> None:
    body = bytes.fromhex(entry["messages"][0])
    of_lanes = frames.is_of_lanes(msgpack.unpackb(body))
    if not of_lanes or not UNSEEN_HEADS.search(entry["name"]):
        assert fault("pool_reset.request" if of_lanes else "state.request", body)


ONE = np.array([1])
WRONG_INFOS: list[Any] = [
    *([], "entries", 5, {}, {"entries": {}}, {"entries": [[0]]}, {"entries": [[0, {}, {}]]}, {"entries": [[-1, {}]]}),
    *({"entries": [["0", {}]]}, {"entries": [[0, "info"]]}, {"entries": [[0.0, {}]]}),
    *({"columns": []}, {"columns": {}}, {"columns": [{"a": ["scalar", [1]]}]}, {"columns": [{"a": ["object", ONE]}]}),
    *({"columns": [{"_a": ["scalar", ONE]}]}, {"columns": [{"a": ["value", 1]}]}, {"columns": [{"a": ["scalar"]}]}),
    *({"columns": [{"a": ["map", [1]]}]}, {"columns": [{"a": ["scalar", ONE]}] * 17}, {"columns": [[]]}),
    *({"columns": [{}], "at": [0]}, {"columns": [{}], "at": np.array([0.0])}, {"columns": [{}], "group": 0}),
    *({"merged": []}, {"merged": {"a": ["scalar", ONE]}}, {"merged": {"a": 1}}, {"merged": {"a": ["array", [1]]}}),
]


@pytest.mark.parametrize("told", WRONG_INFOS, ids=repr)
def test_code_and_schema_refuse_the_same_forms_of_infos(told: Any) -> None:
    data = pack({"seq": 1, "obs": 0, "infos": told})
    assert fault("vector_reset.reply", data)
    body = unpack(data)
    assert isinstance(body, dict)
    with pytest.raises(MalformedMessage):
        infos.merge_infos([(body["infos"], 0, 1)], 1)


def test_the_schema_of_infos_accepts_what_the_code_writes() -> None:
    own = {"a": 1, "b": None, "c": np.zeros(2), "d": {"e": {"f": 1.5, "": True}}, "g": np.float32(1)}
    for told in (
        infos.pack_infos([(0, own)], 1),
        infos.pack_infos([(i, own) for i in range(4)], 4),
        infos.pack_infos([(i, own if i % 2 else {"z": (1, "x")}) for i in range(8)], 9),
        pack_merged({"a": np.ones(3), "_a": np.ones(3, np.bool_), "b": {"c": np.full(3, None)}, "d": 5}, 3),
    ):
        assert fault("vector_reset.reply", pack({"seq": 1, "obs": 0, "infos": told})) == ""


def test_the_forms_that_the_code_refuses_are_refused_by_the_schema_where_it_can_see_it() -> None:
    passed = set()
    for entry in corpus("hostile", "values"):
        try:
            if not fault("value", bytes.fromhex(entry["messages"][0])):
                passed.add(entry["name"])
        except (ValueError, RecursionError, TypeError, msgpack.UnpackException):
            continue  # no msgpack at all
    # What JSON Schema cannot say: that numbers fit one another, and what bytes hold.
    arithmetic = re.compile(r"an array with a shape|a scalar with|a set with|a set of|a map with|bool|Unicode|no UTF-8")
    code = {"a complex number that is code", "a complex number without end"}
    passed.discard("a pickle as msgpack-numpy sends object arrays")  # its keys are bins, which no schema shows
    assert {name for name in passed if not arithmetic.search(name)} <= code


def test_every_op_of_the_code_has_its_schemas_and_no_other_has() -> None:
    assert set(OPS) == frames.OPS
    for kind in (".request", ".reply"):
        told = {name.removesuffix(kind) for name in schemas() if name.endswith(kind)}
        assert told == {f"{form}{op}" for form, table in FORMS.items() for op in table} | {"act_anywhere"}


def test_every_error_code_is_told_of() -> None:
    told = {known.get("const") for known in schemas()["error"]["properties"]["error"]["properties"]["code"]["anyOf"]}
    classes = [MeshError]
    for cls in classes:
        classes += cls.__subclasses__()
    assert told - {None} == {cls.code for cls in classes}
    for cls in classes:
        data = pack(frames.error_reply(cls("what", fact_s=1.0, remote_traceback="where"), 3))
        assert fault("error", data) == ""
        with pytest.raises(cls):
            frames.check_reply(unpack(data), 3)


def test_parts_are_valid() -> None:
    for part in split(bytes(3000), 1024, lane=0, seq=1, attempt=0):
        assert fault("part", part) == ""


SPACES: list[gs.Space[Any]] = [
    gs.Box(-1.0, np.inf, (2, 3), np.float32),
    gs.Box(np.array([0, -5], np.int16), np.array([3, 5], np.int16)),
    gs.Discrete(5, start=-2),
    gs.MultiDiscrete([2, 3]),
    gs.MultiBinary(4),
    gs.MultiBinary([2, 2]),
    gs.Text(5),
    gs.Dict({"a": gs.Discrete(2), "b": gs.Dict({"c": gs.MultiBinary(1)})}),
    gs.Tuple([gs.Discrete(2), gs.Box(0, 1, ())]),
    gs.OneOf([gs.Discrete(2), gs.Discrete(3)]),
    gs.Sequence(gs.Discrete(2), stack=True),
    gs.Graph(gs.Box(0, 1, (2,)), gs.Discrete(3)),
    gs.Graph(gs.Box(0, 1, (2,)), None),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_descriptions_of_spaces_are_valid_and_nothing_may_be_left_out(space: gs.Space[Any]) -> None:
    described = spaces.describe(space)
    assert fault("space", pack(described)) == ""
    for field in described:
        rest = {name: value for name, value in described.items() if name != field}
        optional = field in {"bounded_below", "bounded_above", "sort_keys"}
        assert bool(fault("space", pack(rest))) != optional


# --------------------------------------------------------------------------- subjects

NAME = "ns/mod.ule:Env-v1"
SUBJECTS = Subjects("my mesh")
PLACES = {
    "namespace": token("my mesh"),
    "kind": "env",
    "name": token(NAME),
    "worker": "e1",
    "user": "anon",
    "session": "s1",
}
BUILT: dict[str, str] = {
    "advertisement": SUBJECTS.advertisement("env", NAME, "e1"),
    "audit": SUBJECTS.audit("e1"),
    "recording": SUBJECTS.recording(NAME, "s1"),
    "episodes": SUBJECTS.episodes(NAME, "s1"),
    "about": SUBJECTS.tapped(NAME, "s1", "about"),
    "rows": SUBJECTS.tapped(NAME, "s1", "rows"),
    "tapping": SUBJECTS.tapping("anon"),
    "read": SUBJECTS.recordings("read", "anon"),
    "keep": SUBJECTS.recordings("keep", "anon"),
    "ask": SUBJECTS.ask,
    "open": SUBJECTS.worker("e1", "open", "anon"),
    "probe": SUBJECTS.worker("e1", "probe", "anon"),
    "renew": SUBJECTS.worker("e1", "renew", "anon"),
    "drain": SUBJECTS.worker("e1", "drain", "anon"),
    "act_at_worker": SUBJECTS.worker("e1", "act", "anon"),
    "open_anywhere": SUBJECTS.any_open(NAME, "anon"),
    "act_anywhere": SUBJECTS.any_act(NAME, "anon"),
    **{f"session_{op}": SUBJECTS.session("e1", "anon", "s1", op) for op in [*frames.OPS, "close"]},
}
# wildcard: the channels it hears
HEARD: dict[str, set[str]] = {
    SUBJECTS.advertisements: {"advertisement"},
    SUBJECTS.sessions("e1"): {name for name in BUILT if name.startswith("session_")},
    SUBJECTS.session_prefix("e1") + ">": {name for name in BUILT if name.startswith("session_")},
    **{SUBJECTS.at_worker("e1", op): {op} for op in ("open", "probe", "renew", "drain")},
    SUBJECTS.at_worker("e1", "act"): {"act_at_worker"},
    SUBJECTS.tapped("*", "*", "*"): {"about", "rows"},
    SUBJECTS.tapping("*"): {"tapping"},
    SUBJECTS.recordings("*", "*"): {"read", "keep"},
    SUBJECTS.prefix + ">": set(BUILT),
}


def test_every_subject_that_the_code_builds_is_a_channel_with_that_address() -> None:
    filled = {
        name: channel["address"].format(**PLACES)
        for name, channel in asyncapi()["channels"].items()
        if channel["address"] is not None
    }
    assert filled == BUILT


@pytest.mark.parametrize("pattern", HEARD)
def test_what_the_code_subscribes_to_hears_its_channels_and_no_other(pattern: str) -> None:
    assert {name for name, subject in BUILT.items() if _matches(pattern, subject)} == HEARD[pattern]


def test_no_builder_of_subjects_is_forgotten_here() -> None:
    public = {name for name in vars(Subjects) if not name.startswith("_")}
    assert public == {
        *("namespace", "prefix", "advertisement", "advertisements", "ask", "audit", "worker", "at_worker"),
        *("any_open", "any_act", "session", "session_prefix", "sessions"),
        *("recording", "episodes", "position", "tapped", "tapping", "recordings"),
    }


def _matches(pattern: str, subject: str) -> bool:
    if pattern.endswith(".>"):
        return subject.startswith(pattern[:-1])
    wanted, parts = pattern.split("."), subject.split(".")
    return len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))


def test_each_address_names_the_parameters_that_it_has() -> None:
    for channel in asyncapi()["channels"].values():
        if channel["address"] is not None:
            assert set(re.findall(r"{(\w+)}", channel["address"])) == set(channel["parameters"])


def test_every_reference_of_the_document_leads_somewhere() -> None:
    def walk(node: Any, visit: Callable[[str], None]) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                visit(node["$ref"])
            for value in node.values():
                walk(value, visit)
        elif isinstance(node, list):
            for value in node:
                walk(value, visit)

    def found(reference: str) -> None:
        if reference.startswith("./messages/"):
            assert reference.removeprefix("./messages/").removesuffix(".json") in schemas()
            return
        at: Any = asyncapi()
        for key in reference.removeprefix("#/").split("/"):
            at = at[key]

    walk(asyncapi(), found)


def test_every_channel_has_an_operation_and_every_request_a_reply() -> None:
    operations = asyncapi()["operations"]
    used = {operation["channel"]["$ref"].rpartition("/")[2] for operation in operations.values()}
    assert used == set(asyncapi()["channels"]) - {"replies"}
    assert {name for name, operation in operations.items() if "reply" not in operation} == {
        *("advertise", "audit", "record", "index", "describe_shown", "show", "watch"),
    }
