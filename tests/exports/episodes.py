"""Episodes as tests of exports want them: made without a mesh, and compared to the bit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from meshrl.adapters.datasets.exporting import Format
from meshrl.adapters.datasets.gathered import gather
from meshrl.client.episode import Episode
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import batched
from meshrl.wire import spaces
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description
from meshrl.wire.recorded import Recorded

Space = gymnasium.Space[Any]


def recorded_of(observation_space: Space, action_space: Space) -> Recorded:
    description = Description(
        kind="env",
        name="made",
        worker="w1",
        observation_space=spaces.describe(observation_space),
        action_space=spaces.describe(action_space),
        versions={"python": "3.11"},
    )
    return Recorded(
        session="made",
        worker="w1",
        user="ann",
        name="made",
        level="full",
        labels={"run": "a"},
        description=description,
    )


def made(recorded: Recorded, number: int, steps: int, infos: list[dict[str, Any]] | None = None) -> Episode:
    """An episode of values that its spaces give."""
    described = recorded.description
    shown, acted = spaces.rebuild(described.observation_space), spaces.rebuild(described.action_space)
    shown.seed(number)
    acted.seed(number)
    rng = np.random.default_rng(number)
    rewards = rng.normal(size=steps)
    rewards[rng.random(steps) < 0.2] = [np.nan, np.inf, -np.inf, -0.0][number % 4]
    return Episode(
        episode_id=f"made.0.{number}",
        env="made",
        env_id=0,
        observations=batched(batching(shown), Column("items", [shown.sample() for _ in range(steps + 1)])).values,
        actions=batched(batching(acted), Column("items", [acted.sample() for _ in range(steps)])).values,
        rewards=rewards,
        terminations=np.array([False] * (steps - 1) + [number % 2 == 0]),
        truncations=np.array([False] * (steps - 1) + [number % 3 == 0]),
        infos=infos or [{} for _ in range(steps + 1)],
        seed=(None, 7, 1 << 70)[number % 3],
        options=(None, {"at": np.arange(2), "level": 1}, {"easy": True})[number % 3],
        reason="terminated" if number % 2 == 0 else "closed",
        ended_at=datetime(2026, 1, 1, 12, 0, number, 5, tzinfo=UTC),
        at_s=np.arange(steps) / 7,
        policy_versions=np.arange(steps) - 1,
        remade=False,
        recorded=recorded,
    )


async def written(format_: Format, episodes: list[Episode], place: Path) -> Path:
    """Episodes in a file or directory, as an export writes them; gives where."""

    async def each() -> AsyncIterator[Episode]:
        for episode in episodes:
            yield episode

    gathered = await gather(each(), place / "episodes")
    writing = format_.begin(gathered, place)
    try:
        for episode in gathered.episodes():
            writing.add(episode)
        return writing.finish()
    finally:
        writing.close()


def names_in(path: Path) -> list[str]:
    return [one.name for one in path.iterdir()]


def same_episodes(one: Episode, other: Episode) -> None:
    """Equal in everything, floats to the bit."""
    assert (one.episode_id, one.env, one.env_id) == (other.episode_id, other.env, other.env_id)
    assert (one.seed, one.reason, one.ended_at) == (other.seed, other.reason, other.ended_at)
    assert pack(one.options) == pack(other.options)
    assert one.recorded == other.recorded
    for name in ("rewards", "terminations", "truncations", "at_s", "policy_versions"):
        assert pack(getattr(one, name)) == pack(getattr(other, name)), name
    assert len(one) == len(other)
    for mine, theirs in zip(one.transitions(), other.transitions(), strict=True):
        for name in ("observation", "action", "next_observation"):
            assert alike(getattr(mine, name), getattr(theirs, name)), name
    assert len(one.infos) == len(other.infos)
    assert all(map(alike, one.infos, other.infos))


def alike(one: Any, other: Any) -> bool:
    """Equal, arrays in dtype, shape and bits; whichever of Python's and NumPy's a number is."""
    if pack(one) == pack(other):
        return True
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        numpys = isinstance(one, np.ndarray | np.generic) and isinstance(other, np.ndarray | np.generic)
        if np.shape(one) == () == np.shape(other):  # a NumPy scalar is of the machine's byte order
            one, other = (np.asarray(value).astype(value.dtype.newbyteorder("=")) for value in (one, other))
        return numpys and pack(np.asarray(one)) == pack(np.asarray(other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, tuple | list):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float | np.floating) and isinstance(other, float | np.floating):
        return np.float64(one).tobytes() == np.float64(other).tobytes()
    return bool(one == other)
