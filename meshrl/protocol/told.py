"""What a shard's sub-environments have told since their journals began, as a replay must tell it again (R8).

A worker may say the digests itself, which it does where observations are large: with every answer those of all before
it, so that only the last of each sub-environment is kept. Else all answers are kept. What is kept is counted into the
digests when somebody needs those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.protocol.digests import Digests, Words
from meshrl.protocol.uncounted import Uncounted
from meshrl.wire.batches import Batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.kept import Kept, whole

# Of answers that are in no digest yet: some hundred steps of 256 CartPoles.
UNCOUNTED_BYTES = 4 * 1024 * 1024


# An answer to a reset or a step:
#     the position of its request in the journal,
#     the answer as it arrived,
#     what was asked,
#     the sub-environments that told something with it,
#     their rows in it; None where it has a row for each of them, in their order.
Answer = tuple[int, Kept, str, Indices | slice, Indices | None]


class _Last:
    """An answer that its worker has not counted yet, for an array that would take a tuple apart."""

    __slots__ = ("answer",)

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class Told:
    """What a number of sub-environments have told.

    Args:
        count: how many there are.
        observations: batches of them.
    """

    def __init__(self, count: int, observations: Batching) -> None:
        self._count = count
        self._observations = observations
        self._digests = Digests(count, observations)
        self._uncounted: Uncounted[Answer] = Uncounted(UNCOUNTED_BYTES)
        self._lasts: NDArray[np.object_] = np.full(count, None)
        self._said = False

    def said(self, answer: Answer, digests: Words) -> None:
        """The worker counts itself: the digests of whom that answer is of, before it."""
        which = answer[3]
        self._digests.values[which] = digests
        self._lasts[which] = _Last(answer)
        self._said = True

    def keep(self, answers: Sequence[Answer]) -> list[Answer]:
        """Keep answers; gives those that have to be counted now, the oldest first."""
        before = self._take_lasts() if self._said else []
        return before + self._uncounted.add(answers)

    def take(self) -> list[Answer]:
        """All answers that are not counted yet, the oldest of each first; they are kept no more."""
        return self.take_uncounted() + self._take_lasts()

    def take_uncounted(self) -> list[Answer]:
        """Of those, what a worker told that did not count."""
        return [self._uncounted.take() for _ in range(len(self._uncounted))]

    def _take_lasts(self) -> list[Answer]:
        """Each last answer, as one to those that have had none since."""
        lanes_of: dict[_Last, list[int]] = {}
        for lane, last in enumerate(self._lasts.tolist()):
            if last is not None:
                lanes_of.setdefault(last, []).append(lane)
        self._lasts[:] = None
        self._said = False
        taken: list[Answer] = []
        for last, lanes in lanes_of.items():
            at, data, op, which, rows = last.answer
            ids = np.arange(self._count)[which]
            own = np.isin(ids, lanes)
            taken.append((at, data, op, ids[own], (np.arange(len(ids)) if rows is None else rows)[own]))
        return taken

    def drop_before(self, position: int) -> None:
        """No journal begins before that position: what was told before is of no use."""
        self._uncounted.drop_before(position)

    def forget(self) -> None:
        """Nothing was told."""
        self._uncounted.clear()
        self._lasts[:] = None
        self._said = False
        self._digests.values[:] = 0

    @property
    def digests(self) -> Words:
        """Of what was counted so far."""
        return self._digests.values

    def count(self, answer: Answer) -> None:
        """Count an answer into the digests of whom it is of.

        Raises:
            Exception: it is none.
        """
        _, data, op, which, rows = answer
        frame = unpack(whole(data))
        if rows is not None and not len(rows):  # a reset of none of them
            return
        lanes = frame.get("lanes")
        size = len(lanes) if isinstance(lanes, np.ndarray) else self._count
        observations = frame.get("obs")
        self._observations.check(observations, size, "obs", exact=True)
        if op == "reset" and "rewards" not in frame:  # a vector's
            rewards, terminations, truncations = np.zeros(size), np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        else:
            rewards = _column(frame, "rewards", size, np.float64)
            terminations = _column(frame, "terminations", size, np.bool_)
            truncations = _column(frame, "truncations", size, np.bool_)
        began = (frame.get("origins") or [])[::2]
        if rows is not None:
            observations = self._observations.pick(observations, rows)
            rewards, terminations, truncations = rewards[rows], terminations[rows], truncations[rows]
            began = [k for k, row in enumerate(rows.tolist()) if row in began] if began else began
        self._digests.add(which, observations, rewards, terminations, truncations, began)


def _column(frame: Frame, name: str, size: int, dtype: type) -> NDArray[Any]:
    column = frame.get(name)
    if not isinstance(column, np.ndarray) or column.shape != (size,) or column.dtype != dtype:
        raise MalformedMessage(f"an answer's {name} are {size} of {np.dtype(dtype)}", field=name)
    return column
