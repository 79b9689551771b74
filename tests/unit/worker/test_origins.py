"""What outlives an env's resets: a fresh env that is given it goes on as the old one would have."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, TimeLimit

from meshrl.errors import MalformedMessage
from meshrl.worker.origins import outliving, resumable
from tests.unit.worker.origin_checks import check_goes_on

GENERATORS = [
    "CartPole-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "Pendulum-v1",
    "FrozenLake-v1",
    "Taxi-v3" if "Taxi-v3" in gymnasium.registry else "Taxi-v4",
    "CliffWalking-v1" if "CliffWalking-v1" in gymnasium.registry else "CliffWalking-v0",
    "Blackjack-v1",
]


class Said(gymnasium.Env[Any, Any]):
    """Says of itself what it is told to say."""

    observation_space = spaces.Discrete(1000)
    action_space = spaces.Discrete(2)

    def __init__(self, said: object = None) -> None:
        self.metadata = {} if said is None else {"outlives_reset": said}
        self.level = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.level += 1
        return self.level, {}

    def get_state(self) -> Any:
        return {"level": self.level}

    def set_state(self, state: Any) -> None:
        self.level = state["level"]


@pytest.mark.parametrize("name", GENERATORS)
def test_gymnasiums_own_go_on_from_their_generators_state(name: str) -> None:
    check_goes_on(name)


def test_half_a_number_that_a_generator_has_left_goes_with_it() -> None:
    one, other = gymnasium.make("CartPole-v1"), gymnasium.make("CartPole-v1")
    one.reset(seed=1)
    one.unwrapped.np_random.integers(10, dtype=np.int32)
    kept, put = outliving(one), outliving(other)
    assert kept is not None
    assert put is not None
    put.put(kept.get())
    draws = [list(env.unwrapped.np_random.integers(10**6, size=5, dtype=np.int32)) for env in (one, other)]
    assert draws[0] == draws[1]


def test_a_state_is_that_of_before_the_reset_whatever_the_env_makes_of_it() -> None:
    class Reused(Said):
        def __init__(self) -> None:
            super().__init__("state")
            self.state = {"level": 0}

        def get_state(self) -> Any:
            return self.state

        def set_state(self, state: Any) -> None:
            self.state = state

        def reset(self, **_: Any) -> tuple[int, dict[str, Any]]:
            self.state["level"] += 1
            return self.state["level"], {}

    one, other = Reused(), Reused()
    kept, put = outliving(one), outliving(other)
    assert kept is not None
    assert put is not None
    state = kept.get()
    one.reset()
    put.put(state)
    assert other.reset()[0] == 1


def test_an_env_may_say_that_its_own_state_outlives_it() -> None:
    one, other = Said("state"), Said("state")
    for _ in range(3):
        one.reset(seed=1)
    kept, put = outliving(one), outliving(other)
    assert kept is not None
    assert put is not None
    put.put(kept.get())
    assert other.reset()[0] == one.reset()[0] == 4


@pytest.mark.parametrize(
    ("said", "known", "may"),
    [
        (None, False, True),
        ("nothing", True, True),
        ("generator", True, True),
        ("unknown", False, False),
        (5, False, True),
    ],
)
def test_what_an_env_says_of_itself_counts(said: object, known: bool, may: bool) -> None:
    assert (outliving(Said(said)) is not None) == known
    assert resumable(Said(said)) == may


def test_a_wrapper_that_remembers_its_episodes_leaves_nothing_known() -> None:
    cartpole = gymnasium.make("CartPole-v1")
    assert outliving(FrameStackObservation(TimeLimit(cartpole, 10), 2)) is not None
    assert outliving(NormalizeObservation(cartpole)) is None
    assert outliving(FrameStackObservation(NormalizeObservation(cartpole), 2)) is None


# All zeros are no generator's state: it would give the same number for ever, and whoever draws would never end.
@pytest.mark.parametrize("bad", [b"", bytes(36), bytes(37), "x" * 37, None, 5])
def test_what_is_no_state_is_refused(bad: object) -> None:
    kept = outliving(gymnasium.make("CartPole-v1"))
    assert kept is not None
    with pytest.raises(MalformedMessage):
        kept.put(bad)  # type: ignore[arg-type]  # whatever a client sends
    nothing = outliving(Said("nothing"))
    assert nothing is not None
    assert nothing.get() == b""
