"""What is kept of messages whose arrays are somebody else's to write to."""

from __future__ import annotations

from meshrl.wire.kept import Reads, kept, whole


def test_bytes_are_kept_as_they_are() -> None:
    message = b"a small one"
    assert kept(message, None) is message
    assert whole(message) is message


def test_what_may_be_written_to_is_kept_as_it_was_read() -> None:
    parts = (memoryview(b"..head")[2:], b" and ", memoryview(b"tail..")[:4])
    message = bytearray().join(parts)
    told = kept(message, Reads(parts))  # type: ignore[arg-type]  # bytes to all who only read it
    message[:4] = b"tail"
    assert len(told) == len(message)
    assert whole(told) == b"head and tail"


def test_without_its_reads_it_is_copied() -> None:
    message = bytearray(b"of unknown reads")
    told = kept(message, None)  # type: ignore[arg-type]
    message[:] = b"x"
    assert whole(told) == b"of unknown reads"
