"""The running digests of many sub-environments: what each has told since its journal begins (R8).

The same purpose as :mod:`~meshrl.protocol.digest`'s, for batches: one number of 64 bits a sub-environment, of which a
batch costs some ten numpy calls however many rows it has. A row is its observation, reward and flags; ``h`` is a
multilinear hash of its words of 32 bits with weights of 64 (which keeps their highest bits: of two signs that change
together a sum of 64-bit words would lose both), and the digest goes on by

    d  ->  d * K + h(row)    (mod 2**64)

A row that is long, or that is no array, counts by its xxh3. Where a sub-environment's journal begins anew, so does its
digest: with ``h`` of the observation alone, since the reward and the flags that are told with it may be those of the
step that ended the episode before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from meshrl.wire.batches import Batching
from meshrl.wire.codec import pack
from meshrl.wire.large import Rows

Words = NDArray[np.uint64]

# Up to so many bytes of one observation are hashed with those of all others, in one call; of more, xxh3 is faster.
SHORT_BYTES = 256
_WORD = 8
# Odd numbers without a pattern: the fractional digits of a geometric sequence, as in Weyl generators.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_STEP = np.uint64(0x94D049BB133111EB)
_INVERSE = np.uint64(pow(int(_STEP), -1, 1 << 64))
# Reward, terminated and truncated take two words behind the observation's.
_BEHIND = 2
# Of so many rows, that are no longer than this, one column of words after another takes half as long as their table.
MANY_ROWS = 2048
NARROW_BYTES = 32
# Powers are kept for so many rows.
KNOWN_POWERS = 1 << 16


@lru_cache(maxsize=64)
def _weights(count: int) -> Words:
    """As many odd weights; those of a shorter row are the first of them."""
    numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MULTIPLIER
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _STEP
    return (numbers ^ (numbers >> np.uint64(31))) | np.uint64(1)


class Digests:
    """The digests of a number of sub-environments.

    Args:
        count: how many there are.
        batches: of their observations.

    Attributes:
        values: uint64, one of each; 0 of one that has told nothing.
    """

    __slots__ = ("_batches", "_table", "values")

    def __init__(self, count: int, batches: Batching) -> None:
        self._batches = batches
        self._table: _Table | None = None
        self.values: Words = np.zeros(count, np.uint64)

    def add(
        self,
        which: NDArray[np.int64] | slice,
        obs: Any,
        rewards: NDArray[np.float64],
        terminations: NDArray[np.bool_],
        truncations: NDArray[np.bool_],
        anew: Sequence[int] = (),
    ) -> Words:
        """Take in a batch that some of them told.

        Args:
            which: of the sub-environments, in the order of the rows.
            obs: the batch, as it travels.
            rewards: one a row.
            terminations: the same.
            truncations: the same.
            anew: the rows with which a journal begins.

        Returns:
            the digests of ``which`` from now on.
        """
        leaves = list(self._batches.leaves(obs, len(rewards)))
        table = self._table
        if table is None or not table.fits(leaves):
            table = self._table = _Table(len(self.values), leaves)
        before = self.values[which]
        if len(anew):
            before = before.copy()
            for row in anew:  # one or two, most often
                before[row] = 0
        after: Words = before * _STEP + table.hashes(leaves, rewards, terminations, truncations, anew)
        self.values[which] = after
        return after

    def chain(
        self,
        i: int,
        obs: Any,
        rewards: NDArray[np.float64],
        terminations: NDArray[np.bool_],
        truncations: NDArray[np.bool_],
        *,
        anew: bool,
    ) -> None:
        """Take in what sub-environment ``i`` alone told, row after row; ``anew`` says that its journal begins so.

        May be called on several threads, of different ones.
        """
        count = len(rewards)
        leaves = list(self._batches.leaves(obs, count))
        table = _Table(count, leaves)
        hashes = table.hashes(leaves, rewards, terminations, truncations, [0] if anew else ())
        value, step = 0 if anew else int(self.values[i]), int(_STEP)
        for one in hashes.tolist():
            value = (value * step + one) & 0xFFFF_FFFF_FFFF_FFFF
        self.values[i] = value


def seen(value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int | None:
    """What a long observation counts by, where it is an array of that dtype and shape, its space's; else None.

    A leaf of such numbers, as uint64, has the same hashes as one of the arrays.
    """
    if type(value) is not np.ndarray or value.dtype != dtype or value.shape != shape:
        return None
    if value.nbytes <= SHORT_BYTES or dtype.kind in "OMm":
        return None
    whole: Any = value if value.flags.c_contiguous else np.ascontiguousarray(value)
    return xxhash.xxh3_64_intdigest(whole)


def hashes_of(
    leaves: Sequence[Any],
    rewards: NDArray[np.float64],
    terminations: NDArray[np.bool_],
    truncations: NDArray[np.bool_],
    anew: Sequence[int] | NDArray[np.int64] = (),
) -> Words:
    """``h`` of each row of a batch, those of ``anew`` without reward and flags; ``leaves`` are those of a batching."""
    words = _words_of(leaves) if len(rewards) >= MANY_ROWS else None
    if words is None:
        return _Table(len(rewards), leaves).hashes(leaves, rewards, terminations, truncations, anew)
    numbers = np.ascontiguousarray(rewards, np.float64).view(np.uint32).reshape(-1, 2)
    flags = np.zeros((len(rewards), 4), np.bool_)
    flags[:, 0], flags[:, 1] = terminations, truncations
    weights = _weights(sum(2 * -(-one.shape[1] // 2) for one in words) + 2 * _BEHIND)
    behind = _weighed([numbers, flags.view(np.uint32)], weights[-2 * _BEHIND :])
    if len(anew):
        behind[np.asarray(anew)] = 0
    return _weighed(words, weights) + behind


def _words_of(leaves: Sequence[Any]) -> list[NDArray[np.uint32]] | None:
    """Of each leaf the words of its rows, as in a :class:`_Table`; None where there are none, many, or other bytes."""
    sizes = [0 if kind is None or kind[1] % 4 else kind[1] for kind in map(_kind, leaves)]
    if not sizes or 0 in sizes or sum(sizes) > NARROW_BYTES:
        return None
    arrays: Iterable[Any] = (leaf.stacked() if type(leaf) is Rows else leaf for leaf in leaves)
    return [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint32) for array in arrays]


def _weighed(words: Sequence[NDArray[np.uint32]], weights: Words) -> Words:
    """The sum of each row's words by their weights; those of each array begin at an even one. There is an array."""
    sums: Words = np.zeros(len(words[0]), np.uint64)
    at = 0
    for array in words:
        for k in range(array.shape[1]):
            sums += array[:, k] * weights[at + k]
        at += 2 * -(-array.shape[1] // 2)
    return sums


def chained(hashes: Words, begins: NDArray[np.int64], before: Words) -> Words:
    """The digest at each row, where rows of one sub-environment stand together: many runs of them at once.

    Within a run ``d[p] = d[p - 1] * K + h[p]``. K is odd, so it can be divided by (mod 2**64), and a run is a running
    sum of ``h[p] / K**p`` times ``K**p``: some numpy calls, however many rows there are.

    Args:
        hashes: of the rows.
        begins: the position at which each run begins, ascending; the first is 0.
        before: of each run, its digest before; 0 where it begins anew.
    """
    count = len(hashes)
    if not count:
        return hashes
    powers = _powers(_STEP, count)
    inverse = _powers(_INVERSE, count)
    sums = np.cumsum(hashes * inverse, dtype=np.uint64)
    left = np.where(begins > 0, sums[begins - 1], np.uint64(0))
    offsets = before * _STEP * inverse[begins] - left
    after: Words = powers * (sums + np.repeat(offsets, np.diff(begins, append=count)))
    return after


def _powers(base: np.uint64, count: int) -> Words:
    """Its powers from 0 on; not to be written to."""
    return _known_powers(base)[:count] if count <= KNOWN_POWERS else _made_powers(base, count)


@lru_cache(maxsize=2)
def _known_powers(base: np.uint64) -> Words:
    powers = _made_powers(base, KNOWN_POWERS)
    powers.flags.writeable = False
    return powers


def _made_powers(base: np.uint64, count: int) -> Words:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


class _Table:
    """Room for the words of a batch's rows, side by side, with a view for whatever is put there.

    Args:
        count: how many rows there may be.
        leaves: of a batch, such as are to be put there.
    """

    def __init__(self, count: int, leaves: Sequence[Any]) -> None:
        self._kinds = list(map(_kind, leaves))
        widths = [_WORD if kind is None else -(-kind[1] // _WORD) * _WORD for kind in self._kinds]
        at = sum(widths)
        table = np.zeros((count, at + _BEHIND * _WORD), np.uint8)
        self._words = table.view(np.uint32)
        self._weights = _weights(self._words.shape[1])
        self._views: list[NDArray[Any]] = []
        begin = 0
        for kind, width in zip(self._kinds, widths, strict=True):
            dtype, size = (np.dtype(np.uint64), _WORD) if kind is None else kind
            self._views.append(table[:, begin : begin + size].view(dtype))
            begin += width
        self._rewards = table[:, at : at + _WORD].view(np.float64)[:, 0]
        self._terminations = table[:, at + _WORD].view(np.bool_)
        self._truncations = table[:, at + _WORD + 1].view(np.bool_)
        self._behind = table[:, at:]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether a batch's leaves have their places here."""
        return [_kind(leaf) for leaf in leaves] == self._kinds

    def hashes(
        self,
        leaves: Sequence[Any],
        rewards: NDArray[np.float64],
        terminations: NDArray[np.bool_],
        truncations: NDArray[np.bool_],
        anew: Sequence[int] | NDArray[np.int64],
    ) -> Words:
        """Of the rows of a batch."""
        n = len(rewards)
        for leaf, kind, view in zip(leaves, self._kinds, self._views, strict=True):
            if kind is None:
                view[:n, 0] = _hashed(leaf)
            else:
                array = leaf.stacked() if type(leaf) is Rows else leaf
                view[:n] = array if array.ndim == 2 else array.reshape(n, -1)
        self._rewards[:n] = rewards
        self._terminations[:n] = terminations
        self._truncations[:n] = truncations
        if len(anew):
            self._behind[np.asarray(anew)] = 0
        hashes: Words = self._words[:n].astype(np.uint64) @ self._weights
        return hashes


def _kind(leaf: Any) -> tuple[np.dtype[Any], int] | None:
    """The dtype of a leaf and the bytes of one of its rows; None where rows count by their xxh3."""
    if type(leaf) is Rows:
        size = leaf.items[0].nbytes
        return (leaf.dtype, size) if size <= SHORT_BYTES else None
    if type(leaf) is not np.ndarray or leaf.dtype.hasobject or leaf.dtype.kind in "Mm" or not len(leaf):
        return None
    size = leaf.nbytes // len(leaf)
    return (leaf.dtype, size) if 0 < size <= SHORT_BYTES else None


def _hashed(leaf: Any) -> Words:
    """By the rows of an array, or by single values as they travel."""
    if type(leaf) is Rows:
        rows: Iterable[Any] = leaf.items
    elif type(leaf) is np.ndarray and not leaf.dtype.hasobject:
        whole = np.ascontiguousarray(leaf)
        rows = (whole.view(np.int64) if whole.dtype.kind in "Mm" else whole).reshape(len(whole), -1)
    else:
        rows = map(pack, leaf)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows), np.uint64)
