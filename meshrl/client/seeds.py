"""The seeds of a vector's or a pool's reset, from what its user gave (R7)."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from meshrl.errors import InvalidSeed
from meshrl.protocol.seeds import check_seed
from meshrl.wire.messages import Seeding

# A root that is drawn has the bits of every seed that is.
ROOT_BITS = 31


class Seeds:
    """Makes them.

    Args:
        seeding: how sub-environments are seeded.
        num_envs: how many there are.
        name: the env's, for errors.
    """

    __slots__ = ("_name", "_num_envs", "_root", "_seeding")

    def __init__(self, seeding: Seeding, num_envs: int, name: str) -> None:
        self._seeding = seeding
        self._num_envs = num_envs
        self._name = name
        self._root: int | None = None

    @property
    def root(self) -> int | None:
        """Of derived seeding; None before the first reset."""
        return self._root

    def of_reset(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        """A seed for each sub-environment, by env_id; None where each goes on by itself.

        Args:
            seed: env_id i gets ``seed + i``; a list has one for each. With ``derived`` seeding it is the root of all
                seeds to come, and one is drawn for the first reset if none is given.

        Raises:
            InvalidSeed: it is none of these.
        """
        if self._seeding == "derived":
            return self._derived(seed)
        if seed is None:
            return None
        if isinstance(seed, (int, np.integer)):
            first = check_seed(seed)
            return [first + i for i in range(self._num_envs)]
        try:
            given = list(seed)
        except TypeError:
            raise InvalidSeed(f"{self._name}: a seed is a number or a list of them, not {seed!r}") from None
        seeds = [None if one is None else check_seed(one) for one in given]
        if len(seeds) != self._num_envs:
            raise InvalidSeed(
                f"{self._name}: a list of seeds has one for each of {self._num_envs} sub-environments, not {len(seeds)}"
            )
        return seeds

    def _derived(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        if seed is not None and not isinstance(seed, (int, np.integer)):
            raise InvalidSeed(f'{self._name}: with seeding="derived" a reset takes one seed, the root of all others')
        if seed is None and self._root is not None:
            return None  # the next episode of each
        # One root for all shards: drawn here, where they are known.
        self._root = secrets.randbits(ROOT_BITS) if seed is None else check_seed(seed)
        return [self._root] * self._num_envs
