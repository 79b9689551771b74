"""The packed state of a generator is the same, however it is read."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from meshrl.errors import MalformedMessage
from meshrl.worker import generators


def test_a_state_is_read_in_place_where_ci_runs() -> None:
    assert generators.lies_as_expected()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_generator_made_of_a_packed_state_goes_on_as_the_other_does(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generators, "lies_as_expected", lambda: in_place)
    env = gymnasium.make("CartPole-v1").unwrapped
    get = generators.packer(env)
    for seed in (1, 2):  # each seeded reset makes another generator
        env.reset(seed=seed)
        for _ in range(3):
            env.np_random.integers(0, 9, dtype=np.uint32)  # leaves half of a number, every other time
            again = generators.unpacked(get())
            expected = generators.unpacked(get())
            assert again.bit_generator.state == env.np_random.bit_generator.state
            drawn = [*again.integers(0, 9, 5, dtype=np.uint32).tolist(), again.random()]
            assert drawn == [*expected.integers(0, 9, 5, dtype=np.uint32).tolist(), expected.random()]


def test_both_ways_give_the_same_bytes() -> None:
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=3)
    get = generators.packer(env)
    for _ in range(4):
        env.np_random.integers(0, 9, dtype=np.uint32)
        in_place = get()
        assert in_place == generators.by_dict(env.np_random.bit_generator)
        assert len(in_place) == generators.PACKED.size


@pytest.mark.parametrize("packed", [b"", b"\0" * 37, b"\0" * 38, "text", None])
def test_what_is_no_state_is_refused(packed: object) -> None:
    with pytest.raises(MalformedMessage):
        generators.unpacked(packed)


def test_a_generator_of_another_kind_is_no_memory_to_be_read() -> None:
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=1)
    get = generators.packer(env)
    assert len(get()) == generators.PACKED.size
    env.np_random = np.random.Generator(np.random.MT19937(1))
    with pytest.raises(TypeError, match="MT19937"):
        get()
