"""The lanes of a pool: the rule of :mod:`~meshrl.protocol.lane`, for many lanes in one message (R1, R2).

One request names several lanes, each with a sequence number of its own. What the table says of each of them is
found by comparing arrays, so that a message of hundreds of lanes costs some microseconds. One answer may hold the
results of several lanes, the ones that finished together: its bytes are kept once and shared by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MeshError
from meshrl.protocol.lane import Lane, Verdict

Indices = NDArray[np.int64]


class Answer:
    """An answer that several lanes share.

    Attributes:
        packed: its bytes.
        held_by: how many lanes keep it.
        lane: the first of them.
        seq: of that lane.
    """

    __slots__ = ("held_by", "lane", "packed", "seq")

    def __init__(self, packed: bytes, held_by: int, lane: int, seq: int) -> None:
        self.packed = packed
        self.held_by = held_by
        self.lane = lane
        self.seq = seq


class Received(NamedTuple):
    """What to do with a request; the numbers are positions in it.

    Attributes:
        run: begin these.
        repeat: the answers to send again.
        refused: positions, and why.
    """

    run: Indices
    repeat: list[Answer]
    refused: list[tuple[int, Verdict]]


_NOBODY = np.empty(0, np.int64)


def _counted(each: list[Any]) -> Iterable[tuple[Any, int]]:
    """Which there are and how often; nearly always it is one."""
    often = each.count(each[0])
    return [(each[0], often)] if often == len(each) else Counter(each).items()


class Lanes:
    """All lanes of one session.

    Attributes:
        seqs: int64, of the last request that began on each lane; 0 before the first.
        running: bool, whether it has not been answered yet.
        cached_bytes: of the answers that are kept.
    """

    __slots__ = ("_answers", "_reply_to", "began", "cached_bytes", "running", "seqs")

    def __init__(self, count: int) -> None:
        self.seqs = np.zeros(count, np.int64)
        self.running = np.zeros(count, np.bool_)
        self.cached_bytes = 0
        self.began = 0.0
        self._reply_to = np.full(count, "", object)
        self._answers = np.full(count, None, object)  # of Answer

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        return f"<{len(self)} lanes, {int(self.running.sum())} running>"

    def receive(self, lanes: Indices, seqs: Indices, reply_to: str, now: float) -> Received:
        """Take a request.

        Args:
            lanes: int64, from 0, each once.
            seqs: int64, one a lane.
            reply_to: where the answers go.
            now: the caller's clock.

        Returns:
            what to do; running a lane obliges the caller to call :meth:`answer` once for it.
        """
        self.began = now
        ahead = seqs - self.seqs[lanes]
        busy = self.running[lanes]
        # What nearly every request is; count_nonzero has no Python in it, unlike any and all.
        if not np.count_nonzero(busy) and np.count_nonzero(ahead == 1) == len(lanes):
            self.seqs[lanes] = seqs
            self.running[lanes] = True
            self._reply_to[lanes] = reply_to
            return Received(np.arange(len(lanes)), [], [])
        fresh = (ahead == 1) & ~busy
        self._reply_to[lanes[fresh | ((ahead == 0) & busy)]] = reply_to  # RUN and JOIN
        run = np.flatnonzero(fresh)
        self.seqs[lanes[run]] = seqs[run]
        self.running[lanes[run]] = True
        repeat: dict[int, Answer] = {}
        refused: list[tuple[int, Verdict]] = []
        for at in np.flatnonzero(~fresh).tolist():
            lane = int(lanes[at])
            answer = self._answers[lane]
            if ahead[at] == 0 and busy[at]:
                continue
            if ahead[at] == 0 and answer is not None:
                repeat[id(answer)] = answer
            elif ahead[at] > 1:
                refused.append((at, Verdict.GAP))
            else:
                refused.append((at, Verdict.BUSY if ahead[at] == 1 else Verdict.STALE))
        return Received(run if len(run) else _NOBODY, list(repeat.values()), refused)

    def reply_to(self, lanes: Indices) -> set[str]:
        """The reply subjects that the answers of running lanes go to."""
        return set(self._reply_to[lanes].tolist())

    def answer(self, lanes: Indices, packed: bytes) -> set[str]:
        """Keep the answer of lanes that ran; gives the reply subjects that it goes to."""
        self.cached_bytes += len(packed)
        self.running[lanes] = False
        for before, count in _counted(self._answers[lanes].tolist()):
            if before is not None:
                before.held_by -= count
                if not before.held_by:
                    self.cached_bytes -= len(before.packed)
        self._answers[lanes] = Answer(packed, len(lanes), int(lanes[0]), int(self.seqs[lanes[0]]))
        return {subject for subject, _ in _counted(self._reply_to[lanes].tolist())}

    def refusal(self, refused: Iterable[tuple[int, Verdict]], lanes: Indices, seqs: Indices, session: str) -> MeshError:
        """The error for lanes that were refused: that of the first, which names the others."""
        worst = list(refused)
        at, verdict = worst[0]
        like = Lane()
        like.seq = int(self.seqs[lanes[at]])
        error = like.refusal(verdict, int(seqs[at]), session)
        facts: dict[str, Any] = {**error.details, "lanes": [int(lanes[at]) for at, _ in worst]}
        return type(error)(f"lane {int(lanes[at])} of {error.message}", **facts)

    def state_of(self, lane: int, seq: int) -> Literal["not_received", "running", "answered"]:
        """What a probe is told of a request: ``not_received``, ``running`` or ``answered``."""
        if seq > self.seqs[lane]:
            return "not_received"
        return "running" if self.running[lane] and seq == self.seqs[lane] else "answered"
