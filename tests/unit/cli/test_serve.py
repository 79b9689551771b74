"""What ``serve`` and ``serve-agent`` make of the names they are given."""

from pathlib import Path

import pytest

from meshrl.cli import main
from meshrl.cli.serve import served_envs
from meshrl.cli.serve_agent import served_agents
from meshrl.errors import InvalidName, UsageError
from meshrl.worker.policies import random_policy


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("CartPole-v1", "CartPole-v1", "CartPole-v1"),
        ("cartpole", "CartPole-v1", "CartPole-v1"),
        ("cartpole-v0", "CartPole-v0", "CartPole-v0"),
        ("pole=cartpole", "pole", "CartPole-v1"),
        ("pole=CartPole-v0", "pole", "CartPole-v0"),
        ("my.envs:Maze", "Maze", "my.envs:Maze"),
        ("ale_py:ALE/Pong-v5", "ALE/Pong-v5", "ale_py:ALE/Pong-v5"),
        ("maze=my.envs:Maze", "maze", "my.envs:Maze"),
    ],
)
def test_env_is_served_under_its_own_name_or_the_one_given(text: str, name: str, source: str) -> None:
    envs = served_envs([text], {"size": 5})
    assert {name: factory.source for name, factory in envs.items()} == {name: source}
    assert envs[name].kwargs == {"size": 5}


def test_several_envs_are_served_together() -> None:
    assert list(served_envs(["cartpole", "old=cartpole-v0"], {})) == ["CartPole-v1", "old"]


def test_unknown_id_is_refused_with_those_like_it() -> None:
    with pytest.raises(InvalidName, match=r"did you mean CartPole-v1"):
        served_envs(["cartpol"], {})


def test_unknown_id_is_refused_with_how_others_are_written() -> None:
    with pytest.raises(InvalidName, match=r"package:Qwxyz-v3, a class module:Class"):
        served_envs(["Qwxyz-v3"], {})


def test_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="CartPole-v1 is named twice"):
        served_envs(["cartpole", "CartPole-v1"], {})


@pytest.mark.parametrize("text", ["=CartPole-v1", "pole=", "="])
def test_half_a_pair_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=ID"):
        served_envs([text], {})


def test_agents_are_given_as_module_and_object() -> None:
    assert served_agents(["greedy=policies:greedy", "random"]) == {
        "greedy": "policies:greedy",
        "random": random_policy,
    }


@pytest.mark.parametrize("text", ["greedy", "greedy=policies", "=policies:greedy", "policies:greedy"])
def test_agent_without_name_module_and_object_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=MODULE:OBJECT"):
        served_agents([text])


@pytest.mark.parametrize("command", [["serve", "cartpole"], ["up"]], ids=lambda command: command[0])
def test_a_state_key_that_is_none_is_refused_before_anything_is_started(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHRL_STATE_KEY", str(tmp_path / "state.key"))
    assert main(command) == 1
    assert "state.key cannot be read" in capsys.readouterr().err
    (tmp_path / "short.key").write_text("secret\n")
    assert main([*command, "--state-key", str(tmp_path / "short.key")]) == 1
    told = capsys.readouterr().err
    assert "at least 32 bytes, not 6" in told
    assert "secret" not in told
