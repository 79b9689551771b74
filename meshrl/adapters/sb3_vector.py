"""What a Stable-Baselines3 ``VecEnv`` asks of a remote vector: infos and options of each sub-environment by itself.

A ``VecEnv`` resets an ended sub-environment at once, tells the infos of each as its env gave them, and may reset each
with options of its own. So the remote vector is leased for SAME_STEP, its infos are split instead of merged, and where
options differ there are several resets after one another, each of the sub-environments that share theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from meshrl.client.mesh import Mesh
from meshrl.client.vector import RemoteVectorEnv
from meshrl.errors import MalformedMessage, UnsupportedSpace, UsageError
from meshrl.wire.batches import form_of
from meshrl.wire.codec import pack
from meshrl.wire.infos import split_infos

# Which sub-environments (None: all) are reset with which options.
Group = tuple[NDArray[np.bool_] | None, dict[str, Any] | None]
# Observations of all, and what each of those that were reset or stepped told: see split_infos.
Told = tuple[Any, list[list[dict[str, Any]]]]
Resets = list[tuple[NDArray[np.bool_] | None, Told]]


async def lease(mesh: Mesh, name: str, num_envs: int, **request: Any) -> RemoteVectorEnv:
    """Lease a vector whose infos are those of each sub-environment.

    Args:
        mesh: where.
        name: as served.
        num_envs: how many sub-environments.
        request: more arguments of :meth:`meshrl.Mesh.vector`.

    Raises:
        UsageError: its workers host it as a whole.
        NotImplementedError: Dicts or Tuples within one another, which SB3 does not take.
        UnsupportedSpace: observations that are no arrays.
        MeshError: as :meth:`meshrl.Mesh.vector` does.
    """
    try:
        remote = await mesh.vector(name, num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **request)
    except UsageError as exc:
        if "lacks" not in exc.details:
            raise
        shown = "; ".join(f"worker {worker} does not offer {text}" for worker, text in exc.details["lacks"].items())
        raise UsageError(
            f"{name}: SB3 resets ended sub-environments at once and seeds each one, and {shown}; this needs a worker "
            "that hosts them one by one (meshrl serve --vectors meshrl)",
            **exc.details,
        ) from None
    try:
        _check(remote)
    except BaseException:
        await remote.close()
        raise
    remote._infos_of = split_infos  # noqa: SLF001  # merged ones have lost the types that the envs gave
    return remote


def _check(remote: RemoteVectorEnv) -> None:
    """Whether SB3 can have it."""
    from stable_baselines3.common.vec_env.util import obs_space_info  # noqa: PLC0415  # nothing else here needs SB3

    vectors = remote._description.vectors  # noqa: SLF001  # nobody else asks
    if vectors is not None and not vectors.attributes:
        raise UsageError(
            f"{remote.name}: its workers host it by {vectors.implementation}'s vector implementation, which merges "
            "infos and hides the sub-environments; this needs a worker that hosts them one by one"
        )
    space = remote.single_observation_space
    obs_space_info(space)  # refuses what is nested, in SB3's words
    parts: Iterable[gymnasium.Space[Any]] = [space]
    if isinstance(space, spaces.Dict):
        parts = space.spaces.values()
    elif isinstance(space, spaces.Tuple):
        parts = space.spaces
    for part in parts:
        if form_of(part) != "array":
            raise UnsupportedSpace(f"{remote.name}: SB3 takes observations that are arrays, not {type(part).__name__}")


def groups_of(options: Sequence[Mapping[str, Any] | None]) -> list[Group]:
    """Which sub-environments are reset together, by their options; empty ones are none.

    Raises:
        UnencodableValue: options that cannot travel.
    """
    masks: dict[bytes, NDArray[np.bool_]] = {}  # by the options as they travel: they need not compare or hash
    groups: list[Group] = []
    for i, one in enumerate(options):
        packed = pack(dict(one) if one else None)
        if packed not in masks:
            masks[packed] = np.zeros(len(options), np.bool_)
            groups.append((masks[packed], dict(one) if one else None))
        masks[packed][i] = True
    return [(None, groups[0][1])] if len(groups) == 1 else groups


async def reset_groups(
    remote: RemoteVectorEnv, seeds: Sequence[int | None] | None, groups: Sequence[Group], *, first: bool
) -> Resets:
    """Reset all sub-environments, one group after another.

    Args:
        remote: as leased here.
        seeds: one for each, maybe None.
        groups: as :func:`groups_of` gave them.
        first: whether none was ever reset. A first reset leaves nobody out: those of later groups are reset by it too,
            and then again with options of their own, from the same seeds.
    """
    resets: Resets = []
    for mask, options in groups:
        of = None if first and not resets else mask
        told: Any = await remote._reset(seeds, options, of)  # noqa: SLF001  # the public one makes {} of no options
        resets.append((of, told))
    return resets


def only(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The info of a sub-environment that told nothing of an end.

    Raises:
        MalformedMessage: it did.
    """
    if len(told) > 1:
        raise MalformedMessage("two infos of a sub-environment whose episode has not ended")
    return told[0] if told else {}


def ended(told: list[dict[str, Any]]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The last info and observation of an episode, and the info of the next one's reset.

    Raises:
        MalformedMessage: they are not there.
    """
    final = told[0] if told else {}
    if final.keys() != {"final_obs", "final_info"} or type(final["final_info"]) is not dict:
        raise MalformedMessage("an episode has ended, and its last observation and info are missing")
    return final["final_info"], final["final_obs"], only(told[1:])
