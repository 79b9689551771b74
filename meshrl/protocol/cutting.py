"""Cutting: how the sub-environments of a vector are laid upon several workers (R5).

Every worker with room takes part, with nearly equal shards: slots say how much a worker can hold, not how fast it is,
and a step of the vector takes as long as that of its slowest shard. A shard is within the room of its worker where the
workers have enough together, and always within its slots: else it could never be opened. What does not fit into an
equal share goes to the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A worker as far as a cut is concerned.

    Attributes:
        index: what it is known by here: its place among all.
        slots: that it has.
        taken: of them.
        room: what an open would get at once.
        limit: the most that may be laid upon it.
    """

    index: int
    slots: int
    taken: int
    room: int
    limit: int

    def load(self, own: int) -> float:
        """The fraction of its slots that is taken with ``own`` more; above 1 for what has to wait."""
        return (self.taken + own) / self.slots


def levelled(workers: Sequence[Part], num_envs: int) -> list[tuple[int, int]]:
    """Shards as (index, size), one for each worker that has room: as equal as the room is; the least loaded first."""
    if sum(worker.limit for worker in workers) < num_envs:
        return []
    with_room = sorted((worker for worker in workers if worker.room), key=lambda worker: worker.load(0))
    sizes = {worker.index: 1 for worker in with_room[:num_envs]}
    left = num_envs - len(sizes)
    # First what there is room for, then what has to wait.
    for most in ({w.index: w.room for w in workers}, {w.index: w.limit for w in workers}):
        heap = [(sizes.get(w.index, 0), w.load(0), w.index) for w in workers if sizes.get(w.index, 0) < most[w.index]]
        heapq.heapify(heap)
        while left and heap:
            size, load, index = heap[0]
            sizes[index] = size + 1
            left -= 1
            if size + 1 < most[index]:
                heapq.heapreplace(heap, (size + 1, load, index))
            else:
                heapq.heappop(heap)
    return sorted(sizes.items())


def equal(workers: Sequence[Part], num_envs: int, shards: int) -> list[tuple[int, int]]:
    """Just so many shards as (index, size), the larger ones first, each where there is most for it."""
    each, larger = divmod(num_envs, shards)
    sizes = [each + (number < larger) for number in range(shards)]
    own, held = [0] * len(workers), [0] * len(workers)
    cut = []
    for size in sizes:
        fit = [worker for worker in workers if own[worker.index] + size <= worker.limit]
        if not fit:
            return []
        chosen = min(
            fit,
            key=lambda worker: (
                own[worker.index] + size > worker.room,
                held[worker.index],
                worker.load(own[worker.index] + size),
            ),
        )
        own[chosen.index] += size
        held[chosen.index] += 1
        cut.append((chosen.index, size))
    return cut
