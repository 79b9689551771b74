"""Asks a worker by hand: bodies of the corpora, and what is answered to them."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from meshrl import errors
from meshrl.bus.connection import Connection
from meshrl.errors import MeshError
from meshrl.wire.codec import unpack
from tests.contract.reading import asyncapi, fault

Entry = dict[str, Any]

ANSWER_S = 20.0
# Every code of the contract.
CODES = {cls.code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MeshError)}


def bodies(entry: Entry) -> list[bytes]:
    return [bytes.fromhex(message) for message in entry["messages"]]


async def answer(connection: Connection, subject: str, sent: list[bytes]) -> Any:
    """What is answered to the last of several messages with one reply subject."""
    future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def answered(data: bytes | None) -> None:
        if not future.done():
            future.set_result(data)

    rid = connection.request(subject, sent[0], answered)
    for body in sent[1:]:
        connection.again(rid, subject, body)
    try:
        async with asyncio.timeout(ANSWER_S):
            data = await future
    except TimeoutError:
        raise AssertionError(f"no answer on {subject} to {sent[-1][:60].hex()}") from None
    finally:
        connection.forget(rid)
    assert data is not None, f"nobody listens on {subject}"
    return data


async def answers_of_lanes(connection: Connection, subject: str, body: bytes) -> list[dict[str, Any]]:
    """What is answered to a pool's request, in as many messages as there are, until each lane has its answer."""
    left = set(unpack(body)["lanes"].tolist())
    told: list[dict[str, Any]] = []
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(data: bytes | None) -> None:
        assert data is not None, f"nobody listens on {subject}"
        frame: Any = unpack(data)
        told.append(frame)
        left.difference_update(frame["lanes"].tolist() if "lanes" in frame else list(left))
        if not left and not future.done():
            future.set_result(None)

    rid = connection.request(subject, body, answered)
    try:
        async with asyncio.timeout(ANSWER_S):
            await future
    finally:
        connection.forget(rid)
    return told


def code_of(data: bytes) -> str:
    body = unpack(data)
    assert isinstance(body, dict)
    return body["error"]["code"] if "error" in body else "accepted"


@cache
def is_reply(operation: str, data: bytes) -> bool:
    """Whether the AsyncAPI document has such a reply to that operation."""
    replies = asyncapi()["operations"][operation]["reply"]["messages"]
    return "" in {fault(reply["$ref"].rpartition("/")[2], data) for reply in replies}
