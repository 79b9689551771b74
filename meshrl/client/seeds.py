"""The seeds of a vector's or a pool's reset, from what its user gave (R7)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import numpy as np

from meshrl.errors import InvalidSeed
from meshrl.protocol.seeds import check_seed
from meshrl.wire.messages import Seeding, Vectors

# A root that is drawn has the bits of every seed that is.
ROOT_BITS = 31


class Seeds:
    """Makes them.

    Args:
        seeding: how sub-environments are seeded.
        num_envs: how many there are.
        name: the env's, for errors.
        vectors: what those who host the sub-environments say of seeds.
    """

    __slots__ = ("_common", "_due", "_name", "_num_envs", "_roots", "_seeding", "_vectors")

    def __init__(self, seeding: Seeding, num_envs: int, name: str, vectors: Sequence[Vectors] = ()) -> None:
        self._seeding = seeding
        self._num_envs = num_envs
        self._name = name
        self._vectors = vectors
        self._common: int | None = None  # for all that have no root yet
        self._roots: list[int | None] = [None] * num_envs  # as they were sent
        self._due: list[int | None] = [None] * num_envs  # what a reset without a seed sends all the same

    @property
    def root(self) -> int | None:
        """Of derived seeding; None before the first reset, and where sub-environments have different ones."""
        known = {root for root in self._roots if root is not None}
        return known.pop() if len(known) == 1 else None

    @property
    def roots(self) -> tuple[int | None, ...]:
        """Of derived seeding, that of each; None for one that was never reset."""
        return tuple(self._roots)

    def of_reset(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        """A seed for each sub-environment, by env_id; None where each goes on by itself.

        Args:
            seed: env_id i gets ``seed + i``; a list has one for each. With ``derived`` seeding it is the root of all
                seeds to come, and one is drawn for the first reset if none is given. It counts once
                it was :meth:`sent`.

        Raises:
            InvalidSeed: it is none of these, or the vectors' implementation cannot follow it.
        """
        if self._seeding == "derived":
            return self._derived(seed)
        seeds = self._given(seed)
        if seeds is not None:
            for vectors in self._vectors:
                self._check(seeds, vectors)
        return seeds

    def _given(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        if seed is None:
            return None
        if isinstance(seed, (int, np.integer)):
            first = check_seed(seed)
            check_seed(first + self._num_envs - 1)
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

    def _check(self, seeds: Sequence[int | None], vectors: Vectors) -> None:
        """Refuse what cannot be followed. Asked of all of them: a shard sees its own alone, and others would begin."""
        who = f"{self._name}: the vectors' implementation {vectors.implementation}"
        given = [seed for seed in seeds if seed is not None]
        if vectors.one_seed and given and list(seeds) != list(range(given[0], given[0] + len(seeds))):
            raise InvalidSeed(f"{who} takes seeds that are consecutive (seed + i) or none at all; give reset one seed")
        end, largest = vectors.seeds_below, max(given, default=0)
        if end is not None and largest >= end:
            raise InvalidSeed(f"{who} keeps seeds below {end}, and one of these is {largest}", seed=largest)

    def _derived(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        if seed is not None and not isinstance(seed, (int, np.integer)):
            raise InvalidSeed(f'{self._name}: with seeding="derived" a reset takes one seed, the root of all others')
        if seed is not None:
            return [check_seed(seed)] * self._num_envs
        if None in self._roots and self._common is None:
            self._common = secrets.randbits(ROOT_BITS)  # one for all shards: drawn here, where they are known
        seeds = [self._common if root is None else due for root, due in zip(self._roots, self._due, strict=True)]
        return None if seeds.count(None) == len(seeds) else seeds

    def sent(self, seeds: Sequence[int | None] | None, env_ids: Iterable[int]) -> None:
        """These were sent to ``env_ids``, the seeds being those of all."""
        if self._seeding != "derived" or seeds is None:
            return
        for i in env_ids:
            if seeds[i] is not None:
                self._roots[i], self._due[i] = seeds[i], None

    def refused(self, env_ids: Iterable[int]) -> None:
        """A reset of these came to nothing: whether they were told their root is not known, so they are told again."""
        for i in env_ids:
            self._due[i] = self._roots[i]

    def due(self, root: int, env_ids: Iterable[int]) -> None:
        """All but ``env_ids`` get this root when they are reset next, unless another one is given."""
        others = np.ones(self._num_envs, np.bool_)
        others[np.fromiter(env_ids, np.int64)] = False
        self._common = root
        for i in np.flatnonzero(others).tolist():
            self._due[i] = root
