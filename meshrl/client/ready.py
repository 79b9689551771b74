"""Results that are ready, and in which order a pool's user gets them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire.batches import batching
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.info_forms import Columns, Entries, read_told
from meshrl.wire.infos import merge_infos, pick_infos

# Of an answer, a value for each of its lanes.
_COLUMNS = {
    "rewards": np.dtype(np.float64),
    "terminations": np.dtype(np.bool_),
    "truncations": np.dtype(np.bool_),
    "episodes": np.dtype(np.int64),
    "steps": np.dtype(np.int64),
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PoolBatch:
    """Results of some sub-environments of a pool; row k of each field is that of ``env_ids[k]``.

    Attributes:
        env_ids: int64, each once, in the order in which they became ready (or by their share, in a fair pool).
        observations: batched; after a step that ended an episode, those of the next one's beginning.
        rewards: float64; 0 after a reset.
        terminations: bool.
        truncations: bool.
        infos: merged by Gymnasium's rules over the rows; ``final_obs`` and ``final_info`` where an episode ended.
        first: bool, whether the row is the result of a reset; any other is that of a step.
        episodes: int64, the number of the episode that the row belongs to, from 1 for each sub-environment; a step that
            ends an episode belongs to the one it ends. With ``seeding="derived"`` a reset that gives a root begins
            again from 1, so that the seed of episode e of env_id i is always ``derive(pool.roots[i], i, e - 1)``.
        steps: int64, how many steps that episode had by then; 0 after a reset.
    """

    env_ids: Indices
    observations: Any
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    infos: dict[str, Any]
    first: NDArray[np.bool_]
    episodes: Indices
    steps: Indices

    def __len__(self) -> int:
        return len(self.env_ids)

    def __repr__(self) -> str:
        ended = int(np.count_nonzero(self.terminations | self.truncations))
        return f"<PoolBatch of {len(self)}: {int(np.count_nonzero(self.first))} first, {ended} ended>"


@dataclass(slots=True, eq=False)
class Ready:
    """What is left of one answer.

    Attributes:
        frame: the answer.
        size: how many lanes it is of.
        rows: their positions in it, that were not handed out yet.
        env_ids: of those.
        told: its infos as they were read, for who takes all of it at once.
    """

    frame: Frame
    size: int
    rows: Indices
    env_ids: Indices
    told: Entries | Columns | None = None


class Results:
    """Ready results.

    Args:
        space: of one observation.
        num_envs: of the pool.
        fair: hand out first what belongs to sub-environments that were handed out least.

    Attributes:
        count: how many there are.
        batches: of observations.
    """

    def __init__(self, space: gymnasium.Space[Any], num_envs: int, *, fair: bool) -> None:
        self.count = 0
        self.batches = batching(space)
        self._fair = fair
        self._handed: Indices = np.zeros(num_envs, np.int64)
        self._ready: deque[Ready] = deque()

    def add(self, ready: Ready) -> None:
        """Take an answer.

        Raises:
            MalformedMessage: it is none, and was not taken.
        """
        # Here and not where it is handed out: there it would take others with it.
        ready.told = self.check(ready.frame, ready.size)
        self._ready.append(ready)
        self.count += len(ready.rows)

    def check(self, frame: Frame, size: int) -> Entries | Columns | None:
        """The infos of an answer of ``size`` lanes, as they were read.

        Raises:
            MalformedMessage: it is none.
        """
        self.batches.check(_field(frame, "obs"), size, "obs", exact=True)
        for field, dtype in _COLUMNS.items():
            column = _field(frame, field)
            if not isinstance(column, np.ndarray) or column.shape != (size,) or column.dtype != dtype:
                raise MalformedMessage(f"a pool's {field} are not {size} of {dtype}", field=field)
        if type(_field(frame, "first")) is not bool:
            raise MalformedMessage("a pool's answer does not say whether it is a reset's", field="first")
        return _told(frame.get("infos"), size)

    def drop(self, env_ids: Indices) -> None:
        """Forget the results of ``env_ids``."""
        kept: deque[Ready] = deque()
        for ready in self._ready:
            stays = ~np.isin(ready.env_ids, env_ids)
            if stays.any():
                kept.append(Ready(ready.frame, ready.size, ready.rows[stays], ready.env_ids[stays]))
        self._ready = kept
        self.count = sum(len(ready.rows) for ready in kept)

    def take(self, limit: int) -> PoolBatch:
        """Hand out at most ``limit`` of them; there is at least one.

        Raises:
            MalformedMessage: their infos cannot be merged; nothing was handed out. Where ``details`` have
                ``env_ids``, those have infos that no merging takes, and their results are gone.
        """
        taken = self._take_fairly(limit) if self._fair and self.count > limit else self._take_first(limit)
        try:
            batch = self._batch(taken)
        except MalformedMessage as exc:
            self._ready.extendleft(reversed(taken))
            hopeless = self._hopeless(taken)
            if not len(hopeless):
                raise
            self.drop(hopeless)
            raise MalformedMessage(
                f"the infos of sub-environments {hopeless.tolist()} cannot be merged, not even alone: {exc.message}; "
                "their results are lost, reset them",
                field="infos",
                env_ids=hopeless.tolist(),
            ) from exc
        except BaseException:
            self._ready.extendleft(reversed(taken))
            raise
        self.count -= len(batch)
        self._handed[batch.env_ids] += 1
        return batch

    def _hopeless(self, taken: list[Ready]) -> Indices:
        """Those of them that cannot be handed out alone either."""
        hopeless: list[int] = []
        for part in taken:
            infos = part.frame.get("infos")
            picked = None if infos is None else pick_infos(infos, part.rows, part.size)
            of: dict[int, list[Any]] = {}
            for k, info in [] if picked is None else picked["entries"]:
                of.setdefault(k, []).append([0, info])
            for k, entries in of.items():
                try:
                    _merged([({"entries": entries}, 0, 1)], 1)
                except MalformedMessage:
                    hopeless.append(int(part.env_ids[k]))
        return np.array(hopeless, np.int64)

    def _take_first(self, limit: int) -> list[Ready]:
        taken: list[Ready] = []
        while self._ready and limit:
            ready = self._ready[0]
            if len(ready.rows) <= limit:
                taken.append(self._ready.popleft())
            else:
                taken.append(Ready(ready.frame, ready.size, ready.rows[:limit], ready.env_ids[:limit]))
                ready.rows, ready.env_ids = ready.rows[limit:], ready.env_ids[limit:]
            limit -= len(taken[-1].rows)
        return taken

    def _take_fairly(self, limit: int) -> list[Ready]:
        """Of those that were handed out least, the ones that have been ready for longest."""
        env_ids = np.concatenate([ready.env_ids for ready in self._ready])
        chosen = np.zeros(len(env_ids), np.bool_)
        chosen[np.argsort(self._handed[env_ids], kind="stable")[:limit]] = True
        taken: list[Ready] = []
        kept: deque[Ready] = deque()
        at = 0
        for ready in self._ready:
            own = chosen[at : at + len(ready.rows)]
            at += len(ready.rows)
            if own.any():
                taken.append(Ready(ready.frame, ready.size, ready.rows[own], ready.env_ids[own]))
            if not own.all():
                kept.append(Ready(ready.frame, ready.size, ready.rows[~own], ready.env_ids[~own]))
        self._ready = kept
        return taken

    def _batch(self, taken: list[Ready]) -> PoolBatch:
        sizes = [len(part.rows) for part in taken]
        total = sum(sizes)
        observations, infos, at = [], [], 0
        for part, size in zip(taken, sizes, strict=True):
            obs, info = part.frame["obs"], part.frame.get("infos")
            if size < part.size:
                obs = self.batches.pick(obs, part.rows)
                info = None if info is None else pick_infos(info, part.rows, part.size)
            elif part.told is not None:
                info = part.told
            observations.append(obs)
            infos.append((info, at, size))
            at += size
        first = [np.full(size, part.frame["first"]) for part, size in zip(taken, sizes, strict=True)]
        return PoolBatch(
            env_ids=_joined([part.env_ids for part in taken]),
            observations=self.batches.joined(observations, sizes),
            infos=_merged(infos, total),
            first=_joined(first),
            **{field: _column(taken, field) for field in _COLUMNS},
        )


def _told(infos: object, size: int) -> Entries | Columns | None:
    """Infos such as :func:`~meshrl.wire.infos.pack_infos` gives, of ``size`` lanes.

    Raises:
        MalformedMessage: they are not.
    """
    if infos is None:
        return None
    try:
        told = read_told(infos, 0, size)
    except RecursionError as exc:
        raise MalformedMessage("infos that are nested too deeply", field="infos") from exc
    if told is None:
        raise MalformedMessage("a pool's infos are neither entries nor columns", field="infos")
    return told


def _merged(infos: list[tuple[Any, int, int]], total: int) -> dict[str, Any]:
    try:
        return merge_infos(infos, total)
    except MalformedMessage:
        raise
    except Exception as exc:
        raise MalformedMessage(
            f"the infos of {total} sub-environments cannot be merged: {exc}; receive them one at a time, with max=1",
            field="infos",
        ) from exc


def _column(taken: list[Ready], field: str) -> NDArray[Any]:
    columns = [part.frame[field] for part in taken]
    return _joined([c if len(part.rows) == part.size else c[part.rows] for c, part in zip(columns, taken, strict=True)])


def _joined(columns: list[NDArray[Any]]) -> NDArray[Any]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _field(frame: Frame, field: str) -> Any:
    try:
        return frame[field]
    except KeyError:
        raise MalformedMessage(f"a pool's answer has no {field}", field=field) from None
