"""Headers of messages: a block of lines before the body, as NATS has it."""

from __future__ import annotations

from collections.abc import Mapping

_VERSION = "NATS/1.0"
# Where the code and the text of a status line are found, as nats-py names them.
STATUS = "Status"
DESCRIPTION = "Description"


def header_block(headers: Mapping[str, str]) -> bytes:
    """The block, its empty line included; names and values have no line breaks."""
    status = f" {headers[STATUS]} {headers.get(DESCRIPTION, '')}".rstrip() if STATUS in headers else ""
    lines = [f"{name}: {value}" for name, value in headers.items() if name not in {STATUS, DESCRIPTION}]
    return "\r\n".join((_VERSION + status, *lines, "", "")).encode()


def read_headers(block: bytes) -> dict[str, str]:
    """The headers of a block, the status of its first line among them; of a name that stands twice, the last."""
    first, *lines = block.decode(errors="replace").split("\r\n")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    status = first.removeprefix(_VERSION).strip()
    if status:
        headers[STATUS], _, headers[DESCRIPTION] = status.partition(" ")
    return headers
