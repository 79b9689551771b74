"""Clients that vanish by the thousand leave no slot taken and no memory behind.

``MESHRL_VANISH`` says how many (``make vanish``: ten thousand).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from meshrl import Mesh
from tests.mesh.conftest import until
from tests.mesh.vanishing_clients import VanishingClients
from tests.mesh.worker_process import WorkerProcess

CLIENTS = int(os.environ.get("MESHRL_VANISH", "300"))
BATCH = min(100, CLIENTS)
SLOTS = 5 * BATCH
LEASE_S = 3.0
# After a lease has run out: the next look for it, the envs' close, and the next advertisement, on a machine that runs
# other tests meanwhile.
SWEEP_S = 5.0
# What is made once is there by then: threads, caches, the heap's own reserves.
WARM_UP = 2
# Ended sessions are remembered, 10,000 of them in a few hundred bytes each, and what they were waits in cycles for
# Python's collector. A session that stayed would be 20,000 bytes and its env.
GROWTH_BYTES = 5_000_000
GROWTH_A_CLIENT_BYTES = 1_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def rss_bytes(pid: int) -> int:
    """What a process has of the machine's memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


async def free(m: Mesh) -> int:
    (entry,) = await m.envs()
    return entry.free


@pytest.mark.timeout(120 + CLIENTS / 10)
async def test_clients_that_open_a_session_and_vanish_leave_every_slot_free_within_a_lease_and_no_memory(
    url: str,
) -> None:
    with WorkerProcess(url, {"told": "tests.mesh.fault_envs:Told"}, slots=SLOTS, lease_s=LEASE_S) as worker:
        async with Mesh(url) as m, VanishingClients(url) as clients:

            async def some_taken() -> bool:
                return await free(m) < SLOTS

            async def all_free() -> bool:
                return await free(m) == SLOTS

            async def come_and_go(batches: int) -> float:
                """They come as fast as there is room; gives after how many seconds the last slots were free again."""
                for _ in range(batches):
                    killed_at = await clients.come_and_go(BATCH)
                await until(some_taken, "nobody said goodbye, and the worker has told so", LEASE_S)
                await until(all_free, "all slots are free", killed_at + LEASE_S + SWEEP_S - time.monotonic())
                return time.monotonic() - killed_at

            await come_and_go(WARM_UP)
            before, began = rss_bytes(worker.pid), time.monotonic()
            took = await come_and_go(CLIENTS // BATCH)
            assert took > LEASE_S / 4, "they vanished, and did not say goodbye"
            grown = rss_bytes(worker.pid) - before
            print(  # noqa: T201  # shown by `make vanish`
                f"{CLIENTS} clients vanished in {time.monotonic() - began:.0f} s; all slots were free {took:.1f} s "
                f"after the last (a lease is {LEASE_S:g} s); the worker has {grown / 1e6:+.1f} MB on "
                f"{before / 1e6:.0f} MB"
            )
            assert grown <= GROWTH_BYTES + GROWTH_A_CLIENT_BYTES * min(CLIENTS, 10_000)
            envs = await m.vector("told", SLOTS, wait=30.0)  # every one of them can be had
            await envs.reset()
            assert (await envs.step([0] * SLOTS))[0].tolist() == [1] * SLOTS
            await envs.close()
