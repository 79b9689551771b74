"""Manifests: what may stand in them, what is said of the rest, and what their hash depends on."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from meshrl.client.manifest import Experiment, Manifest, read_manifest
from meshrl.client.recordings import record_of
from meshrl.errors import UsageError
from meshrl.wire.messages import Description

PLAIN = """
name = "pushing"
env = "cartpole"
seeds = [0, 1]
agent = "random"
"""
FULL = """
# What we found in January.
seeds = [ 0,1 ]   # both
agent = 'random'
episodes = 1
record = "actions"
env = "cartpole"
"name" = "pushing"
"""
KWARGS = PLAIN + "[kwargs]\ngravity = 9.9\nsizes = [1, 2]\n"


def write(tmp_path: Path, text: str, name: str = "m.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def hash_of(tmp_path: Path, text: str) -> str:
    return read_manifest(write(tmp_path, text)).hash


def test_comments_order_and_what_is_the_default_anyway_change_no_hash(tmp_path: Path) -> None:
    assert hash_of(tmp_path, PLAIN) == hash_of(tmp_path, FULL)
    turned = PLAIN + "[kwargs]\nsizes = [1, 2]\ngravity = 9.9\n"
    assert hash_of(tmp_path, KWARGS) == hash_of(tmp_path, turned)


def test_the_hash_can_be_made_by_others(tmp_path: Path) -> None:
    body = {"agent": "random", "env": "cartpole", "name": "pushing", "seeds": [0, 1]}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert hash_of(tmp_path, PLAIN) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("pushing", "pulling"),
        PLAIN.replace("cartpole", "acrobot"),
        PLAIN.replace("[0, 1]", "[1, 0]"),
        PLAIN.replace("random", "dqn"),
        PLAIN + "num_envs = 2\n",
        PLAIN + "episodes = 2\n",
        PLAIN + "max_steps = 2\n",
        PLAIN + "deterministic = true\n",
        PLAIN + 'record = "full"\n',
        PLAIN + "wrappers = []\n",
        PLAIN + 'wrappers = ["TimeAware"]\n',
        KWARGS,
        KWARGS.replace("9.9", "9.8"),
    ],
)
def test_whatever_else_changes_changes_the_hash(tmp_path: Path, other: str) -> None:
    assert hash_of(tmp_path, other) not in {hash_of(tmp_path, text) for text in (PLAIN, KWARGS) if text != other}


def test_of_a_script_its_content_counts_and_not_its_path(tmp_path: Path) -> None:
    def of(name: str, content: str) -> str:
        write(tmp_path, content, name)
        return hash_of(tmp_path, PLAIN.replace('agent = "random"', f'script = "{name}"'))

    assert of("a.py", "print(1)") == of("b.py", "print(1)")
    assert of("a.py", "print(2)") != of("b.py", "print(1)")
    assert read_manifest(tmp_path / "m.toml").script == tmp_path / "b.py"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            PLAIN + "episods = 3\n",
            r"there is no key episods, maybe episodes; the keys are name, env, kwargs, wrappers,",
        ),
        (PLAIN + '[[wrappers]]\nname = "A"\nargs = 1\n', r"no key wrappers.0.args; the keys are name, kwargs"),
        (PLAIN.replace('env = "cartpole"', ""), r"the key env is missing"),
        (PLAIN + 'record = "all"\n', r"record: input should be 'actions', 'full' or 'strict'"),
        (PLAIN.replace("[0, 1]", "[0, -1]"), r"seeds.1: input should be greater than or equal to 0"),
        (PLAIN.replace("[0, 1]", "[]"), r"seeds: list should have at least 1 item"),
        (PLAIN.replace("[0, 1]", "[1, 1]"), r"seeds has one twice"),
        (PLAIN.replace("[0, 1]", "3"), r"seeds: input should be a valid list"),
        (PLAIN + 'episodes = "3"\n', r"episodes: input should be a valid integer"),
        (PLAIN + 'script = "a.py"\n', r"one of the two"),
        (PLAIN.replace('agent = "random"', ""), r"one of the two"),
        (PLAIN + 'arguments = ["x"]\n', r"arguments are for a script"),
        (PLAIN + "kwargs = { day = 2026-01-31 }\n", r"kwargs are texts, numbers,"),
        (PLAIN + "kwargs = { x = nan }\n", r"kwargs are texts, numbers,"),
        (PLAIN.replace('agent = "random"', 'script = "nowhere.py"'), r"cannot be read: No such file"),
        ("name = ", r"is no TOML"),
    ],
)
def test_what_is_wrong_is_said_by_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=said) as caught:
        read_manifest(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match="cannot be read"):
        read_manifest(tmp_path / "no.toml")


def described(spec: Any) -> Description:
    return Description(kind="env", name="cartpole", worker="w", spec=None if spec is None else json.dumps(spec))


STACK = {"name": "FrameStackObservation", "entry_point": "gymnasium.wrappers:F", "kwargs": {"stack_size": 4}}
AWARE = {"name": "TimeAwareObservation", "entry_point": "gymnasium.wrappers:T", "kwargs": {}}


@pytest.mark.parametrize(
    ("wanted", "has", "said"),
    [
        ("", [STACK], None),
        ("wrappers = []\n", [], None),
        ('wrappers = ["FrameStackObservation", "TimeAwareObservation"]\n', [STACK, AWARE], None),
        ('wrappers = [{ name = "FrameStackObservation", kwargs = { stack_size = 4 } }]\n', [STACK], None),
        ('wrappers = [{ name = "FrameStackObservation", kwargs = { stack_size = 3 } }]\n', [STACK], "stack_size"),
        ('wrappers = ["TimeAwareObservation", "FrameStackObservation"]\n', [STACK, AWARE], "workers wrap, so serve it"),
        ('wrappers = ["FrameStackObservation"]\n', [STACK, AWARE], "and the manifest says"),
        ("wrappers = []\n", [AWARE], "TimeAwareObservation"),
        ("wrappers = []\n", None, "does not say which wrappers"),
    ],
)
def test_an_env_that_is_wrapped_otherwise_is_refused(wanted: str, has: Any, said: str | None) -> None:
    manifest = Manifest.model_validate(tomllib.loads(PLAIN + wanted))
    description = described(None if has is None else {"id": "CartPole-v1", "additional_wrappers": has})
    if said is None:
        manifest.check_wrappers(description)
        return
    with pytest.raises(UsageError, match=said):
        manifest.check_wrappers(description)


def test_what_a_script_is_told_is_what_its_meshes_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = read_manifest(write(tmp_path, KWARGS + "[[wrappers]]\nname = 'A'\nkwargs = {a = 1}\n"))
    told = Experiment(hash=file.hash, manifest=file.manifest, run="r", seed=3)
    assert Experiment.from_environment() is None
    for name, value in told.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Experiment.from_environment() == told
    record = record_of(None, labels={"mine": "x", "seed": "9"}, experiment=told)
    assert record is not None
    assert (record.level, record.manifest, record.policy) == ("actions", file.hash, "random")
    assert record.labels == {"mine": "x", "experiment": "pushing", "experiment_run": "r", "seed": "3"}
    asked = record_of("off", policy="other", experiment=told)
    assert asked is not None
    assert (asked.level, asked.policy) == ("off", "other")
    monkeypatch.setenv("MESHRL_EXPERIMENT", "{}")
    with pytest.raises(UsageError, match="unset it: the key hash is missing"):
        Experiment.from_environment()
