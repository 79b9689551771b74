"""What a viewer makes of the chunks of a session, where some of them were not seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from gymnasium import spaces

from meshrl.client.tap import _View
from meshrl.protocol.chunking import Chunker
from meshrl.protocol.chunks import Chunk, pack_chunk, read_chunk
from meshrl.protocol.transcript import Transcript
from meshrl.wire.batches import batching

OBS = batching(spaces.Box(0, 1000, (1,), np.float64))
ACTIONS = batching(spaces.Discrete(2))


class Worker:
    """One that does a session's only episode, from its beginning on, and shows it."""

    def __init__(self) -> None:
        self.noted = Transcript(1, OBS, ACTIONS, "full", False, 100, 8)
        self.chunker = Chunker(self.noted, shows=True)
        self.noted.began(0, 1, None, None)
        self.noted.note_one(0.0, None, np.zeros(1), 0.0, False, False, {}, reset=True)
        self.step = 0

    def chunk(self, steps: int) -> Chunk:
        for _ in range(steps):
            self.step += 1
            self.noted.note_one(0.0, 1, np.array([float(self.step)]), 1.0, False, False, {}, reset=False)
        made = self.chunker.chunk(self.noted.taken(1 << 62))
        assert made is not None
        return read_chunk(pack_chunk(made[0]))


def view() -> _View:
    recorded = SimpleNamespace(session="s", name="of", first_env_id=0)
    return _View(cast("Any", SimpleNamespace(observations=OBS, actions=ACTIONS, recorded=recorded)))


def seen(viewer: _View, chunk: Chunk) -> list[tuple[int, float, float]]:
    transitions = [one.transition for one in viewer.rows(chunk)]
    return [(one.step, float(one.observation[0]), float(one.next_observation[0])) for one in transitions]


def test_chunks_that_follow_one_another_leave_nothing_out() -> None:
    worker, viewer = Worker(), view()
    assert seen(viewer, worker.chunk(2)) == [(0, 0.0, 1.0), (1, 1.0, 2.0)]
    assert seen(viewer, worker.chunk(2)) == [(2, 2.0, 3.0), (3, 3.0, 4.0)]


def test_behind_a_gap_the_first_observation_is_not_known() -> None:
    worker, viewer = Worker(), view()
    seen(viewer, worker.chunk(2))
    worker.chunk(2)
    assert seen(viewer, worker.chunk(2)) == [(5, 5.0, 6.0)]


def test_nor_where_another_worker_goes_on_with_the_number_that_would_have_been_next() -> None:
    viewer = view()
    seen(viewer, Worker().chunk(3))
    other = Worker()
    other.chunk(40)  # what it does again was not shown
    assert seen(viewer, other.chunk(2)) == [(41, 41.0, 42.0)]


def test_what_another_worker_does_again_is_not_seen_twice() -> None:
    viewer = view()
    assert len(seen(viewer, Worker().chunk(3))) == 3
    assert seen(viewer, Worker().chunk(5)) == [(3, 3.0, 4.0), (4, 4.0, 5.0)]
