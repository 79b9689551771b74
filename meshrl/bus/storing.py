"""Messages that JetStream stores, and gives back by their number: no consumers, nothing to clean up.

Writing is a request whose answer says that it is stored. Reading is JetStream's *direct get*, which answers one
request with many messages, of a stream that allows it; what is there no more is left out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from meshrl.bus.connection import Connection
from meshrl.bus.headers import DESCRIPTION, STATUS, read_headers
from meshrl.bus.subscription import Subscription
from meshrl.errors import MeshError, RequestTimeout, StorageRefused, StreamMissing, TransportError, WrongSequence

MESSAGE_ID = "Nats-Msg-Id"
# The number of the last message on the subject, 0 for none: anything else is refused.
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_WRONG_SEQUENCE = 10071
_REMEDY = "an operator makes those of recordings: meshrl recordings NAME"
# Of one answer; the next is asked for when it is read.
BATCH = 256
BATCH_BYTES = 8 * 1024 * 1024
# What the server says behind the last message of an answer, and in place of one.
_END, _NOT_FOUND, _NO_RESPONDERS = "204", "404", "503"


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of a stream.

    Attributes:
        seq: its number there.
        at: when the server got it, on the server's clock, in UTC.
        subject: it was published on.
        message_id: that its writer gave it; empty for none.
        body: of it.
    """

    seq: int
    at: datetime
    subject: str
    message_id: str
    body: bytes


async def store(
    connection: Connection, subject: str, body: bytes, timeout: float, *, message_id: str, after: int | None = None
) -> int:
    """Store a message; gives its number in the stream.

    Args:
        connection: to the server.
        subject: of a stream.
        body: of the message.
        timeout: seconds to wait for the server's word. Whether it is stored is not known then.
        message_id: within two minutes, the stream does not store a second one with it.
        after: the number of the last message on the subject, 0 for none; None for whichever.

    Raises:
        WrongSequence: the last one is another; that may be this very message, from a request that was not answered.
        StorageRefused: JetStream does not store it.
        StreamMissing: nobody stores what is published there.
        MessageTooLarge: it is larger than a message may be.
        RequestTimeout: the server said nothing.
        SubjectNotPermitted: the login may not.
        BusClosed: the connection was closed.
    """
    answered: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def on_reply(reply: bytes | None) -> None:
        if not answered.done():
            answered.set_result(reply)

    def on_fail(exc: MeshError) -> None:
        if not answered.done():
            answered.set_exception(exc)

    headers = {MESSAGE_ID: message_id} if after is None else {MESSAGE_ID: message_id, EXPECTED: str(after)}
    rid = connection.request_headed(subject, headers, body, on_reply, on_fail=on_fail)
    try:
        async with asyncio.timeout(timeout):
            reply = await answered
    except TimeoutError:
        raise RequestTimeout(
            f"{connection.url} did not say within {timeout:g} s whether it stored a message on {subject}",
            timeout_s=timeout,
        ) from None
    finally:
        connection.forget(rid)
    if reply is None:
        raise StreamMissing(
            f"no stream at {connection.url} stores what is published on {subject}; {_REMEDY}",
            subject=subject,
        )
    return _stored(subject, reply)


def _stored(subject: str, reply: bytes) -> int:
    try:
        said = json.loads(reply)
        error = said.get("error")
        if error is None:
            return int(said["seq"])
        code, text = int(error.get("err_code", 0)), str(error.get("description"))
    except (ValueError, AttributeError, KeyError, TypeError) as exc:
        raise TransportError(f"what JetStream said of a message on {subject} cannot be read") from exc
    if code == _WRONG_SEQUENCE:
        raise WrongSequence(
            f"JetStream did not store a message on {subject} ({text}): another one is the last there; "
            "read it, and store behind it",
            subject=subject,
            err_code=code,
        )
    raise StorageRefused(
        f"JetStream did not store a message on {subject}: {text}; "
        "the server's operator makes room, or raises the limit",
        subject=subject,
        err_code=code,
    )


