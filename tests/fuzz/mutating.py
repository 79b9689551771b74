"""Mutates messages: by seed the same each time, some by their bytes and some by what they mean.

A mutant of bytes rarely gets far: a length that is one off ends the decoding. One whose *values* are others (a field of
another type, missing, twice, nested too deep, an array that lies about its size) is good msgpack, and reaches what is
behind the decoder. A quarter is left as it is, so that sessions come into the states in which mutants meet them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack

Path = tuple[Any, ...]

# At the ends of what fields and formats hold.
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 127, 128, 255, 256, 65535, 65536, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 53) + 1),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 31), -(1 << 63), 1000, 1001),
    *(0.0, -0.0, 1.5, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324),
]
ODD: list[Any] = [
    *(None, True, False, "", "a", "step", "\x00", "é", "a" * 129, "a.b", "*", ">", b"", b"\x00" * 8, bytes(200)),
    *([], {}, [[]], [1, [2, [3, [4]]]], {"": None}, {"nd": True}, {"py": "tuple", "v": []}, {"py": "int", "v": "0xff"}),
    {"py": "int", "v": "-0x1" + "0" * 300},
    {"complex": True, "data": "(1+2j)"},
    {"nd": True, "type": "<f4", "kind": "", "shape": [2], "data": bytes(8)},
    {"nd": True, "type": "<f8", "kind": "", "shape": [0], "data": b""},
    {"nd": True, "type": "<i8", "kind": "", "shape": [1 << 40, 0], "data": b""},
    {"nd": True, "type": "|b1", "kind": "", "shape": [3], "data": b"\x01\x02\x00"},
    {"nd": True, "type": "|O", "kind": "O", "shape": [1], "data": b"cos\nsystem\n(Vfalse\ntR."},
    {"nd": False, "type": "<i8", "data": b"\xff" * 8},
    {"nd": False, "type": "<U3", "data": bytes(12)},
    {"py": "map", "v": [[[1], 2]]},
    {"py": "set", "v": [1, 1]},
]
# Parts of messages, as a peer might mix them up.
HEADERS = [
    b"\x80",
    b"\x90",
    b"\x96",
    b"\xc1",
    b"\xd9\xff",
    b"\xdc\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\x7f\xff\xff\xff",
]
MAX_BYTES = 4096
DEEP = 80


class Mutator:
    """Draws mutants.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def mutant(self, body: bytes, others: list[bytes]) -> bytes:
        """A message that was ``body``; ``others`` are what it may be mixed with."""
        chance = self.chance
        how = chance.random()
        if how < 0.25:
            return body
        if how < 0.75:
            return self._of_values(body)
        if how < 0.97:
            return self._of_bytes(body, others)
        return self._of_bytes(self._of_values(body), others)

    # ---------------------------------------------------------------- bytes

    def _of_bytes(self, body: bytes, others: list[bytes]) -> bytes:
        chance, data = self.chance, bytearray(body)
        for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(9):
                case 0 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 1 if at < len(data):
                    data[at] = chance.randrange(256)
                case 2:
                    data[at:at] = chance.randbytes(chance.choice((1, 1, 4, 32)))
                case 3:
                    del data[at : at + chance.choice((1, 1, 4, 32))]
                case 4:
                    data[at:at] = data[at : at + chance.choice((1, 4, 16, 64))]
                case 5:
                    del data[at:]
                case 6:
                    data[at:at] = chance.choice(HEADERS)
                case 7:
                    other = chance.choice(others)
                    data[at:] = other[chance.randrange(len(other) + 1) :]
                case _:
                    data += chance.choice(others)[:64]
        return bytes(data[:MAX_BYTES])

    # ---------------------------------------------------------------- values

    def _of_values(self, body: bytes) -> bytes:
        try:
            value = msgpack.unpackb(body, strict_map_key=False)
            for _ in range(self.chance.choice((1, 1, 1, 1, 2))):
                value = self.changed(value)
            packed: bytes = msgpack.packb(value)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            return self._of_bytes(body, [body])  # it was no message before
        return packed[:MAX_BYTES]

    def changed(self, value: Any) -> Any:
        """``value`` with something of it, at any depth, replaced."""
        paths: list[Path] = []
        _walk(value, (), paths)
        return _replaced(value, self.chance.choice(paths), self._other)

    def _other(self, value: Any) -> Any:
        chance = self.chance
        match chance.randrange(10):
            case 0 | 1 | 2:
                return chance.choice(NUMBERS)
            case 3 | 4:
                return chance.choice(ODD)
            case 5 if isinstance(value, dict) and value:
                gone = chance.choice(list(value))
                return {key: item for key, item in value.items() if key != gone}
            case 6 if isinstance(value, dict):
                return {**value, chance.choice(["later", "v", "nd", "py", "lanes", "seed", ""]): chance.choice(ODD)}
            case 7 if isinstance(value, list) and value:
                return [*value, *value] if chance.random() < 0.5 else value[:-1]
            case 8:
                return self._nested(value)
            case _ if isinstance(value, int):
                return max(-(1 << 63), min(value + chance.choice((-1, 1)), (1 << 64) - 1))
            case _ if isinstance(value, bytes | str):
                return value[: chance.randrange(len(value) + 1)]
            case _:
                return chance.choice(ODD)

    def _nested(self, value: Any) -> Any:
        for _ in range(self.chance.choice((1, 2, DEEP))):
            value = [value] if self.chance.random() < 0.5 else {"x": value}
        return value


def _walk(value: Any, path: Path, paths: list[Path]) -> None:
    """Where there is something to replace; an array as often as a number, although it is made of several."""
    paths.append(path)
    if isinstance(value, dict) and "nd" in value:
        paths.append((*path, list(value)[-1]))  # its bytes
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(item, (*path, key), paths)
    elif isinstance(value, list):
        for at, item in enumerate(value[:50]):
            _walk(item, (*path, at), paths)


def _replaced(value: Any, path: Path, other: Callable[[Any], Any]) -> Any:
    if not path:
        return other(value)
    first, *rest = path
    changed = list(value) if isinstance(value, list) else dict(value)
    changed[first] = _replaced(value[first], tuple(rest), other)
    return changed
