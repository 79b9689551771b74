"""Writing one session's recording: chunks and index entries, each stored once, in order, and by one writer alone.

Each message says which one it expects to be the last on its subject, and is sent again until the server has said what
became of it. A *wrong last sequence* is one of three things, which the last message tells apart by its id::

    it is this one         the answer to an earlier sending was lost: stored
    there is none          the stream was deleted, or its retention took all: the recording begins again
    it is another          somebody else records the session now: this recording is over
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from meshrl.bus.connection import Connection
from meshrl.bus.storing import Reader, Stored, store
from meshrl.errors import BusClosed, MeshError, RequestTimeout, StreamMissing, SubjectNotPermitted, WrongSequence
from meshrl.protocol.chunking import ENDS, Chunker, Ended
from meshrl.protocol.chunks import Chunk, pack_chunk, read_chunk
from meshrl.protocol.transcript import Transcript
from meshrl.recording.streams import EPISODES, stream_of
from meshrl.wire.recorded import MAX_EPISODES, Entry, Recorded
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.recording")

# A chunk is about as large, compressed, or what was noted in as long a time. How much smaller compression makes it is
# seen from the chunks before; pictures, by some dozens.
CHUNK_BYTES = 512 * 1024
CHUNK_S = 1.0
MAX_FACTOR = 32.0
# The server says within this that a message is stored; then it is sent again, with pauses that grow up to so many
# seconds.
STORED_S = 5.0
MAX_PAUSE_S = 5.0
# What may wait, of one session: beyond it steps are not recorded, until there is room.
MAX_NOTED_BYTES = 64 * 1024 * 1024
# Where so many chunks stand in the stream is kept; then only of those in which something began that goes on.
MAX_NUMBERS = 4096
# Between two words on the same trouble.
SAID_S = 60.0
# The description is said again when so much was stored since, so that retention leaves one with what it leaves.
DESCRIBED_BYTES = 32 * 1024 * 1024


# What the ids of descriptions end with.
DESCRIPTION = "d"


def is_description(stored: Stored) -> bool:
    """Whether a message of a recording says of what it is, and is no chunk."""
    return stored.message_id.endswith(DESCRIPTION)


class Rival(Exception):
    """Somebody else records the session: it was opened again elsewhere."""


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
        if noted > stored:
            self.factor += (min(MAX_FACTOR, noted / stored) - self.factor) / 4


@dataclass(slots=True)
class Counts:
    """What became of what a worker's sessions did.

    Attributes:
        recorded: rows that are stored.
        lost: rows that could not be.
        why: the last reason.
    """

    recorded: int = 0
    lost: int = 0
    why: str = ""
    _said: float = -math.inf

    def missed(self, rows: int, why: str, now: float) -> None:
        """So many rows could not be stored; it is logged, the same reason once a minute."""
        self.lost += rows
        if rows and (why != self.why or now - self._said > SAID_S):
            log.warning("what sessions do is not recorded: %s (%d steps so far)", why, self.lost)
            self.why, self._said = why, now


@dataclass(slots=True)
class Storing:
    """What all recordings of a worker share.

    Attributes:
        connection: over which they are stored.
        reader: over the same.
        subjects: of the worker.
        make: makes the streams of an env, where they are not; raises why it cannot.
        counts: of all of them.
    """

    connection: Connection
    reader: Reader
    subjects: Subjects
    make: Callable[[str], Awaitable[None]]
    counts: Counts = field(default_factory=Counts)
    _ready: set[str] = field(default_factory=set)

    async def ready(self, name: str) -> None:
        """See that there are streams for an env, as far as this login may.

        Nobody else would say so: where somebody hears everything, what no stream takes is not refused.

        Raises:
            UsageError: the server has no JetStream, or refuses them.
        """
        if name not in self._ready:
            try:
                await self.make(name)
            except SubjectNotPermitted:
                log.info("recordings of %s: this login makes no streams; `meshrl recordings` does", name)
            self._ready.add(name)

    def forget(self, name: str) -> None:
        """They may be gone."""
        self._ready.discard(name)


@dataclass(slots=True)
class _Chain:
    """The messages of one subject.

    Attributes:
        stream: that has it.
        subject: where they are published.
        last: the number of the last of them in the stream; 0 before the first.
    """

    stream: str
    subject: str
    last: int = 0

    async def add(self, storing: Storing, body: bytes, message_id: str) -> int:
        """Store a message as the next, however long that takes; gives its number.

        Raises:
            Rival: another one is the next.
            StreamMissing: nothing is there any more, so that a recording begins anew.
            StorageRefused, MessageTooLarge: it cannot be stored.
            BusClosed: the connection was closed.
        """
        pause = 0.1
        while True:
            try:
                self.last = await store(
                    storing.connection, self.subject, body, STORED_S, message_id=message_id, after=self.last
                )
            except WrongSequence as exc:
                found = await storing.reader.last(self.stream, self.subject)
                if found is None:
                    raise StreamMissing(f"what was stored on {self.subject} is gone", subject=self.subject) from exc
                if found.message_id != message_id:
                    raise Rival(f"somebody else stores on {self.subject} now") from exc
                self.last = found.seq
            except RequestTimeout as exc:
                log.info("%s", exc.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)
                continue
            return self.last


class SessionWriter:
    """Writes one session's recording; used by one task at a time.

    Args:
        transcript: of the session.
        recorded: what the recording is of.
        epoch: of the session.
        storing: what it shares with others.

    Attributes:
        transcript: as given.
        over: whether it writes nothing more.
        end: why the session ended, once it has; see :data:`~meshrl.protocol.chunking.ENDS`.
    """

    def __init__(self, transcript: Transcript, recorded: Recorded, epoch: int, storing: Storing) -> None:
        self.transcript = transcript
        self.over = False
        self.end: str | None = None
        self._recorded = recorded
        self._epoch = epoch
        self._storing = storing
        self._chunker = Chunker(transcript, recorded.every)
        subjects, name, session = storing.subjects, recorded.name, recorded.session
        self._chunks = _Chain(stream_of(subjects, name), subjects.recording(name, session))
        self._entries = _Chain(EPISODES, subjects.episodes(name, session))
        self._described = 0  # the number of the last description in the stream
        self._since_described = 0  # bytes
        self._size = Size()
        self._streams_lost = 0
        self._numbers: dict[int, int] = {}  # chunks' numbers in the stream, by their own
        self._due_at = 0.0
        self._lost = 0  # rows of a chunk that could not be stored, to be told with what was dropped for it
        self._new = epoch == 1  # else somebody else may have begun

    def __repr__(self) -> str:
        return f"<SessionWriter of {self._recorded.session}, chunk {self._chunker.n}>"

    def due(self, now: float) -> bool:
        """Whether there is something to be written."""
        if self.over:
            return False
        noted = self.transcript.nbytes
        if self.end is not None or noted >= self._size.limit:
            return True
        if not noted:
            self._due_at = 0.0
        elif not self._due_at:
            self._due_at = now + CHUNK_S
        return bool(self._due_at) and now >= self._due_at

    def overflow(self) -> None:
        """Drop what was noted, if it is too much."""
        if self.transcript.nbytes > MAX_NOTED_BYTES:
            self._drop("the server does not keep up")

    async def write(self) -> None:
        """Write what was noted; what cannot be kept is counted.

        Raises:
            BusClosed: the connection was closed.
        """
        end, self._due_at = self.end, 0.0
        try:
            await self._write(end)
        except Rival as exc:
            log.info("session %s: %s", self._recorded.session, exc)
            self.over = True
        except BusClosed:
            raise
        except MeshError as exc:
            self._drop(exc.message)
        if end is not None:
            self.over = True

    async def _write(self, end: str | None) -> None:
        if not self._new and self.transcript.nbytes:
            await self._take_over()
        while noted := self.transcript.taken(self._size.limit):
            last = end is not None and not self.transcript.nbytes
            made = self._chunker.chunk(noted, end if last and end in ENDS else "")
            if made is not None:
                await self._store(*made, sum(one.nbytes for one in noted))
            if last:
                return
        if end in ENDS and self._chunker.n:
            made = self._chunker.chunk((), end)
            if made is not None:
                await self._store(*made, 0)

    async def _take_over(self) -> None:
        """Go on with what another worker has stored; from now on that one cannot store anything more.

        Raises:
            Rival: somebody else does so at this moment.
        """
        reader, session = self._storing.reader, self._recorded.session
        try:
            last = await reader.last(self._chunks.stream, self._chunks.subject)
            entry = await reader.last(self._entries.stream, self._entries.subject)
        except StreamMissing:
            last = entry = None
        self._new = True
        if last is None:
            return
        self._chunks.last, self._entries.last = last.seq, 0 if entry is None else entry.seq
        found = last if not is_description(last) else None
        if found is None:  # its writer was killed between a description and a chunk
            async for stored in reader.get(self._chunks.stream, self._chunks.subject):
                found = found if is_description(stored) else stored
        chunk = None if found is None else read_chunk(found.body)
        await self._describe(0 if chunk is None else chunk.n)
        ended = [] if chunk is None else self._chunker.go_on(chunk, redone=self.transcript.redone)
        if found is not None and chunk is not None:
            self._numbers[0] = int(chunk.first[chunk.first > 0].min(initial=found.seq))
        # An entry without episodes, if need be: what the other one would say of what it could not store is refused.
        await self._store_entries(max(1, self._chunker.n), self._described, ended, always=True)
        log.info("session %s: its recording goes on after chunk %d", session, self._chunker.n)

    def _id(self, what: str) -> str:
        """Of a message; another one where the stream is another, whose predecessor may have had it."""
        return f"{self._recorded.session}:{self._epoch}:{'~' * self._streams_lost}{what}"

    async def _describe(self, n: int) -> None:
        message_id = self._id(f"{n}{DESCRIPTION}")
        self._described = await self._chunks.add(self._storing, self._recorded.to_stream(), message_id)
        self._since_described = 0

    async def _store(self, chunk: Chunk, ended: list[Ended], noted: int) -> None:
        try:
            chunk = replace(chunk, first=self._where_they_began(chunk))
            body = pack_chunk(chunk)
            self._size.seen(noted, len(body))
            try:
                await self._store_packed(chunk, body, ended)
            except StreamMissing:
                await self._begin_anew()
                await self._store_packed(chunk, body, ended)
        except MeshError:
            self._lost += len(chunk)
            self._chunker.lose(set(np.unique(chunk.lanes).tolist()))
            raise
        self._storing.counts.recorded += len(chunk)

    async def _store_packed(self, chunk: Chunk, body: bytes, ended: list[Ended]) -> None:
        if not self._described:
            await self._storing.ready(self._recorded.name)
        if not self._described or self._since_described > DESCRIBED_BYTES:
            await self._describe(chunk.n)
        after = self._chunks.last
        # Together: an entry whose chunk was not stored is found out by who looks for that; a chunk without its entry
        # would never be found.
        stored = [self._chunks.add(self._storing, body, self._id(f"{chunk.n}"))]
        if ended:
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

    async def _store_entries(self, n: int, after: int, ended: list[Ended], *, always: bool = False) -> int:
        for at in range(0, len(ended) or always, MAX_EPISODES):
            entry = self._entry(n, after, ended[at : at + MAX_EPISODES])
            await self._entries.add(self._storing, entry.to_stream(), self._id(f"{n}.{at}"))
        return self._entries.last

    def _entry(self, n: int, after: int, ended: list[Ended]) -> Entry:
        recorded = self._recorded
        first = [self._numbers.get(one.first, after + 1) for one in ended]
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
            lanes=np.array([one.lane for one in ended], np.int32),
            numbers=np.array([one.number for one in ended], np.int64),
            steps=np.array([one.steps for one in ended], np.int64),
            returns=np.array([one.episode_return for one in ended], np.float64),
            reasons=np.array([one.reason for one in ended], np.uint8),
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

    def _drop(self, why: str) -> None:
        lanes, rows = self.transcript.dropped()
        self._chunker.lose(lanes)
        self._storing.counts.missed(rows + self._lost, why, time.monotonic())
        self._lost = 0
