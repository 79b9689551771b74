"""A block: answers to all lanes of a session, one after another, column by column.

To put five arrays at the end of five lists is all that a step has to do for its recording. Who steps an env writes to a
block, and who takes what was noted reads behind, at the same time and without a lock: what is in the columns before
``count`` is not touched any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.noted import Began, Note

# Answers in one: about as many as a fast env gives until a chunk is made, which is made of few blocks best.
ANSWERS = 1024
# What is larger is noted by itself.
MAX_ANSWER_BYTES = 32 * 1024


class Block:
    """Some answers like one, written by one thread and read by another.

    Args:
        actions: a batch, one a lane, like those that follow.
        obs: the same of what was told.
        policy: the version of whoever chose the actions.

    Attributes:
        count: the answers in it.
        closed: whether nothing more comes.
    """

    __slots__ = (
        "_actions",
        "_actions_like",
        "_at",
        "_begun",
        "_finals",
        "_infos",
        "_lanes",
        "_nbytes",
        "_obs",
        "_obs_like",
        "_policy",
        "_rewards",
        "_taken",
        "_terminations",
        "_truncations",
        "closed",
        "count",
    )

    def __init__(self, actions: NDArray[Any], obs: NDArray[Any], policy: int | None) -> None:
        self._lanes = len(obs)
        self._actions_like, self._obs_like, self._policy = actions.dtype, obs.dtype, policy
        self._at: list[float] = []
        self._nbytes: list[int] = []
        self._actions: list[NDArray[Any]] = []
        self._obs: list[NDArray[Any]] = []
        self._rewards: list[NDArray[np.float64]] = []
        self._terminations: list[NDArray[np.bool_]] = []
        self._truncations: list[NDArray[np.bool_]] = []
        # By the row in the block, those of what comes first before the others.
        self._begun: list[tuple[int, Began]] = []
        self._finals: list[tuple[int, Any]] = []
        self._infos: list[tuple[int, bool, bytes]] = []
        self.count = 0
        self.closed = False
        self._taken = 0

    def __repr__(self) -> str:
        return f"<Block of {self.count} answers to {self._lanes} lanes, {self._taken} taken>"

    # ---------------------------------------------------------------- who writes

    def fits(self, actions: NDArray[Any], obs: NDArray[Any], policy: int | None) -> bool:
        """Whether the next answer can stand here."""
        return (
            self.count < ANSWERS
            and actions.dtype == self._actions_like
            and obs.dtype == self._obs_like
            and policy == self._policy
        )

    def add(
        self,
        at: float,
        actions: NDArray[Any],
        obs: NDArray[Any],
        rewards: NDArray[np.float64],
        terminations: NDArray[np.bool_],
        truncations: NDArray[np.bool_],
        begun: Mapping[int, Began],
        finals: Sequence[tuple[int, Any]],
        infos: Sequence[tuple[int, bool, bytes]],
        nbytes: int,
    ) -> None:
        """Take in an answer that fits; the arguments are the fields of a :class:`~meshrl.protocol.noted.Note`."""
        self._at.append(at)
        self._nbytes.append(nbytes)
        self._actions.append(actions)
        self._obs.append(obs)
        self._rewards.append(rewards)
        self._terminations.append(terminations)
        self._truncations.append(truncations)
        if begun or infos:
            row = self.count * self._lanes
            self._begun += [(row + lane, begun[lane]) for lane in sorted(begun)]
            self._finals += [(row + lane, one) for lane, one in finals]
            self._infos += [(row + lane, is_final, info) for lane, is_final, info in infos]
        self.count += 1

    # ---------------------------------------------------------------- who reads

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing in it that was not taken."""
        return self._taken == self.count

    def taken(self, limit_bytes: int, *, least: bool) -> Note | None:
        """What is in it, the oldest first, at most so much of it; ``least``: or one answer, if there is any."""
        start, stop, lanes = self._taken, self.count, self._lanes
        sizes = np.cumsum(self._nbytes[start:stop])
        fit = max(int(np.searchsorted(sizes, limit_bytes, side="right")), min(int(least), len(sizes)))
        if not fit:
            return None
        self._taken = stop = start + fit
        first = start * lanes
        return Note(
            at=np.array(self._at[start:stop]),
            lanes=np.tile(np.arange(lanes), fit),
            actions=_rows(self._actions, start, stop),
            obs=_rows(self._obs, start, stop),
            rewards=_rows(self._rewards, start, stop),
            terminations=_rows(self._terminations, start, stop),
            truncations=_rows(self._truncations, start, stop),
            begun={row - first: one for row, one in _before(self._begun, stop * lanes)},
            finals=[(row - first, obs) for row, obs in _before(self._finals, stop * lanes)],
            infos=[(row - first, is_final, info) for row, is_final, info in _before(self._infos, stop * lanes)],
            policy=self._policy,
            nbytes=int(sizes[fit - 1]),
        )


def _rows(column: list[Any], start: int, stop: int) -> NDArray[Any]:
    """Some answers of a column as one array, of the byte order that they have; the column keeps them no more."""
    parts = column[start:stop]
    column[start:stop] = [None] * len(parts)  # as long as before, whatever is put behind it meanwhile
    like = parts[0]
    return np.concatenate(parts, out=np.empty((len(parts) * len(like), *like.shape[1:]), like.dtype))


def _before(entries: list[Any], row: int) -> list[Any]:
    """Take those out that are of rows before that one; more may be written behind them meanwhile."""
    count = 0
    while count < len(entries) and entries[count][0] < row:
        count += 1
    taken, entries[:count] = entries[:count], []
    return taken
