"""Sealing: what a client keeps for workers comes back as one of them made it, or is refused (R8).

A state that native code parses must not be what a client has written: such parsers trust their input. So a worker tells
one only under a key that the workers of its operator share, and no other is parsed again::

    sealed = HMAC-SHA256(key, label, length of the kind, kind, state), 32 bytes, and the state
"""

from __future__ import annotations

import hmac
import struct
from pathlib import Path

from meshrl.errors import MalformedMessage, UsageError

# The variable that says where it is, of a worker's environment; env code has it in none of its own.
STATE_KEY_VARIABLE = "MESHRL_STATE_KEY"
# Those of HMAC-SHA256's own output: a shorter one could be guessed, by who holds a state that it sealed.
MIN_KEY_BYTES = 32
# A file that is larger is not one of a key.
MAX_KEY_BYTES = 4096
_MAC_BYTES = 32
_STATE, _ID = b"meshrl state 1\0", b"meshrl state key 1\0"
_LENGTH = struct.Struct("<I")


class StateKey:
    """The key of an operator's workers.

    Args:
        secret: at least 32 bytes, from a good source.

    Attributes:
        id: 16 hexadecimal digits that tell keys apart, and not what they are.

    Raises:
        UsageError: it is too short.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_KEY_BYTES:
            raise UsageError(
                f"a state key has at least {MIN_KEY_BYTES} bytes, not {len(secret)}; make one: openssl rand -hex 32"
            )
        self._secret = secret
        self.id = hmac.digest(secret, _ID, "sha256")[:8].hex()

    def __repr__(self) -> str:
        return f"<StateKey {self.id}>"

    @classmethod
    def read(cls, path: str | Path) -> StateKey:
        """One from a file: all that is in it, but of a text the white space at its ends.

        Raises:
            UsageError: the file cannot be read, or is not that of a key.
        """
        try:
            with Path(path).expanduser().open("rb") as file:
                secret = file.read(MAX_KEY_BYTES + 1)
        except OSError as exc:
            raise UsageError(f"the state key {path} cannot be read: {exc.strerror}") from exc
        if len(secret) > MAX_KEY_BYTES:
            raise UsageError(f"the state key {path} is no key: it has more than {MAX_KEY_BYTES} bytes")
        return cls(secret.strip() if secret.isascii() else secret)

    def seal(self, kind: bytes, state: bytes) -> bytes:
        """What is told in place of a state.

        Args:
            kind: of whom it is; it can be opened as nothing else.
            state: as its env gave it.
        """
        return self._mac(kind, state) + state

    def open(self, kind: bytes, sealed: object) -> bytes:
        """The state that a worker with this key has sealed as one of this kind.

        Raises:
            MalformedMessage: none has.
        """
        if type(sealed) is not bytes:
            raise MalformedMessage("a sealed state is bytes")
        mac, state = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(kind, state)):
            raise MalformedMessage("a state was not sealed by a worker with this key, or is another env's")
        return state

    def _mac(self, kind: bytes, state: bytes) -> bytes:
        return hmac.digest(self._secret, b"".join((_STATE, _LENGTH.pack(len(kind)), kind, state)), "sha256")
