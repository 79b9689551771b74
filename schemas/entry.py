"""An entry of the hostile corpus, and the words and pieces that its programs share."""

from __future__ import annotations

from typing import Any, NamedTuple

MALFORMED = "malformed_message"
VERSION = "unsupported_version"
ACCEPTED = "accepted"
IGNORED = "ignored"
ANY = "any"

ARRAY: dict[str, Any] = {"nd": True, "type": "<f4", "kind": "", "shape": [2], "data": bytes(8)}
LANE: dict[str, Any] = {"epoch": 1, "lane": 0, "seq": 1}


class Entry(NamedTuple):
    """Messages in their order, who decodes them, and what the last of them comes to."""

    name: str
    decoder: str
    messages: list[bytes]
    expect: str
