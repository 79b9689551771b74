"""nats-py's client, which says who it is to a server with TLS alone, where TLS was asked for.

By itself, nats-py turns TLS on if the *server* says so: one that does not (another program on that port, or somebody
between) would be sent the password in the clear. Private: ``Client._connect_command``, which makes what a client says
first, ``_transport`` and ``_server_info``; held by ``tests/unit/bus/test_contract.py``.
"""

from __future__ import annotations

import ssl
from typing import Any

import nats.aio.client
import nats.aio.transport
import nats.errors


class NoTls(nats.errors.Error):  # type: ignore[misc]
    """The server talks in the clear, and is told nothing."""

    def __str__(self) -> str:
        return "nats: the server does not offer TLS, which was asked for"


class NoCertificate(nats.errors.Error):  # type: ignore[misc]
    """The server asks its clients for certificates, and there is none. It would only hang up."""

    def __str__(self) -> str:
        return "nats: the server asks for a certificate of its clients"


class Client(nats.aio.client.Client):  # type: ignore[misc]
    """nats-py's, with :attr:`tls_only`.

    Attributes:
        tls_only: say nothing to a server without TLS.
        has_certificate: there is one to show to a server that asks for it.
    """

    _transport: Any
    tls_only = False
    has_certificate = False

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """What TLS begins with, as soon as the server has said that it wants it."""
        if self._server_info.get("tls_verify") and not self.has_certificate:
            raise NoCertificate
        context: ssl.SSLContext = super().ssl_context
        return context

    def _connect_command(self) -> bytes:
        transport = self._transport
        # A WebSocket was encrypted before its first word, or never will be.
        if self.tls_only and isinstance(transport, nats.aio.transport.TcpTransport):
            if transport._io_writer.get_extra_info("ssl_object") is None:  # noqa: SLF001
                raise NoTls
        elif self.tls_only and self._current_server.uri.scheme != "wss":
            raise NoTls
        command: bytes = super()._connect_command()
        return command
