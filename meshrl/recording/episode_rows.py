"""The rows of one episode in the chunks of its recording, and the episode that they are."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import EpisodeTorn
from meshrl.protocol.chunks import Chunk, Column
from meshrl.protocol.joined import checked, joined_columns, picked
from meshrl.protocol.noted import Indices
from meshrl.recording.episodes import Described, EpisodeId, EpisodeSummary, RecordedEpisode
from meshrl.wire.batches import Batching


class KeptChunk:
    """A chunk, with the rows of each lane side by side.

    Attributes:
        chunk: as it was read.
        seq: its number in the stream.
        at: when it was stored.
        nbytes: about what it takes.
        versions: of each row, that of the policy; -1 where nobody said.
        acted: of each row, how many steps are before it.
        started: of each row, how many resets are up to it, less one.
    """

    def __init__(self, chunk: Chunk, seq: int, at: datetime, nbytes: int) -> None:
        self.chunk = chunk
        self.seq = seq
        self.at = at
        self.nbytes = nbytes
        self.versions = np.full(len(chunk), -1, np.int64)
        for row, version in chunk.policies:
            self.versions[row:] = version
        self.acted = np.cumsum(~chunk.resets) - 1
        self.started = np.cumsum(chunk.resets) - 1
        self.infos = dict(chunk.infos or ())
        self.changed = {*chunk.touched, *(change.lane for change in chunk.changes)}
        self._order = order = np.argsort(chunk.lanes, kind="stable")
        self._runs = _runs(chunk, order, self.started)
        self._checked = False

    def check(self, observations: Batching, actions: Batching) -> None:
        """Whether its batches are of these spaces.

        Raises:
            MalformedMessage: they are not.
        """
        if not self._checked:
            chunk = self.chunk
            checked(actions, chunk.actions, int(np.count_nonzero(~chunk.resets)), "actions")
            if chunk.observations is not None:
                checked(observations, chunk.observations, len(chunk), "observations")
            self._checked = True

    def rows(self, lane: int, number: int) -> Indices:
        """Those of one episode, up to its end."""
        begin, end = self._runs.get((lane, number), (0, 0))
        own: Indices = self._order[begin:end]
        return own


def _runs(chunk: Chunk, order: Indices, started: Indices) -> dict[tuple[int, int], tuple[int, int]]:
    """Where each episode stands in the order of lanes, by lane and number, up to its end."""
    lanes, resets = chunk.lanes[order], chunk.resets[order]
    begins = np.flatnonzero(resets | np.append(True, lanes[1:] != lanes[:-1])[: len(lanes)])
    stops = np.append(begins[1:], len(order))
    flagged = np.append(np.flatnonzero((chunk.terminations | chunk.truncations)[order]), len(order))
    ends = np.minimum(flagged[np.searchsorted(flagged, begins)] + 1, stops)
    of_reset = chunk.started.numbers[started[order[begins]]] if len(chunk.started.numbers) else chunk.started.numbers
    numbers = (
        np.where(resets[begins], of_reset, chunk.numbers[lanes[begins]])
        if len(of_reset)
        else chunk.numbers[lanes[begins]]
    )
    keys = zip(lanes[begins].tolist(), numbers.tolist(), strict=True)
    return dict(zip(keys, zip(begins.tolist(), ends.tolist(), strict=True), strict=True))


def torn(episode: EpisodeId, why: str) -> EpisodeTorn:
    """The error of an episode of which a part is missing."""
    return EpisodeTorn(
        f"episode {episode} cannot be read: {why}; m.episodes() and `meshrl episodes` list others",
        episode_id=str(episode),
    )


# Of many rows; nobody writes to it.
_NO_INFO: dict[str, Any] = {}


class EpisodeParts:
    """The rows of one episode, chunk after chunk."""

    def __init__(self, described: Described, wanted: EpisodeId) -> None:
        self._described = described
        self._wanted = wanted
        self._observations, self._actions = described.observations, described.actions
        self._began: tuple[int | None, bytes | None, dict[str, Any] | None] | None = None
        self._columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _COLUMNS}
        self._acted: list[Column] = []
        self._shown: list[Column] = []
        self._infos: list[dict[str, Any]] = []
        self._over = False
        self._changed = False

    def add(self, kept: KeptChunk) -> None:
        """Take its rows of the episode.

        Raises:
            MalformedMessage: it is broken.
            EpisodeTorn: it is not the beginning.
        """
        chunk, lane = kept.chunk, self._wanted.lane
        kept.check(self._observations, self._actions)
        self._changed = self._changed or lane in kept.changed
        rows = kept.rows(lane, self._wanted.number)
        if self._over or not len(rows):
            return
        if chunk.resets[rows[0]]:
            which, started = int(kept.started[rows[0]]), chunk.started
            self._began = started.seeds[which], started.states[which], started.options[which]
        elif self._began is None:
            raise torn(self._wanted, "its beginning is kept no more")
        for name in _TOLD:
            self._columns[name].append(getattr(chunk, name)[rows])
        self._columns["at_s"].append(kept.at.timestamp() - (float(chunk.at_us[-1]) - chunk.at_us[rows]) / 1e6)
        self._columns["policies"].append(kept.versions[rows])
        self._acted.append(picked(self._actions, chunk.actions, kept.acted[rows[~chunk.resets[rows]]]))
        if chunk.observations is not None:
            self._shown.append(picked(self._observations, chunk.observations, rows))
            self._infos += [kept.infos.get(row, {}) for row in rows.tolist()] if kept.infos else [_NO_INFO] * len(rows)
        last = rows[-1]
        self._over = bool(chunk.terminations[last] or chunk.truncations[last])

    def episode(self, summary: EpisodeSummary) -> RecordedEpisode:
        """All of it.

        Raises:
            EpisodeTorn: it is not whole.
        """
        count = sum(map(len, self._columns["digests"]))
        if self._began is None or count != summary.steps + 1:
            raise torn(self._wanted, f"{max(0, count - 1)} of its {summary.steps} steps are kept")
        told: dict[str, NDArray[Any]] = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        seed, state, options = self._began
        shown = None
        if self._described.recorded.level == "full":
            shown = joined_columns(self._observations, self._shown)
        return RecordedEpisode(
            id=self._wanted,
            described=self._described,
            summary=summary,
            seed=seed,
            state=state,
            options=options,
            actions=joined_columns(self._actions, self._acted),
            rewards=told["rewards"][1:],
            terminations=told["terminations"][1:],
            truncations=told["truncations"][1:],
            digests=told["digests"],
            observations=shown,
            infos=self._infos,
            at_s=told["at_s"][1:] - told["at_s"][0],
            policies=told["policies"][1:],
            changed=self._changed,
        )


_TOLD = ("rewards", "terminations", "truncations", "digests")
_COLUMNS = (*_TOLD, "at_s", "policies")
