"""Compression: Zstandard frames, of which nobody is given more than was asked for.

A frame of a few hundred bytes may hold gigabytes, and zstandard's own ``max_output_size`` counts for nothing where a
frame says its size: it allocates what is said. So here a frame has to say its size, and is read only up to a limit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import zstandard

from meshrl.errors import MalformedMessage

# Fast enough for whoever steps: some hundred MB a second, and a third to a thirtieth of the size.
LEVEL = 1


class _PerThread(threading.local):
    """Neither may be shared between threads, and each costs some hundred microseconds to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_PER_THREAD = _PerThread()


def compress(data: bytes) -> bytes:
    """A frame that says its size and has a checksum; safe from any thread."""
    return _PER_THREAD.compressor.compress(data)


def compress_parts(parts: Sequence[Any]) -> bytes:
    """The same of bytes, or arrays in C order, that stand one behind another, without joining them."""
    size = sum(memoryview(part).nbytes for part in parts)
    frame = _PER_THREAD.compressor.compressobj(size=size)
    return b"".join([*map(frame.compress, parts), frame.flush()])


def decompress(frame: bytes, limit_bytes: int) -> bytes:
    """What a frame holds; safe from any thread.

    Args:
        frame: one whole frame and nothing behind it.
        limit_bytes: more than this is not read.

    Raises:
        MalformedMessage: it is no frame, says no size or one over the limit, or is not what it says.
    """
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN or size > limit_bytes:
            said = "no size" if size == zstandard.CONTENTSIZE_UNKNOWN else f"{size} bytes"
            raise MalformedMessage(
                f"a compressed frame that says {said} is not read; the limit is {limit_bytes} bytes",
                limit_bytes=limit_bytes,
            )
        return _PER_THREAD.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise MalformedMessage(f"not a compressed frame: {str(exc)[:200]}", size_bytes=len(frame)) from exc
