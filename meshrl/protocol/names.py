"""Names: which served name a user meant (D2).

The rule: an exact name is that name; any other text is an id without regard to case, and when it says no
version, the newest one is meant. A name's namespace or module belongs to the id: ``pong`` does not mean
``ALE/Pong-v5``.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Nine digits: the text may come from a peer, and int() of thousands of digits raises.
_VERSIONED = re.compile(r"(?P<id>.+)-[vV](?P<version>[0-9]{1,9})\Z", re.DOTALL)
_UNVERSIONED = -1

# What difflib calls a good match; below it, suggestions confuse more than they help.
_SIMILAR = 0.6


def _split(name: str) -> tuple[str, int]:
    """The id and the version of a name; a name without a version is older than version 0."""
    match = _VERSIONED.match(name)
    return (match["id"], int(match["version"])) if match else (name, _UNVERSIONED)


def resolve(asked: str, served: Iterable[str]) -> str | None:
    """The served name that ``asked`` means.

    Args:
        asked: what the user wrote: ``CartPole-v1``, ``cartpole``, ``ale/pong``, ``module:name-v2``.
        served: the names there are, in any order.

    Returns:
        ``asked`` itself when it is served; else the newest version of the id that matches without case, of
        the version asked for when one was; else None. When ids differ only in case, the one written as asked
        is preferred.
    """
    names = set(served)
    if asked in names:
        return asked
    wanted_id, wanted_version = _split(asked)
    folded = wanted_id.casefold()
    best: tuple[bool, int, str] | None = None
    for name in sorted(names):
        this_id, version = _split(name)
        if this_id.casefold() != folded or wanted_version not in (_UNVERSIONED, version):
            continue
        rank = (this_id == wanted_id, version, name)
        if best is None or rank > best:
            best = rank
    return best[2] if best else None


def near(asked: str, served: Iterable[str], n: int = 3) -> list[str]:
    """Served names that are written much like ``asked``, for the text of an error.

    Compared are the ids without case and version, with and without their namespace or module, so that
    ``pong`` finds ``ALE/Pong-v5`` and ``cartpole-v7`` the versions of CartPole that exist.

    Args:
        asked: what the user wrote.
        served: the names there are.
        n: how many to give at most.

    Returns:
        the most similar first, newer versions before older ones; empty when nothing is similar.
    """
    wanted = _split(asked)[0].casefold()
    # The second sequence is the one SequenceMatcher prepares; the first is exchanged cheaply.
    matcher = SequenceMatcher(autojunk=False, b=wanted)
    found: list[tuple[float, int, str]] = []
    for name in set(served):
        this_id, version = _split(name)
        whole = this_id.casefold()
        similar = 0.0
        for text in {whole, re.split(r"[/:]", whole)[-1]}:
            matcher.set_seq1(text)
            if matcher.real_quick_ratio() >= _SIMILAR and matcher.quick_ratio() >= _SIMILAR:
                similar = max(similar, matcher.ratio())
        if similar >= _SIMILAR:
            found.append((-similar, -version, name))
    return [name for _, _, name in sorted(found)[: max(n, 0)]]
