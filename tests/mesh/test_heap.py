"""Large messages do not fetch their memory from the system anew each time."""

from __future__ import annotations

import asyncio
import platform
import sys

import pytest

from meshrl.bus.connect import connect

SIZE = 900_000
# Without the heap's lesson, 600 a message; with it, none. What the interpreter does in between is within this.
MAX_FAULTS = 60

CLIENT = """
import asyncio, resource, sys
from meshrl.bus.connect import connect

async def main(url):
    async with connect(url, name="asks") as connection:
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            await connection.ask("heap.large", b"", 30.0)
        before = faults()
        for _ in range(50):
            assert len(await connection.ask("heap.large", b"", 30.0)) == 900_000
        print((faults() - before) // 50)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc is what it is about")
async def test_large_messages_cost_no_page_faults(url: str) -> None:
    body = bytes(SIZE)
    async with connect(url, name="answers") as connection:
        await connection.subscribe("heap.large", lambda _subject, reply, _body: connection.publish(reply, body))
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, url, stdout=asyncio.subprocess.PIPE)
        told, _ = await client.communicate()
    assert client.returncode == 0
    assert int(told) < MAX_FAULTS
