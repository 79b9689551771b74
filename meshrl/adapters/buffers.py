"""Replay buffers of other libraries, filled from a feed of experience.

::

    async with Mesh() as m:
        feed = m.experience("CartPole-v1", name="my-dqn")
        async for count in fill(buffer, feed):
            ...                                    # so many transitions more are in the buffer

Whoever does not await has :class:`meshrl.adapters.experience.ExperienceReader`, whose ``fill`` is the same. A buffer is
known by its class: Stable-Baselines3's (:mod:`meshrl.adapters.sb3_buffer`) or tianshou's
(:mod:`meshrl.adapters.tianshou_buffer`). What holds of each:

    - What is in the buffer is taken: the feed's position is behind it. A buffer in memory is gone with its process. To
      have it full again, use another name or ``from_``, or store ``feed.position`` beside the buffer and go on with
      ``from_=position`` and no name: both are then as they were.
    - The steps of an episode stand one behind the other, as buffers that sum over several steps want it. Where what
      follows in the buffer is not the next step (an episode was cut off by a time limit or by its reset, or the rest of
      it was left out) it is marked as cut off: nothing is joined across that, and the value of the next observation
      counts. One feed fills a buffer: of two it is not known where they meet.
    - A buffer for k envs takes k transitions a row. Each batch becomes k runs of equal length side by side, cut where
      that falls, so the feed needs ``multiple_of=k``; what is over waits in the stream. Nothing is gained by it: make
      buffers for one env, if nothing else needs more.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.client.experience import ExperienceFeed
from meshrl.client.gathering import Experience
from meshrl.errors import UsageError

_BY_LIBRARY = {"stable_baselines3": "sb3_buffer", "tianshou": "tianshou_buffer"}


async def fill(buffer: Any, feed: ExperienceFeed) -> AsyncGenerator[int, None]:
    """Put what a feed gives into a buffer, batch after batch; gives how many transitions each was.

    Args:
        buffer: a replay buffer of Stable-Baselines3 or tianshou.
        feed: of :meth:`meshrl.Mesh.experience`.

    Raises:
        UsageError: it is no such buffer, one for a number of envs of which ``feed.multiple_of`` is no multiple, or one
            of other spaces than the env's.
        MeshError: as the feed does.
    """
    check_rows(buffer, feed.multiple_of)
    async for batch in feed:
        try:
            count = put(buffer, batch)
        except BaseException:
            feed.rewind()
            raise
        await feed.commit()
        yield count


def put(buffer: Any, batch: Experience) -> int:
    """Put a batch into a buffer, all of it or, where that is refused, nothing; gives how many transitions it was.

    Raises:
        UsageError: as of :func:`fill`.
    """
    _adapter(buffer).put(buffer, batch)
    return len(batch)


def check_rows(buffer: Any, multiple_of: int) -> None:
    """Whether batches of such a multiple fill whole rows of a buffer.

    Raises:
        UsageError: they do not.
    """
    envs = _adapter(buffer).envs_of(buffer)
    if multiple_of % envs:
        raise UsageError(
            f"a buffer for {envs} envs takes {envs} transitions at once: make the feed with multiple_of={envs}, or the "
            "buffer for one env"
        )


def _adapter(buffer: object) -> ModuleType:
    for kind in type(buffer).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in _BY_LIBRARY:
            return importlib.import_module(f"meshrl.adapters.{_BY_LIBRARY[library]}")
    raise UsageError(f"a {type(buffer).__name__} is no replay buffer of Stable-Baselines3 or tianshou")


# ---------------------------------------------------------------- for the adapters of the libraries


class Laid(NamedTuple):
    """How the transitions of a batch are laid out over the columns of a buffer, one column an env.

    Attributes:
        order: of shape (rows, envs): which transition stands where.
        unflagged: of each transition, whether what follows it in its column is not the next step, and neither flag
            says so.
    """

    order: NDArray[np.int64]
    unflagged: NDArray[np.bool_]


def laid(batch: Experience, envs: int) -> Laid:
    """The layout of a batch: as many runs as there are columns, side by side.

    Raises:
        UsageError: it does not fill whole rows.
    """
    count = len(batch)
    rows, over = divmod(count, envs)
    if over:
        raise UsageError(
            f"{count} transitions do not fill rows of {envs} envs: make the feed with multiple_of={envs}; where it is "
            "served with other spaces from then on there is a rest, which only a buffer for one env takes"
        )
    cut = batch.ends.copy()
    if envs > 1:
        cut[rows - 1 :: rows] = True
    return Laid(np.arange(count).reshape(envs, rows).T, cut & ~batch.terminations & ~batch.truncations)


def array_of(values: object, what: str) -> NDArray[Any]:
    """Observations or actions, if they are one array.

    Raises:
        UsageError: they are not.
    """
    if isinstance(values, np.ndarray):
        return values
    raise UsageError(f"a buffer takes {what} that are an array, not a {type(values).__name__} of the env's values")
