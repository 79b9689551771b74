import enum
import math
import random
import struct
import threading
import tracemalloc
from collections import OrderedDict, defaultdict
from contextlib import suppress
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
import pytest
from gymnasium.spaces import GraphInstance
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage, UnencodableValue
from meshrl.wire import codec, forms
from meshrl.wire.codec import Codec, pack, unpack
from tests.unit.wire.strategies import all_spaces, same, values

REQUEST = {"epoch": 1, "lane": 0, "seq": 5, "action": 1}
REPLY = {
    "seq": 5,
    "obs": np.array([0.1, -0.0, math.nan, math.inf], np.float32),
    "reward": 1.0,
    "terminated": False,
    "truncated": False,
    "info": {"x": (1, 2.5, np.float64(3)), "y": {"nd": 4}},
}
NAN = struct.unpack("<d", bytes.fromhex("0123456789abf87f"))[0]


class Point(NamedTuple):
    x: Any
    y: Any


class Colour(enum.IntEnum):
    RED = 1


class Word(enum.StrEnum):
    ND = "nd"


class Odd(float):
    pass


@given(values)
def test_every_value_comes_back_with_its_types_and_bits(value: Any) -> None:
    assert same(unpack(pack(value)), value)
    assert same(unpack(Codec("bytes").pack(value)), value)


@given(all_spaces, st.integers(0, 2**31 - 1))
def test_samples_of_every_space_come_back_with_their_types_and_bits(space: Any, seed: Any) -> None:
    space.seed(seed)
    sample = space.sample()
    back = unpack(pack({"obs": sample, "info": {"was": [sample]}}))
    assert same(back, {"obs": sample, "info": {"was": [sample]}})


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**5000, -(10**5000)),
        *(0.0, -0.0, math.inf, -math.inf, math.nan, NAN, 5e-324, 0.1),
        *(complex(-0.0, -0.0), complex(math.nan, 1), complex(NAN, -NAN), 1e300j, complex(0, -math.inf)),
        *("", "ä\0", "\ud800x", "nd", b"", b"\xff", bytearray(b"ab"), bytearray()),
        *([], (), set(), frozenset(), {}, [()], ((),), {(): ()}, [[[]]], {"": None}),
        *({1: 2}, {None: 1, True: 2, 2.5: 3, b"k": 4, (1, "a"): 5, frozenset({1}): 6}, {"a": 1, 2: 3}),
        *(
            {"nd": True},
            {"py": "tuple", "v": [1]},
            {"complex": True, "data": "1j"},
            {b"nd": 1},
            {b"complex": 2},
        ),
        {"nd": True, "type": "<f4", "kind": "", "shape": [2], "data": bytes(8)},
        {b"nd": False, b"type": "<f4", b"data": bytes(4)},
        {"\ud800": 1},
        {"map": {"py": {"nd": {"complex": [{"py": 1}]}}}},
        {"a": (1, {"b": bytearray(b"x")}, {3, (4, 5)})},
        GraphInstance(np.zeros((2, 3), np.float32), None, None),
        GraphInstance((1, 2), np.zeros(1), np.zeros((1, 2), np.int32)),
        {np.int64(3): np.str_("a\0"), np.str_("b"): 1},
        [
            np.datetime64("NaT", "s"),
            np.datetime64("2020-01-01T00:00", ("s", 25)),
            np.timedelta64(3, "D"),
            np.bytes_(b"\0"),
        ],
        REPLY,
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, int) else f"int of {value.bit_length()} bits",
)
def test_edges_of_every_type_come_back(value: Any) -> None:
    assert same(unpack(pack(value)), value)
    assert same(unpack(Codec("bytes").pack({"x": [value]})), {"x": [value]})
    assert same(unpack(memoryview(pack(value))), value)


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Point(1, (2, Point(3, 4))), (1, (2, (3, 4)))),
        (Colour.RED, 1),
        (Word.ND, "nd"),
        ({Word.ND: 1}, {"nd": 1}),
        ({Colour.RED: Colour.RED}, {1: 1}),
        (Odd(2.5), 2.5),
        ([Odd(2.5), (Odd(-0.0),)], [2.5, (-0.0,)]),
        ({"a": {"b": OrderedDict(nd=Odd(1))}}, {"a": {"b": {"nd": 1.0}}}),
    ],
)
def test_instances_of_subclasses_travel_as_their_base_type(value: Any, base: Any) -> None:
    assert same(unpack(pack(value)), base)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), ""),
        ({"info": {"x": [0, 1, 2, object()]}}, "info.x[3]"),
        ({"a": (1, {"b c": {5}, "d": open})}, "a[1].d"),
        ({"a b": [object()]}, "['a b'][0]"),
        ({3: object()}, "[int]"),
        ([memoryview(b"x")], "[0]"),
        ([range(3)], "[0]"),
        ([np.datetime64], "[0]"),
        ({"t": [OrderedDict(k=object())]}, "t[0].k"),
        (GraphInstance((), None, cast("Any", object())), "[2]"),
    ],
)
def test_values_without_a_form_are_refused_with_their_path(value: Any, path: Any) -> None:
    with pytest.raises(UnencodableValue) as caught:
        pack(value)
    assert caught.value.details["path"] == path


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop += [loop, loop]
    knot: dict[str, Any] = {}
    knot["a"] = (knot,)
    for value in (loop, knot):
        with pytest.raises(UnencodableValue):
            pack(value)


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}])
def test_whatever_depth_is_packed_is_also_unpacked(wrap: Any) -> None:
    value, packed = 1, 0
    for depth in range(600):
        try:
            body = pack(value)
            assert pack(unpack(body)) == body  # comparing the values would recurse in Python
            packed = depth
        except UnencodableValue:
            break
        value = wrap(value)
    else:
        pytest.fail("no bound on depth")
    assert packed >= 100


