"""A rerun: a part of a recorded episode, asked of an env once more, in one request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium

from meshrl.errors import MalformedMessage
from meshrl.protocol.chunks import Column
from meshrl.protocol.joined import checked, size_of
from meshrl.protocol.values import own
from meshrl.wire.batches import batching
from meshrl.wire.frames import Frame

# So many steps may be asked for at once; whoever asks for fewer hears of them sooner.
MAX_STEPS = 16_384


class Rerun:
    """What a request asks for, and what came of it.

    Args:
        body: the request: maybe a ``reset``, a map of what it was given, and ``actions``, a column of a recording.
        space: of the actions.

    Attributes:
        frame: what was told so far: lists of the env's own values.

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
        self.frame: Frame = {"obs": [], "rewards": [], "terminated": [], "truncated": [], "infos": []}

    def deeds(self) -> Iterator[tuple[str, Frame]]:
        """The requests, one after another, up to a step that ends the episode."""
        if self._begin is not None:
            yield "reset", self._begin
        for action in self._actions:
            if self._ended:
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
