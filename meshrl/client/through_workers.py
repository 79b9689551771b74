"""What is on record, read through env workers where the login may not ask JetStream itself.

Which of the two it is shows in the first request: the server refuses it, or does not. See
:mod:`~meshrl.recording.serving` for why a learner may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from meshrl.bus.connection import Connection
from meshrl.bus.storing import Reader, Stored, store
from meshrl.errors import MalformedMessage, MeshError, RequestTimeout, SubjectNotPermitted, from_wire
from meshrl.wire.codec import unpack
from meshrl.wire.messages import parse
from meshrl.wire.of_recordings import Keep, Kept, Read
from meshrl.wire.subjects import Subjects

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIELDS = (int, int, str, str, bytes)


class AnyReader(Reader):
    """Reads streams by itself, or through workers.

    Args:
        connection: of the client.
        timeout: seconds without an answer, until it is given up.
        subjects: of the mesh.
    """

    def __init__(self, connection: Connection, timeout: float, subjects: Subjects) -> None:
        super().__init__(connection, timeout)
        self._subjects = subjects
        self._may = True

    async def _asked(self, stream: str, query: dict[str, Any]) -> AsyncIterator[Stored]:
        if self._may:
            try:
                async for stored in super()._asked(stream, query):
                    yield stored
            except SubjectNotPermitted:
                self._may = False
            else:
                return
        async for stored in self._through_a_worker(_read_of(stream, query)):
            yield stored

    async def _through_a_worker(self, read: Read) -> AsyncIterator[Stored]:
        subject = self._subjects.recordings("read", self._connection.user)
        async for body in _answers(self._connection, subject, read.to_wire(), self._timeout):
            if body.get("end") is True:
                return
            fields = body.get("stored")
            if type(fields) is not list or tuple(map(type, fields)) != _FIELDS:
                raise MalformedMessage(
                    "the answer to a read is a message of the stream, or says that there are no more"
                )
            seq, at_us, of, message_id, data = fields
            yield Stored(seq, _EPOCH + timedelta(microseconds=at_us), of, message_id, data)

    async def keep(self, env: str, consumer: str, position: str, timeout: float, *, message_id: str, after: int) -> int:
        """Store how far a consumer of this user has come; gives its number in the stream.

        Raises:
            as of :func:`~meshrl.bus.storing.store`.
        """
        connection = self._connection
        if self._may:
            subject = self._subjects.position(connection.user, env, consumer)
            try:
                return await store(connection, subject, position.encode(), timeout, message_id=message_id, after=after)
            except SubjectNotPermitted:
                self._may = False
        keep = Keep(env=env, consumer=consumer, position=position, message_id=message_id, after=after)
        subject = self._subjects.recordings("keep", connection.user)
        answer = await connection.ask(subject, keep.to_wire(), timeout)
        if answer is None:
            raise _nobody(connection, subject)
        _check(unpack(answer))
        return parse(Kept, answer).seq


def _read_of(stream: str, query: dict[str, Any]) -> Read:
    """What a worker is asked in place of JetStream."""
    if "last_by_subj" in query:
        return Read(stream=stream, which="last", subject=query["last_by_subj"])
    if "next_by_subj" not in query:
        return Read(stream=stream, which="at", seq=query["seq"])
    since = query.get("start_time")
    since_us = None if since is None else max(0, (datetime.fromisoformat(since) - _EPOCH) // timedelta(microseconds=1))
    return Read(
        stream=stream,
        subject=query["next_by_subj"],
        seq=max(1, query.get("seq", 1)),
        since_us=since_us,
        count=query["batch"],
    )


async def _answers(connection: Connection, subject: str, body: bytes, timeout: float) -> AsyncIterator[dict[str, Any]]:
    """The answers to one request, as long as they are asked for."""
    queue: asyncio.Queue[bytes | MeshError | None] = asyncio.Queue()
    rid = connection.request(subject, body, queue.put_nowait, on_fail=queue.put_nowait)
    try:
        while True:
            try:
                async with asyncio.timeout(timeout):
                    got = await queue.get()
            except TimeoutError:
                raise RequestTimeout(
                    f"no env worker told within {timeout:g} s what is on record", timeout_s=timeout
                ) from None
            if isinstance(got, MeshError):
                raise got
            if got is None:
                raise _nobody(connection, subject)
            yield _check(unpack(got))
    finally:
        connection.forget(rid)


def _check(body: object) -> dict[str, Any]:
    if type(body) is not dict:
        raise MalformedMessage(f"an answer is a map, not {type(body).__name__}")
    if "error" in body:
        raise from_wire(body["error"])
    return body


def _nobody(connection: Connection, subject: str) -> SubjectNotPermitted:
    return SubjectNotPermitted(
        f"this login may not read recordings itself, and no env worker at {connection.url} does it for it; start one, "
        "or take an operator's login",
        subject=subject,
    )
