"""The parts of ``up`` that need no mesh: ports, waits, and what it prints."""

import socket

import pytest

from meshrl.cli import up
from meshrl.cli.supervisor import MAX_DEATHS, wait_before_restart_s
from meshrl.errors import UsageError


def test_each_death_in_a_row_is_waited_for_longer_until_it_is_given_up() -> None:
    waits = [wait_before_restart_s(n) for n in range(1, MAX_DEATHS + 2)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, None]


def test_port_is_not_free_while_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not up.is_free(port)
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            up.start_server(None, port)
    assert up.is_free(port)


def test_no_port_asked_for_is_any_port() -> None:
    with up.start_server(None, 0) as one, up.start_server(None, 0) as two:
        assert one.port != two.port


def test_own_server_is_found_by_this_user_and_told_to_others() -> None:
    text = up.how_to_connect("nats://embedded:secret@127.0.0.1:4222", 2, "default", own=True).plain
    assert "meshrl.Mesh() as m" in text
    assert "MESHRL_URL=nats://embedded:secret@127.0.0.1:4222" in text
    assert "2 worker processes serve" in text


def test_given_server_is_named_without_its_password() -> None:
    text = up.how_to_connect("nats://me:secret@host:4222", 1, "lab", own=False).plain
    assert "meshrl.Mesh('nats://host:4222', namespace='lab') as m" in text
    assert "meshrl ls --url nats://host:4222 --namespace lab" in text
    assert "secret" not in text
    assert "1 worker process serves" in text
