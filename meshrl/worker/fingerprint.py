"""Fingerprints: what an env's behaviour depends on, as one short text (R8).

Two workers with equal fingerprints do the same when asked the same, as far as can be known beforehand: the same env
with the same arguments, the same packages, and a processor on which numpy computes with the same instructions. Whether
they did is proved by the digest of each replay.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

# Whatever an env says of what it wraps, it ends somewhere.
MAX_WRAPPERS = 100
# The first carries an env's values and computes none of them. Releases of the other differ in hardly anything, and
# machines are updated one by one: the digest of a replay is the proof.
_IGNORED = frozenset({"meshrl", "libc"})


def fingerprint_of(
    env: Any,
    spec: str | None,
    versions: Mapping[str, str],
    arguments: Mapping[str, Any],
    sealed_by: str | None = None,
) -> str:
    """128 bits as hexadecimal text.

    Args:
        env: as it was made.
        spec: its ``EnvSpec`` as JSON, which has its arguments and wrappers; None where it has none.
        versions: of Python and the packages that it comes from.
        arguments: those that the operator made it with, which an env without a spec does not tell.
        sealed_by: the id of the key without which its origins cannot be read; None where there is none.
    """
    facts: dict[str, Any] = {
        "chain": [f"{type(one).__module__}:{type(one).__qualname__}" for one in chain_of(env)],
        "spec": spec,
        "arguments": {name: repr(value) for name, value in arguments.items()},
        "versions": {name: version for name, version in versions.items() if name not in _IGNORED},
        "machine": _machine(),
    }
    if sealed_by is not None:
        facts["sealed_by"] = sealed_by
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def chain_of(env: object) -> Iterator[object]:
    """An env and what it wraps, from the outermost to the last."""
    inner: Any = env
    for _ in range(MAX_WRAPPERS):
        yield inner
        inner = getattr(inner, "env", None) if inner is not getattr(inner, "unwrapped", inner) else None
        if inner is None:
            return


@cache
def _machine() -> list[str]:
    try:
        features: Mapping[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]  # noqa: SLF001
    except AttributeError:
        features = {}
    used = sorted(name for name, has in features.items() if has)
    return [platform.system(), platform.machine(), *used]
