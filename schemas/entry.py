"""An entry of the hostile corpus, and the words and pieces that its programs share."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

MALFORMED = "malformed_message"
VERSION = "unsupported_version"
ACCEPTED = "accepted"
IGNORED = "ignored"
ANY = "any"

ARRAY: dict[str, Any] = {"nd": True, "type": "<f4", "kind": "", "shape": [2], "data": bytes(8)}
LANE: dict[str, Any] = {"epoch": 1, "lane": 0, "seq": 1}


def whole_numbers(*numbers: int) -> dict[str, Any]:
    """An array of int64."""
    data = struct.pack(f"<{len(numbers)}q", *numbers)
    return {"nd": True, "type": "<i8", "kind": "", "shape": [len(numbers)], "data": data}


# Of a pool of three.
LANES: dict[str, Any] = {"epoch": 1, "lanes": whole_numbers(0, 1, 2), "seqs": whole_numbers(1, 1, 1)}


class Entry(NamedTuple):
    """Messages in their order, who decodes them, and what the last of them comes to."""

    name: str
    decoder: str
    messages: list[bytes]
    expect: str
