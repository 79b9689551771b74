"""What a transcript notes: resets, answers, and whatever else changes an env."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import UnencodableValue
from meshrl.protocol.digests import Words
from meshrl.protocol.values import own
from meshrl.wire.codec import pack

Indices = NDArray[np.int64]
Info = dict[str, Any]

# What a row takes of a chunk beside its action and observation.
ROW_BYTES = 32


class Began(NamedTuple):
    """A reset.

    Attributes:
        number: of the episode that begins.
        seed: that it was given.
        state: what outlived a reset without one, if that is known.
        options: that it was given.
    """

    number: int
    seed: int | None
    state: bytes | None
    options: Info | None


class Note(NamedTuple):
    """An answer to some lanes, or several one after another.

    Attributes:
        at: when, in monotonic seconds; of several one each, which are of as many rows.
        lanes: of each row; None where each lane has one.
        actions: a batch, one a row, or a list of them; None of an explicit reset.
        obs: a batch of what was told; None once it is hashed and not kept.
        rewards: as told.
        terminations: as told.
        truncations: as told.
        begun: the rows that show an observation of a reset, with what that was given.
        finals: the rows that show a reset where a step has ended, with that step's observation.
        infos: of rows, packed, and whether it is that of a final.
        policy: the version of whoever chose the actions, where that is said; a list of one a row where they differ.
        nbytes: about what it takes of a chunk.
        hashes: of the rows and of the finals behind them, where observations are too large to be kept.
    """

    at: float | NDArray[np.float64]
    lanes: Indices | None
    actions: Any
    obs: Any
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    begun: dict[int, Began]
    finals: Sequence[tuple[int, Any]]
    infos: Sequence[tuple[int, bool, bytes]]
    policy: int | list[int | None] | None
    nbytes: int
    hashes: Words | None = None

    @property
    def hashed(self) -> bool:
        """Whether hashes stand for its observations."""
        return self.hashes is not None


class One(NamedTuple):
    """An answer to the only lane of a session of one env: its own values, a row of a :class:`Note`.

    Attributes:
        hash: of the row, where its observation is large, and not kept.
        seen: that of a large observation alone, kept or not (:func:`~meshrl.protocol.digests.seen`).
    """

    at: float
    action: Any
    obs: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: bytes | None
    begun: Began | None
    policy: int | None
    nbytes: int
    hash: int | None
    seen: int | None

    @property
    def hashed(self) -> bool:
        """Whether a hash stands for its observation."""
        return self.hash is not None or (self.seen is not None and self.obs is None)


@dataclass(slots=True)
class Asked:
    """Something else that was asked of a lane and changes its env: ``call`` or ``set_attr``."""

    at: float
    lane: int
    op: str
    given: Info
    nbytes: int = ROW_BYTES
    hashed: None = None


def rows_in(noted: Note | One | Asked) -> int:
    """How many steps and resets that is."""
    if isinstance(noted, Note):
        return len(noted.rewards)
    return 1 if isinstance(noted, One) else 0


def finals_of(infos: Sequence[tuple[int, Info]]) -> list[tuple[int, Any]]:
    """Of rows that show a reset, each with what the step before it told last, copied.

    Of a row the first counts: what follows is of the reset, in which an env may say whatever it likes.
    """
    finals: dict[int, Any] = {}
    for row, info in infos:
        if "final_obs" in info and row not in finals:
            finals[row] = own(info["final_obs"])
    return list(finals.items())


def packed_infos(infos: Sequence[tuple[int, Info]], finals: Collection[int]) -> list[tuple[int, bool, bytes]]:
    """Those that are not empty; of a row that is a final, the first is that of its step."""
    packed, left = [], set(finals)
    for row, info in infos:
        if row in left and "final_obs" in info:
            left.remove(row)
            if info.get("final_info"):
                packed.append((row, True, packed_info(info["final_info"])))
        elif info:
            packed.append((row, False, packed_info(info)))
    return [one for one in packed if one[2]]


def packed_info(info: Info) -> bytes:
    """An info, packed; nothing of one that cannot be: its learner was told an error in its place."""
    try:
        return pack(info)
    except UnencodableValue:
        return b""
