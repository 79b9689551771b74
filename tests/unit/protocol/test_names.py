from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.protocol.names import near, resolve

SERVED = [
    "CartPole-v0",
    "CartPole-v1",
    "Acrobot-v1",
    "ALE/Pong-v5",
    "module:Name-v2",
    "my.package:Env",
    "Lander-v2",
    "Lander-v9",
    "Lander-v10",
    "random",
]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("CartPole-v0", "CartPole-v0"),
        ("cartpole", "CartPole-v1"),
        ("CARTPOLE", "CartPole-v1"),
        ("cartpole-v0", "CartPole-v0"),
        ("CartPole-V0", "CartPole-v0"),
        ("cartpole-v2", None),
        ("ale/pong", "ALE/Pong-v5"),
        ("ale/pong-v5", "ALE/Pong-v5"),
        ("pong", None),
        ("ale", None),
        ("module:Name-v2", "module:Name-v2"),
        ("module:name", "module:Name-v2"),
        ("name", None),
        ("MY.package:env", "my.package:Env"),
        ("my.package:env-v0", None),
        ("lander", "Lander-v10"),
        ("lander-v9", "Lander-v9"),
        ("lander-v1", None),
        ("cart", None),
        ("Random", "random"),
        ("", None),
        ("-v1", None),
        ("cartpole-v", None),
        ("cartpole-v" + "9" * 5000, None),
    ],
)
def test_a_name_means(asked: str, meant: str | None) -> None:
    assert resolve(asked, SERVED) == meant
    assert resolve(asked, reversed(SERVED)) == meant


def test_an_exact_name_wins_over_a_newer_version() -> None:
    assert resolve("cartpole", ["cartpole", "CartPole-v1"]) == "cartpole"


def test_a_version_is_newer_than_none() -> None:
    assert resolve("cartpole", ["CartPole", "CartPole-v0"]) == "CartPole-v0"


def test_among_ids_that_differ_in_case_the_one_written_as_asked_is_meant() -> None:
    assert resolve("pong", ["Pong-v9", "pong-v1", "pong-v2"]) == "pong-v2"


def test_nothing_is_meant_where_nothing_is_served() -> None:
    assert resolve("cartpole", []) is None
    assert near("cartpole", []) == []


@settings(deadline=None)
@given(st.text(max_size=12), st.lists(st.text(max_size=12), max_size=6))
def test_what_is_meant_is_served_and_served_names_mean_themselves(asked: str, served: list[str]) -> None:
    meant = resolve(asked, iter(served))
    assert meant is None or meant in served
    assert all(resolve(name, served) == name for name in served)


@settings(deadline=None)
@given(st.sets(st.integers(0, 10**9 - 1), min_size=1, max_size=8))
def test_without_a_version_the_newest_is_meant(versions: set[int]) -> None:
    assert resolve("my/env", [f"My/Env-v{version}" for version in versions]) == f"My/Env-v{max(versions)}"


@pytest.mark.parametrize(
    ("asked", "similar"),
    [
        ("cartpol", ["CartPole-v1", "CartPole-v0"]),
        ("cartpole-v7", ["CartPole-v1", "CartPole-v0"]),
        ("pong", ["ALE/Pong-v5"]),
        ("Pnog", ["ALE/Pong-v5"]),
        ("nmae-v2", ["module:Name-v2"]),
        ("landr", ["Lander-v10", "Lander-v9", "Lander-v2"]),
        ("zzzzzz", []),
    ],
)
def test_similar_names_are_found(asked: str, similar: list[str]) -> None:
    assert near(asked, SERVED) == similar


def test_as_many_similar_names_as_wanted_are_given() -> None:
    assert near("lander", SERVED, n=1) == ["Lander-v10"]
    assert near("lander", SERVED, n=0) == []
