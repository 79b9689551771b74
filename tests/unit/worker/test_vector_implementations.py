"""A hosted vector implementation by itself: what it refuses, whoever asks, leaves it as it was (R6)."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from meshrl.errors import InvalidSeed, MeshError, UsageError
from meshrl.wire.messages import Open
from meshrl.worker.factories import Factory
from meshrl.worker.threads import Threads
from meshrl.worker.vector_implementations import HostedImplementation, describe_implementation, make_implementation

COUNT = 2


class Counts(VectorEnv[Any, Any, Any]):
    """Observes how often it was stepped, and keeps what it was reset with."""

    def __init__(self, seed: int) -> None:
        self.num_envs = COUNT
        self.single_observation_space = self.single_action_space = spaces.Discrete(9)
        self.observation_space = self.action_space = batch_space(self.single_action_space, COUNT)
        self.made_with = seed
        self.resets: list[Any] = []
        self.steps = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.resets.append((seed, options))
        self.steps = 0
        return np.zeros(COUNT, np.int64), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        flags = np.zeros(COUNT, np.bool_)
        return np.full(COUNT, self.steps), np.zeros(COUNT), flags, flags, {}


def hosted(*, seeded_at_construction: bool) -> HostedImplementation:
    """One of them, after its first reset and a step."""
    asked = Open(session="s1", name="env", form="vector", num_envs=COUNT, seeding="implementation")
    made = HostedImplementation(
        Counts, asked, seeded_at_construction=seeded_at_construction, threads=Threads("implementations")
    )
    made.run("reset", {})
    made.run("step", {"actions": np.zeros(COUNT, np.int64)})
    return made


REFUSED: list[tuple[bool, dict[str, Any], type[MeshError]]] = [
    (True, {"options": {"low": 0.1}}, UsageError),
    (True, {"seeds": [4, 5], "options": {"low": 0.1}}, UsageError),
    (True, {"seeds": [(1 << 31) - 1, 1 << 31]}, InvalidSeed),
    *(
        (at_construction, body, error)
        for at_construction in (True, False)
        for body, error in (
            ({"mask": np.array([True, False])}, UsageError),
            ({"seeds": [4, 6]}, InvalidSeed),
            ({"seeds": [4, None]}, InvalidSeed),
            ({"seeds": [None, 5]}, InvalidSeed),
            ({"seeds": [1 << 256, (1 << 256) + 1]}, InvalidSeed),
        )
    ),
]


@pytest.mark.parametrize(("at_construction", "body", "error"), REFUSED)
def test_a_reset_that_it_cannot_follow_is_refused_and_it_goes_on(
    at_construction: bool, body: dict[str, Any], error: type[MeshError]
) -> None:
    made = hosted(seeded_at_construction=at_construction)
    vector = made.vector
    assert isinstance(vector, Counts)
    with pytest.raises(error):
        made.run("reset", body)
    assert made.vector is vector
    assert vector.resets == [(None, None)]
    assert made.run("step", {"actions": np.zeros(COUNT, np.int64)})["obs"].tolist() == [2, 2]


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_are_none_to_one_that_is_seeded_at_construction(options: Any) -> None:
    made = hosted(seeded_at_construction=True)
    made.run("reset", {"seeds": [4, 5], "options": options})
    vector = made.vector
    assert isinstance(vector, Counts)
    assert (vector.made_with, vector.resets) == (4, [(None, None)])


def test_options_and_the_first_seed_reach_one_that_is_seeded_by_its_reset() -> None:
    made = hosted(seeded_at_construction=False)
    made.run("reset", {"seeds": [4, 5], "options": {"low": 0.1}})
    vector = made.vector
    assert isinstance(vector, Counts)
    assert vector.resets == [(None, None), (4, {"low": 0.1})]


class Local:
    """Stands in for EnvPool: makes the env's own vector implementation."""

    def make_gymnasium(self, source: str, *, num_envs: int, seed: int) -> Any:
        return gymnasium.make_vec(source, num_envs, vectorization_mode="vector_entry_point")


def test_what_resets_take_is_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", Local())
    taken = {
        implementation: describe_implementation("env", Factory("CartPole-v1"), implementation)
        for implementation in ("meshrl", "gymnasium", "envpool")
    }
    assert {name: (can.reset_mask, can.options) for name, can in taken.items()} == {
        "meshrl": (True, True),
        "gymnasium": (False, True),
        "envpool": (False, False),
    }


def test_a_render_mode_is_refused_where_envpool_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", Local())
    with pytest.raises(UsageError, match="not rendered"):
        make_implementation(Factory("CartPole-v1"), "envpool", 1, {}, "rgb_array")
