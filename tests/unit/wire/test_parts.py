import math
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import MalformedMessage, MessageTooLarge
from meshrl.wire.codec import pack, unpack
from meshrl.wire.parts import MAX_MESSAGE_BYTES, Assembler, is_part, split

MIB = 1024 * 1024


def part(*, lane: Any = 0, seq: Any = 1, attempt: Any = 0, index: Any = 0, count: Any = 2, chunk: Any = b"x") -> Any:
    return msgpack.packb([lane, seq, attempt, index, count, chunk])


def body_of(size: Any, fill: Any = 7) -> Any:
    return bytes((i * fill) % 251 for i in range(size))


def test_a_message_is_never_taken_for_a_part_nor_a_part_for_a_message() -> None:
    assert not is_part(pack({}))
    assert not is_part(pack({"epoch": 1, "lane": 0, "seq": 5, "action": 1}))
    assert not is_part(b"")
    assert all(is_part(piece) for piece in split(body_of(5000), 1024, lane=2**63 - 1, seq=1, attempt=0))


@pytest.mark.parametrize("size", [1025, 2000, 1024 * 7, 100_000])
@pytest.mark.parametrize("numbers", [(0, 0, 0), (2**63 - 1, 2**63 - 1, 2**63 - 1)])
def test_no_part_is_over_the_payload_limit(size: Any, numbers: Any) -> None:
    lane, seq, attempt = numbers
    pieces = split(body_of(size), 1024, lane=lane, seq=seq, attempt=attempt)
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 1024


def test_a_message_that_fits_is_not_split() -> None:
    assert split(bytes(1024), 1024, lane=0, seq=1, attempt=0) == [bytes(1024)]


def test_a_message_over_every_limit_is_refused() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        split(bytes(MAX_MESSAGE_BYTES + 1), MIB, lane=0, seq=1, attempt=0)
    assert caught.value.details == {"size_bytes": MAX_MESSAGE_BYTES + 1, "limit_bytes": MAX_MESSAGE_BYTES}


def test_a_payload_limit_without_room_for_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="1023"):
        split(bytes(2000), 1023, lane=0, seq=1, attempt=0)


@pytest.mark.parametrize(
    "value",
    [
        {"obs": np.arange(300 * 300 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 300, 3)},
        {"obs": np.arange(2_500_000, dtype=np.float64).reshape(100, 25_000)},
    ],
    ids=["an image", "20 MB"],
)
@pytest.mark.parametrize("limit", [MIB, 256 * 1024])
def test_large_observations_go_through_the_payload_limit(value: Any, limit: Any) -> None:
    pieces = split(pack(value), limit, lane=3, seq=9, attempt=0)
    assert max(map(len, pieces)) <= limit
    assembler = Assembler()
    *before, whole = [assembler.feed("a", piece, 0.0) for piece in pieces] if len(pieces) > 1 else pieces
    assert before == [None] * (len(pieces) - 1)
    assert whole is not None
    np.testing.assert_array_equal(unpack(whole)["obs"], value["obs"])
    assert assembler.buffered_bytes == 0


@given(st.data())
def test_messages_come_out_whole_whatever_the_order_the_duplicates_and_the_mixture(data: Any) -> None:
    bodies = {
        (source, lane): body_of(data.draw(st.integers(1025, 6000)), fill)
        for (source, lane), fill in zip([("a", 0), ("a", 1), ("b", 0)], (3, 5, 7), strict=True)
    }
    pieces = [
        (key, piece) for key, body in bodies.items() for piece in split(body, 1024, lane=key[1], seq=4, attempt=0)
    ]
    again = data.draw(st.lists(st.sampled_from(pieces), max_size=8))
    assembler, out = Assembler(), []
    for key, piece in data.draw(st.permutations(pieces + again)):
        joined = assembler.feed(key[0], piece, 0.0)
        if joined is not None:
            out.append((key, joined))
    assert sorted(out) == sorted(bodies.items())
    assert len(assembler) == 0
    assert assembler.buffered_bytes == 0


@given(st.data())
def test_a_message_with_a_part_lost_never_comes_out_until_a_new_attempt_does(data: Any) -> None:
    body = body_of(data.draw(st.integers(1100, 6000)))
    first = split(body, 1024, lane=0, seq=1, attempt=0)
    second = split(body, 1024, lane=0, seq=1, attempt=1)
    first.pop(data.draw(st.integers(0, len(first) - 1)))
    assembler = Assembler()
    assert all(assembler.feed("a", piece, 0.0) is None for piece in first)
    out = [assembler.feed("a", piece, 0.0) for piece in second + first]
    assert [joined for joined in out if joined is not None] == [body]
    assert len(assembler) == 0


def test_attempts_never_mix() -> None:
    assembler = Assembler()
    assert assembler.feed("a", part(attempt=0, index=0, chunk=b"old"), 0.0) is None
    assert assembler.feed("a", part(attempt=1, index=1, chunk=b"new"), 0.0) is None
    assert assembler.feed("a", part(attempt=0, index=1, chunk=b"old"), 0.0) is None
    assert assembler.feed("a", part(attempt=1, index=0, chunk=b"brand"), 0.0) == b"brandnew"


