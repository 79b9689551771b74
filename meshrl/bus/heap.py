"""The heap: large messages without giving their memory back and fetching it anew for each.

glibc gives memory at the heap's end back to the system as soon as there is more of it than twice the largest block
that was mapped and freed so far. A message of a megabyte is copied a few times on its way, so that its memory came
and went with each: 600 page faults, and two thirds of the whole time (900 KB messages: 209 MB/s with them, 627
without). A block that was mapped once and freed, of which no page was ever touched, raises both bounds for good.
Other C libraries take no notice of it.
"""

from __future__ import annotations

from functools import cache

# Just below the largest size from which glibc learns (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB on 64 bit).
_BLOCK_BYTES = 30 * 1024 * 1024


@cache
def keep_large_blocks() -> None:
    """Let this process keep what large messages need; costs some microseconds, and no memory of its own.

    Once for all connections: a second block of that size would come from the heap and be filled with zeros, in 5 ms.
    """
    bytearray(_BLOCK_BYTES)
