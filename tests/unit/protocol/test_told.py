"""What a client counts from the answers that arrived is what a worker counts from what its envs gave."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.protocol.digest import Digest
from meshrl.protocol.digests import Digests
from meshrl.protocol.told import Told
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack, unpack
from tests.unit.wire.strategies import all_spaces, values

FLAGS = np.array([False, True, False])
REWARDS = np.array([0.5, -0.0, np.nan])


@given(values)
def test_of_a_lane(obs: Any) -> None:
    frame = {"obs": obs, "reward": np.float32(0.1), "terminated": np.bool_(True), "truncated": False}
    told, counted = Digest(), Digest()
    assert told.add(frame) == counted.add(unpack(pack(frame)))


class Metres(float):
    """A number."""


@pytest.mark.parametrize(
    "obs",
    [
        OrderedDict(a=1, b=OrderedDict(c=2)),
        Counter("aab"),
        defaultdict(int, x=1),
        Metres(2.5),
        [Metres(1.0), np.float64(1.0), 1.0],
        (IntEnum("Way", "LEFT RIGHT").LEFT, "text", b"bytes", None),  # type: ignore[attr-defined]
        {1, 8, 16, 2},
        np.arange(6)[::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=str,
)
def test_what_travels_as_something_plainer_counts_as_that(obs: Any) -> None:
    assert Digest().add({"obs": obs}) == Digest().add(unpack(pack({"obs": obs})))


@settings(deadline=None)
@given(all_spaces, st.integers(0, 99), st.sampled_from([None, [0], [2, 0], []]))
def test_of_a_shard(space: spaces.Space[Any], seed: int, picked: list[int] | None) -> None:
    of = batching(space)
    space.seed(seed)
    single = [space.sample() for _ in range(3)]
    obs = of.stack(single)
    frame = {"obs": obs, "rewards": REWARDS, "terminations": FLAGS, "truncations": ~FLAGS, "origins": [2, b"seed"]}
    told, counted = Digests(3, of), Told(3, of)
    rows = None if picked is None else np.array(picked, np.int64)
    which: Any = slice(None) if rows is None else np.array([1, 2], np.int64)[: len(rows)]
    for op in ("reset", "step"):
        counted.count((0, pack(frame), op, which, rows))
        if rows is None:
            told.add(which, obs, REWARDS, FLAGS, ~FLAGS, [2])
        elif len(rows):
            own = of.stack([single[row] for row in rows])
            told.add(which, own, REWARDS[rows], FLAGS[rows], ~FLAGS[rows], [0] if 2 in rows else [])
    assert counted.digests.tolist() == told.values.tolist()


def test_a_vectors_reset_has_no_rewards() -> None:
    of = batching(spaces.Discrete(9))
    told, counted = Digests(2, of), Told(2, of)
    nothing = np.zeros(2, np.bool_)
    told.add(slice(None), np.array([3, 4]), np.zeros(2), nothing, nothing, [0, 1])
    data = pack({"obs": np.array([3, 4]), "origins": [0, b"", 1, b""]})
    counted.count((0, data, "reset", slice(None), None))
    assert counted.digests.tolist() == told.values.tolist()
