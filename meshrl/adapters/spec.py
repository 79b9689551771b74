"""What Gymnasium keeps of an env beside its spaces, for a remote one: its ``EnvSpec`` and its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import EnvSpec

# What makes these remotes, by name: the one an env, the other a vector.
ENTRY_POINT = "meshrl:make"
VECTOR_ENTRY_POINT = "meshrl:make_vec"
# By Gymnasium's rule for ids.
_NOT_IN_NAMESPACE = re.compile(r"[^\w:-]")
_NOT_IN_NAME = re.compile(r"[^\w:.-]")


def own_spec(
    name: str, entry_point: str, kwargs: Mapping[str, Any], remote: EnvSpec | None, *, vector: bool = False
) -> EnvSpec:
    """The spec with which ``spec.make()``, or ``gymnasium.make_vec(spec)``, leases the same remote again.

    Args:
        name: the served name as asked for; with what Gymnasium takes in no id replaced, it is the spec's id.
        entry_point: what makes an env of it, with ``name`` and ``kwargs``.
        kwargs: what else it was made with.
        remote: the worker's own spec of the env.
        vector: whether it is of a vector, whose limit of steps is read from its spec. Of a single env it is left to
            the worker: ``spec.make()`` would count once more on top of it.
    """
    return EnvSpec(
        id=_id(name),
        entry_point=entry_point,
        vector_entry_point=VECTOR_ENTRY_POINT,
        reward_threshold=None if remote is None else remote.reward_threshold,
        nondeterministic=remote is not None and remote.nondeterministic,
        max_episode_steps=remote.max_episode_steps if vector and remote is not None else None,
        # The worker's wrappers check, order and truncate; none of them belongs on top of a remote env again.
        order_enforce=False,
        disable_env_checker=True,
        kwargs={"name": name, **kwargs},
    )


def own_metadata(remote: Mapping[str, Any], *, vector: bool = False) -> dict[str, Any]:
    """The remote's, with ``human`` among the render modes exactly if there are frames to show here.

    A vector's are never shown: they are many.
    """
    metadata = dict(remote)
    modes = metadata.get("render_modes")
    if isinstance(modes, list | tuple):
        shown = "rgb_array" in modes and not vector
        if shown and "human" not in modes:
            metadata["render_modes"] = type(modes)(["human", *modes])
        elif not shown and "human" in modes:
            metadata["render_modes"] = type(modes)([mode for mode in modes if mode != "human"])
    return metadata


def _id(name: str) -> str:
    namespace, slash, rest = name.rpartition("/")
    namespace, rest = _NOT_IN_NAMESPACE.sub("_", namespace), _NOT_IN_NAME.sub("_", rest)
    return (f"{namespace or '_'}/" if slash else "") + (rest or "_")
