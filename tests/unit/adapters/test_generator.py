from __future__ import annotations

import numpy as np

from meshrl.adapters.generator import client_generator, draw_seed


def test_the_last_sub_environment_of_a_drawn_seed_still_has_31_bits() -> None:
    assert draw_seed(1 << 31) == 0
    assert all(0 <= draw_seed((1 << 31) - 3) <= 3 for _ in range(100))
    assert len({draw_seed() for _ in range(100)}) > 90


def test_a_clients_generator_follows_its_seed_and_is_not_the_envs() -> None:
    assert client_generator(5).random(4).tolist() == client_generator(5).random(4).tolist()
    assert client_generator(5).random(4).tolist() != client_generator(6).random(4).tolist()
    assert client_generator(5).random(4).tolist() != np.random.Generator(np.random.PCG64(5)).random(4).tolist()
