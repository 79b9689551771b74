"""Seeds: the one of an episode, from the root seed alone (R7), and the check of a seed that a user gave.

The rule: the seed of episode ``n`` of sub-environment ``i`` depends on (root, i, n) and on nothing else, not
on which worker runs it, what ran before it, the platform or any package's version.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import numpy as np

from meshrl.errors import InvalidSeed

# NumPy's SeedSequence takes quadratic time in a seed's length and holds the interpreter meanwhile: one of a megabyte
# would stop a worker for a minute. More than its pool's 128 bits say nothing new.
MAX_SEED_BITS = 256


def derive(root: SupportsIndex, env_id: SupportsIndex, episode: SupportsIndex) -> int:
    """The seed of one episode under ``seeding="derived"``.

    The exact bytes, for other languages: write the three numbers in decimal ASCII without sign, blanks or
    leading zeros, after a prefix and separated by colons, ``meshrl.seed.v1:<root>:<env_id>:<episode>``; take
    the SHA-256 (FIPS 180-4) of that text; read the digest's first four bytes as a big-endian unsigned
    integer; clear its top bit.

    Args:
        root: the root seed, at least 0, of at most ``MAX_SEED_BITS`` bits.
        env_id: the global index of the sub-environment, at least 0; 0 for a single env.
        episode: the number of the episode, at least 0.

    Returns:
        a seed from 0 to 2**31 - 1, which every seeding interface in use takes (some keep it in a signed
        32-bit integer).

    Raises:
        InvalidSeed: one of the three is negative, has more bits or is no integer.
    """
    # Checked one by one: str(True), str(-1) and str(1.0) would hash to something no other language derives.
    text = f"meshrl.seed.v1:{check_seed(root)}:{check_seed(env_id)}:{check_seed(episode)}"
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:4], "big") & 0x7FFF_FFFF


def is_seed(value: object) -> bool:
    """Whether it is one."""
    try:
        check_seed(value)
    except InvalidSeed:
        return False
    return True


def check_seed(seed: object) -> int:
    """``seed`` as a plain int.

    Args:
        seed: an int or a NumPy integer, at least 0, of at most ``MAX_SEED_BITS`` bits (Gymnasium takes any size).

    Raises:
        InvalidSeed: it is negative, longer, a bool, a float or anything else.
    """
    # bool is an int to Python, yet seed=True is always a slip (a misplaced argument); np.bool_ is no
    # np.integer.
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InvalidSeed(f"a seed is a non-negative integer, not {type(seed).__name__}: {seed!r}")
    value = operator.index(seed)
    if value < 0:
        raise InvalidSeed(f"a seed is a non-negative integer, not {value if value > -(1 << 63) else 'a negative one'}")
    if value.bit_length() > MAX_SEED_BITS:
        raise InvalidSeed(
            f"a seed has at most {MAX_SEED_BITS} bits, not {value.bit_length()}; hash a longer one first",
            bits=value.bit_length(),
        )
    return value
