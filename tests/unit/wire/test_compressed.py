"""Compressed frames: read as they were written, or refused before anything is allocated for what they claim."""

import tracemalloc

import pytest
import zstandard

from meshrl.errors import MalformedMessage
from meshrl.wire.compressed import compress, decompress


@pytest.mark.parametrize("data", [b"", b"x", b"abc" * 10_000, bytes(range(256)) * 64])
def test_what_was_compressed_is_read_again(data: bytes) -> None:
    assert decompress(compress(data), len(data)) == data


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (1 << 28))
    assert len(bomb) < 1 << 14
    tracemalloc.start()
    with pytest.raises(MalformedMessage, match="268435456 bytes is not read; the limit is 1048576"):
        decompress(bomb, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_frame_that_does_not_say_its_size_is_refused() -> None:
    quiet = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000)
    with pytest.raises(MalformedMessage, match="says no size"):
        decompress(quiet, 1 << 20)


def test_a_frame_that_says_less_than_it_holds_is_refused() -> None:
    frame = bytearray(compress(b"x" * 200))
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 200
    frame[5] = 100  # where a small frame has its size
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 100
    with pytest.raises(MalformedMessage, match="not a compressed frame"):
        decompress(bytes(frame), 1 << 20)


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_what_was_changed_on_the_way_is_refused(at: int) -> None:
    frame = bytearray(compress(bytes(range(64))))
    frame[at % len(frame)] ^= 0x55
    with pytest.raises(MalformedMessage):
        decompress(bytes(frame), 1 << 20)


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_half_a_frame_is_none(cut: int) -> None:
    with pytest.raises(MalformedMessage):
        decompress(compress(b"abc" * 100)[:cut], 1 << 20)


def test_nothing_may_stand_behind_a_frame() -> None:
    with pytest.raises(MalformedMessage, match="unused data"):
        decompress(compress(b"abc") + b"x", 1 << 20)
