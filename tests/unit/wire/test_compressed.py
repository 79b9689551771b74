"""Compressed frames: read as they were written, or refused before anything is allocated for what they claim."""

import tracemalloc

import pytest
import xxhash
import zstandard

from meshrl.errors import MalformedMessage
from meshrl.wire.compressed import compress, decompress

CHECK_BYTES = 16


def checked(frame: bytes | bytearray) -> bytes:
    """As it would be if that had been written."""
    return bytes(frame) + compress(b"")[-CHECK_BYTES:-8] + xxhash.xxh3_64_digest(frame)


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


@pytest.mark.parametrize("size", [100, 250])
def test_a_frame_that_holds_more_or_less_than_it_says_is_refused(size: int) -> None:
    frame = bytearray(compress(b"x" * 200)[:-CHECK_BYTES])
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 200
    frame[5] = size  # where a small frame has its size
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == size
    with pytest.raises(MalformedMessage, match="not a compressed frame"):
        decompress(checked(frame), 1 << 20)


def test_what_nothing_checks_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="nothing checks"):
        decompress(compress(b"abc")[:-CHECK_BYTES], 1 << 20)


def test_zstandards_own_checksum_is_as_good() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(range(64)))
    assert decompress(frame, 1 << 20) == bytes(range(64))
    with pytest.raises(MalformedMessage, match="checksum"):
        decompress(frame[:-1] + bytes([frame[-1] ^ 1]), 1 << 20)


def test_any_reader_of_zstandard_passes_over_the_check() -> None:
    data = b"abc" * 1000
    reader = zstandard.ZstdDecompressor().stream_reader(compress(data), read_across_frames=True)
    assert reader.read() == data


@pytest.mark.parametrize("at", range(len(compress(bytes(range(64))))))
def test_what_was_changed_on_the_way_is_refused(at: int) -> None:
    frame = bytearray(compress(bytes(range(64))))
    frame[at] ^= 0x55
    with pytest.raises(MalformedMessage):
        decompress(bytes(frame), 1 << 20)


@pytest.mark.parametrize("cut", [0, 1, 5, -17, -16, -8, -1])
def test_half_a_frame_is_none(cut: int) -> None:
    with pytest.raises(MalformedMessage):
        decompress(compress(b"abc" * 100)[:cut], 1 << 20)


def test_nothing_may_stand_behind_a_frame() -> None:
    whole = compress(b"abc")
    for more in (b"x", whole, whole[-CHECK_BYTES:]):
        with pytest.raises(MalformedMessage):
            decompress(whole + more, 1 << 20)
    with pytest.raises(MalformedMessage, match="unused data"):
        decompress(checked(whole), 1 << 20)
