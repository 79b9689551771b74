"""Large observations side by side: what was put there is what is read, in as few pieces as there are."""

import numpy as np
import pytest

from meshrl.protocol.shelf import PIECE_BYTES, Shelf, rows_of
from meshrl.wire.codec import pack, pack_in_parts, unpack
from meshrl.wire.large import Rows

SHAPE = (32, 32, 4)
NBYTES = 4096
DTYPE = np.dtype(np.uint8)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, SHAPE, np.uint8) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1000])
def test_what_was_put_is_told_in_order(count: int) -> None:
    shelf, shown = Shelf(DTYPE, SHAPE), pictures(count)
    rows = rows_of([shelf.put(one) for one in shown])
    whole = rows.stacked() if isinstance(rows, Rows) else rows
    assert np.array_equal(whole, np.stack(shown))
    assert np.array_equal(unpack(b"".join(pack_in_parts({}, "obs", rows)))["obs"], np.stack(shown))


def test_rows_are_copies() -> None:
    shelf, one = Shelf(DTYPE, SHAPE), np.ones(SHAPE, np.uint8)
    rows = [shelf.put(one) for _ in range(3)]
    one[:] = 2
    assert all((row == 1).all() for row in rows)


def test_there_are_few_pieces_and_none_is_larger_than_they_may_be() -> None:
    shelf = Shelf(DTYPE, SHAPE)
    rows = rows_of([shelf.put(one) for one in pictures(2000)])
    assert isinstance(rows, Rows)
    assert len(rows.items) == 2000
    assert len(rows.pieces) == 9 + 1 + 6  # 1, 1, 2, 4, … 128; 256; six times 256
    assert max(piece.nbytes for piece in rows.pieces) == PIECE_BYTES


def test_at_most_half_of_it_is_empty() -> None:
    shelf, held = Shelf(DTYPE, SHAPE), {}
    for count, one in enumerate(pictures(300), 1):
        base = shelf.put(one).base
        assert base is not None
        held[id(base)] = base
        assert sum(piece.nbytes for piece in held.values()) <= max(1, 2 * count - 1) * NBYTES


def test_what_is_larger_than_a_piece_has_one_of_its_own() -> None:
    shelf = Shelf(np.dtype(np.float64), (PIECE_BYTES // 4,))
    shown = [np.full(PIECE_BYTES // 4, n, np.float64) for n in range(3)]
    rows = rows_of([shelf.put(one) for one in shown])
    assert isinstance(rows, Rows)
    assert [piece.shape for piece in rows.pieces] == [(1, PIECE_BYTES // 4)] * 3
    assert np.array_equal(rows.stacked(), np.stack(shown))


@pytest.mark.parametrize("missing", [0, 1, 50, 98, 99])
def test_what_was_put_and_not_noted_is_left_out(missing: int) -> None:
    shelf, shown = Shelf(DTYPE, SHAPE), pictures(100)
    put = [shelf.put(one) for one in shown]
    del put[missing], shown[missing]
    rows = rows_of(put)
    assert isinstance(rows, Rows)
    assert b"".join(pack_in_parts({}, "obs", rows)) == pack({"obs": np.stack(shown)})


def test_some_of_several_shelves_are_one_batch() -> None:
    shelf, shown = Shelf(DTYPE, SHAPE), pictures(120)
    put = [shelf.put(one) for one in shown[:60]]
    shelf = shelf.another()
    put += [shelf.put(one) for one in shown[60:]]
    for start, stop in ((0, 120), (7, 61), (59, 99)):
        rows = rows_of(put[start:stop])
        assert isinstance(rows, Rows)
        assert b"".join(pack_in_parts({}, "obs", rows)) == pack({"obs": np.stack(shown[start:stop])})


def test_little_is_an_array() -> None:
    shelf = Shelf(DTYPE, SHAPE)
    assert isinstance(rows_of([shelf.put(one) for one in pictures(3)]), np.ndarray)
