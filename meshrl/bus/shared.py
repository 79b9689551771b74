"""The embedded mesh of a process tree: one server, and one process that serves on demand.

The first process that needs it starts it; its children find it by an environment variable; with the first process,
however that ends, it is gone.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

from meshrl.bus.embedded import URL_VARIABLE, EmbeddedServer
from meshrl.bus.guard import Guarded

# The program that serves the embedded mesh. A name and not an import: the bus is below the workers.
HOST_MODULE = "meshrl.worker.host"


class _Shared:
    """What this process has started for itself and its children, if it has."""

    def __init__(self) -> None:
        self.starting = threading.Lock()
        self.server: EmbeddedServer | None = None
        self.host: Guarded | None = None


_SHARED = _Shared()  # by the process and not by the Mesh: two of them in one process shall meet


@atexit.register
def stop_embedded() -> None:
    """Stop what this process started, before its end does."""
    with _SHARED.starting:
        host, _SHARED.host = _SHARED.host, None
        if host is not None:
            host.stop(timeout_s=5.0)
        if _SHARED.server is not None:
            _SHARED.server.stop()


def shared_server() -> EmbeddedServer:
    """The embedded server of this process, started at the first call; children: see :func:`shared_url`.

    A server that ended meanwhile is started again with the same url and store, so that connected clients come
    back to it.

    Raises:
        MeshUnreachable: it cannot be started, as in :meth:`EmbeddedServer.start`.
    """
    with _SHARED.starting:
        return _server()


def shared_url() -> str:
    """The url of the embedded server of this process tree; started by this process if the tree has none.

    Raises:
        MeshUnreachable: it cannot be started, as in :meth:`EmbeddedServer.start`.
    """
    with _SHARED.starting:
        return _inherited() or _server().url


def embedded_mesh() -> str:
    """The same, with a process that serves Gymnasium's registry and the agent ``random`` on it.

    Raises:
        MeshUnreachable: the server cannot be started.
    """
    with _SHARED.starting:
        inherited = _inherited()
        if inherited:
            return inherited
        url = _server().url
        if _SHARED.host is None or _SHARED.host.poll() is not None:
            env = {**os.environ, "MESHRL_URL": url}
            _SHARED.host = Guarded.spawn([sys.executable, "-m", HOST_MODULE, "--agents", "--private"], env=env)
        return url


def _inherited() -> str | None:
    url = os.environ.get(URL_VARIABLE)
    return url if url and (_SHARED.server is None or _SHARED.server.url != url) else None


def _server() -> EmbeddedServer:
    server = _SHARED.server
    if server is None or server.stopped:
        server = _SHARED.server = EmbeddedServer.start()
    elif not server.running:
        server.restart()
    os.environ[URL_VARIABLE] = server.url
    return server


def _forget() -> None:
    """In a forked process: all is the parent's, and another thread may have held the lock."""
    _SHARED.starting = threading.Lock()
    _SHARED.server = None
    _SHARED.host = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
