"""Whole messages over a socket, whatever a peer does with it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from meshrl.errors import MalformedMessage
from meshrl.wire.parts import MAX_MESSAGE_BYTES
from meshrl.worker.channel import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    own, other = socket.socketpair()
    channel = Channel(own)
    with other:
        yield channel, other
    channel.close()


@pytest.mark.parametrize("size", [0, 1, 65527, 65528, 65529, 65536, 5_000_000])
def test_message_of_any_size_comes_as_it_went(ends: tuple[Channel, socket.socket], size: int) -> None:
    channel, other = ends
    body = os.urandom(size)
    sending = threading.Thread(target=Channel(other).send, args=(body,))
    sending.start()
    assert channel.receive() == body
    sending.join()


def test_message_in_pieces_is_one(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    body = bytes(range(256)) * 300
    whole = struct.pack("!Q", len(body)) + body

    def send() -> None:
        for at in range(0, len(whole), 7001):
            other.sendall(whole[at : at + 7001])

    sending = threading.Thread(target=send)
    sending.start()
    assert channel.receive() == body
    sending.join()


def test_length_byte_by_byte_is_read(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    reading: list[bytes | bytearray] = []
    receiving = threading.Thread(target=lambda: reading.append(channel.receive()))
    receiving.start()
    for byte in struct.pack("!Q", 2) + b"ok":
        other.sendall(bytes([byte]))
    receiving.join()
    assert reading == [b"ok"]


@pytest.mark.parametrize("data", [b"", b"\0\0\0", struct.pack("!Q", 9) + b"cut off", struct.pack("!Q", 100_000)])
def test_end_in_the_middle_is_an_end(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, other = ends
    other.sendall(data)
    other.close()
    with pytest.raises(EOFError):
        channel.receive()


@pytest.mark.parametrize(
    "data",
    [struct.pack("!Q", MAX_MESSAGE_BYTES + 1), struct.pack("!Q", 2**64 - 1), struct.pack("!Q", 1) + b"two"],
)
def test_length_that_is_none_is_refused(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, other = ends
    other.sendall(data)
    with pytest.raises(MalformedMessage, match="no message"):
        channel.receive()
