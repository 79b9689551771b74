"""Compression: Zstandard frames, of which nobody is given more than was asked for.

A frame of a few hundred bytes may hold gigabytes, and zstandard's own ``max_output_size`` counts for nothing where a
frame says its size: it allocates what is said. So here a frame has to say its size, and is read only up to a limit.

Behind the frame stands its xxh3, in a skippable frame, which other readers of Zstandard pass over. Zstandard has a
checksum of its own, of what a frame holds: of pictures that is a hundred times more, and took a fifth of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import xxhash
import zstandard

from meshrl.errors import MalformedMessage

# Fast enough for whoever steps: some hundred MB a second, and a third to a thirtieth of the size.
LEVEL = 1

# A skippable frame (RFC 8878, 3.1.2): any of sixteen magic numbers, and how many bytes follow.
_CHECK_BYTES = 8
_CHECK = (0x184D2A5D).to_bytes(4, "little") + _CHECK_BYTES.to_bytes(4, "little")


class _PerThread(threading.local):
    """Neither may be shared between threads, and each costs some hundred microseconds to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_PER_THREAD = _PerThread()


def compress(data: bytes) -> bytes:
    """A frame that says its size, and its check; safe from any thread."""
    return _checked(_PER_THREAD.compressor.compress(data))


def compress_parts(parts: Sequence[Any]) -> bytes:
    """The same of bytes, or arrays in C order, that stand one behind another, without joining them."""
    size = sum(memoryview(part).nbytes for part in parts)
    frame = _PER_THREAD.compressor.compressobj(size=size)
    return _checked(b"".join([*map(frame.compress, parts), frame.flush()]))


def _checked(frame: bytes) -> bytes:
    return frame + _CHECK + xxhash.xxh3_64_digest(frame)


def decompress(data: bytes, limit_bytes: int) -> bytes:
    """What a frame holds; safe from any thread.

    Args:
        data: one whole frame with its check, or one with Zstandard's own, and nothing behind it.
        limit_bytes: more than this is not read.

    Raises:
        MalformedMessage: it is no frame, says no size or one over the limit, or is not what it says.
    """
    end = len(data) - len(_CHECK) - _CHECK_BYTES
    checked = end > 0 and data.startswith(_CHECK, end)
    frame = data[:end] if checked else data
    try:
        told = zstandard.get_frame_parameters(frame)
        size = told.content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN or size > limit_bytes:
            said = "no size" if size == zstandard.CONTENTSIZE_UNKNOWN else f"{size} bytes"
            raise MalformedMessage(
                f"a compressed frame that says {said} is not read; the limit is {limit_bytes} bytes",
                limit_bytes=limit_bytes,
            )
        if not (checked or told.has_checksum):
            raise MalformedMessage("a compressed frame that nothing checks is not read", size_bytes=len(data))
        if checked and xxhash.xxh3_64_digest(frame) != data[-_CHECK_BYTES:]:
            raise MalformedMessage("a compressed frame is not what its check is of", size_bytes=len(data))
        return _PER_THREAD.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise MalformedMessage(f"not a compressed frame: {str(exc)[:200]}", size_bytes=len(data)) from exc
