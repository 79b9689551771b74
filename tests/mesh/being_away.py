"""A server that goes away for longer than anybody waits for it, for tests of what comes of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import MeshUnreachable
from tests.mesh.worker_process import WorkerProcess


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    """A server of the test's own, and a worker of CartPoles: to be killed and restarted."""
    monkeypatch.setattr("meshrl.protocol.doubt.DISCONNECTED_S", 0.3)
    with EmbeddedServer.start() as server, WorkerProcess(server.url, {"CartPole-v1": "CartPole-v1"}):
        yield server


def mesh_of(server: EmbeddedServer) -> dict[str, Any]:
    """Arguments of a mesh whose calls give up after some seconds without the server."""
    return {"url": server.url, "timeout": 3.0}


def patiently(settle: Callable[[], Any]) -> Any:
    """What ``settle`` gives once the server is there."""
    for _ in range(200):
        try:
            return settle()
        except MeshUnreachable:
            continue
    raise AssertionError("the server did not come back")
