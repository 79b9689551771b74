"""What is measured: in each round, every work of every system once, works that are compared right after one another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OURS = "meshrl"
VECTOR_SIZES = (1, 4, 16, 64, 256, 1024)
SESSIONS = 2048
PPO_STEPS = 100_000


@dataclass(frozen=True)
class Turn:
    """One work of one system."""

    system: str
    work: str
    longer: float = 1.0
    """How many times the usual time it is given."""

    @property
    def key(self) -> str:
        """What its figures are stored under."""
        return f"{self.system}/{self.work}"


def turns(*works: str, of: str = OURS, longer: float = 1.0) -> list[Turn]:
    return [Turn(of, work, longer) for work in works]


def _vectors(size: int) -> list[Turn]:
    ours = [f"vector{size}_{workers}" for workers in (1, 2) if size >= workers]
    return [
        *turns(*ours),
        *turns(f"vector{size}", of="gymnasium_sync"),
        *(turns(f"vector{size}", of="gymnasium_async") if size <= 256 else []),
    ]


REMOTE = ("openenv", "openenv_best", "rlmesh", "dm_env_rpc")

GROUPS: dict[str, list[Turn]] = {
    "single": [
        *turns("echo", "single", "nothing"),
        *(Turn(system, "single") for system in (*REMOTE, "gymnasium_sync")),
        Turn("tcp", "echo"),
    ],
    "clients16": [
        *turns("clients16_one_mesh", "clients16_meshes"),
        *(Turn(system, "clients16") for system in (*REMOTE, "tcp")),
    ],
    "image": [
        *turns("image", "echo_image"),
        *(Turn(system, "image") for system in (*REMOTE, "gymnasium_sync", "tcp")),
        Turn("rlmesh", "image_unix"),
    ],
    "image32": turns("image32", "echo_image32"),
    **{f"vector{size}": _vectors(size) for size in VECTOR_SIZES},
    "vector4096": [
        *turns("vector4096_1", "vector4096_2", "two2048_1", "two2048_2"),
        Turn("gymnasium_vector", "vector4096"),
        Turn("envpool", "vector4096"),
    ],
    "sleep64": turns("sleep64_vector", "sleep64_halves", "sleep64_apart", "sleep64_pool", "threads"),
    "lognormal": turns("lognormal_pool", "lognormal_vector", longer=2.0),
    "fair": turns("fair", longer=1.5),
}
GROUPS["vector64"] += [Turn(system, "vector64") for system in (*REMOTE, "gymnasium_vector", "envpool")]
GROUPS["vector256"] += turns("pool256_1", "pool256_2")
GROUPS["vector256"] += [Turn(system, "vector256") for system in ("gymnasium_vector", "envpool")]

# A few repetitions only: each takes a good part of a round.
LONG: dict[str, list[Turn]] = {
    "sessions": [
        *turns("sessions_one_mesh", "sessions_meshes"),
        *(Turn(system, "sessions") for system in ("openenv", "openenv_best")),
    ],
    "ppo": [Turn("sb3", "ppo_mesh"), Turn("sb3", "ppo_dummy")],
}


def plan(rounds: int, only: Sequence[str], groups: Mapping[str, list[Turn]]) -> list[list[Turn]]:
    """The turns of each round: groups in another order each time, and the turns of each group too.

    Args:
        rounds: how many.
        only: systems, groups and works to be measured; all of them where there is none.
        groups: of :data:`GROUPS` or :data:`LONG`.
    """
    chosen = {
        group: [turn for turn in all_of_it if not only or {group, turn.system, turn.work, turn.key} & set(only)]
        for group, all_of_it in groups.items()
    }
    draw = random.Random(0)
    planned = []
    for _ in range(rounds):
        order = [group for group, of_it in chosen.items() if of_it]
        draw.shuffle(order)
        planned.append([turn for group in order for turn in draw.sample(chosen[group], len(chosen[group]))])
    return planned


def known() -> set[str]:
    """Whatever ``plan`` takes in ``only``."""
    everything = {**GROUPS, **LONG}
    return set(everything) | {
        name for of_it in everything.values() for turn in of_it for name in (turn.system, turn.work, turn.key)
    }
