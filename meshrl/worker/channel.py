"""A channel: whole messages over a socket between a worker and the process of an env, one at a time and in turn.

A message is its length (eight bytes, big-endian) and its bytes. The worker believes neither: a length over the limit,
or more than one message where one is awaited, is an error before anything is allocated for it.
"""

from __future__ import annotations

import socket
import struct

from meshrl.errors import MalformedMessage
from meshrl.wire.parts import MAX_MESSAGE_BYTES

_LENGTH = struct.Struct("!Q")
# Most messages are read by one call.
_READ_BYTES = 65536


class Channel:
    """One side of it; owned by one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, body: bytes) -> None:
        """Send one message; blocks until the other side has room for it.

        Raises:
            OSError: nobody is there any more.
        """
        if len(body) < _READ_BYTES:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
        else:
            self._socket.sendall(_LENGTH.pack(len(body)))
            self._socket.sendall(body)

    def receive(self) -> bytes | bytearray:
        """Wait for the next message, for as long as that takes.

        Raises:
            EOFError: the other side is gone.
            OSError: the same.
            MalformedMessage: what came is no message.
        """
        data = self._socket.recv(_READ_BYTES)
        while 0 < len(data) < _LENGTH.size and (more := self._socket.recv(_READ_BYTES)):
            data += more
        if len(data) < _LENGTH.size:
            raise EOFError
        (size,) = _LENGTH.unpack_from(data)
        here = len(data) - _LENGTH.size
        if here == size:
            return data[_LENGTH.size :]
        if size > MAX_MESSAGE_BYTES or here > size:
            raise MalformedMessage(f"an env's process sent what is no message: {here} bytes where it said {size}")
        body = bytearray(size)
        body[:here] = data[_LENGTH.size :]
        left = memoryview(body)[here:]
        while left:
            count = self._socket.recv_into(left)
            if not count:
                raise EOFError
            left = left[count:]
        return body

    def close(self) -> None:
        """Close this side; the other one reads an end."""
        self._socket.close()
