"""The schedule: which fault comes when, from a seed alone. Same seed, same faults in the same order.

Faults of one track come one after another, and tracks run beside each other, so that faults overlap:

    track      kinds
    kills      a worker is killed; one is killed while it does a journal again; all are killed at once
    leaves     a worker is told to leave; another takes its place
    freezes    a worker stands still for longer than its lease, and goes on
    network    answers are lost, connections cut, delayed, held up; the server is killed and comes back
    saboteurs  envs hang, exit, segfault, raise

A track is endless: bags of its kinds, as many of each as its quota asks for beside the others, each bag in an order of
its own. So all quotas of a track are reached at about the same time, and what did not count comes again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Of a fault; the value is its name in reports."""

    KILL = "workers killed"
    REPLAY_KILL = "workers killed during a replay"
    KILL_ALL = "all workers killed at once"
    LEAVE = "workers told to leave"
    FREEZE = "workers stopped past their lease and woken"
    LOSE = "answers lost after execution"
    CUT = "connections cut"
    DELAY = "connections delayed"
    HOLD = "connections held up"
    RESTART = "server restarts"
    HANG = "envs that hung"
    EXIT = "envs that exited"
    SEGFAULT = "envs that crashed"
    RAISE = "envs that raised"


@dataclass(frozen=True)
class Track:
    """Of the kinds, those that come one after another.

    Attributes:
        kinds: of its faults.
        pause_s: between two of them, from and to.
    """

    kinds: tuple[Kind, ...]
    pause_s: tuple[float, float]


TRACKS = {
    "kills": Track((Kind.KILL, Kind.REPLAY_KILL, Kind.KILL_ALL), (2.0, 6.0)),
    "leaves": Track((Kind.LEAVE,), (3.0, 9.0)),
    "freezes": Track((Kind.FREEZE,), (2.0, 6.0)),
    "network": Track((Kind.LOSE, Kind.CUT, Kind.DELAY, Kind.HOLD, Kind.RESTART), (0.5, 3.0)),
    "saboteurs": Track((Kind.HANG, Kind.EXIT, Kind.SEGFAULT, Kind.RAISE), (1.0, 6.0)),
}
# How long a fault lasts, from and to, in seconds; of a freeze beyond the lease. What is not here is over at once.
# Some of those who stand still are given up meanwhile, and some are not.
LENGTH_S = {
    Kind.FREEZE: (0.5, 5.0),
    Kind.DELAY: (0.5, 2.0),
    Kind.HOLD: (0.5, 2.5),
    Kind.RESTART: (0.0, 1.0),
}


@dataclass(frozen=True)
class Fault:
    """One of the schedule.

    Attributes:
        kind: what.
        pause_s: before it.
        length_s: of it.
        draw: from 0 to below 1; whom it meets, of those who are there by then.
    """

    kind: Kind
    pause_s: float
    length_s: float
    draw: float


def faults(seed: int, track: str, quotas: Mapping[Kind, int]) -> Iterator[Fault]:
    """The faults of a track, without end; none where none of its kinds has a quota.

    Args:
        seed: of the schedule.
        track: one of :data:`TRACKS`.
        quotas: how many of each kind are wanted; what is not in it does not come.
    """
    rng = random.Random(f"{seed} {track}")  # it is to come again
    wanted = {kind: quotas[kind] for kind in TRACKS[track].kinds if quotas.get(kind)}
    if not wanted:
        return
    least = min(wanted.values())
    bag = [kind for kind, count in wanted.items() for _ in range(math.ceil(count / least))]
    while True:
        rng.shuffle(bag)
        for kind in bag:
            pause_s = rng.uniform(*TRACKS[track].pause_s)
            length_s = rng.uniform(*LENGTH_S.get(kind, (0.0, 0.0)))
            yield Fault(kind, pause_s, length_s, rng.random())
