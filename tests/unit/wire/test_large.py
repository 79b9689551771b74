"""Messages that end in one large array are the same messages, and read the same by either way."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire import large
from meshrl.wire.arrays import KeyStyle
from meshrl.wire.codec import Codec, pack, unpack
from meshrl.wire.large import LARGE_BYTES, Rows, large_rows

ITEMS = LARGE_BYTES // 4
KEY = b"\xa4data\xc6"


def read_plainly(data: bytes) -> Any:
    """What a reader sees that knows nothing of large arrays."""
    return msgpack.unpackb(data)


@pytest.mark.parametrize("dtype", ["|u1", "<f4", "|b1", "<c8"])
@pytest.mark.parametrize("style", ["str", "bytes"])
def test_rows_are_written_as_the_array_that_they_are(dtype: str, style: KeyStyle) -> None:
    obs = np.arange(6 * ITEMS).reshape(3, 2, -1).astype(dtype)
    items = [row.copy() for row in obs]
    rows = large_rows(items, items[0].shape, items[0].dtype)
    assert type(rows) is Rows
    for rest in ({"rewards": np.zeros(3)}, {"infos": {1: "a key that msgpack takes alone in the slow way"}}):
        packed = Codec(style).pack_batch({**rest, "obs": rows})
        assert packed == Codec(style).pack_batch({**rest, "obs": obs})
        assert np.array_equal(unpack(packed)["obs"], obs)


@pytest.mark.parametrize("bad", [np.zeros((2, ITEMS), ">f4"), np.zeros((ITEMS, 2), "f4").T, np.zeros((1, ITEMS), "f4")])
def test_what_is_not_just_such_an_array_makes_no_rows(bad: NDArray[Any]) -> None:
    good = np.zeros((2, ITEMS), np.float32)
    assert large_rows([good, good], good.shape, good.dtype) is not None
    assert large_rows([good, bad], good.shape, good.dtype) is None
    assert large_rows([good, good.tolist()], good.shape, good.dtype) is None
    assert large_rows([good[:, :4], good[:, :4]], (2, 4), good.dtype) is None  # too small to be worth it


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "|u1", "|b1", "<U3", "|S5", "<c8"])
def test_a_frame_with_a_large_batch_comes_back_whole_and_is_plain_msgpack(dtype: str) -> None:
    obs = np.arange(3 * ITEMS * 4).reshape(3, -1).astype(dtype)
    frame = {"obs": obs, "rewards": np.zeros(3), "infos": {"x": [1, b"y", None]}, "seq": 7}
    packed = Codec().pack_batch(frame)
    assert read_plainly(packed) == read_plainly(pack(frame))
    for data in (packed, pack(frame)):
        read = unpack(data)
        assert read["obs"].dtype == obs.dtype
        assert np.array_equal(read["obs"], obs)
        assert read["obs"].flags.owndata
        assert read["obs"].flags.writeable
        assert np.array_equal(read["rewards"], np.zeros(3))
        assert read["infos"] == {"x": [1, b"y", None]}


@pytest.mark.parametrize("dtype", ["|u1", "|b1", "<f4", "<c8"])
def test_an_array_of_a_message_that_is_its_readers_own_is_made_where_it_is(dtype: str) -> None:
    obs = np.arange(6 * ITEMS).reshape(3, -1).astype(dtype)
    for padding in range(8):  # of which it depends where the array's first byte lies
        own = bytearray(Codec().pack_batch({"obs": obs, "x": b"y" * padding}))
        before = bytes(own)
        read = unpack(own)["obs"]
        assert np.array_equal(read, obs)
        assert read.flags.writeable
        assert read.flags.aligned
        read[...] = 0
        assert (bytes(own) != before) == np.shares_memory(read, np.frombuffer(own, np.uint8))
        assert np.shares_memory(read, np.frombuffer(own, np.uint8)) or obs.itemsize > 1
        assert np.array_equal(unpack(before)["obs"], obs)
        assert not np.shares_memory(unpack(before)["obs"], np.frombuffer(before, np.uint8))


def test_an_array_in_another_order_is_written_in_its_own() -> None:
    obs = np.arange(2 * ITEMS, dtype=np.float32).reshape(2, -1).T
    assert not obs.flags.c_contiguous
    assert np.array_equal(unpack(Codec().pack_batch({"obs": obs}))["obs"], obs)


@pytest.mark.parametrize(
    "obs",
    [
        np.zeros(3),
        {"a": np.zeros(ITEMS)},
        (np.zeros(ITEMS), 3),
        np.zeros(ITEMS, "<M8[s]"),
        "text",
        None,
    ],
)
def test_what_is_no_large_array_is_written_as_ever(obs: object) -> None:
    assert Codec().pack_batch({"obs": obs, "seq": 1}) == pack({"obs": obs, "seq": 1})


def test_values_that_need_the_slow_way_take_it() -> None:
    frame: dict[str, Any] = {"obs": np.zeros(ITEMS), "infos": {1: {2}, "nd": 3}}
    read = unpack(Codec().pack_batch(frame))
    assert read["infos"] == {1: {2}, "nd": 3}
    assert np.array_equal(read["obs"], frame["obs"])


def test_peers_that_want_bytes_for_keys_get_them() -> None:
    packed = Codec("bytes").pack_batch({"obs": np.zeros(ITEMS)})
    assert b"nd" in read_plainly(packed)["obs"]
    assert np.array_equal(unpack(packed)["obs"], np.zeros(ITEMS))


@pytest.mark.parametrize(
    "value",
    [
        {"data": b"x" * LARGE_BYTES},
        {"a": {"data": b"x" * LARGE_BYTES}},
        {"a": np.zeros((0, 3)), "data": b"x" * LARGE_BYTES},
        {"a": KEY * LARGE_BYTES},
        {"a": KEY + b"\0\0\0\0", "z": np.zeros(ITEMS)},
        {"a": np.zeros((4, 0)), "z": np.ones(ITEMS)},
        {"infos": {"data": np.ones(3)}, "z": np.zeros(ITEMS)},
        {"infos": {"nd": np.ones(3), "shape": [3], "data": b""}, "z": np.zeros(ITEMS)},
        [np.ones(ITEMS), np.zeros(ITEMS)],
    ],
)
def test_what_only_looks_like_one_is_read_as_what_it_is(value: Any) -> None:
    assert read_plainly(pack(unpack(pack(value)))) == read_plainly(pack(value))


def hollow(shape: list[int]) -> dict[str, Any]:
    """An array's map without its data."""
    return {"nd": True, "type": "|u1", "kind": "", "shape": shape, "data": b""}


