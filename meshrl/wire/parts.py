"""Messages over the server's payload limit, as several: split, and joined again.

Rule: a part is the msgpack array ``[lane, seq, attempt, index, count, bin]`` and every other body of the
protocol is a map, so the first byte tells them apart; nothing that a part says takes memory, only the bytes
that came with it.

Parts may arrive in any order, twice, and between the parts of other messages. A sender that has to send again
uses the next ``attempt``, whose parts never mix with those before.
"""

from __future__ import annotations

from typing import Any

import msgpack

from meshrl.errors import MalformedMessage, MessageTooLarge

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""The largest body that is split: a batch of a thousand 300x300x3 observations (257 parts of 1 MiB)."""

_HEAD_BYTES = 1 + 5 * 9 + 5  # the array, five integers and the bin header, at their widest
_MAX_INTEGER = (1 << 63) - 1
_PART_ROOM_BYTES = 160  # what a part takes beside its bytes (an entry, an int, a bytes object), about
_FINISHED_KEPT = 4096


def is_part(data: bytes) -> bool:
    """Whether a body is a part rather than a whole message."""
    return data[:1] == b"\x96"


def split(body: bytes, max_payload: int, *, lane: int, seq: int, attempt: int) -> list[bytes]:
    """The body as messages of at most ``max_payload`` bytes each.

    Each part copies its bytes twice, into the packer and out of it. A body that fits is returned as it is,
    alone.

    Args:
        body: a whole message.
        max_payload: what the server takes in one message, in bytes; at least 1024, as no server has less.
        lane: the lane it belongs to.
        seq: its number in the lane.
        attempt: how often it was sent before.

    Raises:
        MessageTooLarge: it is over ``MAX_MESSAGE_BYTES``.
        ValueError: ``max_payload`` is below 1024.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(
            f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}",
            size_bytes=len(body),
            limit_bytes=MAX_MESSAGE_BYTES,
        )
    if max_payload < 1024:
        raise ValueError(f"a payload limit of {max_payload} bytes leaves no room for parts")
    if len(body) <= max_payload:
        return [body]
    step = max_payload - _HEAD_BYTES
    count = -(-len(body) // step)
    view = memoryview(body)
    return [
        msgpack.packb([lane, seq, attempt, index, count, view[index * step : (index + 1) * step]])
        for index in range(count)
    ]


class _Incoming:
    """The parts of one attempt that are here."""

    def __init__(self, attempt: int, count: int, now: float) -> None:
        self.attempt = attempt
        self.count = count
        self.parts: dict[int, bytes] = {}  # not a list of count: that number is only a peer's word
        self.size_bytes = 0
        self.room_bytes = 0
        self.heard_at = now


class Assembler:
    """Joins parts, for any number of senders; sans-IO, owned by one thread.

    Args:
        max_bytes: what all incomplete messages may take together, counting 160 bytes a part beside its own;
            over it the oldest is dropped. A message above this, or ``MAX_MESSAGE_BYTES``, is refused.
        max_parts: how many parts one message may have.
        max_age_s: how long after its last part an incomplete message is kept, seconds.

    Attributes:
        dropped_for_room: incomplete messages dropped because ``max_bytes`` was reached.
        dropped_for_age: incomplete messages dropped by :meth:`sweep`.
        buffered_bytes: what the incomplete messages take now.
    """

    def __init__(self, max_bytes: int = 2 * MAX_MESSAGE_BYTES, max_parts: int = 65536, max_age_s: float = 30.0) -> None:
        self.max_bytes = max_bytes
        self.max_parts = max_parts
        self.max_age_s = max_age_s
        self.dropped_for_room = 0
        self.dropped_for_age = 0
        self.buffered_bytes = 0
        # Both in order of arrival. The second knows which attempt of a message was completed, so that a part
        # that comes again afterwards does not begin it anew.
        self._incoming: dict[tuple[str, int, int], _Incoming] = {}
        self._finished: dict[tuple[str, int, int], int] = {}

    def __len__(self) -> int:
        """How many messages are incomplete."""
        return len(self._incoming)

    def feed(self, source: str, data: bytes, now: float) -> bytes | None:
        """Take one part.

        Args:
            source: who sent it, from the subject and never from the body; another one for each series of
                sequence numbers (a session and its epoch, say).
            data: the part.
            now: seconds, of any clock that only goes forward.

        Returns:
            the whole body when this part completes it (joined in one copy), else None.

        Raises:
            MalformedMessage: it is no part, or contradicts another of the same attempt, which is dropped.
            MessageTooLarge: the message would be over the limits; what came of it is dropped.
        """
        lane, seq, attempt, index, count, chunk = self._read(data)
        key = (source, lane, seq)
        if attempt <= self._finished.get(key, -1):
            return None
        incoming = self._incoming.get(key)
        if incoming is not None and attempt < incoming.attempt:
            return None
        if incoming is None or attempt > incoming.attempt:
            self._drop(key)
            incoming = self._incoming[key] = _Incoming(attempt, count, now)
        incoming.heard_at = now
        if count != incoming.count:
            self._drop(key)
            raise MalformedMessage(f"a message of {incoming.count} parts has a part of {count}", seq=seq, lane=lane)
        known = incoming.parts.get(index)
        if known is not None:
            if known != chunk:
                self._drop(key)
                raise MalformedMessage(f"part {index} came twice and is not the same", seq=seq, lane=lane)
            return None
        self._add(key, incoming, index, chunk)
        if len(incoming.parts) < count:
            self._make_room()
            return None
        self._drop(key)
        self._finish(key, attempt)
        return b"".join([incoming.parts[i] for i in range(count)])

    def sweep(self, now: float) -> int:
        """Drop the incomplete messages of which nothing was heard for ``max_age_s``; gives how many."""
        late = [key for key, incoming in self._incoming.items() if now - incoming.heard_at > self.max_age_s]
        for key in late:
            self._drop(key)
        self.dropped_for_age += len(late)
        return len(late)

    def _read(self, data: bytes) -> tuple[int, int, int, int, int, bytes]:
        if not is_part(data):
            raise MalformedMessage("not a part of a message")
        try:
            fields: list[Any] = msgpack.unpackb(data, max_array_len=6, max_map_len=0, max_str_len=0, max_ext_len=0)
        except Exception as exc:  # as in the codec: unpackb raises a dozen classes
            raise MalformedMessage(f"not a part of a message: {str(exc)[:200]}") from exc
        for number in fields[:5]:
            if type(number) is not int or not 0 <= number <= _MAX_INTEGER:
                raise MalformedMessage("a part whose lane, seq, attempt, index and count are not natural numbers")
        lane, seq, attempt, index, count, chunk = fields
        if type(chunk) is not bytes or not chunk:
            raise MalformedMessage("a part without bytes")
        if not 0 <= index < count <= self.max_parts:
            raise MalformedMessage(f"part {index} of {count}, where {self.max_parts} are allowed")
        return lane, seq, attempt, index, count, chunk

    def _add(self, key: tuple[str, int, int], incoming: _Incoming, index: int, chunk: bytes) -> None:
        room_bytes = len(chunk) + _PART_ROOM_BYTES
        if incoming.size_bytes + len(chunk) > MAX_MESSAGE_BYTES or incoming.room_bytes + room_bytes > self.max_bytes:
            self._drop(key)
            limit = min(self.max_bytes, MAX_MESSAGE_BYTES)
            raise MessageTooLarge(f"the parts of a message are over {limit} bytes", limit_bytes=limit)
        incoming.parts[index] = chunk
        incoming.size_bytes += len(chunk)
        incoming.room_bytes += room_bytes
        self.buffered_bytes += room_bytes

    def _make_room(self) -> None:
        while self.buffered_bytes > self.max_bytes and self._incoming:
            self._drop(next(iter(self._incoming)))
            self.dropped_for_room += 1

    def _drop(self, key: tuple[str, int, int]) -> None:
        incoming = self._incoming.pop(key, None)
        if incoming is not None:
            self.buffered_bytes -= incoming.room_bytes

    def _finish(self, key: tuple[str, int, int], attempt: int) -> None:
        self._finished.pop(key, None)
        self._finished[key] = attempt
        if len(self._finished) > _FINISHED_KEPT:
            del self._finished[next(iter(self._finished))]
