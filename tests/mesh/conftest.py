from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from meshrl.bus.embedded import EmbeddedServer

DEADLINE_S = 30.0


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A real nats-server of the test's own."""
    with EmbeddedServer.start() as running:
        yield running


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    return server.url


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that tells nobody when it happens."""
    async with asyncio.timeout(deadline_s):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.01)
    raise AssertionError(what)