def ending(head: dict[str, Any], tail: bytes) -> bytes:
    """A message whose last value's bytes are taken out of it and ``tail`` put there."""
    packed: bytes = msgpack.packb(head)
    assert packed.endswith(b"\xc4\x00")
    return packed[:-2] + b"\xc6" + len(tail).to_bytes(4, "big") + tail


@pytest.mark.parametrize(
    "data",
    [
        ending({"a": hollow([LARGE_BYTES]), "obs": hollow([LARGE_BYTES])}, bytes(LARGE_BYTES)),
        ending({"obs": hollow([LARGE_BYTES + 1])}, bytes(LARGE_BYTES)),
        ending({"obs": hollow([1 << 40, 1 << 40])}, bytes(LARGE_BYTES)),
        ending({"obs": {**hollow([LARGE_BYTES // 8]), "type": "|O"}}, bytes(LARGE_BYTES)),
        ending({"obs": {**hollow([LARGE_BYTES]), "type": "|b1"}}, b"\2" * LARGE_BYTES),
        ending({"obs": hollow([LARGE_BYTES])}, bytes(LARGE_BYTES))[:-1],
        ending({"obs": hollow([LARGE_BYTES])}, bytes(LARGE_BYTES)) + b"x",
        KEY + (LARGE_BYTES).to_bytes(4, "big") + bytes(LARGE_BYTES),
    ],
)
def test_what_does_not_fit_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        unpack(data)


@given(st.data())
def test_no_change_of_a_byte_does_more_than_make_another_value_or_none(data: st.DataObject) -> None:
    message = bytearray(Codec().pack_batch({"seq": 1, "obs": np.zeros(LARGE_BYTES, np.uint8), "infos": {"a": "b"}}))
    head = message.index(KEY) + len(KEY) + 4
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, head))] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(message))
    except MalformedMessage:
        return


def test_arrays_full_of_the_byte_that_is_looked_for_are_not_looked_through_byte_by_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    is_head = large._is_head

    def counted(data: bytes, end: int) -> bool:
        looked.append(end)
        return is_head(data, end)

    monkeypatch.setattr(large, "_is_head", counted)
    full = np.full((300, 300, 3), 0xC6, np.uint8)
    frames: list[dict[str, Any]] = [{"obs": full, "seq": 3}, {"a": full[:50], "obs": full}, {"seq": 0xC6, "obs": full}]
    for frame in frames:
        read = unpack(Codec().pack_batch(frame))
        assert read.keys() == frame.keys()
        assert all(np.array_equal(read[key], value) for key, value in frame.items())
    assert len(looked) < 20
