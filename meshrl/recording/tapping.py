"""Tapping: what recorded sessions do, shown to whoever watches at this moment, and stored for nobody.

A viewer says again and again that it watches. As long as that lasts, a worker cuts the chunks of the session more
often, and publishes others beside them that have observations and infos whatever the level of the recording is, and all
episodes, however few of them are kept. No step waits for that, and the server cuts off a viewer that does not keep up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from meshrl.bus.connection import Connection
from meshrl.errors import MeshError, SubjectNotPermitted
from meshrl.protocol.chunking import Chunker
from meshrl.protocol.chunks import pack_chunk
from meshrl.protocol.joined import Noted, halves
from meshrl.protocol.transcript import Transcript
from meshrl.recording.chain import Storing
from meshrl.recording.messages import Messages
from meshrl.wire.messages import parse
from meshrl.wire.of_recordings import Watch
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.recording")

# Between chunks of a session that is watched.
SHOWN_S = 0.1
# Of different things that are watched at once.
MAX_WATCHES = 1000


@dataclass(slots=True)
class Tap:
    """The viewers of one session.

    Attributes:
        storing: of its worker.
        session: as its client knows it.
        messages: of its recording, which may be of another id.
        until: when they are believed to be gone, in monotonic seconds.
        transcript: of the session.
        chunker: of what is shown.
        late_bytes: how much was noted before anybody watched, and so without what viewers want.
    """

    storing: Storing
    session: str
    messages: Messages
    until: float
    transcript: Transcript
    chunker: Chunker
    late_bytes: int

    def describe(self) -> None:
        """Say what it is; to those who watch already, once more."""
        try:
            self._publish("about", self.messages.recorded.to_stream())
        except MeshError as exc:  # it may be larger than a message
            log.info("session %s is not shown: %s", self.session, exc.message)

    def show(self, noted: Noted, end: str) -> None:
        """Show what was noted; a step that is too large for a message is a gap to its viewers."""
        late_bytes, before = self.late_bytes, self.chunker.standing()
        self.late_bytes -= sum(one.nbytes for one in noted)
        made = self.chunker.chunk(noted, end)
        if made is None or late_bytes > 0 or made[0].observations is None:
            return
        try:
            body = pack_chunk(replace(made[0], first=np.zeros_like(made[0].first)))
            too_large = len(body) > self.storing.connection.max_payload
            if too_large and (parts := halves(self.transcript, noted)) is not None:
                self.chunker.go_back(before)
                self.show(parts[0], "")
                self.show(parts[1], end)
            else:
                self._publish("rows", body)
        except MeshError as exc:
            log.info("a chunk of session %s is not shown: %s", self.session, exc.message)

    def _publish(self, what: str, body: bytes) -> None:
        subject = self.storing.subjects.tapped(self.messages.recorded.name, self.session, what)
        self.storing.connection.publish(subject, body)


class Watched:
    """What viewers want to see of one worker's sessions.

    Args:
        connection: over which they say so.
        subjects: of the worker.
        wake: has the recorder look who is watched.
    """

    def __init__(self, connection: Connection, subjects: Subjects, wake: Callable[[], None]) -> None:
        self._connection = connection
        self._subjects = subjects
        self._wake = wake
        self._until: dict[tuple[str | None, str | None], float] = {}  # by env and session

    async def begin(self) -> None:
        """Hear them from now on, as far as this login may."""
        try:
            await self._connection.subscribe(self._subjects.tapping("*"), self._on_watch, join=False)
        except SubjectNotPermitted as exc:
            log.info("nobody can watch: %s", exc.message)

    def _on_watch(self, _subject: str, _reply: str, data: bytes) -> None:
        now = time.monotonic()
        try:
            watch = parse(Watch, data)
        except MeshError as exc:
            log.info("%s", exc.message)
            return
        known = {wanted: until for wanted, until in self._until.items() if until > now}
        wanted = watch.env, watch.session
        if wanted in known or len(known) < MAX_WATCHES:
            known[wanted] = max(known.get(wanted, 0.0), now + watch.seconds)
        self._until = known  # another one: it is looked into on other threads
        self._wake()

    def until(self, name: str, session: str) -> float:
        """Until when somebody watches a session of an env, in monotonic seconds; 0 if nobody ever did."""
        asked = self._until
        if not asked:
            return 0.0
        return max(asked.get(wanted, 0.0) for wanted in ((None, None), (name, None), (None, session), (name, session)))
