"""The recorder: a worker's third thread, with a connection of its own, that writes what its sessions did.

It begins with the first session that is recorded. Nobody waits for it: what it cannot keep up with is dropped, counted
and said.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from meshrl.bus.connect import dial
from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.bus.storing import Reader
from meshrl.errors import BusClosed, MeshError
from meshrl.protocol.transcript import Transcript
from meshrl.recording.chain import STORED_S, Counts, Storing
from meshrl.recording.serving import Serving
from meshrl.recording.streams import Retention, make_streams
from meshrl.recording.tapping import SHOWN_S, Watched
from meshrl.recording.writing import CHUNK_BYTES, CHUNK_S, SessionWriter
from meshrl.wire.recorded import Recorded
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.recording")

# Between looks whose turn it is, at least: where nobody watches, or says that it is full, or has ended.
MIN_LOOK_S = 0.2
# A worker that ends has so long to write what is left.
LAST_S = 5.0
# Chunks under way at once, each of another session.
AT_ONCE = 64


class Recorder:
    """Writes the recordings of one worker.

    Args:
        worker: its id.
        url: of the server.
        subjects: of its namespace.
        credentials: the login.
        retention: of streams that it makes.

    Attributes:
        counts: what became of what its sessions did.
    """

    def __init__(
        self,
        worker: str,
        url: str,
        subjects: Subjects,
        credentials: str | Path | Credentials | None,
        retention: Retention,
    ) -> None:
        self.counts = Counts()
        self._worker = worker
        self._url = url
        self._subjects = subjects
        self._credentials = credentials
        self._retention = retention
        self._thread: threading.Thread | None = None
        self._added: list[tuple[Transcript, Recorded, int, bool]] = []
        self._writers: dict[int, SessionWriter] = {}  # by their transcript's id; the recorder's own
        self._ended: list[tuple[Transcript, str]] = []
        self._watched: Watched | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stopping = self._ended_for_good = False

    def __repr__(self) -> str:
        return f"<Recorder of {self._worker}: {self.counts.recorded} rows recorded, {self.counts.lost} not>"

    # ---------------------------------------------------------------- from the worker's threads

    def begin(self, transcript: Transcript, recorded: Recorded, epoch: int, *, asked: bool = True) -> None:
        """Record a session from now on; ``asked``: somebody wants it, so that it is a warning where it cannot be."""
        if self._ended_for_good:
            transcript.close()
            return
        if self._watched is not None and self._watched.until(recorded.name, recorded.session) > time.monotonic():
            transcript.watched = True  # from its first row on
        transcript.when_full(CHUNK_BYTES, self.nudge)  # it may be so before anybody looks
        self._added.append((transcript, recorded, epoch, asked))
        self.start()
        if transcript.watched:
            self.nudge()

    def start(self) -> None:
        """Begin, also without a session: others may want to read."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"recorder-{self._worker}", daemon=True)
            self._thread.start()

    def end(self, transcript: Transcript, reason: str) -> None:
        """A session has ended; ``closed`` ends its episodes too."""
        self._ended.append((transcript, reason))
        self.nudge()

    def nudge(self) -> None:
        """Look now whose turn it is."""
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            try:
                loop.call_soon_threadsafe(wake.set)
            except RuntimeError:  # its loop has ended
                return

    def stop(self) -> None:
        """Write what is left, for some seconds at most, and end; blocks."""
        self._stopping = True
        self.nudge()
        if self._thread is not None:
            self._thread.join(LAST_S + 1.0)

    # ---------------------------------------------------------------- on its own thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except MeshError as exc:
            log.warning("worker %s records nothing more: %s", self._worker, exc.message)
        except Exception:
            log.exception("worker %s records nothing more", self._worker)
        finally:
            self._ended_for_good = True
            for transcript in (*(added[0] for added in self._added), *(w.transcript for w in self._writers.values())):
                transcript.close()

    async def _main(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        connection = await self._dialled()
        if connection is None:
            return
        try:
            async with Reader(connection, STORED_S) as reader:
                storing = Storing(connection, reader, self._subjects, self._maker(connection), self.counts)
                self._watched = watched = Watched(connection, self._subjects, self._wake.set)
                await watched.begin()
                serving = Serving(connection, reader, self._subjects)
                await serving.begin()
                try:
                    await self._serve(storing, watched)
                finally:
                    await serving.stop()
        finally:
            await connection.close()

    async def _dialled(self) -> Connection | None:
        while not self._stopping:
            try:
                return await dial(self._url, name=f"recorder of {self._worker}", credentials=self._credentials)
            except MeshError as exc:
                log.info("worker %s cannot record yet: %s", self._worker, exc.message)
                await asyncio.sleep(1.0)
        return None

    def _maker(self, connection: Connection) -> Callable[[str], Awaitable[None]]:
        async def make(name: str) -> None:
            if await make_streams(connection, self._subjects, name, self._retention, less=True):
                log.info("worker %s made the stream for recordings of %s", self._worker, name)

        return make

    async def _serve(self, storing: Storing, watched: Watched) -> None:
        assert self._wake is not None
        turn = asyncio.Semaphore(AT_ONCE)
        under_way: dict[int, asyncio.Task[None]] = {}
        stop_by: float | None = None
        while True:
            now = time.monotonic()
            self._take_in(storing)
            look_at, least_s = now + CHUNK_S, MIN_LOOK_S
            for key, writer in list(self._writers.items()):
                if writer.watched(watched.until(*writer.known_as), now):
                    look_at, least_s = min(look_at, now + SHOWN_S / 2), SHOWN_S / 2
                if key in under_way:
                    continue
                if writer.over:
                    del self._writers[key]
                elif writer.due(now) or (self._stopping and writer.transcript.nbytes):
                    task = asyncio.create_task(_write(writer, turn))
                    under_way[key] = task
                    task.add_done_callback(partial(self._done, under_way, key))
                else:
                    look_at = min(look_at, writer.due_at)
            if self._stopping:
                stop_by = stop_by or now + LAST_S
                look_at = min(look_at, stop_by)
                if now > stop_by or not (under_way or self._added or self._ended):
                    break
            try:
                async with asyncio.timeout(max(look_at - now, least_s)):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()
        for task in under_way.values():
            task.cancel()
        await asyncio.gather(*under_way.values(), return_exceptions=True)

    def _done(self, under_way: dict[int, asyncio.Task[None]], key: int, task: asyncio.Task[None]) -> None:
        del under_way[key]
        assert self._wake is not None
        self._wake.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("worker %s: %r failed", self._worker, self._writers[key], exc_info=exc)
            self._writers[key].over = True
            self._writers[key].transcript.close()

    def _take_in(self, storing: Storing) -> None:
        while self._added:
            transcript, recorded, epoch, asked = self._added.pop(0)
            self._writers[id(transcript)] = SessionWriter(
                transcript, recorded, epoch, storing, full=self.nudge, asked=asked
            )
        ended, self._ended = self._ended, []
        for transcript, reason in ended:
            writer = self._writers.get(id(transcript))
            if writer is not None:
                writer.end = reason


async def _write(writer: SessionWriter, turn: asyncio.Semaphore) -> None:
    async with turn:
        try:
            await writer.write()
        except BusClosed:
            writer.over = True
            writer.transcript.close()
