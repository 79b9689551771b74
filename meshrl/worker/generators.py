"""The state of an env's generator, packed: what a reset without a seed goes on with.

Gymnasium's seeding makes ``numpy.random.PCG64``. Its ``state`` is a dict of Python's integers, which takes as long as a
step of a fast env, and that before each reset of a recorded one. So the state is read where NumPy says that it is
(``BitGenerator.ctypes.state_address``): a pointer to two numbers of 128 bits, the state and the increment, then whether
half of a number is left, and that half. How these lie there NumPy does not promise: what is read is compared with
``state`` once for each process, and where it differs, as with other byte orders, ``state`` is used.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage

# State and increment, whether half of a number is left, and that half.
PACKED = struct.Struct("<16s16s?I")


def packer(env: Any) -> Callable[[], bytes]:
    """What gives the packed state of ``env.np_random``, also when that becomes another generator.

    Args:
        env: whose ``np_random.bit_generator`` is a ``PCG64``.
    """
    known: Any = None  # held, so that what is read stays where it is
    numbers: Any
    half: Any

    def get() -> bytes:
        nonlocal known, numbers, half
        generator = env.np_random.bit_generator
        if generator is not known:
            if type(generator) is not np.random.PCG64:  # as it was when the env was made
                raise TypeError(f"the generator of {env!r} is a {type(generator).__name__} now, and no PCG64")
            if not lies_as_expected():
                return by_dict(generator)
            known, (numbers, half) = generator, _places(generator)
        left = half.raw
        return numbers.raw + left[:1] + left[4:]  # type: ignore[no-any-return]

    return get


def unpacked(packed: Any) -> np.random.Generator:
    """A generator with a packed state.

    Raises:
        MalformedMessage: it is none.
    """
    if type(packed) is not bytes or len(packed) != PACKED.size:
        raise MalformedMessage(f"the state of a generator is {PACKED.size} bytes")
    number, increment, has_half, half = PACKED.unpack(packed)
    if not increment[0] & 1:  # of no generator that was ever seeded; it may give the same number for ever
        raise MalformedMessage("the increment of a generator is odd")
    numbers = {"state": int.from_bytes(number, "little"), "inc": int.from_bytes(increment, "little")}
    state: Any = {"bit_generator": "PCG64", "state": numbers, "has_uint32": int(has_half), "uinteger": half}
    generator = np.random.PCG64(0)
    generator.state = state
    return np.random.Generator(generator)


@functools.cache
def lies_as_expected() -> bool:
    """Whether a state can be read in place here."""
    generator = np.random.PCG64(0)
    numbers, half = _places(generator)
    for _ in range(2):  # with half of a number left, and without
        np.random.Generator(generator).integers(0, 9, dtype=np.uint32)
        if numbers.raw + half.raw[:1] + half.raw[4:] != by_dict(generator):
            return False
    return True


def _places(generator: Any) -> tuple[Any, Any]:
    """The memory in which the two numbers of a generator lie, and that of the half that is left."""
    address = generator.ctypes.state_address
    numbers = (ctypes.c_char * 32).from_address(ctypes.c_void_p.from_address(address).value or 0)
    return numbers, (ctypes.c_char * 8).from_address(address + ctypes.sizeof(ctypes.c_void_p))


def by_dict(generator: Any) -> bytes:
    """The packed state of a generator, by NumPy's word alone."""
    state = generator.state
    numbers = state["state"]
    return PACKED.pack(
        numbers["state"].to_bytes(16, "little"),
        numbers["inc"].to_bytes(16, "little"),
        bool(state["has_uint32"]),
        state["uinteger"],
    )
