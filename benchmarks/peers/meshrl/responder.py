"""The fixed responder of the bare echo: this system's own bus, and nothing on it. ``responder.py URL``."""

from __future__ import annotations

import asyncio
import sys

from meshrl.bus.connect import connect
from meshrl.bus.connection import Handler
from meshrl.worker.running import run

FRAME_BYTES = 84 * 84 * 4
ECHOES = {"bench.echo": None, "bench.image": bytes(FRAME_BYTES), "bench.image32": bytes(32 * FRAME_BYTES)}
"""By subject: what is answered; None sends back what came."""


async def respond(url: str) -> None:
    async with connect(url, name="responder") as connection:

        def answering(body: bytes | None) -> Handler:
            def handler(_subject: str, reply: str, request: bytes) -> None:
                connection.publish(reply, request if body is None else body)

            return handler

        for subject, body in ECHOES.items():
            await connection.subscribe(subject, answering(body))
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(respond(sys.argv[1]))
