"""Shares: how many of a worker's slots one user may have, and what a client says where it has them all (R5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Share(NamedTuple):
    """What a worker said of one user's slots.

    Attributes:
        share: how many it gives to one user.
        held: how many the user has.
    """

    share: int
    held: int


def shares_in_words(shares: Mapping[str, Share]) -> str:
    """Why there is no slot, and what to do: of each worker that said so."""
    said = ", ".join(
        f"worker {worker} gives one user {share.share} of its slots, of which you have {share.held}"
        for worker, share in shares.items()
    )
    return f"{said}; close sessions of yours, or ask its operator for more (meshrl serve --max-slots-per-user)"
