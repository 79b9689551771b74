"""The running digest of what a lane has told: what a replay must arrive at to be in the same state (R8).

xxh3-128 over each observation, reward and flag, in the order in which they were told. Infos are left out: they may hold
times, paths and whatever else differs from one run to the next. Either the worker says it with every answer, or its
client keeps the answers and counts them when the digest is needed: what was packed and read again counts as it did.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import xxhash

from meshrl.wire.codec import pack
from meshrl.wire.frames import Frame

# What of an answer counts, of a single env, of a vector and of a call; their order is that of the digest.
_TOLD = ("obs", "reward", "rewards", "terminated", "terminations", "truncated", "truncations", "value")
# datetimes have no buffer protocol: their integers do.
_TIMES = frozenset("mM")
_DOUBLE = struct.Struct("<d")


class Digest:
    """The digest of one lane."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def copy(self) -> Digest:
        """Another one, of the same so far."""
        other = Digest()
        other._hash = self._hash.copy()
        return other

    def add(self, frame: Frame) -> bytes:
        """Take in what a reset or a step told.

        Returns:
            16 bytes, of everything so far.

        Raises:
            UnencodableValue: a value has no form on the wire, so that it cannot be told either.
        """
        for field in _TOLD:
            if field in frame:
                self._feed(frame[field])
        return self._hash.digest()

    @property
    def value(self) -> bytes:
        """16 bytes, of everything so far."""
        return self._hash.digest()

    def _feed(self, value: Any) -> None:
        kind = type(value)
        if kind is np.ndarray and not value.dtype.hasobject:
            whole = np.ascontiguousarray(value)
            self._hash.update(b"%d" % whole.nbytes)
            self._hash.update((whole.view(np.int64) if whole.dtype.kind in _TIMES else whole).data)
        elif kind is float or (isinstance(value, float) and not isinstance(value, np.generic)):  # the commonest reward
            self._hash.update(_DOUBLE.pack(value))
        elif kind is bool:
            self._hash.update(b"\1" if value else b"\0")
        elif isinstance(value, dict):
            self._hash.update(b"{%d" % len(value))
            for key, part in value.items():
                self._feed(key)
                self._feed(part)
        elif kind is set or kind is frozenset:  # in no order of their own
            self._hash.update(b"".join(sorted(map(self._of_one, value))))
        elif isinstance(value, (tuple, list)):
            self._hash.update(b"[%d" % len(value))
            for part in value:
                self._feed(part)
        else:
            self._hash.update(pack(value))

    @staticmethod
    def _of_one(value: Any) -> bytes:
        alone = Digest()
        alone._feed(value)
        return alone.value
