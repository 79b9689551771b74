"""Stable-Baselines3's PPO learns CartPole on remote envs: one line differs from a local run, that of ``MeshVecEnv``.

::

    pip install 'meshrl[sb3]'
    python examples/ppo_sb3.py --total-timesteps 100000
"""

import argparse
import time
from dataclasses import dataclass, fields

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from meshrl.adapters.sb3 import MeshVecEnv


@dataclass(frozen=True)
class Settings:
    """Also the command line."""

    env: str = "CartPole-v1"
    num_envs: int = 8
    total_timesteps: int = 100_000
    eval_episodes: int = 20
    seed: int = 0


class Progress(BaseCallback):
    """Prints the mean return of the last 100 episodes, ten times in all."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.next = every
        self.began = time.monotonic()

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next:
            self.next += self.every
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            mean_return = sum(returns) / max(1, len(returns))
            seconds = time.monotonic() - self.began
            print(f"{self.num_timesteps:>7,} steps, {seconds:5.1f} s: mean return {mean_return:.1f}", flush=True)
        return True


def main(settings: Settings) -> None:
    torch.set_num_threads(1)  # a network this small is slower on several
    venv = VecMonitor(MeshVecEnv(settings.env, settings.num_envs))  # here: DummyVecEnv([...]) on this machine
    model = PPO(
        "MlpPolicy",
        venv,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        ent_coef=0.0,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        seed=settings.seed,
        device="cpu",
    )
    model.learn(settings.total_timesteps, callback=Progress(max(1, settings.total_timesteps // 10)))
    venv.seed(settings.seed + 10_000)
    mean_return, deviation = evaluate_policy(model, venv, n_eval_episodes=settings.eval_episodes)
    print(f"evaluation: mean return {mean_return:.1f} (deviation {deviation:.1f}) of {settings.eval_episodes} episodes")
    venv.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stable-Baselines3's PPO on remote envs.")
    for one in fields(Settings):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    main(Settings(**vars(parser.parse_args())))
