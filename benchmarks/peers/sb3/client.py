"""Stable-Baselines3's PPO on eight CartPoles: on the mesh, and on this machine alone. One learning run a command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # meshrl is this tree's

import driver
import torch
from peers.served import cartpole
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from meshrl.adapters.sb3 import MeshVecEnv
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.guard import Guarded
from meshrl.errors import UnknownName

NUM_ENVS = 8
WARM_UP_STEPS = 512
LISTENING_S = 60.0
LOG = Path.cwd() / "stderr"  # where the driver looks for the reason of an end
WORKER = Path(__file__).resolve().parents[1] / "meshrl" / "worker.py"
VERSIONS = ("stable-baselines3", "torch", "gymnasium", "numpy")


def learned(venv: VecEnv, steps: int) -> driver.Answer:
    """Learns for ``steps`` env steps, with the settings of examples/ppo_sb3.py."""
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
        seed=0,
        device="cpu",
    )
    began = time.perf_counter()
    model.learn(steps)
    return {"count": model.num_timesteps, "seconds": time.perf_counter() - began}


def serving(url: str) -> None:
    """Waits until the worker is seen.

    Raises:
        UnknownName: it does not come up.
    """
    until = time.monotonic() + LISTENING_S
    while True:
        try:
            MeshVecEnv("cartpole", 1, mesh={"url": url}).close()
        except UnknownName:
            if time.monotonic() > until:
                raise
        else:
            return


def main() -> None:
    torch.set_num_threads(1)  # a network this small is slower on several
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])  # the worker's too
    server = EmbeddedServer.start()
    worker = Guarded.spawn([sys.executable, str(WORKER), server.url, "default", "first", "cartpole"], log=LOG)

    serving(server.url)

    def mesh(command: Mapping[str, Any]) -> driver.Answer:
        if worker.poll() is not None:
            raise RuntimeError("the worker has ended")
        venv = MeshVecEnv("cartpole", NUM_ENVS, mesh={"url": server.url})
        try:
            return learned(venv, command["steps"])
        finally:
            venv.close()

    def dummy(command: Mapping[str, Any]) -> driver.Answer:
        return learned(DummyVecEnv([cartpole] * NUM_ENVS), command["steps"])

    learned(DummyVecEnv([cartpole] * NUM_ENVS), WARM_UP_STEPS)  # what torch does once, neither side shall pay
    driver.obey(
        {"ppo_mesh": mesh, "ppo_dummy": dummy},
        versions=driver.versions_of(*VERSIONS),
        notes="MeshVecEnv over one worker process, and DummyVecEnv in this process; torch on one thread",
    )


if __name__ == "__main__":
    main()
