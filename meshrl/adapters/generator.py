"""The random generator that a remote env has at its client: the env's own lives on the worker."""

from __future__ import annotations

import secrets

import numpy as np

# A drawn seed has the bits of those that workers draw (R7).
SEED_BITS = 31
# Wrappers at the client draw from a stream of their own: with the env's own seed alone they would draw the very
# numbers that the env draws.
CLIENT_STREAM = 1


def draw_seed(num_envs: int = 1) -> int:
    """A seed with which the last of ``num_envs`` sub-environments, seeded with ``seed + i``, still has 31 bits."""
    return secrets.randbelow((1 << SEED_BITS) - num_envs + 1)


def client_generator(seed: int) -> np.random.Generator:
    """A generator that depends on ``seed`` alone, and shares no number with one that an env starts from it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(CLIENT_STREAM,))))
