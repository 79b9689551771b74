"""Frames: the requests and replies of a session's lanes, flat maps checked by hand (the step path).

A request is ``{"epoch", "lane", "seq", ...}`` with the fields of its op beside them; a reply is ``{"seq", ...}`` or
``{"seq", "error"}``. No pydantic here and no headers: a step passes through this file four times.

    op        request's own fields        reply's own fields
    reset     seed?, options?             obs, info, seed?, state?, digest?
    step      action, policy?             obs, reward, terminated, truncated, info, digest?
    replay    journal, digest?
    rerun     reset?, actions, render?    obs, rewards, terminated, truncated, infos, frames?
    render                                frame
    state                                 state
    call      name, args, kwargs          value
    get_attr  name                        value
    set_attr  name, value
    act       obs, info, ...              action
    observe   reward, terminated, truncated

A vector's have a batch in each field. A pool's name several lanes and a sequence number for each, ``lanes`` and
``seqs`` in place of ``lane`` and ``seq``; its answers come as the lanes finish, each lane in one of them.

    op         request's own fields                     reply's own fields
    reset      seeds?, episodes?, options?, mask?       obs, infos?, digests?, origins?
    step       actions, policy?                         obs, rewards, terminations, truncations, infos?, digests?,
                                                        origins?
    replay     journal, begins, ends, origins, digests
    render                                              frames
    call       name, args, kwargs, ids?                 values
    get_attr   name, ids?                               values
    set_attr   name, values, ids?
    is_wrapped wrapper, ids?                            values
    (a pool's) reset, step and replay                   those of step, and first, episodes, steps
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage, MeshError, from_wire

OPS = frozenset(
    {
        "reset",
        "step",
        "render",
        "state",
        "call",
        "get_attr",
        "set_attr",
        "is_wrapped",
        "act",
        "observe",
        "replay",
        "rerun",
    }
)

Frame = dict[str, Any]
Indices = NDArray[np.int64]

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


def is_of_lanes(body: object) -> bool:
    """Whether a request is one of a pool: of several lanes at once."""
    return type(body) is dict and "lanes" in body


def check_lanes(body: Frame, count: int) -> tuple[int, Indices, Indices]:
    """The epoch of a pool's request or reply, its lanes, and a sequence number for each.

    Args:
        body: a map with the key ``lanes``.
        count: how many lanes there are.

    Returns:
        epoch (0 in a reply), lanes and seqs, int64.

    Raises:
        MalformedMessage: they are no whole numbers in range, of different lengths, or a lane stands twice.
    """
    epoch, lanes, seqs = body.get("epoch", 0), body["lanes"], body.get("seqs")
    if (
        type(epoch) is int
        and 0 <= epoch <= _MAX_INTEGER
        and isinstance(lanes, np.ndarray)
        and isinstance(seqs, np.ndarray)
        and lanes.dtype == np.int64
        and seqs.dtype == np.int64
        and lanes.ndim == 1
        and lanes.shape == seqs.shape
        and len(lanes)
    ):
        named = np.zeros(count, np.bool_)
        # A third of the time of a set. Below 0 would be counted from the end.
        if not np.count_nonzero(lanes < 0) and not np.count_nonzero(lanes >= count):
            named[lanes] = True
            if np.count_nonzero(named) == len(lanes) and not np.count_nonzero(seqs < 1):
                return epoch, lanes, seqs
    raise MalformedMessage(
        f"a pool's message names lanes, each once, below {count}, and a sequence number for each, as arrays of int64"
    )


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
