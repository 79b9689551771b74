"""Stable-Baselines3's wrappers, callbacks, checks and algorithms on top of remote envs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO, SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    sync_envs_normalization,
)

import meshrl
from meshrl.adapters.sb3 import MeshVecEnv
from tests.mesh.test_vector_parity import different
from tests.sb3 import envs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


WRAPPERS: dict[str, tuple[str, Callable[[VecEnv], VecEnv]]] = {
    "monitor": ("CartPole-v1", VecMonitor),
    "normalize": ("CartPole-v1", VecNormalize),
    "frame stack": ("CartPole-v1", lambda venv: VecFrameStack(venv, 3)),
    "check": ("CartPole-v1", lambda venv: VecCheckNan(venv, raise_exception=True)),
    "all": ("CartPole-v1", lambda venv: VecFrameStack(VecNormalize(VecMonitor(venv)), 2)),
    "dicts monitored": ("OfDicts", VecMonitor),
    "part of a dict": ("OfDicts", lambda venv: VecExtractDictObs(venv, "where")),
    "tuples monitored": ("OfTuples", VecMonitor),
}


def without_times(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for info in infos:
        if "episode" in info:
            del info["episode"]["t"]  # seconds
    return infos


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_give_what_they_give_on_local_envs(mesh: dict[str, Any], name: str) -> None:
    served, wrap = WRAPPERS[name]
    make = getattr(envs, served, lambda: gymnasium.make(served))
    local, remote = wrap(DummyVecEnv([make] * 3)), wrap(MeshVecEnv(served, 3, mesh=mesh))
    assert remote.observation_space == local.observation_space
    ended = 0
    local.action_space.seed(5)
    for venv in (local, remote):
        venv.seed(5)
    assert not different(remote.reset(), local.reset())
    for _ in range(80):
        actions = np.array([local.action_space.sample() for _ in range(3)])
        (*expected, expected_infos), (*got, got_infos) = local.step(actions), remote.step(actions)
        assert not different(got, expected)
        assert not different(without_times(got_infos), without_times(expected_infos))
        ended += int(got[2].sum())
    assert ended
    remote.close()


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "OfDicts", "Goals"])
def test_check_env_passes_on_a_single_remote_env(mesh: dict[str, Any], name: str) -> None:
    with meshrl.make(name, mesh=mesh) as env:
        check_env(env, warn=False)


def small_model(venv: VecEnv, **more: Any) -> Any:
    return PPO("MlpPolicy", venv, n_steps=32, batch_size=32, n_epochs=2, seed=3, device="cpu", **more)


def test_a_model_learns_on_remote_envs_exactly_what_it_learns_on_local_ones(mesh: dict[str, Any]) -> None:
    learned = []
    for venv in (
        DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 4),
        MeshVecEnv("CartPole-v1", 4, mesh=mesh, shards=2),
    ):
        model = small_model(VecNormalize(VecMonitor(venv)))
        model.learn(1024)
        learned.append({key: value.numpy() for key, value in model.policy.state_dict().items()})
        venv.close()
    assert not different(learned[1], learned[0])


def test_a_model_is_evaluated_alike_on_local_and_remote_envs(mesh: dict[str, Any]) -> None:
    local = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
    remote = MeshVecEnv("CartPole-v1", 3, mesh=mesh)
    model = small_model(local)
    told = []
    for venv in (VecMonitor(local), VecMonitor(remote)):
        venv.seed(11)
        told.append(evaluate_policy(model, venv, n_eval_episodes=8, return_episode_rewards=True))
    assert told[0] == told[1]
    assert len(told[0][0]) == 8
    remote.close()


def test_envs_that_nothing_monitors_are_warned_of_and_those_of_a_worker_are_not(mesh: dict[str, Any]) -> None:
    bare, watched = (MeshVecEnv(name, 2, mesh=mesh) for name in ("CartPole-v1", "monitored"))
    model = small_model(bare)
    with pytest.warns(UserWarning, match="Monitor"):
        evaluate_policy(model, bare, n_eval_episodes=2)
    returns, _ = evaluate_policy(model, watched, n_eval_episodes=4)
    assert returns > 0
    for venv in (bare, watched):
        venv.close()


def test_eval_callback_evaluates_keeps_the_best_and_goes_on(mesh: dict[str, Any], tmp_path: Path) -> None:
    venv = VecNormalize(VecMonitor(MeshVecEnv("CartPole-v1", 4, mesh=mesh)))
    tested = VecNormalize(VecMonitor(MeshVecEnv("CartPole-v1", 2, mesh=mesh)), training=False, norm_reward=False)
    callback = EvalCallback(
        tested, n_eval_episodes=4, eval_freq=64, log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0
    )
    model = small_model(venv)
    model.learn(1024, callback=callback)
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (4, 4)
    assert callback.best_mean_reward > 0
    again = PPO.load(tmp_path / "best_model", env=venv, device="cpu")
    again.learn(128)
    venv.save(str(tmp_path / "normalize.pkl"))
    loaded = VecNormalize.load(str(tmp_path / "normalize.pkl"), tested.venv)
    sync_envs_normalization(venv, loaded)
    assert np.array_equal(loaded.obs_rms.mean, venv.obs_rms.mean)
    for one in (venv, tested):
        one.close()


def test_masked_actions_are_never_taken(mesh: dict[str, Any]) -> None:
    venv = VecMonitor(MeshVecEnv("Masked", 4, mesh=mesh))
    model = MaskablePPO("MlpPolicy", venv, n_steps=32, batch_size=64, n_epochs=2, seed=1, device="cpu")
    model.learn(512)  # an action that is masked raises
    assert {episode["r"] for episode in model.ep_info_buffer} == {7.0}
    venv.close()


def her(venv: VecEnv) -> Any:
    buffer = {"n_sampled_goal": 2, "goal_selection_strategy": "future"}
    return SAC(
        "MultiInputPolicy",
        venv,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=buffer,
        learning_starts=60,
        train_freq=4,
        seed=1,
        device="cpu",
    )


ALGORITHMS: dict[str, tuple[str, Callable[[VecEnv], Any]]] = {
    "a2c": ("OfDicts", lambda venv: A2C("MlpPolicy", VecExtractDictObs(venv, "exact"), seed=1, device="cpu")),
    "dqn": ("CartPole-v1", functools.partial(DQN, "MlpPolicy", seed=1, device="cpu", learning_starts=50)),
    "sac": ("Pendulum-v1", functools.partial(SAC, "MlpPolicy", seed=1, device="cpu", learning_starts=50)),
    "hindsight": ("Goals", her),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_algorithms_learn_what_they_learn_on_local_envs(mesh: dict[str, Any], name: str) -> None:
    served, make = ALGORITHMS[name]
    local = getattr(envs, served, lambda: gymnasium.make(served))
    learned = []
    for venv in (DummyVecEnv([local] * 2), MeshVecEnv(served, 2, mesh=mesh)):
        model = make(venv)
        model.learn(160)
        learned.append({key: value.numpy() for key, value in model.policy.state_dict().items()})
        venv.close()
    assert not different(learned[1], learned[0])
