"""A rerun: a part of a recorded episode, asked of an env once more, in one request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from meshrl.errors import MalformedMessage
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import checked, size_of
from meshrl.protocol.values import own
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack
from meshrl.wire.frames import Frame

# So many steps may be asked for at once; whoever asks for fewer hears of them sooner.
MAX_STEPS = 16_384
# Frames of one answer: it ends with the step whose frame makes it as much, so that nobody holds a whole episode's.
MAX_FRAMES_BYTES = 8 * 1024 * 1024


class Rerun:
    """What a request asks for, and what came of it.

    Args:
        body: the request: maybe a ``reset``, a map of what it was given, and ``actions``, a column of a recording;
            and whether to ``render`` the env after each of these.
        space: of the actions.

    Attributes:
        frame: what was told so far: lists of the env's own values.
        renders: whether the env is to be rendered after each of its deeds.

    Raises:
        MalformedMessage: it is no such request.
    """

    def __init__(self, body: Frame, space: gymnasium.Space[Any]) -> None:
        begin, actions = body.get("reset"), body.get("actions")
        if begin is not None and type(begin) is not dict:
            raise MalformedMessage("a rerun's reset is a map of what it was given")
        if type(actions) is not list or len(actions) != 2 or actions[0] not in ("batch", "items"):
            raise MalformedMessage("a rerun has actions, as a recording has them")
        batches, column = batching(space), Column(actions[0], actions[1])
        if column.form == "items" and type(column.values) is not list:
            raise MalformedMessage("a rerun's actions are a batch or a list")
        try:
            count = size_of(batches, column)
        except (TypeError, KeyError, IndexError, AttributeError) as exc:
            raise MalformedMessage("a rerun's actions are no batch of the env's space") from exc
        checked(batches, column, count, "actions")
        if count > MAX_STEPS:
            raise MalformedMessage(f"a rerun has at most {MAX_STEPS} actions, not {count}", limit=MAX_STEPS)
        self._begin = begin
        self._actions = column.values if column.form == "items" else batches.rows(column.values, count)
        self._ended = False
        self._frames_bytes = 0
        self.renders = body.get("render", False)
        if type(self.renders) is not bool:
            raise MalformedMessage("a rerun's render is true or false")
        self.frame: Frame = {"obs": [], "rewards": [], "terminated": [], "truncated": [], "infos": []}
        if self.renders:
            self.frame["frames"] = []

    def deeds(self) -> Iterator[tuple[str, Frame]]:
        """The requests, one after another, up to a step that ends the episode, or the answer."""
        if self._begin is not None:
            yield "reset", self._begin
        for action in self._actions:
            if self._ended or self._frames_bytes >= MAX_FRAMES_BYTES:
                return
            yield "step", {"action": action}

    def took(self, op: str, told: Frame) -> None:
        """One of them was carried out."""
        frame = self.frame
        frame["obs"].append(own(told["obs"]))
        frame["infos"].append(own(told["info"]))
        if op == "step":
            frame["rewards"].append(told["reward"])
            frame["terminated"].append(told["terminated"])
            frame["truncated"].append(told["truncated"])
            self._ended = bool(told["terminated"] or told["truncated"])
        for name in ("digest", "seed", "state"):
            if name in told:
                frame[name] = told[name]

    def showed(self, told: Frame) -> None:
        """The env was rendered after that."""
        frame = own(told["frame"])
        self._frames_bytes += frame.nbytes if isinstance(frame, np.ndarray) else len(pack(frame))
        self.frame["frames"].append(frame)
