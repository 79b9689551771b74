"""What the thin path takes from inside nats-py, held against the installed version."""

from __future__ import annotations

import asyncio
import inspect

import nats
import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.plain import PlainPath
from meshrl.bus.thin import ThinPath, thin_supported


def test_the_installed_nats_py_supports_the_thin_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHRL_BUS", raising=False)
    assert thin_supported()


def test_the_overridden_methods_have_the_signatures_that_nats_py_calls() -> None:
    assert list(inspect.signature(Client._connect_to_server).parameters) == ["self", "s"]
    assert list(inspect.signature(Client._process_err).parameters) == ["self", "err_msg"]
    assert list(inspect.signature(Client._process_op_err).parameters) == ["self", "e"]
    assert list(inspect.signature(Client._process_pong).parameters) == ["self"]
    assert list(inspect.signature(Client._connect_command).parameters) == ["self"]
    for method in (Client._connect_to_server, Client._process_err, Client._process_op_err, Client._process_pong):
        assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(TcpTransport.connect).parameters) == ["self", "uri", "buffer_size", "connect_timeout"]
    tls = ["self", "uri", "ssl_context", "buffer_size", "connect_timeout"]
    assert list(inspect.signature(TcpTransport.connect_tls).parameters) == tls


async def test_the_private_attributes_are_there_on_a_live_connection() -> None:
    with EmbeddedServer.start() as server:
        client = await nats.connect(server.url)
        try:
            assert isinstance(client._transport, TcpTransport)
            for name in ("_io_reader", "_io_writer", "_bare_io_reader", "_bare_io_writer"):
                assert hasattr(client._transport, name)
            assert isinstance(client._transport._io_reader, asyncio.StreamReader)
            assert client._pongs == []
            assert client._pending == []
            assert client._pending_data_size == 0
            assert callable(client._transport._io_writer.is_closing)
            assert client._transport._io_writer.get_extra_info("ssl_object") is None
            assert client._server_info["version"] in str(client.connected_server_version)
            subscription = await client.subscribe("x")
            assert isinstance(subscription, Subscription)
            assert isinstance(subscription._id, int)
            assert client._subs[subscription._id] is subscription
        finally:
            await client.close()


async def test_the_plain_path_is_taken_where_a_private_name_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer.start() as server:
        async with connect(server.url) as thin:
            assert isinstance(thin.path, ThinPath)
        monkeypatch.setattr(Client, "_process_op_err", None)
        assert not thin_supported()
        monkeypatch.undo()
        monkeypatch.setenv("MESHRL_BUS", "plain")
        async with connect(server.url) as plain:
            assert isinstance(plain.path, PlainPath)