def test_a_part_that_comes_again_after_the_end_begins_nothing() -> None:
    assembler = Assembler()
    assembler.feed("a", part(index=0), 0.0)
    assert assembler.feed("a", part(index=1), 0.0) == b"xx"
    assert assembler.feed("a", part(index=1), 0.0) is None
    assert len(assembler) == 0
    assembler.feed("a", part(attempt=1, index=0), 0.0)
    assert assembler.feed("a", part(attempt=1, index=1), 0.0) == b"xx"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x96",
        b"\x80",
        pack({"a": 1}),
        part()[:-1],
        part() + b"\x00",
        msgpack.packb([0, 1, 0, 0, 2]),
        msgpack.packb([0, 1, 0, 0, 2, b"x", b"y"]),
        part(lane=-1),
        part(seq=-1),
        part(attempt=-1),
        part(index=-1),
        part(lane="0"),
        part(lane=True),
        part(seq=1.0),
        part(seq=None),
        part(seq=2**64 - 1),
        part(count=0),
        part(index=2, count=2),
        part(count=101),
        part(count=2**63),
        part(chunk="text"),
        part(chunk=b""),
        part(chunk=None),
        part(chunk=[1] * 6),
        part(chunk={"a": 1}),
        b"\x96\xdd\xff\xff\xff\xff" + bytes(9),
        b"\x96\x00\x01\x00\x00\x02\xc6\xff\xff\xff\xff",
        b"\x96" * 3000,
    ],
)
def test_parts_that_are_none_are_malformed(data: Any) -> None:
    assembler = Assembler(max_parts=100)
    with pytest.raises(MalformedMessage):
        assembler.feed("a", data, 0.0)
    assert assembler.buffered_bytes == 0


@given(st.binary(max_size=60))
def test_random_bytes_are_malformed_or_a_part(data: Any) -> None:
    for body in (data, b"\x96" + data):
        with suppress(MalformedMessage):
            Assembler().feed("a", body, 0.0)


@pytest.mark.parametrize("second", [part(index=0, chunk=b"y"), part(index=1, count=3)], ids=["bytes", "count"])
def test_parts_that_contradict_each_other_end_the_message(second: Any) -> None:
    assembler = Assembler()
    assembler.feed("a", part(index=0, chunk=b"x"), 0.0)
    assembler.feed("b", part(index=0, chunk=b"x"), 0.0)
    with pytest.raises(MalformedMessage):
        assembler.feed("a", second, 0.0)
    assert len(assembler) == 1
    assert assembler.feed("b", part(index=1), 0.0) == b"xx"


def test_over_the_bound_the_oldest_message_is_dropped_and_counted() -> None:
    assembler = Assembler(max_bytes=3000)
    for source in ("a", "b", "c", "d"):
        assembler.feed(source, part(chunk=bytes(800)), 0.0)
    assert assembler.dropped_for_room == 1
    assert assembler.buffered_bytes <= 3000
    assert assembler.feed("a", part(index=1), 0.0) is None  # its first part is gone
    assert assembler.feed("d", part(index=1), 0.0) == bytes(800) + b"x"


def test_a_flood_of_tiny_parts_stays_within_the_bound() -> None:
    assembler = Assembler(max_bytes=100_000)
    for number in range(5000):
        assembler.feed(f"source {number}", part(count=60_000, chunk=b"x"), 0.0)
        assert assembler.buffered_bytes <= 100_000
    assert len(assembler) + assembler.dropped_for_room == 5000


def test_a_single_message_over_the_bound_is_refused() -> None:
    assembler = Assembler(max_bytes=3000)
    assembler.feed("a", part(index=0, count=10, chunk=bytes(1300)), 0.0)
    assembler.feed("a", part(index=1, count=10, chunk=bytes(1300)), 0.0)
    with pytest.raises(MessageTooLarge):
        assembler.feed("a", part(index=2, count=10, chunk=bytes(1300)), 0.0)
    assert assembler.buffered_bytes == 0


def test_a_claim_of_many_parts_takes_no_memory() -> None:
    assembler = Assembler(max_parts=2**62)
    assembler.feed("a", part(count=2**62), 0.0)
    assert assembler.buffered_bytes < 1000


def test_messages_of_which_nothing_is_heard_are_swept() -> None:
    assembler = Assembler(max_age_s=10.0)
    assembler.feed("a", part(index=0, count=3), 0.0)
    assembler.feed("b", part(index=0, count=3), 0.0)
    assembler.feed("b", part(index=1, count=3), 8.0)
    assert assembler.sweep(10.0) == 0
    assert assembler.sweep(math.nextafter(10.0, 11.0)) == 1
    assert assembler.dropped_for_age == 1
    assert assembler.feed("a", part(index=1, count=3), 12.0) is None
    assert assembler.feed("b", part(index=2, count=3), 12.0) == b"xxx"
    assert assembler.sweep(1000.0) == 1
    assert assembler.buffered_bytes == 0
