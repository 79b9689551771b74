"""Streams of JetStream, as far as the audit needs them: made once, and read by number.

By JetStream's own API over a plain connection, one request a message: what it takes are four subjects that can be
permitted one by one, and no consumer that somebody would have to clean up.
"""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from meshrl.bus.connection import Connection
from meshrl.errors import TransportError, UsageError

ANSWER_S = 10.0
# Requests under way at once: a stream of a million is read in minutes, and the server is not busy with nothing else.
AT_ONCE = 64
# Of JetStream's API.
NOT_FOUND = 404


@dataclass(frozen=True)
class Stored:
    """A message of a stream.

    Attributes:
        seq: its number there.
        at: when the server got it, on the server's clock.
        subject: it was published on.
        body: of it.
    """

    seq: int
    at: datetime
    subject: str
    body: bytes


async def make_stream(connection: Connection, name: str, config: dict[str, Any]) -> bool:
    """Make a stream; gives whether it is new. One that is there is left as it is.

    Raises:
        UsageError: the server has no JetStream, or refuses the stream.
        SubjectNotPermitted: the login may not.
    """
    if await bounds(connection, name) is not None:
        return False
    await _ask(connection, f"STREAM.CREATE.{name}", {"name": name, **config})
    return True


async def bounds(connection: Connection, name: str) -> tuple[int, int] | None:
    """The numbers of the first message that a stream has and of the last (below it if there is none).

    None where there is no such stream.

    Raises:
        UsageError: the server has no JetStream.
        SubjectNotPermitted: the login may not.
    """
    found = await _ask(connection, f"STREAM.INFO.{name}", {}, missing=True)
    if found is None:
        return None
    state = found["state"]
    return max(1, int(state["first_seq"])), int(state["last_seq"])


async def read(connection: Connection, name: str, first: int, last: int) -> list[Stored]:
    """The messages from ``first`` to ``last``, without those that are not there any more.

    Raises:
        UsageError: the server has no JetStream.
        SubjectNotPermitted: the login may not.
    """
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(seq: int) -> Stored | None:
        async with gate:
            found = await _ask(connection, f"STREAM.MSG.GET.{name}", {"seq": seq}, missing=True)
        if found is None:
            return None
        message = found["message"]
        body = base64.b64decode(message.get("data", ""))
        return Stored(seq, datetime.fromisoformat(message["time"]), message["subject"], body)

    tasks = [asyncio.ensure_future(one(seq)) for seq in range(first, last + 1)]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # where one failed
            task.cancel()
    return [stored for stored in found if stored is not None]


async def _ask(
    connection: Connection, api: str, body: dict[str, Any], *, missing: bool = False
) -> dict[str, Any] | None:
    answer = await connection.ask(f"$JS.API.{api}", json.dumps(body).encode(), ANSWER_S)
    if answer is None:
        raise UsageError(
            f"the server at {connection.url} has no JetStream for this login; start it with --jetstream, or turn it on "
            "for the account"
        )
    read_: dict[str, Any] = json.loads(answer)
    error = read_.get("error")
    if error is None:
        return read_
    if missing and error.get("code") == NOT_FOUND:
        return None
    if error.get("code") == 503 or "not enabled" in str(error.get("description")):
        raise UsageError(f"JetStream at {connection.url}: {error.get('description')}; turn it on for the account")
    raise TransportError(
        f"JetStream refused {api}: {error.get('description')}",
        api=api,
        code=error.get("code"),
        err_code=error.get("err_code"),
    )
