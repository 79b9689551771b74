"""The seeds of a vector's or a pool's reset, from what its user gave (R7)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import numpy as np

from meshrl.errors import InvalidSeed
from meshrl.protocol.seeds import check_seed
from meshrl.wire.messages import Seeding

# A root that is drawn has the bits of every seed that is.
ROOT_BITS = 31
# Vector implementations that take one seed for all, so that they can follow seed + i alone; all of it is below this.
ONE_SEED = {"gymnasium": None, "envpool": 1 << 31}


class Seeds:
    """Makes them.

    Args:
        seeding: how sub-environments are seeded.
        num_envs: how many there are.
        name: the env's, for errors.
        implementation: what hosts the sub-environments; see :class:`meshrl.wire.messages.Vectors`.
    """

    __slots__ = ("_common", "_due", "_implementation", "_name", "_num_envs", "_roots", "_seeding")

    def __init__(self, seeding: Seeding, num_envs: int, name: str, implementation: str = "meshrl") -> None:
        self._seeding = seeding
        self._num_envs = num_envs
        self._name = name
        self._implementation = implementation
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
        if seeds is not None and self._implementation in ONE_SEED:
            self._check_one_seed(seeds)
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

    def _check_one_seed(self, seeds: Sequence[int | None]) -> None:
        """Refuse what cannot be followed. Asked of all of them: a shard sees its own alone, and others would begin."""
        first = seeds[0]
        if first is None and seeds.count(None) == len(seeds):
            return
        if first is None or list(seeds) != list(range(first, first + len(seeds))):
            raise InvalidSeed(
                f"{self._name}: the vectors' implementation {self._implementation} takes seeds that are consecutive "
                "(seed + i) or none at all; give reset one seed"
            )
        end = ONE_SEED[self._implementation]
        if end is not None and first + len(seeds) > end:
            raise InvalidSeed(
                f"{self._name}: the vectors' implementation {self._implementation} keeps seeds below {end}, and the "
                f"last of these is {first + len(seeds) - 1}; give reset one of at most {end - len(seeds)}",
                seed=first,
            )

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
