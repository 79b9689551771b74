from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from hypothesis import given

from meshrl.errors import MalformedMessage, UnencodableValue
from meshrl.wire.arrays import array_map, dtype_of, from_map, text_of
from meshrl.wire.codec import Codec, pack, unpack
from tests.unit.wire.strategies import DTYPES, arrays, same, scalars


def form(**changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"nd": True, "type": "<f4", "kind": "", "shape": [2], "data": bytes(8)}
    made.update(changed)
    return {key: value for key, value in made.items() if value is not ...}


@given(arrays())
def test_every_array_comes_back_with_its_dtype_shape_and_bits(array: Any) -> None:
    assert same(unpack(pack(array)), array)


@given(arrays())
def test_arrays_that_come_back_are_owned_writable_contiguous_and_aligned(array: Any) -> None:
    flags = unpack(pack(array)).flags
    assert flags.owndata
    assert flags.writeable
    assert flags.c_contiguous
    assert flags.aligned


@given(scalars())
def test_every_scalar_comes_back_with_its_type_and_bits(scalar: Any) -> None:
    assert same(unpack(pack(scalar)), scalar)


@given(arrays())
def test_msgpack_numpy_reads_what_the_bytes_style_writes(array: Any) -> None:
    read = msgpack_numpy.unpackb(Codec("bytes").pack(array))
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d[1] not in "Mm"])  # it cannot write those
def test_what_msgpack_numpy_writes_is_what_the_bytes_style_writes(dtype: Any) -> None:
    array = np.zeros((2, 3), dtype)
    assert Codec("bytes").pack(array) == msgpack_numpy.packb(array)
    assert same(unpack(msgpack_numpy.packb(array)), array)


@pytest.mark.parametrize(
    "scalar", [np.float64(0.1), np.bool_(True), np.int8(-3), np.uint64(2**64 - 1), np.complex64(1j)]
)
def test_scalars_and_complex_numbers_are_those_of_msgpack_numpy(scalar: Any) -> None:
    theirs = msgpack_numpy.packb({"x": scalar, "z": [scalar]}, strict_types=True)  # else np.float64 is a float
    assert Codec("bytes").pack({"x": scalar, "z": [scalar]}) == theirs
    assert same(unpack(theirs), {"x": scalar, "z": [scalar]})


@pytest.mark.parametrize("number", [1 + 2j, complex(-0.0, 0.1), complex(float("inf"), -1)])
def test_python_complex_numbers_are_those_of_msgpack_numpy(number: Any) -> None:
    assert Codec("bytes").pack(number) == msgpack_numpy.packb(number)
    assert same(msgpack_numpy.unpackb(Codec("bytes").pack(number)), number)
    assert same(unpack(msgpack_numpy.packb(number)), number)


def test_both_key_styles_of_one_array_are_read() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    for style in ("str", "bytes"):
        assert same(unpack(Codec(style).pack({"a": array, "b": [np.float32(1)]})), {"a": array, "b": [np.float32(1)]})


def test_the_text_form_is_the_documented_one() -> None:
    assert msgpack.unpackb(pack(np.zeros((1, 2), np.float32))) == form(shape=[1, 2])
    assert msgpack.unpackb(pack(np.int64(5))) == {
        "nd": False,
        "type": "<i8",
        "data": (5).to_bytes(8, "little"),
    }


def test_a_large_contiguous_array_is_handed_over_without_a_copy() -> None:
    array = np.arange(5000)
    data = array_map(array, "str")["data"]
    assert isinstance(data, memoryview)
    assert np.shares_memory(np.frombuffer(data, array.dtype), array)


def test_large_strided_and_datetime_arrays_come_back() -> None:
    assert same(unpack(pack(np.arange(9000)[::2])), np.arange(0, 9000, 2))
    assert same(unpack(pack(np.asfortranarray(np.arange(6000).reshape(60, 100)))), np.arange(6000).reshape(60, 100))
    days = np.arange("2000-01-01", "2010-01-01", dtype="<M8[D]")
    assert same(unpack(pack(days)), days)


