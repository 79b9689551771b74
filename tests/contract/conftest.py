"""A server, and a watch over what must not happen on it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshrl.bus.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as running:
        yield running


@pytest.fixture
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards no pickle has run here, and no worker or client had anything to report."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="meshrl"):
        yield
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records if record.name.startswith("meshrl")] == []
