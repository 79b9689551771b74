"""Descriptions: what a worker tells of an env or an agent that it serves."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from meshrl.errors import UnencodableValue
from meshrl.wire import spaces
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description, Vectors
from meshrl.worker.fingerprint import chain_of, fingerprint_of
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
    """Versions of what ``thing`` does depends on, as far as can be seen.

    They are those of Python, its C library, meshrl, Gymnasium and NumPy; and of the packages that the classes of
    ``thing``, and of all that it wraps, come from and import: a simulator is seldom the package that has the env.
    """
    found = {"python": platform.python_version(), **_libc()}
    for name in dict.fromkeys(("meshrl", "gymnasium", "numpy", *sorted(_packages_of(thing)))):
        known = _version(name)
        if known is not None:
            found[name] = known
    return found


def _packages_of(thing: object) -> set[str]:
    """The top-level packages that its classes are of, and that their modules import."""
    packages = set()
    for one in chain_of(thing):
        for module in {cls.__module__ for cls in type(one).__mro__} - sys.stdlib_module_names:
            packages.add(module.partition(".")[0])
            # Gymnasium's own machinery computes nothing.
            if not module.startswith("gymnasium.") or module.startswith("gymnasium.envs."):
                packages |= {
                    _home_of(value) for value in list(getattr(sys.modules.get(module), "__dict__", {}).values())
                }
    return packages - sys.stdlib_module_names


def _home_of(value: object) -> str:
    name = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", None)
    return name.partition(".")[0] if isinstance(name, str) else ""


@cache
def _version(package: str) -> str | None:
    """Of the distribution that a package is of, most of which have its name; None where it is of none."""
    with suppress(PackageNotFoundError, ValueError):
        return version(package)
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    if not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return None  # somebody's own, which is not worth a tenth of a second
    names = packages_distributions().get(package)
    return version(names[0]) if names else None


@cache
def _libc() -> dict[str, str]:
    """What numpy and others compute sines with."""
    text = " ".join(platform.libc_ver()).strip()
    return {"libc": text} if text else {}


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
