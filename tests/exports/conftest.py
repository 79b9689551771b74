"""What the tests of exports share. Those that need Minari or pyarrow are not collected without; CI runs them with."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from meshrl.bus.embedded import EmbeddedServer

_MINARI = ("minari", "h5py", "pyarrow", "PIL")
NEEDS = {
    "test_cli.py": _MINARI,
    "test_importing.py": _MINARI,
    "test_interrupted.py": _MINARI,
    "test_minari.py": _MINARI,
    "test_parquet.py": ("pyarrow", "pandas"),
    "test_spaces.py": _MINARI,
}
collect_ignore_glob = [file for file, modules in NEEDS.items() if not all(map(find_spec, modules))]


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A real nats-server of the test's own: each env has a stream, for which the server sets room aside."""
    with EmbeddedServer.start() as running:
        yield running


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    return server.url


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Minari keeps its datasets, for one test."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"
