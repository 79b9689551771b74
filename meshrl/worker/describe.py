"""Descriptions: what a worker tells of an env or an agent that it serves."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gymnasium

from meshrl.errors import UnencodableValue
from meshrl.wire import spaces
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description, Vectors
from meshrl.worker.fingerprint import fingerprint_of
from meshrl.worker.origins import unsealed


def describe_env(
    env: Any,
    *,
    name: str,
    worker: str,
    capabilities: Mapping[str, Any],
    allow_kwargs: Collection[str],
    allow: Collection[str],
    step_deadline_s: float,
    vectors: Vectors | None = None,
    arguments: Mapping[str, Any] | None = None,
    state_key_id: str | None = None,
) -> Description:
    """The description of ``env`` as it stands.

    Raises:
        UnsupportedSpace: a space of it has no converter.
    """
    spec, known = _spec(env), versions(env)
    kept = None if state_key_id is None else unsealed(env)
    sealed_by = None if kept is None or kept.native is None else state_key_id
    return Description(
        kind="env",
        name=name,
        worker=worker,
        observation_space=spaces.describe(env.observation_space),
        action_space=spaces.describe(env.action_space),
        spec=spec,
        metadata=encodable(getattr(env, "metadata", None) or {}),
        capabilities=dict(capabilities),
        allow_kwargs=sorted(allow_kwargs),
        allow=sorted(allow),
        step_deadline_s=step_deadline_s,
        versions=known,
        vectors=Vectors() if vectors is None else vectors,
        fingerprint=fingerprint_of(env, spec, known, arguments or {}, sealed_by),
    )


def versions(thing: object) -> dict[str, str]:
    """Versions of Python, meshrl, Gymnasium, NumPy and the package that ``thing``'s class comes from."""
    package = type(getattr(thing, "unwrapped", thing)).__module__.partition(".")[0]
    found = {"python": platform.python_version()}
    for name in ("meshrl", "gymnasium", "numpy", package):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def encodable(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries of ``values`` that can travel."""
    kept = {}
    for key, value in values.items():
        try:
            pack(value)
        except UnencodableValue:
            continue
        kept[str(key)] = value
    return kept


def _spec(env: Any) -> str | None:
    spec = getattr(env, "spec", None)
    if not isinstance(spec, gymnasium.envs.registration.EnvSpec):
        return None
    try:
        return str(spec.to_json())
    except (TypeError, ValueError):
        return None  # a callable entry point, say, has no text