def test_an_alias_of_a_fixed_width_type_travels_as_that_type() -> None:
    assert same(unpack(pack(np.longlong(3))), np.int64(3))
    assert unpack(pack(np.zeros(2, np.longlong))).dtype == np.int64


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, 1], object),
        np.zeros(2, "V8"),
        np.zeros(2, [("a", "<i4")]),
        np.zeros(2, np.longdouble) if np.dtype(np.longdouble).itemsize > 8 else np.zeros(2, "V1"),
        np.ma.masked_array([1, 2], mask=[True, False]),
        np.zeros(2, [("a", "<i4")])[0],
        np.zeros(1, "S1000000"),
    ],
    ids=["object", "void", "structured", "longdouble", "masked", "record", "endless text"],
)
def test_arrays_without_an_exact_form_are_refused_by_path(array: Any) -> None:
    with pytest.raises(UnencodableValue) as caught:
        pack({"info": {"x": [0, array]}})
    assert caught.value.details["path"] == "info.x[1]"
    assert "info.x[1]" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "O",
            "|O8",
            "<O8",
            "O8,i4",
            "V8",
            "|V8",
            "i4,i4",
            "(2,3)f4",
            "float32",
            "f4",
            "=f4",
            "f",
            "d",
            "",
            " <f4",
            "<f4 ",
        ),
        *(
            "<f16",
            "<g",
            "<U",
            "<U0",
            "<U01",
            "<U9999999999",
            "|S-1",
            "|S1,O",
            "<M8[xs]",
            "<M8[0s]",
            "<M8[ns]O",
            "a8",
        ),
        *(
            "<f4\n",
            "<U1\n",
            "T",
            "|b2",
            "<b1",
            "\N{ARABIC-INDIC DIGIT ONE}",
            "<U\N{ARABIC-INDIC DIGIT ONE}",
            "numpy.float32",
        ),
        *(b"O", b"\xff", None, 4, ["<f4"], [["a", "<f4"]], {"a": 1}, True),
    ],
)
def test_types_outside_the_allow_list_are_refused(text: Any) -> None:
    with pytest.raises(MalformedMessage):
        dtype_of(text)
    for nd in (True, False):
        with pytest.raises(MalformedMessage):
            unpack(msgpack.packb(form(nd=nd, type=text)))


@pytest.mark.parametrize("text", DTYPES)
def test_types_of_the_allow_list_are_known_by_their_text(text: Any) -> None:
    assert text_of(dtype_of(text)) == text
    assert dtype_of(text.encode()) == np.dtype(text)


@pytest.mark.parametrize(
    "wrong",
    [
        form(shape=[3]),
        form(shape=[1]),
        form(shape=[-2]),
        form(shape=[-1, -2]),
        form(shape=[2.0]),
        form(shape=[True, 2]),
        form(shape=["2"]),
        form(shape=2),
        form(shape=None),
        form(shape=...),
        form(shape=[2**62, 4, 2]),
        form(shape=[2**32, 2**32], data=b""),
        form(shape=[2**63, 2**63, 2**63], data=b""),
        form(shape=[0, 2**63], data=b""),
        form(shape=[1] * 65 + [2]),
        form(shape=[2**61 + 2]),  # times four bytes is eight, in 64 bits
        form(data=...),
        form(data="12345678"),
        form(data=None),
        form(data=[1, 2]),
        form(type=...),
        form(nd=1),
        form(nd=None),
        form(nd="yes"),
        form(kind="O"),
        form(kind=b"O"),
        form(kind=b"V"),
        form(type="|b1", data=b"\x01\x02"),
        form(type="<U1", data=b"\xff\xff\xff\xff\x00\x00\x00\x00"),
        form(type=">U1", data=b"\x00\x11\x00\x00\x00\x00\x00\x00"),
        form(nd=False),
        form(nd=False, type="<f8", data=b""),
        form(nd=False, type="|b1", data=b"\x02"),
        form(nd=False, type="<U2", data=bytes(4)),
        form(nd=False, type="<U1", data=b"\xff\xff\xff\xff"),
        form(nd=False, type="|S3", data=b"ab"),
    ],
)
def test_forms_that_do_not_fit_are_refused(wrong: Any) -> None:
    with pytest.raises(MalformedMessage):
        unpack(msgpack.packb(wrong))
    with pytest.raises(MalformedMessage):
        unpack(msgpack.packb({key.encode(): value for key, value in wrong.items()}))
    with pytest.raises(MalformedMessage):
        from_map({"nd": None, **wrong}, "str")


def test_the_kind_may_be_left_out_by_other_languages() -> None:
    assert same(unpack(msgpack.packb(form(kind=...))), np.zeros(2, np.float32))


def test_a_pickle_in_msgpack_numpys_form_executes_nothing(tmp_path: Any) -> Any:
    mark = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    message = msgpack_numpy.packb(np.array([Payload()], object))
    with pytest.raises(MalformedMessage):
        unpack(message)
    assert not mark.exists()
    # the payload is live: the library whose form this is runs it
    msgpack_numpy.unpackb(message)[0].close()
    assert mark.exists()
