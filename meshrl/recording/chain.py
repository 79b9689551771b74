"""A chain: the messages of one subject, each stored once, in order, and by one writer alone.

Each message says which one it expects to be the last on its subject, and is sent again until the server has said what
became of it. A *wrong last sequence* is one of three things, which the last message tells apart by its id::

    it is this one         the answer to an earlier sending was lost: stored
    there is none          the stream was deleted, or its retention took all: the recording begins again
    it is another          somebody else records the session now: this recording is over
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from meshrl.bus.connection import Connection
from meshrl.bus.storing import Reader, store
from meshrl.errors import RequestTimeout, StreamMissing, SubjectNotPermitted, WrongSequence
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.recording")

# The server says within this that a message is stored; then it is sent again, with pauses that grow up to so many
# seconds.
STORED_S = 5.0
MAX_PAUSE_S = 5.0
# Between two words on the same trouble.
SAID_S = 60.0
# Of what was sent last on a subject, to be known again.
SENT_IDS = 8


class Rival(Exception):
    """Somebody else records the session: it was opened again elsewhere."""


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

    def missed(self, rows: int, why: str, now: float, level: int = logging.WARNING) -> None:
        """So many rows could not be stored; it is logged, the same reason once a minute."""
        self.lost += rows
        if rows and (why != self.why or now - self._said > SAID_S):
            log.log(level, "what sessions do is not recorded: %s (%d steps so far)", why, self.lost)
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
class Chain:
    """The messages of one subject.

    Attributes:
        name: of the env.
        stream: that has it.
        subject: where they are published.
        last: the number of the last of them in the stream; 0 before the first.
    """

    name: str
    stream: str
    subject: str
    last: int = 0
    _sent: deque[str] = field(default_factory=lambda: deque(maxlen=SENT_IDS))

    async def add(self, storing: Storing, body: bytes, message_id: str) -> int:
        """Store a message as the next, however long that takes; gives its number.

        Raises:
            Rival: another one is the next.
            StreamMissing: nothing is there any more, so that a recording begins anew.
            StorageRefused, MessageTooLarge, UsageError: it cannot be stored.
            BusClosed: the connection was closed.
        """
        self._sent.append(message_id)
        pause = 0.1
        while True:
            try:
                self.last = await store(
                    storing.connection, self.subject, body, STORED_S, message_id=message_id, after=self.last
                )
            except WrongSequence as exc:
                if await self._is_stored(storing, message_id, exc):
                    return self.last
            except RequestTimeout as exc:
                await self._wait(storing, exc, pause)
                pause = min(2 * pause, MAX_PAUSE_S)
            else:
                return self.last

    async def _is_stored(self, storing: Storing, message_id: str, refused: WrongSequence) -> bool:
        """Whether it was by an earlier sending; if not, from now on it is to be stored behind what was."""
        try:
            found = await storing.reader.last(self.stream, self.subject)
        except RequestTimeout as exc:
            await self._wait(storing, exc, MAX_PAUSE_S)
            return False
        if found is None:
            raise StreamMissing(f"what was stored on {self.subject} is gone", subject=self.subject) from refused
        if found.message_id not in self._sent:
            raise Rival(f"somebody else stores on {self.subject} now") from refused
        self.last = found.seq
        return found.message_id == message_id

    async def _wait(self, storing: Storing, exc: RequestTimeout, pause: float) -> None:
        """The server says nothing. It may be away; or the stream is, and somebody who hears everything hides that."""
        log.info("%s", exc.message)
        await asyncio.sleep(pause)
        storing.forget(self.name)
        with contextlib.suppress(RequestTimeout):
            await storing.ready(self.name)