def test_a_codec_packs_on_after_an_error() -> None:
    codec = Codec()
    with pytest.raises(UnencodableValue):
        codec.pack({"a": 1, "b": object()})
    assert codec.pack(REQUEST) == msgpack.packb(REQUEST)


def test_plain_messages_are_plain_msgpack() -> None:
    plain = {"a": [1, 2.5, None, "x", b"y", {"b": True}]}
    assert pack(plain) == msgpack.packb(plain)
    assert unpack(msgpack.packb(plain)) == plain


def test_module_functions_may_be_called_from_several_threads() -> None:
    wrong = []

    def work(number: Any) -> None:
        value = {"n": (number, [np.full(300, number)] * 5)}
        for _ in range(300):
            if not same(unpack(pack(value)), value):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",  # cut off
        b"\x01\x01",  # more after it
        b"\x81\xa1a",
        b"\xd9\x02\xff\xfe",  # not UTF-8
        b"\xa3\xed\xa0\x80",  # a surrogate
        b"\xdd\xff\xff\xff\xff",  # four thousand million items
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x01",
        b"\x81\xa1a" * 5000 + b"\x01",
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xd4\x01a",
        b"\xc7\x00\x05",
        b"\x81\x01\x02",  # maps have text keys
        b"\x81\xc0\x02",
        b"\x81\x90\x02",
        b"\x81\x80\x02",
        *(
            msgpack.packb({"py": kind, "v": 5})
            for kind in ("tuple", "set", "map", "int", "complex", "graph", "str", "bytearray", "no such")
        ),
        msgpack.packb({"py": 5, "v": 5}),
        *(msgpack.packb({"py": kind, "v": "x"}) for kind in ("tuple", "bytearray", "int", "map", "str")),
        msgpack.packb({"py": None, "v": 5}),
        msgpack.packb({"py": [], "v": 5}),
        msgpack.packb({"py": "tuple"}),
        msgpack.packb({"py": "tuple", "v": [], "w": 1}),
        msgpack.packb({"py": "set", "v": [[]]}),
        msgpack.packb({"py": "set", "v": [1, 1]}),
        msgpack.packb({"py": "frozenset", "v": [{"a": 1}]}),
        msgpack.packb({"py": "map", "v": [[1, 2], [1, 3]]}),
        msgpack.packb({"py": "map", "v": [[1]]}),
        msgpack.packb({"py": "map", "v": [[[], 1]]}),
        msgpack.packb({"py": "map", "v": [["a", "b"], "cd"]}),
        msgpack.packb({"py": "int", "v": "0x"}),
        msgpack.packb({"py": "int", "v": "1" * 5000}),
        msgpack.packb({"py": "int", "v": "0x1_0"}),
        msgpack.packb({"py": "complex", "v": [1.0]}),
        msgpack.packb({"py": "complex", "v": [1, 2]}),
        msgpack.packb({"py": "graph", "v": [1, 2]}),
        msgpack.packb({"py": "str", "v": b"\xff"}),
        msgpack.packb({"complex": True, "data": "__import__('os')"}),
        msgpack.packb({"complex": True, "data": "1" * 1000}),
        msgpack.packb({"complex": True}),
        msgpack.packb({"complex": 1, "data": "1j"}),
        msgpack.packb({b"complex": True, b"data": 5}),
        msgpack.packb({"nd": True}),
    ],
)
def test_bytes_that_are_no_message_are_malformed(data: Any) -> None:
    with pytest.raises(MalformedMessage):
        unpack(data)


