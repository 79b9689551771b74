"""The floor under every remote env: a hand-written request-reply over TCP, nothing encoded and nothing stepped."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import driver
import uvloop

BODY = 64
ECHO = struct.pack(">I", BODY) + bytes(BODY)
IMAGE = struct.pack(">I", BODY) + b"\x01" + bytes(BODY - 1)


class Requester(asyncio.Protocol):
    """One request at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.parts, self.missing = transport, bytearray(), 0
        self.create_future = asyncio.get_running_loop().create_future

    def ask(self, request: bytes) -> asyncio.Future[int]:
        self.waiting: asyncio.Future[int] = self.create_future()
        self.transport.write(request)
        return self.waiting

    def data_received(self, data: bytes) -> None:
        parts = self.parts
        parts += data
        if len(parts) >= 4 and len(parts) >= 4 + int.from_bytes(parts[:4], "big"):
            size = len(parts)
            parts.clear()
            self.waiting.set_result(size)


async def connected(address: str) -> Requester:
    _, requester = await asyncio.get_running_loop().create_connection(Requester, "127.0.0.1", int(address))
    return requester


def asking(requester: Requester, request: bytes) -> tuple[Callable[[], Awaitable[bool]], Callable[[], Awaitable[Any]]]:
    async def step() -> bool:
        await requester.ask(request)
        return False

    return step, lambda: asyncio.sleep(0)


async def one(address: str, request: bytes, seconds: float) -> driver.Answer:
    requester = await connected(address)
    try:
        return await driver.timed_async(*asking(requester, request), seconds)
    finally:
        requester.transport.close()


async def many(address: str, clients: int, seconds: float) -> driver.Answer:
    requesters = [await connected(address) for _ in range(clients)]
    try:
        return await driver.counted_async([asking(requester, ECHO) for requester in requesters], seconds)
    finally:
        for requester in requesters:
            requester.transport.close()


def main() -> None:
    address = driver.Server(Path(__file__).with_name("server.py")).address

    def single(command: Mapping[str, Any]) -> driver.Answer:
        return uvloop.run(one(address, ECHO, command["seconds"]))

    def image(command: Mapping[str, Any]) -> driver.Answer:
        return uvloop.run(one(address, IMAGE, command["seconds"]))

    def clients16(command: Mapping[str, Any]) -> driver.Answer:
        return uvloop.run(many(address, driver.CLIENTS, command["seconds"]))

    driver.obey(
        {"single": single, "echo": single, "clients16": clients16, "image": image},
        versions=driver.versions_of("uvloop"),
        notes="no env: a 64-byte body echoed, for an image 28,224 bytes back; asyncio protocols on uvloop, both sides",
    )


if __name__ == "__main__":
    main()
