"""Frames: the requests and replies of a session's lanes, flat maps checked by hand (the step path).

A request is ``{"epoch", "lane", "seq", ...}`` with the fields of its op beside them; a reply is ``{"seq", ...}`` or
``{"seq", "error"}``. No pydantic here and no headers: a step passes through this file four times.

    op        request's own fields        reply's own fields
    reset     seed?, options?             obs, info
    step      action                      obs, reward, terminated, truncated, info
    render                                frame
    state                                 state
    call      name, args, kwargs          value
    get_attr  name                        value
    set_attr  name, value
    act       obs, info, ...              action
    observe   reward, terminated, truncated
"""

from __future__ import annotations

from typing import Any

from meshrl.errors import MalformedMessage, MeshError, from_wire

OPS = frozenset({"reset", "step", "render", "state", "call", "get_attr", "set_attr", "act", "observe"})

Frame = dict[str, Any]

# Longer ints exist in the codec, and some cannot even be printed in an error.
_MAX_INTEGER = (1 << 63) - 1


def check_request(body: object) -> tuple[int, int, int]:
    """The epoch, lane and sequence number of a request.

    Raises:
        MalformedMessage: it is no map, or one of the three is missing, no int or not from 0 (lane) or 1 to 2**63 - 1.
    """
    if type(body) is dict:
        epoch, lane, seq = body.get("epoch"), body.get("lane"), body.get("seq")
        if (
            type(epoch) is int
            and type(lane) is int
            and type(seq) is int
            and 0 < epoch <= _MAX_INTEGER
            and 0 <= lane <= _MAX_INTEGER
            and 0 < seq <= _MAX_INTEGER
        ):
            return epoch, lane, seq
    raise MalformedMessage("a session request is a map with the whole numbers epoch, lane and seq")


def check_reply(body: object, seq: int) -> Frame:
    """The reply to request ``seq``.

    Raises:
        MalformedMessage: it is no map, or answers another request.
        MeshError: the error that it carries.
    """
    if type(body) is not dict:
        raise MalformedMessage(f"a reply is a map, not {type(body).__name__}")
    if "error" in body:
        raise from_wire(body["error"])
    answered = body.get("seq")
    if type(answered) is not int or answered != seq:
        raise MalformedMessage(f"a reply to another request arrived in place of {seq}", seq=seq)
    return body


def error_reply(exc: MeshError, seq: int | None = None) -> Frame:
    """The reply that carries ``exc``; without ``seq`` when the request could not be read so far."""
    wire: Frame = {"error": exc.to_wire()}
    if seq is not None:
        wire["seq"] = seq
    return wire
