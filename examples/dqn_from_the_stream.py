"""DQN in one file that never steps an env to learn: all it learns from is what others play, out of the stream.

::

    pip install "meshrl[tianshou]"
    python examples/dqn_from_the_stream.py

Four players, in another process, step CartPole on the mesh that is found, or on one that this starts, and are
recorded: one by chance, two by a rule that chance disturbs (mean returns of some 25, 160 and 400), and one that learns
by climbing hills. The learner here follows the stream of their episodes under a name of its own, puts it into
tianshou's prioritised replay buffer, and trains on that. It leases envs for evaluation alone, and is done when 20
episodes return 475 in the mean. It reads from top to bottom; :class:`Settings` is the command line (``--seed 2``). It
takes about half a minute on two cores.

Who learns from others' actions alone never sees its own mistakes: where they never were, it believes anything. So there
is one term more than in DQN, which lowers the value of actions that nobody takes (*conservative Q-learning*, Kumar et
al. 2020). Without it seeds fail.
"""

import argparse
import asyncio
import multiprocessing
import time
import uuid
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tianshou.data import PrioritizedReplayBuffer
from torch import nn

import meshrl
from meshrl.adapters.experience import ExperienceReader


@dataclass(frozen=True)
class Settings:
    """Also the command line."""

    env: str = "CartPole-v1"  # the players know this one
    url: str = ""  # of the mesh's NATS server; without one, the mesh that is found or started
    seed: int = 1
    target: float = 475.0  # mean return of the evaluation's episodes
    eval_episodes: int = 20
    transitions: int = 40_000  # that the players play, in all
    num_envs: int = 8  # of each player
    learning_starts: int = 20_000  # transitions in the buffer
    max_updates: int = 6_000
    updates_per_evaluation: int = 250
    batch_size: int = 256
    learning_rate: float = 1e-3
    gamma: float = 0.98
    tau: float = 0.005  # by how much of the way the target network follows at each update
    conservative: float = 2.0  # weight of that term
    alpha: float = 0.6  # how much priorities count
    beta: float = 0.4  # how much of that is weighed back


# ---------------------------------------------------------------- the players


def rule(obs: NDArray[np.float32]) -> NDArray[np.int64]:
    """Pushes to where the pole will be in half a second."""
    return (obs[:, 2] + 0.5 * obs[:, 3] > 0).astype(np.int64)


class Climber:
    """A learner of its own: changes a linear policy a little for each episode, and keeps what was no worse."""

    def __init__(self, num_envs: int, draw: np.random.Generator) -> None:
        self.version = 0
        self._draw = draw
        self._best, self._best_return = np.zeros(4), 0.0
        self._tried = draw.normal(size=(num_envs, 4))
        self._returns = np.zeros(num_envs)

    def act(self, obs: NDArray[np.float32]) -> NDArray[np.int64]:
        """A push for each env."""
        return np.where((self._tried * obs).sum(-1) > 0, 1, 0)

    def learn(self, rewards: NDArray[np.float64], ended: NDArray[np.bool_]) -> None:
        """What the pushes brought."""
        self._returns += rewards
        for i in np.flatnonzero(ended):
            if self._returns[i] >= self._best_return:
                self._best, self._best_return = self._tried[i].copy(), self._returns[i]
                self.version += 1
            self._tried[i] = self._best + self._draw.normal(size=4) / 2
            self._returns[i] = 0.0


# How often chance decides, and not the rule, or the climber.
CHANCE = {"random": 1.0, "wild": 0.5, "unsteady": 0.2, "climbing": 0.1}


async def play(settings: Settings, player: str, run: str) -> None:
    draw = np.random.default_rng([settings.seed, *player.encode()])
    climber = Climber(settings.num_envs, draw) if player == "climbing" else None
    wish: dict[str, Any] = {"record": "full", "labels": {"run": run}, "policy": player}
    async with (
        meshrl.Mesh(settings.url or None) as m,
        await m.vector(settings.env, settings.num_envs, **wish) as envs,
    ):
        obs, _ = await envs.reset(seed=settings.seed)
        for _ in range(settings.transitions // len(CHANCE) // settings.num_envs):
            wanted = climber.act(obs) if climber else rule(obs)
            by_chance = draw.random(settings.num_envs) < CHANCE[player]
            actions = np.where(by_chance, draw.integers(0, 2, settings.num_envs), wanted)
            obs, rewards, terminations, truncations, _ = await envs.step(actions)
            if climber:
                climber.learn(rewards, terminations | truncations)
                envs.policy_version = climber.version


def play_all(settings: Settings, run: str) -> None:
    """What the players' process does."""

    async def main() -> None:
        async with asyncio.TaskGroup() as players:
            for player in CHANCE:
                players.create_task(play(settings, player, run))

    asyncio.run(main())


# ---------------------------------------------------------------- the learner


def network(inputs: int, actions: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, actions))


