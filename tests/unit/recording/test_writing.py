"""How much is noted until a chunk is full."""

from meshrl.protocol.transcript import MAX_NOTED_BYTES
from meshrl.recording.writing import CHUNK_BYTES, Size


def test_the_first_chunk_says_how_much_smaller_the_next_ones_become() -> None:
    size = Size()
    assert size.limit == CHUNK_BYTES
    size.seen(noted=20 * CHUNK_BYTES, stored=CHUNK_BYTES)
    assert size.limit == 20 * CHUNK_BYTES


def test_one_chunk_among_others_says_less() -> None:
    size = Size()
    size.seen(noted=20 * CHUNK_BYTES, stored=CHUNK_BYTES)
    size.seen(noted=8 * CHUNK_BYTES, stored=CHUNK_BYTES)
    assert size.limit == 17 * CHUNK_BYTES


def test_little_that_was_noted_says_nothing() -> None:
    size = Size()
    size.seen(noted=100, stored=700)
    assert size.limit == CHUNK_BYTES


def test_much_that_compresses_well_is_taken_before_there_is_no_room_for_more() -> None:
    size = Size()
    size.seen(noted=1000 * CHUNK_BYTES, stored=CHUNK_BYTES)
    assert size.limit == MAX_NOTED_BYTES // 4
