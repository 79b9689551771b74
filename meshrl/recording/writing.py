"""Writing one session's recording: its description, chunks of what was noted, and entries of the index."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.storing import Stored
from meshrl.errors import BusClosed, MeshError, RequestTimeout, StreamMissing
from meshrl.protocol.chunking import ENDS, Chunker, Ended
from meshrl.protocol.chunks import Chunk, pack_chunk, read_chunk
from meshrl.protocol.joined import Noted, halves
from meshrl.protocol.noted import rows_in
from meshrl.protocol.runs import LOST
from meshrl.protocol.transcript import MAX_NOTED_BYTES, Transcript
from meshrl.recording.chain import Chain, Rival, Storing
from meshrl.recording.streams import EPISODES, stream_of
from meshrl.recording.tapping import SHOWN_S, Tap
from meshrl.wire.recorded import MAX_EPISODES, Entry, Recorded

log = logging.getLogger("meshrl.recording")

# A chunk is about as large, compressed, or what was noted in as long a time. How much smaller compression makes it is
# seen from the chunks before; pictures, by some dozens.
CHUNK_BYTES = 512 * 1024
CHUNK_S = 1.0
MAX_FACTOR = 32.0
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


@dataclass(slots=True)
class Size:
    """How much is noted until a chunk is full.

    Attributes:
        factor: by which chunks are smaller than what was noted, lately.
    """

    factor: float = 1.0

    @property
    def limit(self) -> int:
        """In bytes of what is noted."""
        return min(int(CHUNK_BYTES * self.factor), MAX_NOTED_BYTES // 4)

    def seen(self, noted: int, stored: int) -> None:
        """What was noted has become a chunk of so many bytes."""
        if noted > stored or stored > CHUNK_BYTES:  # little of it is mostly what every chunk has
            self.factor += (min(MAX_FACTOR, max(1.0, noted / stored)) - self.factor) / 4


class SessionWriter:
    """Writes one session's recording; used by one task at a time.

    Args:
        transcript: of the session.
        recorded: what the recording is of.
        epoch: of the session.
        storing: what it shares with others.
        asked: whether somebody wants it recorded; that it is not is a warning then.

    Attributes:
        transcript: as given.
        over: whether it writes nothing more.
        end: why the session ended, once it has; see :data:`~meshrl.protocol.chunking.ENDS`.
    """

    def __init__(
        self, transcript: Transcript, recorded: Recorded, epoch: int, storing: Storing, *, asked: bool = True
    ) -> None:
        self.transcript = transcript
        self.over = False
        self.end: str | None = None
        self._recorded = recorded
        self._epoch = epoch
        self._storing = storing
        self._asked = asked
        self._chunker = Chunker(transcript, recorded.every)
        self._chunks, self._entries = self._chains(recorded.session)
        self._described_at = 0.0
        self._described = 0  # the number of the last description in the stream
        self._since_described = 0  # bytes
        self._size = Size()
        self._streams_lost = 0
        self._numbers: dict[int, int] = {}  # chunks' numbers in the stream, by their own
        self._due_at = 0.0
        self._lost = 0  # rows of a chunk that could not be stored, to be told with what was dropped for it
        self._tap: Tap | None = None
        self._placed = False  # whether it is known where it goes on

    def _chains(self, recording: str) -> tuple[Chain, Chain]:
        subjects, name = self._storing.subjects, self._recorded.name
        chunks = Chain(name, stream_of(subjects, name), subjects.recording(name, recording))
        return chunks, Chain(name, EPISODES, subjects.episodes(name, recording))

    def __repr__(self) -> str:
        return f"<SessionWriter of {self._recorded.session}, chunk {self._chunker.n}>"

    # ---------------------------------------------------------------- who watches

    def watched(self, until: float, now: float) -> bool:
        """Somebody watches until then; gives whether it is shown."""
        if self.over or until <= now:
            self._tap, self.transcript.watched = None, False
        elif self._tap is None:
            first = self._chunker.n + (1 if self.transcript.watched else 2)  # what was noted so far is of the next
            self._tap = Tap(self._storing, self._recorded, until, first)
            self._tap.describe()
            self.transcript.watched = True
        elif until > self._tap.until:  # somebody else may have come
            self._tap.until = until
            self._tap.describe()
        return self._tap is not None

    @property
    def recorded(self) -> Recorded:
        """What the recording says of itself."""
        return self._recorded

    # ---------------------------------------------------------------- writing

    def due(self, now: float) -> bool:
        """Whether there is something to be written."""
        if self.over:
            return False
        noted = self.transcript.nbytes
        if self.end is not None or noted >= self._size.limit or (noted and self.transcript.strict):
            return True
        if not noted:
            self._due_at = 0.0
        elif not self._due_at:
            self._due_at = now + (CHUNK_S if self._tap is None else SHOWN_S)
        return bool(self._due_at) and now >= self._due_at

    async def write(self) -> None:
        """Write what was noted; what cannot be kept is counted.

        Raises:
            BusClosed: the connection was closed.
        """
        end, self._due_at = self.end, 0.0
        try:
            if not self._placed and self.transcript.nbytes:
                await self._place()
                self._placed = True
        except RequestTimeout as exc:  # the server is away: what was noted waits
            log.info("session %s: %s", self._recorded.session, exc.message)
            await self._see_to_the_stream()
            if end is None:
                return
        except Rival as exc:
            self._stop(str(exc))
            return
        except BusClosed:
            raise
        except MeshError as exc:
            self._drop(exc.message)
        try:
            await self._write(end)
        except Rival as exc:
            self._stop(str(exc))
        except BusClosed:
            raise
        except MeshError as exc:
            self._drop(exc.message)
        if end is not None:
            self._end()

    async def _see_to_the_stream(self) -> None:
        """It may not be there, which somebody who hears everything hides: then the server says nothing."""
        self._storing.forget(self._recorded.name)
        try:
            await self._storing.ready(self._recorded.name)
        except BusClosed:
            raise
        except MeshError as exc:
            log.info("session %s: %s", self._recorded.session, exc.message)

    def _end(self) -> None:
        """Write nothing more."""
        self.over = True
        self.transcript.close()

    async def _write(self, end: str | None) -> None:
        if self.transcript.missed:
            missed, self.transcript.missed = self.transcript.missed, 0
            self._chunker.lose(set(range(self.transcript.count)))
            self._missed(missed, "the server does not keep up")
        while noted := self.transcript.taken(self._size.limit):
            last = end is not None and not self.transcript.nbytes
            await self._store_noted(noted, end if last and end in ENDS else "")
            self.transcript.settled(None)
            if last:
                return
            if end is None and self.transcript.nbytes < self._size.limit:
                break  # what has come meanwhile waits for its turn
        if end in ENDS and self._chunker.n:
            await self._store_noted((), end)

    async def _store_noted(self, noted: Noted, end: str) -> None:
        before = self._chunker.standing()
        try:
            made = self._chunker.chunk(noted, end)
        except Exception:
            log.exception("session %s: what it did cannot be recorded", self._recorded.session)
            self._chunker.lose(set(range(self.transcript.count)))
            self._lost += sum(map(rows_in, noted))
            self._drop("it cannot be put down")
            return
        if made is None:
            return
        shown, ended = replace(made[0], first=self._where_they_began(made[0])), made[1]
        chunk = shown if self._recorded.level == "full" else replace(shown, observations=None, infos=None)
        try:
            body = pack_chunk(chunk)
            self._size.seen(sum(one.nbytes for one in noted), len(body))
            too_large = len(body) > self._storing.connection.max_headed
            parts = halves(self.transcript, noted) if too_large else None
            if parts is None:
                if self._tap is not None:
                    self._tap.show(shown)
                await self._store(chunk, body, ended)
        except MeshError:
            self._lost += len(chunk)
            self._chunker.lose(set(np.unique(chunk.lanes).tolist()))
            raise
        if parts is not None:
            self._chunker.go_back(before)
            await self._store_parts(*parts, end)

    async def _store_parts(self, first: Noted, second: Noted, end: str) -> None:
        """What is too much for one message."""
        try:
            await self._store_noted(first, "")
        except MeshError:
            self._lost += sum(map(rows_in, second))
            self._chunker.lose(set(range(self.transcript.count)))
            raise
        await self._store_noted(second, end)

    def _stop(self, why: str) -> None:
        """Write nothing more: somebody else does."""
        log.info("session %s: %s", self._recorded.session, why)
        self._end()

    # ---------------------------------------------------------------- where it goes on

    async def _place(self) -> None:
        """Find out where this recording begins: with nothing, or behind what another worker has stored.

        Raises:
            Rival: somebody else's recording is there.
            RequestTimeout: the server is away.
        """
        recorded, begun = self._recorded, self.transcript.begun
        if self._epoch > 1 and (not self.transcript.redone or begun == self._epoch):
            # Its envs are new, or nobody knows which of their episodes are stored: a recording of its own.
            await self._end_lost()
            begun = self._epoch
        if begun > 1:
            self._recorded = recorded.model_copy(update={"session": f"{recorded.session}-{begun}"})
            self._chunks, self._entries = self._chains(self._recorded.session)
        while (last := await self._last_of(self._chunks)) is not None:
            if begun == self._epoch or epoch_of(last) > self._epoch or not await self._is_ours():
                raise Rival(f"somebody else's recording is on {self._chunks.subject}")
            try:
                await self._take_over(last)
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
            return is_description(stored) and Recorded.from_stream(stored.body).user == self._recorded.user
        return False

    async def _take_over(self, last: Stored) -> None:
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
            self._chunker.go_on(chunk)
            self._numbers[0] = int(chunk.first[chunk.first > 0].min(initial=found.seq))
        # An entry without episodes: what the other one would say of what it could not store is refused.
        await self._store_entries(max(1, self._chunker.n), self._described, Ended.none(), mark="t")
        log.info("session %s: its recording goes on after chunk %d", self._recorded.session, self._chunker.n)

    async def _last_chunk(self, last: Stored) -> Stored | None:
        if not is_description(last):
            return last
        found = None  # its writer was killed between a description and a chunk
        async for stored in self._storing.reader.get(self._chunks.stream, self._chunks.subject):
            found = found if is_description(stored) else stored
        return found

    async def _end_lost(self) -> None:
        """Say of the episodes of the session's first recording that nobody goes on with them."""
        last = await self._last_of(self._chunks)
        if last is None or epoch_of(last) > self._epoch or not await self._is_ours():
            return
        found, entry = await self._last_chunk(last), await self._last_of(self._entries)
        if found is None:
            return
        lost = Chunker(self.transcript, self._recorded.every)
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

    def _id(self, what: str) -> str:
        """Of a message; another one where the stream is another, whose predecessor may have had it."""
        return f"{self._recorded.session}:{self._epoch}:{'~' * self._streams_lost}{what}"

    async def _describe(self, n: int) -> None:
        message_id = self._id(f"{n}{DESCRIPTION}")
        self._described = await self._chunks.add(self._storing, self._recorded.to_stream(), message_id)
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

    async def _store(self, chunk: Chunk, body: bytes, ended: Ended) -> None:
        try:
            await self._store_packed(chunk, body, ended)
        except StreamMissing:
            await self._begin_anew()
            await self._store_packed(chunk, body, ended)
        self._storing.counts.recorded += len(chunk)

    async def _store_packed(self, chunk: Chunk, body: bytes, ended: Ended) -> None:
        if not self._described:
            await self._storing.ready(self._recorded.name)
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
        if len(self._numbers) > MAX_NUMBERS:
            oldest = self._chunker.oldest
            self._numbers = {n: number for n, number in self._numbers.items() if n == 0 or n >= oldest}

    def _where_they_began(self, chunk: Chunk) -> NDArray[np.int64]:
        """Of each lane the number in the stream of a message before which nothing of its episode is."""
        return np.array([self._numbers.get(n, 0) for n in chunk.first.tolist()], np.int64)

    async def _store_entries(self, n: int, after: int, ended: Ended, *, mark: str = "") -> int:
        for at in range(0, len(ended) or bool(mark), MAX_EPISODES):
            entry = self._entry(n, after, ended.picked(slice(at, at + MAX_EPISODES)))
            await self._entries.add(self._storing, entry.to_stream(), self._id(f"{n}.{at}{mark}"))
        return self._entries.last

    def _entry(self, n: int, after: int, ended: Ended) -> Entry:
        recorded = self._recorded
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
        self._storing.forget(self._recorded.name)
        await self._storing.ready(self._recorded.name)
        try:
            found = await self._storing.reader.last(self._entries.stream, self._entries.subject)
        except StreamMissing:
            found = None
        self._entries.last = 0 if found is None else found.seq
        self._chunks.last = self._described = 0
        self._streams_lost += 1
        self._numbers.clear()

    def _missed(self, rows: int, why: str) -> None:
        self._storing.counts.missed(rows, why, time.monotonic(), logging.WARNING if self._asked else logging.INFO)

    def _drop(self, why: str) -> None:
        lanes, rows = self.transcript.dropped()
        self._chunker.lose(lanes)
        self._missed(rows + self._lost, why)
        self._lost = 0
        self.transcript.settled(why)
