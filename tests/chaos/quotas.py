"""What a run has to reach before it ends: learners go on, and faults with them, until all of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from tests.chaos.schedule import Kind


@dataclass(frozen=True)
class Quotas:
    """Of one run.

    Attributes:
        episodes: that learners finish, all of them together.
        episodes_of_each: of each env, at the least.
        episodes_by_each: that each learner finishes at the least.
        resumed: sessions that were resumed while a step was in flight.
        moved: sessions that went to another worker before their own left.
        faults: of each kind.
        limit_s: a run that takes longer has failed.
    """

    episodes: int
    episodes_of_each: int
    episodes_by_each: int
    resumed: int
    moved: int
    faults: MappingProxyType[Kind, int]
    limit_s: float


LONG = Quotas(
    episodes=1000,
    episodes_of_each=250,
    episodes_by_each=20,
    resumed=200,
    moved=40,
    faults=MappingProxyType(
        {
            Kind.KILL: 30,
            Kind.REPLAY_KILL: 10,
            Kind.KILL_ALL: 2,
            Kind.LEAVE: 20,
            Kind.FREEZE: 20,
            Kind.LOSE: 50,
            Kind.CUT: 20,
            Kind.DELAY: 10,
            Kind.HOLD: 10,
            Kind.RESTART: 3,
            Kind.HANG: 10,
            Kind.EXIT: 10,
            Kind.SEGFAULT: 10,
            Kind.RAISE: 10,
        }
    ),
    limit_s=2400.0,
)
SHORT = Quotas(
    episodes=60,
    episodes_of_each=5,
    episodes_by_each=1,
    resumed=12,
    moved=2,
    faults=MappingProxyType(
        {
            Kind.KILL: 2,
            Kind.REPLAY_KILL: 1,
            Kind.KILL_ALL: 1,
            Kind.LEAVE: 2,
            Kind.FREEZE: 2,
            Kind.LOSE: 4,
            Kind.CUT: 2,
            Kind.DELAY: 1,
            Kind.HOLD: 1,
            Kind.RESTART: 1,
            Kind.HANG: 1,
            Kind.EXIT: 1,
            Kind.SEGFAULT: 1,
            Kind.RAISE: 1,
        }
    ),
    limit_s=300.0,
)
