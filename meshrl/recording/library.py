"""The library: reads which episodes there are, and what happened in them.

An episode is known by ``<session>.<lane>.<number>``: whose it is, which sub-environment's of that session, and how many
that one had before. The index says in which messages of which stream it stands, so that nothing else is read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.storing import Reader, Stored
from meshrl.errors import (
    EpisodeTorn,
    EpisodeUnknown,
    MalformedMessage,
    MeshError,
    StreamMissing,
    UnsupportedVersion,
)
from meshrl.protocol.chunks import Chunk, Column, read_chunk
from meshrl.protocol.joined import checked, joined_columns, picked
from meshrl.protocol.noted import Indices
from meshrl.protocol.runs import REASONS
from meshrl.recording.episodes import Described, EpisodeId, EpisodeSummary, RecordedEpisode
from meshrl.recording.streams import EPISODES, stream_of
from meshrl.recording.writing import is_description
from meshrl.wire.batches import Batching
from meshrl.wire.recorded import Entry, Recorded
from meshrl.wire.subjects import Subjects, untoken

# Of what was read last: descriptions, and chunks, which take some times as much as they do in the stream.
KEPT_DESCRIPTIONS = 256
KEPT_BYTES = 256 * 1024 * 1024
KEPT_FACTOR = 8
# Messages that are asked for at once where one or two are needed.
FEW = 4
# How long a chunk is waited for whose entry is there.
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
# Of episodes that are run again for the sake of a later one.
MAX_CHAIN_STEPS = 100_000


class Located(NamedTuple):
    """An episode, and where it stands.

    Attributes:
        summary: as the index knows it.
        entry: of the index, which has it.
        row: of that.
    """

    summary: EpisodeSummary
    entry: Entry
    row: int

    @property
    def first(self) -> int:
        """The number in its stream of a message before which nothing of it is."""
        return int(self.entry.first[self.row])


class Library:
    """Reads what was recorded in a namespace, and keeps what was read last: many episodes share a chunk.

    Args:
        reader: of the server's streams.
        subjects: of the namespace.

    Attributes:
        reader: as given.
    """

    def __init__(self, reader: Reader, subjects: Subjects) -> None:
        self.reader = reader
        self._subjects = subjects
        self._described: OrderedDict[tuple[str, int], Described] = OrderedDict()
        self._chunks: OrderedDict[tuple[str, int], _Kept] = OrderedDict()  # by subject and their own number
        self._bytes = 0

    async def located(
        self,
        env: str | None = None,
        *,
        session: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[Located]:
        """What the index has, the oldest first, each episode once; entries that cannot be read are left out.

        Args:
            env: a served name; None for all.
            session: whose they are; None for all.
            since: from then on, on the server's clock.
            until: up to then.

        Raises:
            MeshError: as of :class:`~meshrl.bus.storing.Reader`. No stream is no episodes.
        """
        seen: set[tuple[str, int, int]] = set()
        try:
            subject = self._subjects.episodes(env or "*", session or "*")
            async for stored in self.reader.get(EPISODES, subject, since=since):
                if until is not None and stored.at > until:
                    return
                for one in _located(stored):
                    key = (one.entry.session, int(one.entry.lanes[one.row]), int(one.entry.numbers[one.row]))
                    if key not in seen:  # what was taken over may be told again
                        seen.add(key)
                        yield one
        except StreamMissing:
            return

    async def entries(
        self,
        env: str,
        first: int = 1,
        *,
        session: str = "*",
        since: datetime | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[tuple[Stored, list[Located]]]:
        """The entries of the index, one by one; each with what is in it that can be read.

        Args:
            env: a served name.
            first: the number in the index's stream from which they are wanted.
            session: those of one recording; ``*`` for all.
            since: the time from which they are wanted, in place of a number.
            limit: no more than this.

        Raises:
            MeshError: as of :class:`~meshrl.bus.storing.Reader`. No stream is no entries.
        """
        subject = self._subjects.episodes(env, session)
        with contextlib.suppress(StreamMissing):
            async for stored in self.reader.get(EPISODES, subject, first, since=since, limit=limit):
                yield stored, _located(stored)

    async def episode(self, text: str) -> RecordedEpisode:
        """One episode, by its id.

        Raises:
            InvalidName: it is no id.
            EpisodeUnknown: the index does not have it: it goes on, was not recorded, or is there no more.
            EpisodeTorn: a part of it is there no more, or cannot be read.
            MeshError: as of :class:`~meshrl.bus.storing.Reader`.
        """
        found = await self._found(EpisodeId.parse(text))
        torn: EpisodeTorn | None = None
        for one in reversed(found):  # of one that was taken over the last one counts
            try:
                return await self.read(one)
            except EpisodeTorn as exc:
                torn = torn or exc
        if torn is not None:
            raise torn
        raise EpisodeUnknown(
            f"there is no episode {text}: it has not ended, was not recorded, or is kept no more; m.episodes() and "
            "`meshrl episodes` list those that there are",
            episode_id=text,
        )

    async def _found(self, wanted: EpisodeId) -> list[Located]:
        found: list[Located] = []
        with contextlib.suppress(StreamMissing):
            async for stored in self.reader.get(EPISODES, self._subjects.episodes("*", wanted.session)):
                found += _located(stored, wanted)
        return found

    async def _before(self, id_: EpisodeId, listed: RecordedEpisode) -> RecordedEpisode:
        """The episode before one; it may have had no step, and is not listed then, as a later one of its lane is.

        Raises:
            EpisodeTorn, MeshError: as of :meth:`read`.
        """
        before = id_._replace(number=id_.number - 1)
        try:
            return await self.episode(str(before))
        except EpisodeUnknown:
            found = await self._found(listed.id)
            if not found or listed.recorded.every > 1:
                raise _torn(before, "it was not recorded, or the index has lost what came after it") from None
            summary, entry, row = found[-1]
            bare = replace(summary, episode_id=str(before), steps=0, episode_return=0.0, reason="reset")
            anywhere = entry.model_copy(update={"first": np.ones_like(entry.first)})
            return await self.read(Located(bare, anywhere, row))

    async def chain(self, episode: RecordedEpisode, *, seeded: bool = False) -> list[RecordedEpisode]:
        """The episode, and before it those of the same env back to one of which is known how its reset began.

        That of an env whose generator went on is run again with all of them. Where one of them is not to be had, or it
        was imported, it is the episode alone.

        Args:
            episode: with which the chain ends.
            seeded: go back to a seed, also where it is known what outlived a reset.

        Raises:
            MeshError: as of :class:`~meshrl.bus.storing.Reader`.
        """
        chain = [episode]
        if episode.recorded.imported is not None:
            return chain
        while chain[0].seed is None and (seeded or chain[0].state is None) and chain[0].id.number:
            try:
                chain.insert(0, await self._before(chain[0].id, episode))
            except EpisodeTorn:
                chain = chain[-1:]
                break
            if sum(len(one.rewards) for one in chain) > MAX_CHAIN_STEPS:
                chain = chain[-1:]
                break
        return [replace(one, state=None) for one in chain] if seeded else chain

    async def read(self, located: Located) -> RecordedEpisode:
        """One that was found.

        Raises:
            EpisodeTorn: a part of it is there no more, or cannot be read.
            MeshError: as of :class:`~meshrl.bus.storing.Reader`.
        """
        summary, entry = located.summary, located.entry
        wanted = EpisodeId.parse(summary.episode_id)
        stream = stream_of(self._subjects, summary.env)
        try:
            described = await self._of(stream, entry.described)
            if described is None:
                raise _torn(wanted, "what it is of is kept no more")
            parts = _Parts(described, wanted)
            for kept in await self._between(stream, self._subjects.recording(summary.env, entry.session), located):
                parts.add(kept)
            return parts.episode(summary)
        except StreamMissing:
            raise _torn(wanted, "its stream is gone") from None
        except (MalformedMessage, UnsupportedVersion) as exc:
            raise _torn(wanted, exc.message) from exc

    async def _of(self, stream: str, seq: int) -> Described | None:
        known = self._described.get((stream, seq))
        if known is None:
            stored = await self.reader.at(stream, seq)
            if stored is None:
                return None
            known = self._described[stream, seq] = Described.of(Recorded.from_stream(stored.body))
            while len(self._described) > KEPT_DESCRIPTIONS:
                self._described.popitem(last=False)
        return known

    async def _between(self, stream: str, subject: str, located: Located) -> list[_Kept]:
        """The chunks in which an episode stands, in order."""
        entry, first = located.entry, located.first
        known = self._known(subject, entry, first)
        if known is not None:
            return known
        for pause in (*PAUSES_S, None):
            chunks: list[_Kept] = []
            async for stored in self.reader.get(stream, subject, first, batch=FEW):
                if is_description(stored):
                    continue
                kept = self._kept(subject, stored)
                chunks.append(kept)
                if kept.chunk.n >= entry.chunk:
                    return chunks
            # The two are stored side by side, and the entry may be there first.
            if pause is not None:
                await asyncio.sleep(pause)
        return chunks

    def _known(self, subject: str, entry: Entry, first: int) -> list[_Kept] | None:
        """The same, if all of them were read before: chunks are numbered, so that none is missed between two."""
        chunks: list[_Kept] = []
        for n in range(entry.chunk, 0, -1):
            kept = self._chunks.get((subject, n))
            if kept is None:
                return None
            if kept.seq >= first:
                chunks.append(kept)
            # Where it began in the chunk in which it ended, all that is known is what came before that.
            if kept.seq <= first or first > entry.after:
                break
        chunks.reverse()
        return chunks

    def _kept(self, subject: str, stored: Stored) -> _Kept:
        chunk = read_chunk(stored.body)
        known = self._chunks.pop((subject, chunk.n), None)
        if known is not None:
            self._bytes -= known.nbytes
        kept = self._chunks[subject, chunk.n] = _Kept(chunk, stored.seq, stored.at, KEPT_FACTOR * len(stored.body))
        self._bytes += kept.nbytes
        while self._bytes > KEPT_BYTES and len(self._chunks) > 1:
            self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return kept


class _Kept:
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


def _located(stored: Stored, wanted: EpisodeId | None = None) -> list[Located]:
    """What is in an entry of the index, or of that one episode; nothing where it cannot be read."""
    try:
        entry = Entry.from_stream(stored.body)
    except MeshError:
        return []
    rows: Iterable[int] = range(len(entry.lanes))
    if wanted is not None:
        rows = np.flatnonzero((entry.lanes == wanted.lane) & (entry.numbers == wanted.number)).tolist()
        rows = rows if entry.session == wanted.session else ()
    return [Located(_summary(stored, entry, row), entry, row) for row in rows]


def _summary(stored: Stored, entry: Entry, row: int) -> EpisodeSummary:
    lane, reason = int(entry.lanes[row]), int(entry.reasons[row])
    return EpisodeSummary(
        episode_id=str(EpisodeId(entry.session, lane, int(entry.numbers[row]))),
        env=untoken(stored.subject.split(".")[-2]),
        env_id=entry.first_env_id + lane,
        steps=int(entry.steps[row]),
        episode_return=float(entry.returns[row]),
        reason=REASONS[reason] if reason < len(REASONS) else "unknown",
        ended_at=stored.at,
        user=entry.user,
        labels=entry.labels,
        policy=entry.policy,
        manifest=entry.manifest,
    )


def _torn(episode: EpisodeId, why: str) -> EpisodeTorn:
    return EpisodeTorn(
        f"episode {episode} cannot be read: {why}; m.episodes() and `meshrl episodes` list others",
        episode_id=str(episode),
    )


# Of many rows; nobody writes to it.
_NO_INFO: dict[str, Any] = {}


class _Parts:
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

    def add(self, kept: _Kept) -> None:
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
            raise _torn(self._wanted, "its beginning is kept no more")
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
            raise _torn(self._wanted, f"{max(0, count - 1)} of its {summary.steps} steps are kept")
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
