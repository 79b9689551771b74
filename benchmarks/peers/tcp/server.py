"""The floor's responder: length-prefixed frames on a TCP connection, on uvloop.

A request's first byte asks for its echo (0) or for a frame of the size of an image (1).
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import driver
import uvloop

IMAGE = struct.pack(">I", 84 * 84 * 4) + bytes(84 * 84 * 4)


class Responder(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.write, self.buffer = transport.write, b""

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        while len(buffer) >= 4:
            end = 4 + int.from_bytes(buffer[:4], "big")
            if len(buffer) < end:
                break
            self.write(IMAGE if buffer[4] else buffer[:end])
            buffer = buffer[end:]
        self.buffer = buffer


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Responder, "127.0.0.1", 0)
    driver.announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
