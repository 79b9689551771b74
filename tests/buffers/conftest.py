"""Of the tests with other libraries' replay buffers none is collected where those are missing; CI has them."""

from __future__ import annotations

from importlib.util import find_spec

from tests.mesh.conftest import server, url

__all__ = ["server", "url"]

collect_ignore_glob = [] if find_spec("stable_baselines3") and find_spec("tianshou") else ["test_*.py"]
