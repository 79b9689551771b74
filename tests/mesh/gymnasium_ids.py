"""Ids of Gymnasium's own envs that the tests play, as its registry has them: versions differ between its releases."""

import gymnasium

# Gymnasium 1.2 ends at Taxi-v3, later ones have Taxi-v4.
TAXI = max(name for name in gymnasium.registry if name.startswith("Taxi-v"))

PARITY_IDS = [
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "FrozenLake-v1",
    TAXI,
    "Blackjack-v1",
]
