"""Arguments of the synchronous faces: what else is written for them, and what belongs to other libraries' calls.

A face takes the env's own constructor arguments by name. So what other libraries call the things that are asked for
here, or ask for beside them, would travel to the worker and be refused there as arguments of the env, if at all.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import EnvSpec

from meshrl.client.mesh import Mesh
from meshrl.errors import MeshError, UsageError

WAIT_S = 30.0
# What gymnasium.make_vec notes in a vector's spec; with it come what its vector was made with, and its time limit.
OF_A_VECTOR = {"vectorization_mode": "vector_entry_point"}
_VECTORS_OWN = ("vectorization_mode", "num_envs", "autoreset_mode", "seeding", "shards")

_ANYWHERE = {
    "env_kwargs": "pass them as keyword arguments: {face}({name!r}, ..., size=5)",
    "seed": "seeds are given to reset(seed=...)",
}
_OF_VECTORS = _ANYWHERE | {
    "vectorization_mode": "the workers decide how they step their sub-environments (meshrl serve --vectors)",
    "vector_kwargs": "the workers decide how they step their sub-environments (meshrl serve --vectors)",
    "wrappers": "wrappers run on this side: wrap the vector, or serve a wrapped env",
    "n_envs": "it is num_envs",
    "autoreset": "it is autoreset_mode",
}
_OF_ONE = _ANYWHERE | {
    "wrappers": "wrappers run on this side: wrap the env, or serve a wrapped one",
    **dict.fromkeys(
        ("num_envs", "n_envs", "vectorization_mode", "vector_kwargs", "autoreset_mode"),
        "one env is leased; vectors are meshrl.make_vec({name!r}, num_envs)",
    ),
    "autoreset": "an env is reset by reset(); vectors reset themselves: meshrl.make_vec({name!r}, num_envs)",
}


def mesh_arguments(mesh: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The arguments of :class:`meshrl.Mesh`; a text is its ``url``.

    Raises:
        UsageError: it is neither.
    """
    if mesh is None:
        return {}
    if isinstance(mesh, str):
        return {"url": mesh}
    if not isinstance(mesh, Mapping):
        raise UsageError(f"mesh= is a url or a dict of Mesh's arguments, such as {{'url': ...}}, not {_kind(mesh)}")
    return dict(mesh)


def served_name(face: str, name: object) -> str:
    """The name, if it is one.

    Raises:
        UsageError: it is something else, such as functions that make envs.
    """
    if isinstance(name, str):
        return name
    call = f'{face}("CartPole-v1")' if face == "make" else f'{face}("CartPole-v1", 8)'
    given = "functions" if _functions(name) else _kind(name)
    raise UsageError(f"{face} takes the name of a served env, not {given}: {call}")


def count_of(num_envs: object) -> int:
    """How many sub-environments are meant.

    Raises:
        UsageError: it is no whole number, or below 1.
    """
    try:
        if isinstance(num_envs, bool):
            raise TypeError
        count = operator.index(num_envs)  # type: ignore[arg-type]  # what is none raises
    except TypeError:
        raise UsageError(f"num_envs is a whole number, not {_kind(num_envs)}") from None
    if count < 1:
        raise UsageError(f"num_envs is at least 1, not {count}", num_envs=count)
    return count


def check_vectors_kwargs(name: str, kwargs: Mapping[str, Any]) -> None:
    """Of ``make_vec``'s arguments, those for the env.

    Raises:
        UsageError: one of them belongs to another library's call.
    """
    _refuse("make_vec", name, kwargs, _OF_VECTORS)


def kwargs_of_one(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``make``'s arguments, those for the env; a vector's spec, by which ``gymnasium.make`` asks for one, has more.

    Raises:
        UsageError: one of them belongs to another library's call.
    """
    if kwargs.items() >= OF_A_VECTOR.items():
        kwargs = {key: value for key, value in kwargs.items() if key not in _VECTORS_OWN}
    _refuse("make", name, kwargs, _OF_ONE)
    return dict(kwargs)


async def kwargs_for(mesh: Mesh, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` without a time limit that the served env has anyway.

    ``gymnasium.make_vec`` passes that of a spec to whatever makes the vector, and few operators allow clients to.
    """
    wanted = dict(kwargs)
    limit = wanted.get("max_episode_steps")
    if limit is not None:
        try:
            spec = (await mesh.describe(name)).spec
        except MeshError:
            return wanted  # the lease says it better
        if spec is not None and EnvSpec.from_json(spec).max_episode_steps == limit:
            del wanted["max_episode_steps"]
    return wanted


def _refuse(face: str, name: str, kwargs: Mapping[str, Any], others: Mapping[str, str]) -> None:
    for key in kwargs:
        if key in others:
            raise UsageError(f"{face} has no {key}: {others[key].format(face=face, name=name)}", argument=key)


def _kind(value: object) -> str:
    return "None" if value is None else f"{value!r}"[:80] if isinstance(value, int | float) else type(value).__name__


def _functions(value: object) -> bool:
    return callable(value) or (isinstance(value, list | tuple) and any(map(callable, value)))
