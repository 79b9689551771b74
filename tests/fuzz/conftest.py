"""The server of these tests."""

from tests.mesh.conftest import server, url

__all__ = ["server", "url"]
