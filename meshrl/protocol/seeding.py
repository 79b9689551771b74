"""Seeding: the seed with which each sub-environment's next episode begins (R7).

    seeding      reset with a seed         first reset without   later resets, autoresets
    gymnasium    that of each              one drawn             None: the generator goes on
    derived      it is the root; the episode numbers start from 0     derive(root, env_id, next episode)

A root is the client's to draw: it is one for all shards of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from meshrl.errors import InvalidSeed, MalformedMessage
from meshrl.protocol.seeds import check_seed, derive

Seedings = Literal["gymnasium", "derived", "implementation"]


class Seeding:
    """The seeds of one session's sub-environments.

    Args:
        how: ``gymnasium`` or ``derived``.
        first_env_id: the global index of the first of them.
        count: how many there are.
        draw: gives a seed of no pattern.
    """

    __slots__ = ("_count", "_draw", "_episodes", "_first", "_how", "_roots")

    def __init__(self, how: Seedings, first_env_id: int, count: int, draw: Callable[[], int]) -> None:
        self._how = how
        self._first = first_env_id
        self._count = count
        self._draw = draw
        self._roots: list[int | None] = [None] * count
        self._episodes = [0] * count

    def check(self, seeds: object) -> Sequence[int | None]:
        """The seeds of a reset: one a sub-environment, each maybe None.

        Raises:
            InvalidSeed: it is none of that.
        """
        if seeds is None:
            return [None] * self._count
        if not isinstance(seeds, (list, tuple)) or len(seeds) != self._count:
            raise InvalidSeed(f"the seeds of {self._count} sub-environments are a list of {self._count}, or nothing")
        return [self.check_one(seed) for seed in seeds]

    def check_one(self, seed: object) -> int | None:
        """The seed of one reset, or None.

        Raises:
            InvalidSeed: it is no seed.
        """
        return None if seed is None else check_seed(seed)

    def reset(self, i: int, given: int | None, episode: int = 0) -> int | None:
        """The seed of an explicit reset of sub-environment ``i``, which was given ``given``.

        Args:
            i: which.
            given: a seed; where they are derived, the root.
            episode: of that root, the number of the next episode.
        """
        if given is not None:
            self._roots[i] = given
            self._episodes[i] = episode
        elif self._roots[i] is None:
            given = self._roots[i] = self._draw()
        return self.next(i) if self._how == "derived" else given

    def next(self, i: int) -> int | None:
        """The seed of the episode that follows by itself."""
        if self._how == "gymnasium":
            return None
        root = self._roots[i]
        assert root is not None, "the first reset is explicit"
        episode = self._episodes[i]
        self._episodes[i] = episode + 1
        return derive(root, self._first + i, episode)

    def place(self, i: int) -> dict[str, int]:
        """Where sub-environment ``i`` stands after its last reset, for :meth:`put`: where its next seed comes from."""
        root = self._roots[i]
        if self._how != "derived" or root is None:
            return {}
        return {"root": root, "episode": self._episodes[i]}

    def put(self, i: int, place: Mapping[str, Any]) -> None:
        """Have ``i`` go on from there, having been reset.

        Raises:
            InvalidSeed: its root is none.
            MalformedMessage: it is no place.
        """
        root, episode = place.get("root", 0), place.get("episode", 0)
        if type(episode) is not int or not 0 <= episode < 1 << 62:
            raise MalformedMessage("the episodes of a root are counted from 0")
        self._roots[i] = check_seed(root)
        self._episodes[i] = episode
