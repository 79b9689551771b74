"""The model: what every learner must see, by local envs with the same seeds and actions; and what a difference means.

A difference of one bit ends the learner. What came in place of what was due says which promise was broken:

    came                                                                  kind
    what was told of the same sub-environment the time before             repeated
    what comes of the same actions, one of them executed twice            repeated
    what comes of the same actions without one of them                    lost
    the end of an episode by the loss of its session                      lost
    what another sub-environment of the run tells now, or told before     misattributed
    anything else                                                         other
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from tests.mesh.test_vector_parity import different

# Of the newest actions, so many are left out or done twice to find what a difference comes of.
LOOKED_BACK = 5


class Autoreset(Enum):
    """What becomes of an episode that has ended: its user resets it, the next step does, or the same step."""

    NONE = "none"
    NEXT_STEP = "next step"
    SAME_STEP = "same step"


class Broken(Enum):
    """Which promise, by what came in place of what was due."""

    LOST = "lost"
    REPEATED = "repeated"
    MISATTRIBUTED = "misattributed"
    OTHER = "other"


class Mismatch(AssertionError):
    """What was told is not what is due.

    Attributes:
        broken: which promise.
    """

    def __init__(self, broken: Broken, text: str) -> None:
        super().__init__(f"{broken.value}: {text}")
        self.broken = broken


class Told(NamedTuple):
    """Of one sub-environment, by one reset or step.

    Attributes:
        obs: after a step that ended an episode and began the next, the first of that one.
        reward: 0 of a reset.
        terminated: as of Gymnasium.
        truncated: as of Gymnasium.
        infos: to be merged one after another.
    """

    obs: Any
    reward: Any
    terminated: bool
    truncated: bool
    infos: tuple[dict[str, Any], ...]


# What tells one transition from another, whatever form it came in: the observation's bytes, reward and flags.
Row = tuple[bytes, float, bool, bool]


class Twin:
    """One sub-environment as it is when nothing is ever lost: a local env.

    Args:
        make: of the env.
        autoreset: what becomes of an episode that has ended.

    Attributes:
        env: the local one.
        asked: every seed of a reset and every action, the oldest first.
        told: the newest.
        before: what was told before that.
        episodes: that have ended.
        steps: of the episode; where an autoreset began the next in the same step, still of the one that it ended.
    """

    told: Told
    before: Row | None = None

    def __init__(self, make: Callable[[], Any], autoreset: Autoreset) -> None:
        self._make = make
        self._autoreset = autoreset
        self.env = make()
        self.asked: list[tuple[str, Any]] = []
        self.episodes = 0
        self.steps = 0
        self._over = False

    def reset(self, seed: int | None = None) -> Told:
        """Begin an episode."""
        return self._ask("reset", seed)

    def step(self, action: Any) -> Told:
        """Take a step, or what autoreset makes of it."""
        return self._ask("step", action)

    @property
    def ended(self) -> bool:
        """Whether the newest step ended an episode."""
        return self.told.terminated or self.told.truncated

    def row(self, obs: Any, reward: Any, terminated: Any, truncated: Any) -> Row:
        """What tells a transition from others."""
        dtype = self.env.observation_space.dtype
        return np.asarray(obs, dtype).tobytes(), float(reward), bool(terminated), bool(truncated)

    def due(self) -> Row:
        """Of what is told."""
        return self.row(*self.told[:4])

    def _ask(self, op: str, value: Any) -> Told:
        if self.asked:
            self.before = self.due()
        self.asked.append((op, value))
        self.told = self._do(op, value)
        return self.told

    def _do(self, op: str, value: Any) -> Told:
        resets = op == "reset" or (self._autoreset is Autoreset.NEXT_STEP and self._over)
        if resets or (self._autoreset is Autoreset.SAME_STEP and self._over):
            self.steps = 0
        if resets:
            self._over = False
            obs, info = self.env.reset(seed=value if op == "reset" else None)
            return Told(obs, 0.0, False, False, (info,))
        obs, reward, terminated, truncated, info = self.env.step(value)
        self.steps += 1
        self._over = bool(terminated or truncated)
        self.episodes += self._over
        infos: tuple[dict[str, Any], ...] = (info,)
        if self._over and self._autoreset is Autoreset.SAME_STEP:
            final = {"final_obs": obs, "final_info": info}
            obs, info = self.env.reset()
            infos = (final, info)
        return Told(obs, reward, bool(terminated), bool(truncated), infos)

    def after(self, asked: Sequence[tuple[str, Any]]) -> Row | None:
        """What a fresh one would tell last if it were asked this; None if it cannot be."""
        fresh = Twin(self._make, self._autoreset)
        try:
            for op, value in asked:
                fresh._ask(op, value)
            return fresh.due()
        except gymnasium.error.ResetNeeded:
            return None
        finally:
            fresh.env.close()

    def broken(self, came: Row, others: Sequence[Twin]) -> Broken:
        """Which promise it breaks that this came."""
        if came == self.before:
            return Broken.REPEATED
        asked = self.asked
        for at in range(len(asked) - 1, max(0, len(asked) - 1 - LOOKED_BACK), -1):
            if came == self.after([*asked[:at], asked[at], *asked[at:]]):
                return Broken.REPEATED
            if came == self.after([*asked[:at], *asked[at + 1 :]]):
                return Broken.LOST
        told = {row for other in others if other is not self and other.asked for row in (other.due(), other.before)}
        return Broken.MISATTRIBUTED if came in told else Broken.OTHER


class Expected:
    """What one learner must see.

    Args:
        make: of each of its envs.
        num_envs: how many.
        autoreset: of each.
        among: the twins of all learners; its own are added.

    Attributes:
        twins: by env_id.
    """

    def __init__(self, make: Callable[[], Any], num_envs: int, autoreset: Autoreset, among: list[Twin]) -> None:
        self.twins = [Twin(make, autoreset) for _ in range(num_envs)]
        self._among = among
        among.extend(self.twins)

    @property
    def episodes(self) -> int:
        """That have ended, in all of them."""
        return sum(twin.episodes for twin in self.twins)

    def check_reset(self, came: tuple[Any, dict[str, Any]]) -> None:
        """Whether a single env's reset told what is due.

        Raises:
            Mismatch: it did not.
        """
        obs, info = came
        twin = self.twins[0]
        if why := different(came, (twin.told.obs, twin.told.infos[-1])):
            raise self._mismatch(0, twin.row(obs, 0.0, False, False), info, why)

    def check_step(self, came: tuple[Any, Any, bool, bool, dict[str, Any]]) -> None:
        """Whether a single env's step told what is due.

        Raises:
            Mismatch: it did not.
        """
        twin = self.twins[0]
        due = (*twin.told[:4], twin.told.infos[-1])
        if why := different(came, due):
            raise self._mismatch(0, twin.row(*came[:4]), came[4], why)

    def check_batch(self, came: Sequence[Any], env_ids: Sequence[int]) -> None:
        """Whether a batch (observations, rewards, terminations, truncations, infos) tells what is due of ``env_ids``.

        Raises:
            Mismatch: it does not.
        """
        told = [self.twins[i].told for i in env_ids]
        due = batched(self.twins[0].env.observation_space, told)
        why = different(tuple(came), due)
        if not why:
            return
        for k, i in enumerate(env_ids):
            twin = self.twins[i]
            row = twin.row(*(column[k] for column in came[:4]))
            if row != twin.due():
                raise self._mismatch(i, row, came[4], why)
        raise self._mismatch(env_ids[0], self.twins[env_ids[0]].due(), came[4], why)

    def _mismatch(self, env_id: int, came: Row, info: dict[str, Any], why: str) -> Mismatch:
        twin = self.twins[env_id]
        where = f"env_id {env_id}, episode {twin.episodes + 1}, step {twin.steps}, {twin.asked[-1]}: {why}"
        if "session_lost" in info:
            return Mismatch(Broken.LOST, f"{where}; {info['session_lost']}")
        if came == twin.due():  # an info, or a type
            return Mismatch(Broken.OTHER, where)
        return Mismatch(twin.broken(came, self._among), where)

    def close(self) -> None:
        """Close the local envs."""
        for twin in self.twins:
            twin.env.close()


def batched(space: gymnasium.Space[Any], told: Sequence[Told]) -> tuple[Any, ...]:
    """Rows as Gymnasium's vectors put them together: observations, rewards, terminations, truncations, infos."""
    count = len(told)
    merging: VectorEnv[Any, Any, Any] = VectorEnv()
    merging.num_envs = count
    infos: dict[str, Any] = {}
    for k, each in enumerate(told):
        for info in each.infos:
            infos = merging._add_info(infos, info, k)
    return (
        concatenate(space, [each.obs for each in told], np.asarray(create_empty_array(space, count))),
        np.array([each.reward for each in told], np.float64),
        np.array([each.terminated for each in told], np.bool_),
        np.array([each.truncated for each in told], np.bool_),
        infos,
    )
