from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import InvalidSeed, UsageError
from meshrl.protocol.seeds import MAX_SEED_BITS, check_seed, derive

COUNTS = st.integers(min_value=0, max_value=2**70)


@pytest.mark.parametrize(
    ("root", "env_id", "episode", "seed"),
    [
        (0, 0, 0, 1320663798),
        (0, 0, 1, 1842807015),
        (0, 1, 0, 288105172),
        (1, 0, 0, 1437940708),
        (12, 3, 4, 470710076),
        (1, 23, 4, 1990709984),
        (2**31 - 1, 63, 10**6, 2046497850),
        (2**64, 1, 2, 85835677),
    ],
)
def test_derived_seeds_never_change(root: int, env_id: int, episode: int, seed: int) -> None:
    assert derive(root, env_id, episode) == seed


@settings(deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_a_derived_seed_is_what_the_docstring_says(root: int, env_id: int, episode: int) -> None:
    digest = hashlib.sha256(b"meshrl.seed.v1:%d:%d:%d" % (root, env_id, episode)).hexdigest()
    assert derive(root, env_id, episode) == int(digest[:8], 16) % 2**31


@settings(deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_a_derived_seed_fits_a_signed_32_bit_integer(root: int, env_id: int, episode: int) -> None:
    assert 0 <= derive(root, env_id, episode) < 2**31


def test_numpy_integers_derive_the_same_seed() -> None:
    assert derive(np.uint64(12), np.int8(3), np.int64(4)) == derive(12, 3, 4)


def test_neighbouring_episodes_get_different_and_spread_seeds() -> None:
    seeds = [derive(7, env_id, episode) for env_id in range(20) for episode in range(200)]
    assert len(set(seeds)) == len(seeds)
    ones = [np.mean([seed >> bit & 1 for seed in seeds]) for bit in range(31)]
    assert min(ones) > 0.45
    assert max(ones) < 0.55


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**100, np.int8(5), np.uint64(2**64 - 1)])
def test_integers_are_seeds(seed: object) -> None:
    checked = check_seed(seed)
    assert checked == seed
    assert type(checked) is int


@pytest.mark.parametrize(
    "seed",
    [-1, -(2**70), np.int64(-1), True, False, np.True_, 1.0, np.float64(1), "1", None, [1], np.array([1])],
    ids=repr,
)
def test_anything_else_is_refused_as_a_usage_error_and_a_value_error(seed: object) -> None:
    with pytest.raises(InvalidSeed) as caught:
        check_seed(seed)
    assert isinstance(caught.value, UsageError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bits", [MAX_SEED_BITS, 20_000, 10_000_000])
def test_a_seed_that_numpy_would_take_long_for_is_refused_without_its_digits(bits: int) -> None:
    assert check_seed((1 << MAX_SEED_BITS) - 1)
    for refuse in (check_seed, lambda seed: derive(seed, 0, 0)):
        with pytest.raises(InvalidSeed, match=f"{MAX_SEED_BITS} bits") as caught:
            refuse(1 << bits)
        assert caught.value.details["bits"] == bits + 1
    with pytest.raises(InvalidSeed, match="negative"):
        check_seed(-(1 << bits))


@pytest.mark.parametrize("wrong", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (True, 0, 0), (0, 0, 1.0)])
def test_derive_refuses_what_is_no_count(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidSeed):
        derive(*wrong)
