"""Runs of an experiment as they are on record, and whether two of them are the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from meshrl.client.context import context_of
from meshrl.client.rerunning import actions_of
from meshrl.recording.episodes import EpisodeSummary, RecordedEpisode
from meshrl.wire.codec import pack

if TYPE_CHECKING:
    from meshrl.client.mesh import Mesh

RUN, SEED, ENV_ID = "experiment_run", "seed", "env_id"


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two runs with one seed.

    Attributes:
        seed: of the manifest; empty of what said none.
        episodes: how many the run has.
        reference: how many that has with which it is compared.
        equal: how many of these are equal.
        first: where the first of the others differs from its like, and in what; empty where it has none.
    """

    seed: str
    episodes: int
    reference: int
    equal: int
    first: str


@dataclass(frozen=True, slots=True)
class _One:
    seed: str
    env: str
    env_id: int
    number: int
    content: bytes
    episode_id: str


async def runs_of(mesh: Mesh, manifest_hash: str) -> dict[str, list[EpisodeSummary]]:
    """The episodes of each run of a manifest that is on record; the run that ended an episode first is the first."""
    runs: dict[str, list[EpisodeSummary]] = {}
    async for one in mesh.episodes(manifest=manifest_hash):
        runs.setdefault(one.labels.get(RUN, ""), []).append(one)
    return runs


async def compare(
    mesh: Mesh, run: Iterable[EpisodeSummary], reference: Iterable[EpisodeSummary]
) -> tuple[int, list[Difference]]:
    """How many episodes of two runs are equal, and what differs.

    Two episodes of the same seed are equal if their resets, actions, rewards, flags and digests of observations are, in
    whichever session each was.

    Raises:
        EpisodeTorn, EpisodeUnknown: one of them cannot be read any more.
        MeshError: as of :meth:`meshrl.Mesh.episode`.
    """
    mine, theirs = [await _read(mesh, one) for one in run], [await _read(mesh, one) for one in reference]
    equal_ones, differences = 0, []
    for seed in sorted({one.seed for one in (*mine, *theirs)}, key=lambda text: (len(text), text)):
        own, others = ([one for one in ones if one.seed == seed] for ones in (mine, theirs))
        both = Counter(one.content for one in own) & Counter(one.content for one in others)
        equal = both.total()
        equal_ones += equal
        if equal < max(len(own), len(others)):
            first = await _first(mesh, _without(own, both), _without(others, both))
            differences.append(Difference(seed, len(own), len(others), equal, first))
    return equal_ones, differences


async def _recorded(mesh: Mesh, episode_id: str) -> RecordedEpisode:
    return await (await context_of(mesh).library()).episode(episode_id)


async def _read(mesh: Mesh, summary: EpisodeSummary) -> _One:
    read = await _recorded(mesh, summary.episode_id)
    columns = (read.rewards, read.terminations, read.truncations, read.digests)
    began = [summary.env, read.seed, read.options, [read.actions.form, read.actions.values]]
    content = hashlib.blake2b(pack(began), digest_size=16)
    for column in columns:
        content.update(np.ascontiguousarray(column).tobytes())
    env_id = summary.labels.get(ENV_ID, "")
    return _One(
        summary.labels.get(SEED, ""),
        summary.env,
        int(env_id) if env_id.isdecimal() else summary.env_id,
        read.id.number,
        content.digest(),
        summary.episode_id,
    )


def _without(ones: Sequence[_One], equal: Counter[bytes]) -> list[_One]:
    """Those that have no equal, by env and number."""
    left, odd = Counter(equal), []
    for one in ones:
        if left[one.content]:
            left[one.content] -= 1
        else:
            odd.append(one)
    return sorted(odd, key=lambda one: (one.env, one.env_id, one.number))


async def _first(mesh: Mesh, own: Sequence[_One], others: Sequence[_One]) -> str:
    if not own or not others:
        return ""
    one, other = own[0], others[0]
    where = f"{one.env} {one.env_id}, episode {one.number}"
    if (one.env, one.env_id, one.number) != (other.env, other.env_id, other.number):
        return f"{where}, beside episode {other.number} of {other.env} {other.env_id}"
    return f"{where}, {_difference(await _recorded(mesh, one.episode_id), await _recorded(mesh, other.episode_id))}"


def _difference(one: RecordedEpisode, other: RecordedEpisode) -> str:
    if (one.seed, pack(one.options)) != (other.seed, pack(other.options)) or one.digests[0] != other.digests[0]:
        return "reset"
    sizes = len(one.rewards), len(other.rewards)
    count = min(sizes)
    actions = zip(actions_of(one, 0, count), actions_of(other, 0, count), strict=True)
    for step, (action, another) in enumerate(actions):
        if pack(action) != pack(another):
            return f"step {step + 1}: action"
        if one.rewards[step].tobytes() != other.rewards[step].tobytes():
            return f"step {step + 1}: reward"
        if one.digests[step + 1] != other.digests[step + 1]:
            return f"step {step + 1}: observation"
    return f"step {count + 1}: length"