def evaluate(envs: Any, q_network: nn.Module, seed: int) -> float:
    """The mean return of one episode in each env."""
    obs, _ = envs.reset(seed=seed)
    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, np.bool_)
    while playing.any():
        with torch.no_grad():
            actions = q_network(torch.as_tensor(obs)).argmax(-1).numpy()
        obs, rewards, terminations, truncations, _ = envs.step(actions)
        returns += rewards * playing
        playing &= ~(terminations | truncations)
    return float(returns.mean())


def learn(settings: Settings, reader: ExperienceReader, envs: Any) -> float:
    buffer = PrioritizedReplayBuffer(settings.transitions, alpha=settings.alpha, beta=settings.beta)
    inputs, actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    q_network, target_network = network(inputs, actions), network(inputs, actions)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=settings.learning_rate)

    began, mean_return = time.monotonic(), 0.0
    if reader.fill(buffer, least=settings.learning_starts, timeout=300.0) < settings.learning_starts:
        raise TimeoutError(f"{len(buffer)} transitions have come in 5 minutes; do the players play?")
    for update in range(1, settings.max_updates + 1):
        if update % 50 == 0:
            reader.fill(buffer, timeout=0.0)  # what has come meanwhile

        # ------------------------------------------------------------ learn

        batch, indices = buffer.sample(settings.batch_size)
        obs, next_obs = torch.as_tensor(batch.obs), torch.as_tensor(batch.obs_next)
        rewards, terminated = torch.as_tensor(batch.rew).float(), torch.as_tensor(batch.terminated)
        weights = torch.as_tensor(batch.weight).float()
        with torch.no_grad():  # the one network chooses, the other one values
            best = q_network(next_obs).argmax(-1, keepdim=True)
            next_values = target_network(next_obs).gather(-1, best).squeeze(-1)
            goals = rewards + settings.gamma * next_values * ~terminated
        values = q_network(obs)
        taken = values.gather(-1, torch.as_tensor(batch.act)[:, None]).squeeze(-1)
        losses = nn.functional.smooth_l1_loss(taken, goals, reduction="none")
        losses = losses + settings.conservative * (values.logsumexp(-1) - taken)
        optimizer.zero_grad()
        (weights * losses).mean().backward()
        nn.utils.clip_grad_norm_(q_network.parameters(), 10.0)
        optimizer.step()
        buffer.update_weight(indices, (taken - goals).detach())
        with torch.no_grad():
            for target, parameter in zip(target_network.parameters(), q_network.parameters(), strict=True):
                target.lerp_(parameter, settings.tau)

        # ------------------------------------------------------------ evaluate the average, which is steadier

        if update % settings.updates_per_evaluation == 0:
            mean_return = evaluate(envs, target_network, settings.seed + 10_000)
            print(
                f"{update:>6,} updates, {len(buffer):>6,} transitions of others, {time.monotonic() - began:5.1f} s: "
                f"mean return {mean_return:5.1f}",
                flush=True,
            )
            if mean_return >= settings.target:
                break
    return mean_return


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed)  # noqa: NPY002  # tianshou's buffer draws from this
    torch.set_num_threads(1)  # such small networks gain nothing by more
    mesh = {"url": settings.url} if settings.url else {}
    run = uuid.uuid4().hex[:8]
    players = multiprocessing.get_context("spawn").Process(target=play_all, args=(settings, run))
    # If there was no mesh, these have started one, and the players find it.
    with (
        meshrl.make_vec(settings.env, settings.eval_episodes, mesh=mesh) as envs,
        ExperienceReader(settings.env, mesh=mesh, name=f"dqn-{run}", labels={"run": run}) as reader,
    ):
        players.start()
        mean_return = learn(settings, reader, envs)
        players.terminate()  # if they still play
        players.join()
    print(f"learned policy: mean return {mean_return:.1f} of {settings.eval_episodes} episodes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DQN that learns from what others play.")
    for one in fields(Settings):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    main(Settings(**vars(parser.parse_args())))