class Reader:
    """Reads messages of streams over one connection; an async context manager."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._inbox = f"_INBOX.{connection.user}.{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Queue[tuple[dict[str, str], bytes] | MeshError]] = {}
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> Self:
        """Begin to listen for answers.

        Raises:
            SubjectNotPermitted: the server does not allow this login its inbox.
        """
        self._subscription = await self._connection.subscribe_headed(f"{self._inbox}.*", self._got)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    def _got(self, subject: str, _reply: str, body: bytes, head: bytes) -> None:
        queue = self._waiting.get(subject)
        if queue is not None:
            queue.put_nowait((read_headers(head) if head else {}, bytes(body)))

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The last message on a subject; None where there is none.

        Raises:
            as of :meth:`get`.
        """
        async for stored in self._asked(stream, {"last_by_subj": subject}):
            return stored
        return None

    async def at(self, stream: str, seq: int) -> Stored | None:
        """The message with that number; None where it is there no more.

        Raises:
            as of :meth:`get`.
        """
        async for stored in self._asked(stream, {"seq": seq}):
            return stored
        return None

    async def get(
        self,
        stream: str,
        subject: str,
        first: int = 1,
        *,
        since: datetime | None = None,
        limit: int | None = None,
        batch: int = BATCH,
    ) -> AsyncIterator[Stored]:
        """The messages on a subject, in order, up to the last that there is now.

        Args:
            stream: its name.
            subject: may hold wildcards.
            first: the number from which they are wanted.
            since: the time from which they are wanted, in place of that.
            limit: no more than this.
            batch: how many are asked for at once.

        Raises:
            StreamMissing: there is no such stream, or it does not allow to be read so.
            RequestTimeout: the server said nothing for a while.
            SubjectNotPermitted: the login may not.
            TransportError: what it said cannot be read.
        """
        left = limit
        while left is None or left > 0:
            count = batch if left is None else min(batch, left)
            query: dict[str, Any] = {"batch": count, "max_bytes": BATCH_BYTES, "next_by_subj": subject}
            if since is None:
                query["seq"] = first
            else:
                query["start_time"] = since.astimezone(UTC).isoformat().replace("+00:00", "Z")
            count = 0
            async for stored in self._asked(stream, query):
                count, first, since = count + 1, stored.seq + 1, None
                yield stored
            if not count:
                return
            left = None if left is None else left - count

    async def _asked(self, stream: str, query: dict[str, Any]) -> AsyncIterator[Stored]:
        inbox = f"{self._inbox}.{next(self._numbers)}"
        queue = self._waiting[inbox] = asyncio.Queue()
        single = "batch" not in query
        subject = f"$JS.API.DIRECT.GET.{stream}"
        watch = self._connection.watch(subject, queue.put_nowait)
        try:
            self._connection.publish(subject, json.dumps(query).encode(), inbox)
            while True:
                try:
                    async with asyncio.timeout(self._timeout):
                        got = await queue.get()
                except TimeoutError:
                    raise RequestTimeout(
                        f"{self._connection.url} gave no message of the stream {stream} within {self._timeout:g} s",
                        timeout_s=self._timeout,
                    ) from None
                if isinstance(got, MeshError):
                    raise got
                headers, body = got
                status = headers.get(STATUS)
                if status in {_END, _NOT_FOUND}:
                    return
                if status == _NO_RESPONDERS:
                    raise StreamMissing(
                        f"there is no stream {stream} at {self._connection.url}, or none that can be read by number; "
                        + _REMEDY,
                        stream=stream,
                    )
                if status is not None:
                    raise TransportError(
                        f"JetStream gives no messages of {stream}: {status} {headers.get(DESCRIPTION)}"
                    )
                yield _read(stream, headers, body)
                if single:
                    return
        finally:
            self._connection.forget(watch)
            del self._waiting[inbox]


def _read(stream: str, headers: dict[str, str], body: bytes) -> Stored:
    try:
        at = datetime.fromisoformat(headers["Nats-Time-Stamp"])
        return Stored(int(headers["Nats-Sequence"]), at, headers["Nats-Subject"], headers.get(MESSAGE_ID, ""), body)
    except (KeyError, ValueError) as exc:
        raise TransportError(f"JetStream gave a message of {stream} without its number") from exc
