"""The messages of one recording as they stand in the streams: descriptions, chunks, and entries of the index.

One worker stores them. Another that goes on with the session takes them over: it stores a description, and then the
first one can store nothing more.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.storing import Stored
from meshrl.errors import StreamMissing
from meshrl.protocol.chunking import Chunker, Ended
from meshrl.protocol.chunks import Chunk, read_chunk
from meshrl.protocol.runs import LOST
from meshrl.protocol.transcript import Transcript
from meshrl.recording.chain import Chain, Rival, Storing
from meshrl.recording.streams import EPISODES, stream_of
from meshrl.wire.recorded import MAX_EPISODES, Entry, Recorded

log = logging.getLogger("meshrl.recording")

# Where so many chunks stand in the stream is kept; then only of those in which something began that goes on.
MAX_NUMBERS = 4096
# The description is said again when so much was stored since, by this session or, in messages, by all of its env's, or
# so many seconds ago: retention leaves one with what it leaves.
DESCRIBED_BYTES = 32 * 1024 * 1024
DESCRIBED_MESSAGES = 1000
DESCRIBED_S = 600.0
# What the ids of descriptions end with.
DESCRIPTION = "d"


def is_description(stored: Stored) -> bool:
    """Whether a message of a recording says of what it is, and is no chunk."""
    return stored.message_id.endswith(DESCRIPTION)


def epoch_of(stored: Stored) -> int:
    """That of the session, in which a message of its recording was stored; 0 where it does not say so."""
    epoch = stored.message_id.rpartition(":")[0].rpartition(":")[2]
    return int(epoch) if epoch.isascii() and epoch.isdigit() and len(epoch) < 16 else 0


class Messages:
    """Those of one session's recording.

    Args:
        recorded: what the recording says of itself.
        epoch: of the session.
        storing: what it shares with others.

    Attributes:
        recorded: as given; of another id where the session has a recording already that does not go on.
    """

    def __init__(self, recorded: Recorded, epoch: int, storing: Storing) -> None:
        self.recorded = recorded
        self._epoch = epoch
        self._storing = storing
        self._chunks, self._entries = self._chains(recorded.session)
        self._described_at = 0.0
        self._described = 0  # the number of the last description in the stream
        self._since_described = 0  # bytes
        self._streams_lost = 0
        self._numbers: dict[int, int] = {}  # chunks' numbers in the stream, by their own

    def __repr__(self) -> str:
        return f"<Messages of {self.recorded.session}, up to {self._chunks.last}>"

    def _chains(self, recording: str) -> tuple[Chain, Chain]:
        subjects, name = self._storing.subjects, self.recorded.name
        chunks = Chain(name, stream_of(subjects, name), subjects.recording(name, recording))
        return chunks, Chain(name, EPISODES, subjects.episodes(name, recording))

    # ---------------------------------------------------------------- where it goes on

    async def place(self, transcript: Transcript, chunker: Chunker) -> None:
        """Find out where the recording begins: with nothing, or behind what another worker has stored.

        Args:
            transcript: of the session.
            chunker: of the same; goes on with what is stored.

        Raises:
            Rival: somebody else's recording is there.
            RequestTimeout: the server is away.
        """
        recorded, begun = self.recorded, transcript.begun
        if self._epoch > 1 and (not transcript.redone or begun == self._epoch):
            # Its envs are new, or nobody knows which of their episodes are stored: a recording of its own.
            await self._end_lost(transcript)
            begun = self._epoch
        if begun > 1:
            self.recorded = recorded.model_copy(update={"session": f"{recorded.session}-{begun}"})
            self._chunks, self._entries = self._chains(self.recorded.session)
        while (last := await self._last_of(self._chunks)) is not None:
            if begun == self._epoch or epoch_of(last) > self._epoch or not await self._is_ours():
                raise Rival(f"somebody else's recording is on {self._chunks.subject}")
            try:
                await self._take_over(last, chunker)
            except Rival:  # one that was thought dead may store until somebody newer has
                if (now := await self._last_of(self._chunks)) is None or now.seq == last.seq:
                    raise
            else:
                return

    async def _last_of(self, chain: Chain) -> Stored | None:
        try:
            return await self._storing.reader.last(chain.stream, chain.subject)
        except StreamMissing:
            return None

    async def _is_ours(self) -> bool:
        """Whether what is there was recorded of a session of the same user: ids are anybody's to choose."""
        chain = self._chunks
        async for stored in self._storing.reader.get(chain.stream, chain.subject, limit=1):
            return is_description(stored) and Recorded.from_stream(stored.body).user == self.recorded.user
        return False

    async def _take_over(self, last: Stored, chunker: Chunker) -> None:
        """Go on with what another worker has stored; from now on that one cannot store anything more.

        Raises:
            Rival: somebody else does so at this moment.
        """
        entry = await self._last_of(self._entries)
        self._chunks.last, self._entries.last = last.seq, 0 if entry is None else entry.seq
        found = await self._last_chunk(last)
        await self._describe(0 if found is None else read_chunk(found.body).n)
        if found is not None:
            chunk = read_chunk(found.body)
            chunker.go_on(chunk)
            self._numbers[0] = int(chunk.first[chunk.first > 0].min(initial=found.seq))
        # An entry without episodes: what the other one would say of what it could not store is refused.
        await self._store_entries(max(1, chunker.n), self._described, Ended.none(), mark="t")
        log.info("session %s: its recording goes on after chunk %d", self.recorded.session, chunker.n)

    async def _last_chunk(self, last: Stored) -> Stored | None:
        if not is_description(last):
            return last
        found = None  # its writer was killed between a description and a chunk
        async for stored in self._storing.reader.get(self._chunks.stream, self._chunks.subject):
            found = found if is_description(stored) else stored
        return found

    async def _end_lost(self, transcript: Transcript) -> None:
        """Say of the episodes of the session's first recording that nobody goes on with them."""
        last = await self._last_of(self._chunks)
        if last is None or epoch_of(last) > self._epoch or not await self._is_ours():
            return
        found, entry = await self._last_chunk(last), await self._last_of(self._entries)
        if found is None:
            return
        lost = Chunker(transcript, self.recorded.every)
        chunk = read_chunk(found.body)
        lost.go_on(chunk)
        ended = lost.leave_all(LOST)
        if not len(ended):
            return
        self._chunks.last, self._entries.last = last.seq, 0 if entry is None else entry.seq
        await self._describe(chunk.n)  # its worker can store nothing more
        self._numbers[0] = int(chunk.first[chunk.first > 0].min(initial=found.seq))
        await self._store_entries(chunk.n, self._described, ended, mark="l")
        self._described = 0
        self._numbers.clear()

    # ---------------------------------------------------------------- storing

    def _id(self, what: str) -> str:
        """Of a message; another one where the stream is another, whose predecessor may have had it."""
        return f"{self.recorded.session}:{self._epoch}:{'~' * self._streams_lost}{what}"

    async def _describe(self, n: int) -> None:
        message_id = self._id(f"{n}{DESCRIPTION}")
        self._described = await self._chunks.add(self._storing, self.recorded.to_stream(), message_id)
        self._since_described, self._described_at = 0, time.monotonic()

    @property
    def _is_described(self) -> bool:
        """Whether retention will have left a description beside what comes next."""
        return (
            self._described > 0
            and self._since_described < DESCRIBED_BYTES
            and self._chunks.last - self._described < DESCRIBED_MESSAGES
            and time.monotonic() - self._described_at < DESCRIBED_S
        )

    async def store(self, chunk: Chunk, body: bytes, ended: Ended, oldest: int) -> None:
        """Store a chunk, and which episodes ended in it.

        Args:
            chunk: the next.
            body: it, packed.
            ended: in it.
            oldest: the number of the chunk in which the oldest episode began that goes on.

        Raises:
            Rival: somebody else stores them now.
            MeshError: it cannot be stored.
        """
        try:
            await self._store_packed(chunk, body, ended)
        except StreamMissing:
            await self._begin_anew()
            await self._store_packed(chunk, body, ended)
        if len(self._numbers) > MAX_NUMBERS:
            self._numbers = {n: number for n, number in self._numbers.items() if n == 0 or n >= oldest}

    async def _store_packed(self, chunk: Chunk, body: bytes, ended: Ended) -> None:
        if not self._described:
            await self._storing.ready(self.recorded.name)
        if not self._is_described:
            await self._describe(chunk.n)
        after = self._chunks.last
        # Together: an entry whose chunk was not stored is found out by who looks for that; a chunk without its entry
        # would never be found.
        stored = [self._chunks.add(self._storing, body, self._id(f"{chunk.n}"))]
        if len(ended):
            stored.append(self._store_entries(chunk.n, after, ended))
        for result in await asyncio.gather(*stored, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        self._numbers[chunk.n] = self._chunks.last
        self._since_described += len(body)

    def where_they_began(self, chunk: Chunk) -> NDArray[np.int64]:
        """Of each lane the number in the stream of a message before which nothing of its episode is."""
        return np.array([self._numbers.get(n, 0) for n in chunk.first.tolist()], np.int64)

    async def _store_entries(self, n: int, after: int, ended: Ended, *, mark: str = "") -> int:
        for at in range(0, len(ended) or bool(mark), MAX_EPISODES):
            entry = self._entry(n, after, ended.picked(slice(at, at + MAX_EPISODES)))
            await self._entries.add(self._storing, entry.to_stream(), self._id(f"{n}.{at}{mark}"))
        return self._entries.last

    def _entry(self, n: int, after: int, ended: Ended) -> Entry:
        recorded = self.recorded
        first = [self._numbers.get(chunk, after + 1) for chunk in ended.first.tolist()]
        return Entry(
            session=recorded.session,
            chunk=n,
            described=self._described,
            after=after,
            first_env_id=recorded.first_env_id,
            user=recorded.user,
            labels=recorded.labels,
            policy=recorded.policy,
            manifest=recorded.manifest,
            lanes=ended.lanes.astype(np.int32),
            numbers=ended.numbers,
            steps=ended.steps,
            returns=ended.returns,
            reasons=ended.reasons.astype(np.uint8),
            first=np.array(first, np.int64),
        )

    async def _begin_anew(self) -> None:
        """There is no stream, or nothing of this recording in it."""
        self._storing.forget(self.recorded.name)
        await self._storing.ready(self.recorded.name)
        try:
            found = await self._storing.reader.last(self._entries.stream, self._entries.subject)
        except StreamMissing:
            found = None
        self._entries.last = 0 if found is None else found.seq
        self._chunks.last = self._described = 0
        self._streams_lost += 1
        self._numbers.clear()
