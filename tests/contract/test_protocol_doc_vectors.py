"""docs/protocol.md says of vectors and pools what the code does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, get_args

import gymnasium.spaces as gs
import msgpack
import numpy as np
import pytest

from meshrl.protocol.autoreset import RULES
from meshrl.protocol.lanes import Lanes
from meshrl.protocol.seeds import derive
from meshrl.protocol.session import ANY_LANE, SessionTable
from meshrl.wire import codec, info_forms, infos, messages, spaces
from meshrl.wire.batches import batching, form_of
from meshrl.wire.codec import unpack
from meshrl.worker.vector_implementations import IMPLEMENTATIONS
from schemas.notation import note
from tests.contract.document import TEXT, Row, coded, table


def test_the_fields_of_opens_for_vectors_have_the_defaults_and_values_of_the_model() -> None:
    rows = {coded(row["field of `Open`"])[0]: row for row in table("Vectors", "field of `Open`")}
    assert list(rows) == ["form", "num_envs", "first_env_id", "autoreset_mode", "seeding"]
    literals = {"form": messages.Form, "autoreset_mode": messages.AutoresetName, "seeding": messages.Seeding}
    for field, row in rows.items():
        assert coded(row["default"]) == [str(messages.Open.model_fields[field].default)]
        if field in literals:
            assert set(get_args(literals[field])) <= set(coded(row[""]))


def test_what_workers_say_of_their_vectors_is_told_with_its_defaults() -> None:
    rows = {coded(row["field of `vectors`"])[0]: row for row in table("Vectors", "field of `vectors`")}
    default = messages.Vectors()
    assert set(rows) == set(messages.Vectors.model_fields)
    assert rows["autoreset_modes"]["default"] == "all"
    assert set(default.autoreset_modes) == set(messages.AUTORESET_MODES)
    assert coded(rows["seedings"]["default"]) == default.seedings
    for field in ("implementation", "reset_mask", "options", "one_seed", "attributes", "pool"):
        assert coded(rows[field]["default"]) == [str(getattr(default, field)).lower()]
    assert (rows["seeds_below"]["default"], default.seeds_below) == ("nil", None)
    assert set(coded(rows["implementation"][""])) == set(IMPLEMENTATIONS)


BATCHED: list[gs.Space[Any]] = [
    gs.Box(-1.0, 1.0, (2,)),
    gs.Discrete(3),
    gs.MultiDiscrete([2, 3]),
    gs.MultiBinary(2),
    gs.Dict({"a": gs.Discrete(2)}),
    gs.Tuple([gs.Discrete(2), gs.Text(3)]),
    gs.Graph(gs.Box(0, 1, (2,)), None),
    gs.Text(4),
    gs.Sequence(gs.Discrete(2)),
    gs.OneOf([gs.Discrete(2), gs.Discrete(3)]),
]


def test_the_forms_of_batches_are_those_of_the_code() -> None:
    forms = {kind: coded(row["batch"])[0] for row in table("Vectors", "`space` of one") for kind in _kinds(row)}
    assert forms == {str(spaces.describe(space)["space"]): form_of(space) for space in BATCHED}
    assert set(forms) == {coded(row["`space`"])[0] for row in table("Encoding", "`space`")}


def _kinds(row: Row) -> list[str]:
    return coded(row["`space` of one"])


def test_the_example_of_a_batch_is_what_travels() -> None:
    assert '`{"a": array of n int64, "b": {"py": "tuple", "v": [n texts]}}`' in " ".join(TEXT.split())
    batched = batching(gs.Dict({"a": gs.Discrete(3), "b": gs.Text(4)})).stack([{"a": np.int64(1), "b": "x"}] * 2)
    plain = msgpack.unpackb(codec.pack(batched))
    assert plain["b"] == {"py": "tuple", "v": ["x", "x"]}
    assert (plain["a"]["type"], plain["a"]["shape"]) == ("<i8", [2])


def test_the_table_of_autoreset_is_that_of_the_code() -> None:
    rows = {coded(row["mode"])[0]: row for row in table("Vectors", "mode")}
    assert {mode: (coded(r["the step that ends it"]), coded(r["the next step"])) for mode, r in rows.items()} == {
        mode: ([rule.on_end.value], [rule.ended.value]) for mode, rule in RULES.items()
    }


def test_the_seedings_and_the_seed_of_the_example_are_those_of_the_code() -> None:
    assert {coded(row["seeding"])[0] for row in table("Vectors", "seeding")} == set(messages.SEEDINGS)
    found = re.findall(r"derive\((\d+), (\d+), (\d+)\) is (\d+)\.", TEXT)
    assert found
    for *numbers, seed in found:
        digest = hashlib.sha256(f"meshrl.seed.v1:{':'.join(numbers)}".encode("ascii")).digest()
        assert int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF == int(seed) == derive(*map(int, numbers))


def test_the_kinds_of_columns_of_infos_are_those_of_the_code() -> None:
    told = {coded(row["kind"])[0] for row in table("Vectors", "kind")}
    assert told == info_forms.LEAF_KINDS | {"map"}


def entries_by_the_text(part: dict[str, Any], count: int) -> list[tuple[int, dict[str, Any]]]:
    """What the text says of entries and columns, and nothing else."""
    if "entries" in part:
        return [(i, info) for i, info in part["entries"]]
    at = part["at"].tolist() if "at" in part else list(range(count))
    group = part["group"].tolist() if "group" in part else [0] * len(at)
    rows = [0] * len(part["columns"])
    found = []
    for i, number in zip(at, group, strict=True):
        found.append((i, _row(part["columns"][number], rows[number])))
        rows[number] += 1
    return found


def _row(columns: dict[str, Any], k: int) -> dict[str, Any]:
    read: dict[str, Callable[[Any], Any]] = {
        "scalar": lambda values: values[k].item(),
        "array": lambda values: values[k, ...].copy(),
        "map": lambda values: _row(values, k),
    }
    return {key: read.get(kind, lambda values: values[k])(values) for key, (kind, values) in columns.items()}


def merged_by_the_text(told: list[tuple[int, dict[str, Any]]], num_envs: int) -> dict[str, Any]:
    """The second step of merging, as the text has it."""
    result: dict[str, Any] = {}
    for i, info in told:
        _merge(result, info, i, num_envs)
    return result


def _merge(result: dict[str, Any], info: dict[str, Any], i: int, num_envs: int) -> None:
    for key, value in info.items():
        if isinstance(value, dict) and key != "final_obs":
            _merge(result.setdefault(key, {}), value, i, num_envs)
        else:
            if key not in result:
                result[key] = np.full(num_envs, None, object)
                if key != "final_obs" and (type(value) in (int, float, bool) or isinstance(value, np.number)):
                    result[key] = np.zeros(num_envs, type(value))
                elif key != "final_obs" and isinstance(value, np.ndarray):
                    result[key] = np.zeros((num_envs, *value.shape), value.dtype)
            result[key][i] = value
        result.setdefault(f"_{key}", np.zeros(num_envs, np.bool_))[i] = True


def _told(i: int) -> list[tuple[int, dict[str, Any]]]:
    """What sub-environment i of the test below tells: many the same, some other things, one two entries."""
    if i % 5 == 4:
        return [(i, {"final_obs": np.zeros(2), "final_info": {"lives": 0, "at": np.float32(i)}}), (i, {"lives": 3})]
    if i % 7 == 3:
        return [(i, {"prob": 1, "who": None if i % 2 else "a", "sure": np.bool_(True)})]
    return [(i, {"lives": i, "prob": 0.9, "pos": np.full((2,), i, np.float32), "of": {"deep": {"x": i / 2}}})]


@pytest.mark.parametrize("sizes", [[20], [1, 19], [6, 7, 7], [1] * 20], ids=str)
def test_infos_that_are_merged_as_the_text_says_are_what_the_code_and_gymnasium_make_of_them(sizes: list[int]) -> None:
    parts, told, first = [], [], 0
    for size in sizes:
        own = [(i - first, info) for j in range(first, first + size) for i, info in _told(j)]
        part = unpack(codec.pack(infos.pack_infos(own, size)))
        assert isinstance(part, dict)
        parts.append((part, first, size))
        told += [(i + first, info) for i, info in entries_by_the_text(part, size)]
        first += size
    by_text = merged_by_the_text(told, first)
    assert note(by_text) == note(infos.merge_infos(parts, first))
    assert note(by_text) == note(infos.merge_infos([({"entries": [[i, x] for i, x in told]}, 0, first)], first))
    if len(sizes) < 20:
        assert any("columns" in part for part, _, _ in parts)


# --------------------------------------------------------------------------- pools


def _lanes_after_three(*, running: bool) -> Lanes:
    """Two lanes, of which lane 1 has had three requests."""
    made = Lanes(2)
    only = np.array([1])
    for seq in (1, 2, 3):
        made.receive(only, np.array([seq]), "inbox", 0.0)
        if seq < 3 or not running:
            made.answer(only, b"answer")
    return made


def test_the_table_of_lanes_holds_for_each_lane_of_a_pool() -> None:
    seqs = {"below n": 2, "n": 3, "n + 1": 4, "beyond": 5}
    for row in table("Lanes", "seq"):
        for head, running in (("while n is running", True), ("after n was answered", False)):
            lanes = _lanes_after_three(running=running)
            received = lanes.receive(np.array([0, 1]), np.array([1, seqs[row["seq"]]]), "newest", 0.0)
            refused = {at: verdict.value for at, verdict in received.refused}
            came = "run" if 1 in received.run else "repeat" if received.repeat else refused.get(1, "join")
            assert coded(row[head]) == [came], row
            assert 0 in received.run, "whatever becomes of the other"
            if came == "join":
                assert lanes.answer(np.array([1]), b"late") == {"newest"}


def test_a_refusal_has_the_code_of_the_first_lane_and_names_all() -> None:
    lanes = _lanes_after_three(running=False)
    asked, seqs = np.array([1, 0]), np.array([2, 5])
    received = lanes.receive(asked, seqs, "inbox", 0.0)
    error = lanes.refusal(received.refused, asked, seqs, "s")
    assert (error.code, error.details["lanes"]) == ("stale_request", [1, 0])


def test_a_session_that_ended_answers_every_lane_of_its_epoch_with_its_last_error() -> None:
    made = SessionTable(2)
    _, session = made.open("u", "s", 1, "inbox", 0.0, num_envs=2, pool=True)
    assert session is not None
    made.granted(session, b"grant", 0.0)
    made.used(session, 0.0)
    made.ending(session, "ended", last=(1, ANY_LANE, 0, b"error"))
    made.ended(session)
    assert {made.last_answer(("u", "s"), 1, lane, seq) for lane in (0, 1) for seq in (1, 9)} == {b"error"}
    assert made.last_answer(("u", "s"), 2, 0, 1) is None
    assert made.probe(("u", "s"), 1, 1, 4) == "answered"
    assert made.free == 2
