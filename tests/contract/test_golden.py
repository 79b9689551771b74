"""The golden vectors: what the code writes, and reads, to the byte and to the bit."""

import json
import re
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest

from meshrl.wire import messages
from meshrl.wire.codec import Codec, unpack
from meshrl.wire.parts import Assembler, split
from schemas.generate import models
from schemas.golden import ARRAY_DTYPES, vectors
from schemas.notation import note, value_of
from tests.contract.reading import V1, corpus, titles

Vector = dict[str, Any]

VALUES = corpus("golden", "values") + corpus("golden", "arrays") + corpus("golden", "frames")
CONTROL = corpus("golden", "control")
PARTS = corpus("golden", "parts")
MODELS = {model.__name__: model for model in models().values()}


@pytest.mark.parametrize("vector", VALUES, ids=titles(VALUES))
def test_a_value_is_written_as_the_vector_says(vector: Vector) -> None:
    assert Codec(vector["key_style"]).pack(value_of(vector["value"])).hex() == vector["hex"]


@pytest.mark.parametrize("vector", VALUES, ids=titles(VALUES))
def test_a_vector_is_read_with_its_exact_types_and_bits(vector: Vector) -> None:
    assert note(unpack(bytes.fromhex(vector["hex"]))) == vector["value"]


@pytest.mark.parametrize("vector", VALUES, ids=titles(VALUES))
def test_the_notation_itself_loses_nothing(vector: Vector) -> None:
    assert note(value_of(vector["value"])) == vector["value"]


@pytest.mark.parametrize("vector", CONTROL, ids=titles(CONTROL))
def test_a_control_message_is_written_as_the_vector_says(vector: Vector) -> None:
    model = MODELS[vector["message"]]
    assert messages.check(model, value_of(vector["value"])).to_wire().hex() == vector["hex"]


@pytest.mark.parametrize("vector", CONTROL, ids=titles(CONTROL))
def test_a_control_vector_is_read_as_it_was_meant(vector: Vector) -> None:
    model = MODELS[vector["message"]]
    data = bytes.fromhex(vector["hex"])
    assert note(unpack(data)) == vector["value"]
    assert messages.parse(model, data).to_wire() == data


@pytest.mark.parametrize("vector", PARTS, ids=titles(PARTS))
def test_a_message_is_split_and_joined_as_the_vector_says(vector: Vector) -> None:
    body = bytes.fromhex(vector["body"])
    marks = {name: vector[name] for name in ("lane", "seq", "attempt")}
    assert [part.hex() for part in split(body, vector["max_payload"], **marks)] == vector["parts"]
    joining = Assembler()
    joined = [joining.feed("a peer", bytes.fromhex(part), 0.0) for part in vector["parts"]]
    assert joined == [None] * (len(joined) - 1) + [body]


def _in_bytes_style(vector: Vector) -> bool:
    return vector["key_style"] == "bytes" and re.match(r"(array|scalar) ", vector["name"]) is not None


ORACLE = [vector for vector in VALUES if _in_bytes_style(vector)]


def _written_by_msgpack_numpy(vector: Vector) -> bool:
    value = value_of(vector["value"])
    # Datetimes have no buffer, which it needs; np.float64, np.str_ and np.bytes_ reach it as Python's own types.
    return value.dtype.kind not in "Mm" and not isinstance(value, (float, complex, str, bytes))


WRITTEN = [vector for vector in ORACLE if _written_by_msgpack_numpy(vector)]


@pytest.mark.parametrize("vector", WRITTEN, ids=titles(WRITTEN))
def test_msgpack_numpy_writes_the_same(vector: Vector) -> None:
    theirs = msgpack.packb(value_of(vector["value"]), default=msgpack_numpy.encode)
    assert note(unpack(theirs)) == vector["value"]
    assert msgpack.unpackb(theirs) == msgpack.unpackb(bytes.fromhex(vector["hex"]))


@pytest.mark.parametrize("vector", ORACLE, ids=titles(ORACLE))
def test_msgpack_numpy_reads_the_same_value(vector: Vector) -> None:
    # safe: these bytes are our own; decode would run code that a peer sends
    value = msgpack.unpackb(bytes.fromhex(vector["hex"]), object_hook=msgpack_numpy.decode)
    assert note(value) == vector["value"]


def test_there_is_a_vector_for_every_dtype_that_travels() -> None:
    dtypes = {vector["value"]["array"]["dtype"] for vector in corpus("golden", "arrays") if "array" in vector["value"]}
    assert {np.dtype(text).str for text in ARRAY_DTYPES} <= dtypes
    from meshrl.wire.arrays import _FIXED

    assert set(_FIXED) <= dtypes


def test_there_is_a_vector_for_every_control_message() -> None:
    assert {vector["message"] for vector in CONTROL} == set(MODELS)


@pytest.mark.parametrize("file", ["values", "arrays", "frames", "control", "parts"])
def test_the_generator_still_writes_the_vectors_that_stand_there(file: str) -> None:
    def by_name(entries: list[Vector]) -> dict[tuple[str, str | None], str]:
        return {(entry["name"], entry.get("key_style")): json.dumps(entry) for entry in entries}

    assert by_name(vectors()[file]) == by_name(corpus("golden", file))


def test_no_golden_file_is_left_untested() -> None:
    assert {path.stem for path in (V1 / "golden").iterdir()} == {"values", "arrays", "frames", "control", "parts"}
