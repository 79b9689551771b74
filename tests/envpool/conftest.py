"""What the tests with EnvPool share. Without it none of them is collected."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.worker_process import WorkerProcess

collect_ignore_glob = [] if find_spec("envpool") else ["test_*.py"]

# Actions that are numbers and episodes of many lengths; actions that are float32 and episodes that are truncated.
SERVED = {name: name for name in ("CartPole-v1", "Pendulum-v1")}
SLOTS = 8


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A mesh of two workers that host vectors by EnvPool; leases outlive every test."""
    with EmbeddedServer.start() as server:
        first, second = (
            WorkerProcess(server.url, SERVED, slots=SLOTS, vectors="envpool", lease_s=3600.0, wait=False)
            for _ in range(2)
        )
        with first, second:
            first.wait_advertised()
            second.wait_advertised()
            yield server.url
