"""``LeasedEnvs``: what a vector and a pool have in common, each a number of envs in shards."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

from meshrl.client.batched_actions import batched_checker
from meshrl.client.leased import Leased
from meshrl.client.seeds import Seeds
from meshrl.client.session import RemoteSession
from meshrl.errors import UsageError
from meshrl.wire import spaces
from meshrl.wire.batches import batching
from meshrl.wire.frames import Indices
from meshrl.wire.messages import Seeding, Vectors


class LeasedEnvs(Leased):
    """Envs in shards, contiguous by env_id.

    Args:
        sessions: of the shards, in the order of env_ids.
        seeding: what is made of the seed of a reset.
        check_actions: ``strict`` refuses actions outside a Box's bounds too.

    Attributes:
        num_envs: how many sub-environments there are.
        seeding: as given.
    """

    def __init__(
        self, sessions: Sequence[RemoteSession], *, seeding: Seeding, check_actions: Literal["normal", "strict"]
    ) -> None:
        description = sessions[0].grant.description
        self.num_envs = sum(session.num_envs for session in sessions)
        self.seeding: Seeding = seeding
        super().__init__(description, sessions)
        self._sessions: list[RemoteSession] = list(sessions)
        self._bounds = [(s.first_env_id, s.first_env_id + s.num_envs) for s in sessions]  # of env_ids, shard by shard
        self._single_observation_space = spaces.rebuild(description.observation_space)
        self._single_action_space = spaces.rebuild(description.action_space)
        self._action_batches = batching(self._single_action_space)
        self._check = batched_checker(
            self._single_action_space, self.num_envs, description.name, strict=check_actions == "strict"
        )
        said = [session.grant.description.vectors or Vectors() for session in sessions]
        self._vectors = [vectors for i, vectors in enumerate(said) if vectors not in said[:i]]  # nearly always one
        self._implementation = self._vectors[0].implementation
        self._seeds = Seeds(seeding, self.num_envs, description.name, self._vectors)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The worker and the number of sub-environments of each shard, in the order of env_ids."""
        return [(session.grant.worker, session.num_envs) for session in self._sessions]

    @property
    def root(self) -> int | None:
        """With ``seeding="derived"``, the root of all seeds, given or drawn.

        None before the first reset, and where some were reset with a seed and others go on by an earlier one: see
        :attr:`roots`.
        """
        return self._seeds.root

    @property
    def roots(self) -> tuple[int | None, ...]:
        """With ``seeding="derived"``, the root of each sub-environment's seeds; None for one that was never reset."""
        return self._seeds.roots

    @property
    def single_observation_space(self) -> gymnasium.Space[Any]:
        """Of one sub-environment."""
        return self._single_observation_space

    @property
    def single_action_space(self) -> gymnasium.Space[Any]:
        """Of one sub-environment."""
        return self._single_action_space

    @cached_property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of all of them: ``batch_space(single_observation_space, num_envs)``."""
        return batch_space(self._single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of all of them: ``batch_space(single_action_space, num_envs)``."""
        return batch_space(self._single_action_space, self.num_envs)

    @property
    def whereabouts(self) -> str:
        """How many shards there are at how many workers, in words."""
        shards, workers = len(self._sessions), len({session.grant.worker for session in self._sessions})
        return f"{shards} shard{'s' * (shards != 1)} at {workers} worker{'s' * (workers != 1)}"

    def _ids(self, env_ids: Sequence[SupportsIndex] | Indices | None) -> Indices:
        """The env_ids that were given, None being all of them.

        Raises:
            UsageError: there is no such sub-environment.
        """
        if env_ids is None:
            return np.arange(self.num_envs)
        if isinstance(env_ids, np.ndarray) and env_ids.dtype.kind in "iu":
            ids: Indices = env_ids.astype(np.int64)  # what is over its range turns negative, and is refused as that
            if ids.ndim == 1 and (not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < self.num_envs):
                return ids
            given = env_ids.tolist()
        else:
            given = [operator.index(i) for i in env_ids]
            if all(0 <= i < self.num_envs for i in given):
                return np.array(given, np.int64)
        raise UsageError(f"{self.name}: env_ids are from 0 to {self.num_envs - 1}, not {given}", env_ids=given)