@pytest.mark.parametrize("data", [None, "text", 5, [b"\x01"]])
def test_what_is_not_bytes_is_malformed(data: Any) -> None:
    with pytest.raises(MalformedMessage):
        unpack(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_malformed(data: Any) -> None:
    with suppress(MalformedMessage):
        unpack(data)


@given(values, st.data())
def test_mutated_messages_are_a_value_or_malformed(value: Any, data: Any) -> None:
    body = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MalformedMessage):
        unpack(bytes(body))


def test_twenty_thousand_mutations_are_values_or_malformed() -> None:
    rng = random.Random(20)
    seeds = [
        pack(value)
        for value in (
            REQUEST,
            REPLY,
            {"a": {1: 2, (3,): {4}}, "b": bytearray(b"x"), "c": 2**70, "d": 1j, "e": complex(NAN, 0)},
            [
                np.array(["ab", "c"]),
                np.array([True, False]),
                np.datetime64("2020"),
                np.str_("x"),
                np.zeros((2, 0)),
            ],
            {"nd": 1, "g": GraphInstance(np.zeros(2), None, None), "s": "\ud800", "f": frozenset({b"1"})},
        )
    ] + [Codec("bytes").pack(REPLY)]
    texts = [
        b"|O8",
        b"O",
        b"V8",
        b"<f8",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\x7f\xff\xff\xff",
        b"\xa2py",
        b"\xa2nd",
        b"\xcf" + b"\xff" * 8,
    ]
    read = refused = 0
    for _ in range(20_000):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(body) + 1)
            match rng.randrange(5):
                case 0:
                    body[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del body[at : at + rng.randint(1, 4)]
                case 2:
                    body[at:at] = rng.randbytes(rng.randint(1, 4))
                case 3:
                    text = rng.choice(texts)
                    body[at : at + len(text)] = text
                case 4:
                    body[at:] = body[at:][: rng.randint(0, 30)]
        try:
            unpack(bytes(body))
            read += 1
        except MalformedMessage:
            refused += 1
    assert read > 500
    assert refused > 500


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\x7f\xff\xff\xff" + bytes(15),
        b"\xdf\x7f\xff\xff\xff" + bytes(15),
        b"\xc6\x7f\xff\xff\xff" + bytes(15),
        msgpack.packb({"nd": True, "type": "<f8", "shape": [2**40], "data": b""}),
        msgpack.packb({"nd": True, "type": "<U999999", "shape": [2**20, 0], "data": b""}),
        msgpack.packb({"nd": False, "type": "<U999999999", "data": b""}),
    ],
)
def test_a_small_message_never_takes_much_memory(data: Any) -> None:
    tracemalloc.start()
    try:
        unpack(data)
    except MalformedMessage:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8_000_000


def by_the_hook(data: bytes) -> object:
    """What reading every map through the hook gives: the rule that the quick reading must equal."""
    try:
        return msgpack.unpackb(data, object_hook=forms.revive, ext_hook=codec._refuse_ext, max_ext_len=0)
    except Exception:
        return MalformedMessage


def quickly(data: bytes) -> object:
    try:
        return unpack(data)
    except MalformedMessage:
        return MalformedMessage


@given(
    st.dictionaries(
        st.sampled_from(["obs", "nd", "py", "end", "info", "complex"]) | st.text(max_size=4), values, max_size=4
    )
)
def test_the_quick_reading_of_small_messages_equals_the_reading_by_the_hook(value: dict[str, object]) -> None:
    for style in ("str", "bytes"):
        data = Codec(style).pack(value)
        assert same(quickly(data), by_the_hook(data))
        assert same(quickly(data), value)


def test_the_quick_reading_equals_the_reading_by_the_hook_for_mutated_messages() -> None:
    chance = random.Random(3)
    array = np.arange(4, dtype=np.float32)
    seeds = [
        pack({"obs": array, "reward": 1.0, "info": {"x": "end"}, "seq": 5}),
        pack({"obs": {"a": array}, "info": {}, "seq": 5}),
        pack({"obs": 3, "reward": np.float64(1), "info": {"nd": 1}, "seq": 5}),
        pack({"epoch": 1, "lane": 0, "seq": 5, "action": 1}),
        pack(array),
    ]
    for _ in range(20_000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((chance.randrange(256), *b"ndpy\x81\xa2\xc2\xc3"))
        quick, slow = quickly(bytes(data)), by_the_hook(bytes(data))
        assert same(quick, slow), bytes(data)
