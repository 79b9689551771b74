from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from meshrl.errors import InvalidName, UsageError
from meshrl.worker.factories import Factory, as_factory, is_gymnasium_id, load, registered


@pytest.mark.parametrize("text", ["CartPole-v1", "ALE/Pong-v5", "package.module:Name-v0", "pkg:ns/Name-v2"])
def test_gymnasium_ids_are_known_by_their_form(text: str) -> None:
    assert is_gymnasium_id(text)


@pytest.mark.parametrize("text", ["module:Class", "tests.mesh.envs:Counter", "cartpole", ""])
def test_other_texts_are_not_gymnasium_ids(text: str) -> None:
    assert not is_gymnasium_id(text)


def test_an_env_is_made_from_an_id_a_class_by_name_or_a_callable() -> None:
    assert Factory("CartPole-v1").make({}, None).spec.id == "CartPole-v1"
    made = as_factory("tests.mesh.envs:Counter").make({"start": 4}, "ansi")
    assert (made.start, made.render_mode) == (4, "ansi")

    def plain() -> gymnasium.Env[Any, Any]:
        return gymnasium.make("CartPole-v1")

    assert as_factory(plain).make({}, None).render_mode is None


def test_a_registered_env_that_takes_no_render_mode_is_made_as_gymnasium_makes_it() -> None:
    gymnasium.register("Plain-v0", f"{__name__}:_Plain", disable_env_checker=True)
    try:
        assert isinstance(Factory("Plain-v0").make({}, None).unwrapped, _Plain)
    finally:
        del gymnasium.registry["Plain-v0"]


class _Plain(gymnasium.Env[Any, Any]):
    observation_space = action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        """Takes nothing at all."""


def test_a_render_mode_is_refused_where_it_would_be_dropped_in_silence() -> None:
    def plain() -> gymnasium.Env[Any, Any]:
        return gymnasium.make("CartPole-v1")

    def framed() -> gymnasium.Env[Any, Any]:
        return gymnasium.make("CartPole-v1", render_mode="rgb_array")

    with pytest.raises(UsageError, match="human, rgb_array") as caught:
        as_factory(plain).make({}, "rgb_array")
    assert caught.value.details["own"] is None
    assert as_factory(framed).make({}, "rgb_array").render_mode == "rgb_array"
    with pytest.raises(UsageError, match="'rgb_array'"):
        as_factory(framed).make({}, "human")


def test_the_clients_kwargs_are_laid_over_the_operators() -> None:
    made = Factory("tests.mesh.envs:Counter", {"start": 1, "slow_s": 0.5}).make({"start": 2}, None)
    assert (made.start, made.slow_s) == (2, 0.5)


@pytest.mark.parametrize("text", ["nonsense", "tests.mesh.envs:Absent", "no.such.module:X", "os:sep", ":x", "os:"])
def test_a_text_that_names_nothing_callable_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        as_factory(text)


def test_something_that_is_neither_text_nor_callable_is_refused() -> None:
    with pytest.raises(InvalidName, match="callable"):
        as_factory(3)  # type: ignore[arg-type]


def test_nested_attributes_load() -> None:
    assert load("os:path.join").__name__ == "join"


def test_on_demand_names_resolve_in_gymnasiums_registry() -> None:
    assert registered("cartpole", import_modules=True) == "CartPole-v1"
    assert registered("CartPole-v1", import_modules=True) == "CartPole-v1"
    assert registered("nothing-like-it", import_modules=True) is None
    assert registered("no.such.module:Name-v0", import_modules=True) is None
    assert registered("os:system", import_modules=True) is None


def test_a_module_is_imported_for_a_name_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "registers_one.py").write_text(
        "import gymnasium\ngymnasium.register('One-v3', 'tests.mesh.envs:Counter')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert registered("registers_one:One-v3", import_modules=False) is None
    assert "registers_one" not in sys.modules
    try:
        assert registered("registers_one:One-v3", import_modules=True) == "registers_one:One-v3"
    finally:
        del gymnasium.registry["One-v3"]
