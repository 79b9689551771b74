"""Writing one session's recording: when what was noted becomes a chunk, and what becomes of what cannot be stored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from meshrl.errors import BusClosed, MeshError, RequestTimeout
from meshrl.protocol.chunking import ENDS, Chunker
from meshrl.protocol.chunks import pack_chunk
from meshrl.protocol.joined import Noted, halves
from meshrl.protocol.noted import rows_in
from meshrl.protocol.transcript import MAX_NOTED_BYTES, Transcript
from meshrl.recording.chain import Rival, Storing
from meshrl.recording.messages import Messages
from meshrl.recording.tapping import SHOWN_S, Tap
from meshrl.wire.recorded import Recorded

log = logging.getLogger("meshrl.recording")

# A chunk is about as large, compressed, or what was noted in as long a time. How much smaller compression makes it is
# seen from the chunks before; pictures, by some dozens.
CHUNK_BYTES = 512 * 1024
CHUNK_S = 1.0
MAX_FACTOR = 128.0


@dataclass(slots=True)
class Size:
    """How much is noted until a chunk is full.

    Attributes:
        factor: by which chunks are smaller than what was noted, lately.
    """

    factor: float = 1.0
    _weight: float = 1.0  # of the next that is seen; nothing is known before the first

    @property
    def limit(self) -> int:
        """In bytes of what is noted."""
        return min(int(CHUNK_BYTES * self.factor), MAX_NOTED_BYTES // 4)

    def seen(self, noted: int, stored: int) -> None:
        """What was noted has become a chunk of so many bytes."""
        if noted > stored or stored > CHUNK_BYTES:  # little of it is mostly what every chunk has
            self.factor += (min(MAX_FACTOR, max(1.0, noted / stored)) - self.factor) * self._weight
            self._weight = 0.25


class SessionWriter:
    """Writes one session's recording; used by one task at a time.

    Args:
        transcript: of the session.
        recorded: what the recording is of.
        epoch: of the session.
        storing: what it shares with others.
        full: called, on any thread, when a chunk's worth is noted.
        asked: whether somebody wants it recorded; that it is not is a warning then.

    Attributes:
        transcript: as given.
        over: whether it writes nothing more.
        known_as: the env's name, and the session's id, which its recording may not have.
        end: why the session ended, once it has; see :data:`~meshrl.protocol.chunking.ENDS`.
    """

    def __init__(
        self,
        transcript: Transcript,
        recorded: Recorded,
        epoch: int,
        storing: Storing,
        *,
        full: Callable[[], None] = lambda: None,
        asked: bool = True,
    ) -> None:
        self.transcript = transcript
        self.over = False
        self.end: str | None = None
        self._storing = storing
        self._full = full
        self._asked = asked
        self.known_as = recorded.name, recorded.session
        self._messages = Messages(recorded, epoch, storing)
        self._chunker = Chunker(transcript, recorded.every)
        self._size = Size()
        transcript.when_full(self._size.limit, full)
        self._not_before = 0.0
        self._lost = 0  # rows of a chunk that could not be stored, to be told with what was dropped for it
        self._tap: Tap | None = None
        self._shown = 0  # the number of the last chunk that was shown by an earlier one
        self._placed = False  # whether it is known where it goes on

    def __repr__(self) -> str:
        return f"<SessionWriter of {self._messages.recorded.session}, chunk {self._chunker.n}>"

    # ---------------------------------------------------------------- who watches

    def watched(self, until: float, now: float) -> bool:
        """Somebody watches until then; gives whether it is shown."""
        if self.over or until <= now:
            self._forget_viewers()
            self.transcript.watched = False
        elif self._tap is None:
            chunker = Chunker(self.transcript, shows=True)
            chunker.go_back(self._chunker.standing())
            chunker.n = self._shown + 1  # one more, so that no viewer takes it for the next of those before
            late_bytes = 0 if self.transcript.watched else self.transcript.nbytes
            self._tap = Tap(
                self._storing, self.known_as[1], self._messages, until, self.transcript, chunker, late_bytes
            )
            self._tap.describe()
            self.transcript.watched = True
        elif until > self._tap.until:  # somebody else may have come
            self._tap.until = until
            self._tap.describe()
        return self._tap is not None

    def _show(self, noted: Noted, end: str) -> None:
        if self._tap is None:
            return
        try:
            self._tap.show(noted, end)
        except Exception:  # it is recorded whether or not it can be seen
            log.exception("session %s: what it did cannot be shown", self._messages.recorded.session)
            self._forget_viewers()

    def _place_viewers(self) -> None:
        """What is shown goes on where the recording does, and as episodes of that."""
        if self._tap is not None:
            n = self._tap.chunker.n
            self._tap.chunker.go_back(self._chunker.standing())
            self._tap.chunker.n = n
            self._tap.describe()

    def _forget_viewers(self) -> None:
        """Who goes on watching is shown what comes from now on, as if they had come just now."""
        if self._tap is not None:
            self._shown, self._tap = self._tap.chunker.n, None

    # ---------------------------------------------------------------- writing

    def due(self, now: float) -> bool:
        """Whether there is something to be written."""
        if self.over:
            return False
        noted = self.transcript.nbytes
        if self.end is not None or noted >= self._size.limit or (noted and self.transcript.strict):
            return True
        return now >= self.due_at

    @property
    def due_at(self) -> float:
        """When there will be, if nothing more comes; in monotonic seconds."""
        return max(self.transcript.oldest_at + self._pace_s, self._not_before)

    @property
    def _pace_s(self) -> float:
        return CHUNK_S if self._tap is None else SHOWN_S

    async def write(self) -> None:
        """Write what was noted; what cannot be kept is counted.

        Raises:
            BusClosed: the connection was closed.
        """
        end, self._not_before = self.end, time.monotonic() + self._pace_s
        try:
            if not self._placed and self.transcript.nbytes:
                await self._messages.place(self.transcript, self._chunker)
                self._placed = True
                self._place_viewers()
        except RequestTimeout as exc:  # the server is away: what was noted waits
            log.info("session %s: %s", self._messages.recorded.session, exc.message)
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
        else:
            self.transcript.when_full(self._size.limit, self._full)

    async def _see_to_the_stream(self) -> None:
        """It may not be there, which somebody who hears everything hides: then the server says nothing."""
        self._storing.forget(self._messages.recorded.name)
        try:
            await self._storing.ready(self._messages.recorded.name)
        except BusClosed:
            raise
        except MeshError as exc:
            log.info("session %s: %s", self._messages.recorded.session, exc.message)

    def _end(self) -> None:
        """Write nothing more."""
        self.over = True
        self.transcript.close()

    async def _write(self, end: str | None) -> None:
        if self.transcript.missed:
            missed, self.transcript.missed = self.transcript.missed, 0
            self._chunker.lose(set(range(self.transcript.count)))
            self._forget_viewers()
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
            log.exception("session %s: what it did cannot be recorded", self._messages.recorded.session)
            self._chunker.lose(set(range(self.transcript.count)))
            self._lost += sum(map(rows_in, noted))
            self._drop("it cannot be put down")
            return
        if made is None:
            self._show(noted, end)
            return
        chunk, ended = replace(made[0], first=self._messages.where_they_began(made[0])), made[1]
        try:
            body = pack_chunk(chunk)
            self._size.seen(sum(one.nbytes for one in noted), len(body))
            too_large = len(body) > self._storing.connection.max_headed
            parts = halves(self.transcript, noted) if too_large else None
            if parts is None:
                self._show(noted, end)
                await self._messages.store(chunk, body, ended, self._chunker.oldest)
                self._storing.counts.recorded += len(chunk)
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
        level = logging.INFO if self.end is not None or not self._asked else logging.WARNING
        log.log(level, "session %s is recorded no more: %s", self._messages.recorded.session, why)
        self._end()

    def _missed(self, rows: int, why: str) -> None:
        self._storing.counts.missed(rows, why, time.monotonic(), logging.WARNING if self._asked else logging.INFO)

    def _drop(self, why: str) -> None:
        lanes, rows = self.transcript.dropped()
        self._chunker.lose(lanes)
        self._forget_viewers()
        self._missed(rows + self._lost, why)
        self._lost = 0
        self.transcript.settled(why)
