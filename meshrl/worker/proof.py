"""Proof: what goes with the answers of sub-environments whose client keeps journals of them (R8).

That is the origins of those that a request has reset, as far as their journals can begin anew there, and, where
observations are large, the digest of each, so that a replay can be compared with what was told. Of small ones the
client keeps the answers and counts them itself when it has to: hardly ever.

A digest is of all that was told before the answer that it goes with: a message of pictures is hashed when it has been
given to the socket, and its client reads it meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage, UnencodableValue
from meshrl.protocol.digests import Digests
from meshrl.protocol.seeding import Seeding
from meshrl.protocol.seeds import check_seed
from meshrl.wire.batches import Batching
from meshrl.wire.codec import pack
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.messages import Open
from meshrl.worker.drawing import alone, draws
from meshrl.worker.origins import outliving
from meshrl.worker.sealing import StateKey

log = logging.getLogger("meshrl.worker")

Flags = NDArray[np.bool_]

# Of one observation: from here on to hash it costs no more than to keep it.
HASHED_BYTES = 1024
# A journal begins anew at a reset without a seed only when it has so many steps: what outlives an env costs as much as
# a step or two of a fast one, and a replay of some hundred of those nothing to speak of.
SHORT_STEPS = 200


class Proof:
    """The digests and origins of one session's sub-environments.

    Resets may be noted on any thread, one at a time for each sub-environment; all else is the event loop's.

    Args:
        envs: local envs.
        batches: of their observations.
        seeding: theirs.
        says: whether digests go with their answers.
        state_key: with which a worker seals what only workers may have written.

    Attributes:
        says: as given.
        called: whether a method was called. Then no journal begins anew at a reset without a seed any more, and so no
            digest may: who does it again, from farther back, could not know where.
    """

    def __init__(
        self,
        envs: Sequence[Any],
        batches: Batching,
        seeding: Seeding,
        *,
        says: bool,
        state_key: StateKey | None = None,
    ) -> None:
        self.says = says
        self._uncounted: list[tuple[Any, ...]] = []  # what was told and is in no digest yet: arguments of Digests.add
        self._digests = Digests(len(envs), batches)
        self._batches = batches
        self._seeding = seeding
        kept = [outliving(env, state_key) for env in envs]
        if any(map(draws, envs)):
            kept = [None if one is None else one._replace(get=alone(one.get), put=alone(one.put)) for one in kept]
        self._kept = kept
        self.called = False
        self._began: dict[int, Frame] = {}
        self._steps = 0.0  # of all so far, on average
        self._since = [0.0] * len(envs)  # which of them each journal begins with

    # ---------------------------------------------------------------- origins

    def begins(self, i: int, seed: int | None) -> bool:
        """Sub-environment ``i`` is about to be reset, with that seed; gives whether its journal may begin anew."""
        kept = self._kept[i]
        if seed is not None:
            origin: Frame = {"seed": seed}
        elif kept is not None and not self.called and self._steps - self._since[i] >= SHORT_STEPS:
            origin = {"state": kept.get()}
        else:
            return False
        self._since[i] = self._steps
        self._began[i] = {**origin, **self._seeding.place(i)}
        return True

    def numbered(self, i: int, number: int) -> None:
        """The episode that is about to begin so has that number in the recording of its session."""
        self._began[i]["nth"] = number

    def begins_from(self, i: int, origin: Frame) -> int | None:
        """It is about to be reset as it was when that was told; gives the seed.

        Raises:
            MalformedMessage: the origin is none, or of another env.
        """
        kept, seed = self._kept[i], origin.get("seed")
        if seed is not None:
            seed = check_seed(seed)
        elif kept is not None and type(origin.get("state")) is bytes:
            kept.put(origin["state"])
        else:
            raise MalformedMessage("an origin has the seed of a reset, or what outlives one of an env that tells it")
        self._seeding.put(i, origin)
        self._began[i] = origin
        return seed

    def take_origin(self, i: int) -> bool:
        """Whether it was reset since this was asked, so that its journal may begin anew."""
        return self._began.pop(i, None) is not None

    def _taken(self, lanes: Indices | None) -> list[tuple[int, Frame]]:
        """The origins of these (None: all), each with the row of its sub-environment."""
        began = self._began
        if not began:
            return []
        if lanes is None:
            taken = [(i, began.pop(i)) for i in list(began)]
        else:
            rows = np.full(len(self._kept), -1)
            rows[lanes] = np.arange(len(lanes))
            taken = [(int(rows[i]), began.pop(i)) for i in list(began) if rows[i] >= 0]
        taken.sort(key=_row)
        return taken

    # ---------------------------------------------------------------- what goes with an answer

    def add(self, frame: Frame, lanes: Indices | None = None, numbers: NDArray[np.int64] | None = None) -> None:
        """Add to the answer of a step, or of a pool's reset.

        Args:
            frame: the answer.
            lanes: of whom it is; None of all.
            numbers: by lane, of the episodes that have begun now.
        """
        self._steps += 1.0 if lanes is None else len(lanes) / len(self._kept)
        if not self._began and not self.says:
            return
        taken = self._taken(lanes)
        if lanes is not None and numbers is not None:
            for row, origin in taken:
                origin["number"] = int(numbers[lanes[row]])
        if self.says:
            which = slice(None) if lanes is None else lanes
            columns = (frame["rewards"], frame["terminations"], frame["truncations"])
            self.count()
            frame["digests"] = self._digests.values[which].copy()
            self._uncounted.append((which, frame["obs"], *columns, [row for row, _ in taken]))
        if taken:
            frame["origins"] = _flat(taken)

    def add_to_reset(self, frame: Frame, ids: Indices, obs: Any) -> None:
        """Add to the answer of a vector's reset: of ``ids`` were reset, and that is what they told."""
        taken = self._taken(None)
        if self.says:
            anew = {i for i, _ in taken}
            nothing = np.zeros(len(ids))
            flags = nothing.astype(np.bool_)
            rows = [row for row, i in enumerate(ids.tolist()) if i in anew]
            self.count()
            frame["digests"] = self._digests.values.copy()
            if len(ids):
                self._uncounted.append((ids, obs, nothing, flags, flags, rows))
        if taken:
            frame["origins"] = _flat(taken)

    def count(self) -> None:
        """Take in what was told: when it was given to the socket, and before more is asked of those who told it.

        Their arrays may be the envs' own, which those go on writing to.
        """
        uncounted, self._uncounted = self._uncounted, []
        try:
            for told in uncounted:
                try:
                    self._digests.add(*told)
                except UnencodableValue:
                    self._count_alone(*told)
        except Exception:
            log.exception("observations cannot be hashed; from now on their client counts them itself, if it can")
            self.says = False

    def _count_alone(
        self,
        which: Indices | slice,
        obs: Any,
        rewards: NDArray[np.float64],
        terminations: Flags,
        truncations: Flags,
        anew: Sequence[int],
    ) -> None:
        """Some of a batch cannot be packed: those were told nobody, and a pool's others each by itself."""
        for k, i in enumerate(np.arange(len(self._kept))[which].tolist()):
            row = slice(k, k + 1)
            with contextlib.suppress(UnencodableValue):
                own = self._batches.pick(obs, np.array([k]))
                flags = terminations[row], truncations[row]
                self._digests.add(np.array([i]), own, rewards[row], *flags, [0] if k in anew else [])

    def chain(self, i: int, obs: Any, rewards: NDArray[np.float64], flags: tuple[Flags, Flags], *, anew: bool) -> None:
        """Take in what one told alone, row after row."""
        self._digests.chain(i, obs, rewards, *flags, anew=anew)

    def digest_of(self, i: int) -> int:
        """Of one, as it is now."""
        return int(self._digests.values[i])


def says_digests(open_: Open, space: gymnasium.Space[Any]) -> bool:
    """Whether digests go with the answers of a session whose observations are of that space."""
    return open_.digests == "all" or (open_.digests == "large" and bytes_of(space) >= HASHED_BYTES)


def bytes_of(space: gymnasium.Space[Any]) -> int:
    """Those of the arrays of one value of a space; what is of no certain size counts nothing."""
    if isinstance(space, spaces.Dict):
        return sum(map(bytes_of, space.spaces.values()))
    if isinstance(space, spaces.Tuple):
        return sum(map(bytes_of, space.spaces))
    if isinstance(space, (spaces.Box, spaces.MultiBinary, spaces.MultiDiscrete)):
        return math.prod(space.shape) * np.dtype(space.dtype).itemsize
    return 0


def _flat(taken: Sequence[tuple[int, Frame]]) -> list[Any]:
    """As they travel: plain values, which are read fast, and an origin is nobody's business but a worker's."""
    return [part for row, origin in taken for part in (row, pack(origin))]


def _row(entry: tuple[int, Frame]) -> int:
    return entry[0]
