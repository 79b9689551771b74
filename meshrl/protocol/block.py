"""A block: answers to all lanes of a session, one after another.

To put the arrays of an answer behind one another, in one piece of memory, is all that a step has to do for its
recording; they themselves are free again at once. Who steps an env writes to a block, and who takes what was noted
reads behind, at the same time and without a lock: what is in it before ``count`` is not touched any more.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.noted import Began, Note

# Answers in one: about as many as a fast env gives until a chunk is made, which is made of few blocks best.
ANSWERS = 1024
# An answer with a larger array is noted by itself.
MAX_ARRAY_BYTES = 32 * 1024


# The fields of a :class:`~meshrl.protocol.noted.Note` that an answer to all lanes has.
Answer = tuple[
    float,
    Any,
    Any,
    NDArray[np.float64],
    NDArray[np.bool_],
    NDArray[np.bool_],
    Mapping[int, Began],
    Sequence[tuple[int, Any]],
    Sequence[tuple[int, bool, bytes]],
    int,
]
# What few answers have: which that is, the resets that it shows, finals and infos, by lane.
_Beside = tuple[int, Mapping[int, Began], Sequence[tuple[int, Any]], Sequence[tuple[int, bool, bytes]]]
# Of the dtypes whose bytes are all that there is to a value, and may be read as such.
_PLAIN_KINDS = "biufc"


def is_plain(array: object) -> bool:
    """Whether an answer with that can stand in a block."""
    return type(array) is np.ndarray and array.dtype.kind in _PLAIN_KINDS and array.nbytes <= MAX_ARRAY_BYTES


class Block:
    """Some answers like one, written by one thread and read by another.

    Args:
        actions: a batch, one a lane, like those that follow; plain.
        obs: the same of what was told.
        policy: the version of whoever chose the actions.

    Attributes:
        count: the answers in it.
        closed: whether nothing more comes.
    """

    __slots__ = (
        "_actions_like",
        "_at",
        "_beside",
        "_lanes",
        "_obs_like",
        "_policy",
        "_sizes",
        "_taken",
        "_told",
        "closed",
        "count",
    )

    def __init__(self, actions: NDArray[Any], obs: NDArray[Any], policy: int | None) -> None:
        self._lanes = len(obs)
        self._actions_like, self._obs_like = (actions.dtype, actions.shape), (obs.dtype, obs.shape)
        self._policy = policy
        self._at: list[float] = []
        self._sizes: list[int] = []  # of each answer, that of all up to it
        self._told: list[bytes] = []  # of each answer, its columns
        self._beside: list[_Beside] = []
        self.count = 0
        self.closed = False
        self._taken = 0

    def __repr__(self) -> str:
        return f"<Block of {self.count} answers to {self._lanes} lanes, {self._taken} taken>"

    # ---------------------------------------------------------------- who writes

    def add(self, answer: Answer, policy: int | None) -> bool:
        """Take in an answer, if it is like the others and there is room; gives whether it was taken in.

        Args:
            answer: the next.
            policy: the version of whoever chose its actions.
        """
        at, actions, obs, rewards, terminations, truncations, begun, finals, infos, nbytes = answer
        if (
            not (type(actions) is type(obs) is np.ndarray)
            or self.count >= ANSWERS
            or (actions.dtype, actions.shape) != self._actions_like
            or (obs.dtype, obs.shape) != self._obs_like
            or policy != self._policy
        ):
            return False
        columns: Sequence[Any] = (actions, obs, rewards, terminations, truncations)
        try:
            told = b"".join(columns)
        except TypeError:  # they are not in one piece themselves
            told = b"".join([column.tobytes() for column in columns])
        self._at.append(at)
        self._sizes.append(nbytes + (self._sizes[-1] if self._sizes else 0))
        self._told.append(told)
        if begun or infos:
            self._beside.append((self.count, begun, finals, infos))
        self.count += 1
        return True

    # ---------------------------------------------------------------- who reads

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing in it that was not taken."""
        return self._taken == self.count

    @property
    def oldest_at(self) -> float:
        """When the first answer was given that was not taken; there is one."""
        return self._at[self._taken]

    def taken(self, limit_bytes: int, *, least: bool) -> Note | None:
        """What is in it, the oldest first, at most so much of it; ``least``: or one answer, if there is any."""
        start, stop, lanes, sizes = self._taken, self.count, self._lanes, self._sizes
        before = sizes[start - 1] if start else 0
        stop = max(bisect_right(sizes, before + limit_bytes, start, stop), min(start + least, stop))
        if stop == start:
            return None
        self._taken = stop
        begun: dict[int, Began] = {}
        finals: list[tuple[int, Any]] = []
        infos: list[tuple[int, bool, bytes]] = []
        for k, its_begun, its_finals, its_infos in self._before(stop):
            row = (k - start) * lanes
            for lane in its_begun if len(its_begun) == 1 else sorted(its_begun):
                begun[row + lane] = its_begun[lane]
            if its_finals:
                finals += [(row + lane, obs) for lane, obs in its_finals]
            if its_infos:
                infos += [(row + lane, is_final, info) for lane, is_final, info in its_infos]
        actions, obs, rewards, terminations, truncations = self._columns(start, stop)
        return Note(
            at=np.array(self._at[start:stop]),
            lanes=np.tile(np.arange(lanes), stop - start),
            actions=actions,
            obs=obs,
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
            begun=begun,
            finals=finals,
            infos=infos,
            policy=self._policy,
            nbytes=sizes[stop - 1] - before,
        )

    def _columns(self, start: int, stop: int) -> list[NDArray[Any]]:
        """Some answers column by column; they are kept no more."""
        told = self._told[start:stop]
        self._told[start:stop] = [b""] * len(told)  # as long as before, whatever is put behind it meanwhile
        answers = np.frombuffer(b"".join(told), np.uint8).reshape(len(told), -1)
        columns, at = [], 0
        number, flag = ((np.dtype(kind), (self._lanes,)) for kind in (np.float64, np.bool_))
        for dtype, shape in (self._actions_like, self._obs_like, number, flag, flag):
            size = dtype.itemsize * math.prod(shape)
            part = np.ascontiguousarray(answers[:, at : at + size])
            columns.append(part.view(dtype).reshape(len(told) * self._lanes, *shape[1:]))
            at += size
        if at != answers.shape[1]:
            raise ValueError("an answer was noted whose rewards are no float64, or whose flags are no bools")
        return columns

    def _before(self, stop: int) -> list[_Beside]:
        """What stands beside the answers before that one; it is kept no more."""
        count = 0
        while count < len(self._beside) and self._beside[count][0] < stop:
            count += 1
        taken, self._beside[:count] = self._beside[:count], []  # more may be put behind it meanwhile
        return taken
