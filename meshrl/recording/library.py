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
from typing import NamedTuple

import numpy as np

from meshrl.bus.storing import Reader, Stored
from meshrl.errors import (
    EpisodeTorn,
    EpisodeUnknown,
    MalformedMessage,
    MeshError,
    StreamMissing,
    UnsupportedVersion,
)
from meshrl.protocol.chunks import read_chunk
from meshrl.protocol.runs import REASONS
from meshrl.recording.episode_rows import EpisodeParts, KeptChunk, torn
from meshrl.recording.episodes import Described, EpisodeId, EpisodeSummary, RecordedEpisode
from meshrl.recording.messages import is_description
from meshrl.recording.streams import EPISODES, stream_of
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
        self._chunks: OrderedDict[tuple[str, int], KeptChunk] = OrderedDict()  # by subject and their own number
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
        failed: EpisodeTorn | None = None
        for one in reversed(found):  # of one that was taken over the last one counts
            try:
                return await self.read(one)
            except EpisodeTorn as exc:
                failed = failed or exc
        if failed is not None:
            raise failed
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
                raise torn(before, "it was not recorded, or the index has lost what came after it") from None
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
                raise torn(wanted, "what it is of is kept no more")
            parts = EpisodeParts(described, wanted)
            for kept in await self._between(stream, self._subjects.recording(summary.env, entry.session), located):
                parts.add(kept)
            return parts.episode(summary)
        except StreamMissing:
            raise torn(wanted, "its stream is gone") from None
        except (MalformedMessage, UnsupportedVersion) as exc:
            raise torn(wanted, exc.message) from exc

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

    async def _between(self, stream: str, subject: str, located: Located) -> list[KeptChunk]:
        """The chunks in which an episode stands, in order."""
        entry, first = located.entry, located.first
        known = self._known(subject, entry, first)
        if known is not None:
            return known
        for pause in (*PAUSES_S, None):
            chunks: list[KeptChunk] = []
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

    def _known(self, subject: str, entry: Entry, first: int) -> list[KeptChunk] | None:
        """The same, if all of them were read before: chunks are numbered, so that none is missed between two."""
        chunks: list[KeptChunk] = []
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

    def _kept(self, subject: str, stored: Stored) -> KeptChunk:
        chunk = read_chunk(stored.body)
        known = self._chunks.pop((subject, chunk.n), None)
        if known is not None:
            self._bytes -= known.nbytes
        kept = self._chunks[subject, chunk.n] = KeptChunk(chunk, stored.seq, stored.at, KEPT_FACTOR * len(stored.body))
        self._bytes += kept.nbytes
        while self._bytes > KEPT_BYTES and len(self._chunks) > 1:
            self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return kept


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
