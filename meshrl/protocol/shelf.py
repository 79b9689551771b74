"""A shelf: room for large observations of one env, side by side.

A chunk's compression takes one piece of memory after another, and gives the interpreter away for each. Of single
pictures that is so often that the thread which compresses and the one which steps do little else than hand it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from meshrl.wire.large import LARGE_BYTES, Rows

PIECE_BYTES = 1024 * 1024


class Shelf:
    """Copies of arrays of one dtype and shape, in pieces of some; used by one thread.

    The first piece has room for one, and each that follows for as many as there are by then, up to
    :data:`PIECE_BYTES`: at most half of it all is empty.

    Args:
        dtype: of each.
        shape: of each; not ``()``.

    Attributes:
        dtype: as given.
        shape: as given.
    """

    __slots__ = ("_at", "_most", "_piece", "_put", "dtype", "shape")

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self._most = max(1, PIECE_BYTES // max(1, np.empty(shape, dtype).nbytes))
        self._piece = np.empty((0, *shape), dtype)
        self._at = 0
        self._put = 0

    def put(self, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A copy of ``value`` for its own, behind the one before it."""
        if self._at == len(self._piece):
            self._put += self._at
            self._piece = np.empty((min(max(1, self._put), self._most), *self.shape), self.dtype)
            self._at = 0
        row: np.ndarray[Any, Any] = self._piece[self._at]
        row[...] = value
        self._at += 1
        return row

    def another(self) -> Shelf:
        """An empty one for the same."""
        return Shelf(self.dtype, self.shape)


def rows_of(put: Sequence[np.ndarray[Any, Any]]) -> Rows | np.ndarray[Any, Any]:
    """What was put upon shelves, each once and in that order, as a batch."""
    if len(put) * put[0].nbytes < LARGE_BYTES:
        return np.stack(put, out=np.empty((len(put), *put[0].shape), put[0].dtype))
    pieces: list[np.ndarray[Any, Any]] = []
    for _, group in groupby(put, key=lambda row: id(row.base)):
        rows = list(group)
        piece, first, last = rows[0].base, _address(rows[0]), _address(rows[-1])
        if piece is None or last - first != (len(rows) - 1) * rows[0].nbytes:  # there are others between them
            pieces += rows
        else:
            at = (first - _address(piece)) // rows[0].nbytes
            pieces.append(piece[at : at + len(rows)])
    return Rows(put, pieces)


def _address(array: np.ndarray[Any, Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
