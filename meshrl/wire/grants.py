"""Answers to opens, read without reading the same description again for every session.

Each description is a kilobyte, and a few kilobytes as a model. What is told in the same bytes with every grant of one
env is read once in a process, and kept once for all sessions that have it; models are frozen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgpack

from meshrl.errors import MalformedMessage
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Description, Grant, check, parse


@lru_cache(maxsize=32)
def _description(raw: bytes) -> Description:
    return parse(Description, raw)


def parse_answer(data: bytes) -> Any:
    """An answer to an open as :func:`~meshrl.wire.codec.unpack` gives it, with the description of a grant as a model.

    Raises:
        MalformedMessage: it is not a value of the codec, or its description is none.
        UnsupportedVersion: the description is of another major version.
    """
    around = _without_description(data)
    if around is None:
        return unpack(data)
    rest, raw = around
    body = unpack(rest)
    if isinstance(body, dict):
        body["description"] = _description(raw)
    return body


def check_grant(body: object, session: str, epoch: int, worker: str) -> Grant:
    """The grant of what was asked for.

    Args:
        body: of :func:`parse_answer`.
        session: that was asked for.
        epoch: the same.
        worker: who was asked.

    Raises:
        MalformedMessage: it is none, or of something else.
    """
    grant = check(Grant, body)
    if (grant.session, grant.epoch, grant.worker) != (session, epoch, worker):
        raise MalformedMessage(
            f"worker {worker} was asked for session {session} in epoch {epoch}, and granted session {grant.session} in "
            f"epoch {grant.epoch} at worker {grant.worker}"
        )
    return grant


def _without_description(data: bytes) -> tuple[bytes, bytes] | None:
    """The message with nil for its description, and the description's own bytes; None where there is no such part."""
    walk = msgpack.Unpacker(max_buffer_size=len(data), max_ext_len=0)
    try:
        walk.feed(data)
        for _ in range(walk.read_map_header()):
            if walk.unpack() == "description":
                begin = walk.tell()
                walk.skip()
                end = walk.tell()
                return data[:begin] + b"\xc0" + data[end:], data[begin:end]
            walk.skip()
    except Exception:  # noqa: BLE001  # a dozen classes, for what is no map of text keys: told by who reads all of it
        return None
    return None
