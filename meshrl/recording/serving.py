"""Reading and keeping for others: what is on record, for logins that may not ask JetStream themselves.

JetStream sends its answers wherever a request says, so that whoever may ask it has a way to publish what is stored as
anybody. An env worker asks in place of a learner, and answers on an inbox of that learner alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from meshrl.bus.answering import may_be_answered
from meshrl.bus.connection import Connection
from meshrl.bus.storing import Reader, Stored, store
from meshrl.errors import BusClosed, MalformedMessage, MeshError, MeshFull, NotAllowed, SubjectNotPermitted
from meshrl.recording.streams import EPISODES, POSITIONS, is_recording
from meshrl.wire.codec import pack
from meshrl.wire.frames import error_reply
from meshrl.wire.messages import Message, parse
from meshrl.wire.of_recordings import Keep, Kept, Read
from meshrl.wire.subjects import READERS, Subjects

log = logging.getLogger("meshrl.recording")

# Of a request that says no more than where it begins.
ANSWER_BYTES = 8 * 1024 * 1024
# Requests that are answered at once; others wait.
AT_ONCE = 8
MAX_WAITING = 1000
KEPT_S = 5.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Serving:
    """Answers those who may not read by themselves.

    Args:
        connection: over which they ask.
        reader: over the same.
        subjects: of the worker.
    """

    def __init__(self, connection: Connection, reader: Reader, subjects: Subjects) -> None:
        self._connection = connection
        self._reader = reader
        self._subjects = subjects
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._marks = itertools.count(1)

    async def begin(self) -> None:
        """Hear them from now on, as far as this login may."""
        kinds: tuple[tuple[str, type[Message], Any], ...] = (("read", Read, self._read), ("keep", Keep, self._keep))
        try:
            for what, model, answer in kinds:
                handler = partial(self._on_request, model, answer)
                subject = self._subjects.recordings(what, "*")
                await self._connection.subscribe(subject, handler, queue=READERS, join=False)
        except SubjectNotPermitted as exc:
            log.info("nobody reads recordings through this worker: %s", exc.message)

    async def stop(self) -> None:
        """Answer nobody any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_request(self, model: type[Message], answer: Any, subject: str, reply: str, data: bytes) -> None:
        user = subject.rpartition(".")[2]
        if not may_be_answered(reply, ("_INBOX." if user == "anon" else f"_INBOX.{user}.",), user):
            return
        try:
            asked = parse(model, data)
            if len(self._tasks) >= MAX_WAITING:
                raise MeshFull(f"{MAX_WAITING} reads wait for this worker already; ask again in a while")
        except MeshError as exc:
            self._connection.publish(reply, pack(error_reply(exc)))
            return
        task = asyncio.get_running_loop().create_task(self._answer(answer(user, asked), reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, frames: AsyncIterator[dict[str, Any]], reply: str) -> None:
        async with self._turn:
            try:
                async for frame in frames:
                    self._connection.publish(reply, pack(frame), mark=(0, 0, next(self._marks)))
            except BusClosed:
                return
            except MeshError as exc:
                self._connection.publish(reply, pack(error_reply(exc)))

    async def _read(self, _user: str, read: Read) -> AsyncIterator[dict[str, Any]]:
        size = 0
        async for stored in self._stored(read):
            if not stored.subject.startswith(self._subjects.prefix):
                continue
            at_us = (stored.at - _EPOCH) // timedelta(microseconds=1)
            yield {"stored": [stored.seq, at_us, stored.subject, stored.message_id, stored.body]}
            size += len(stored.body)
            if size >= ANSWER_BYTES:
                break
        yield {"end": True}

    async def _stored(self, read: Read) -> AsyncIterator[Stored]:
        if read.stream not in (EPISODES, POSITIONS) and not is_recording(self._subjects, read.stream):
            raise NotAllowed(f"{read.stream} is no stream of recordings", stream=read.stream)
        if (read.subject is None) != (read.which == "at"):
            raise MalformedMessage("a read has a subject, but of one message by its number")
        found: Stored | None = None
        if read.which == "at":
            found = await self._reader.at(read.stream, read.seq)
        elif read.which == "last":
            found = await self._reader.last(read.stream, read.subject or "")
        else:
            since = None if read.since_us is None else _EPOCH + timedelta(microseconds=read.since_us)
            async for one in self._reader.get(
                read.stream, read.subject or "", read.seq, since=since, limit=read.count, batch=read.count
            ):
                yield one
        if found is not None:
            yield found

    async def _keep(self, user: str, keep: Keep) -> AsyncIterator[dict[str, Any]]:
        subject = self._subjects.position(user, keep.env, keep.consumer)
        # Ids are those of the stream: with the user in them, nobody takes another's.
        seq = await store(
            self._connection,
            subject,
            keep.position.encode(),
            KEPT_S,
            message_id=f"{keep.message_id}@{user}",
            after=keep.after,
        )
        yield Kept(seq=seq).model_dump()
