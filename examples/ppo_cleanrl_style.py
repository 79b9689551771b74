"""PPO in one file, on envs leased by name: ``meshrl.make_vec`` where there would be ``gymnasium.make_vec``.

::

    pip install meshrl torch
    python examples/ppo_cleanrl_style.py

The envs are on the mesh that ``Mesh()`` finds, or on one that it starts if there is none. It reads from top to bottom;
:class:`Settings` is the command line (``--total-timesteps 20000``). In about a minute on two cores CartPole is learned.

Vector envs reset by themselves, in the step *after* the one that ended an episode. That step's action is ignored and
its reward is 0: what is stored of it is no transition of any episode, and ``valid`` keeps it out of the loss. In return
the last observation of every episode is seen, so that the value behind a time limit needs no second look.
"""

import argparse
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import nn
from torch.distributions import Categorical

import meshrl


@dataclass(frozen=True)
class Settings:
    """Also the command line."""

    env: str = "CartPole-v1"  # a served name; observations are vectors, actions one of n
    url: str = ""  # of the mesh's NATS server; without one, the mesh that is found or started
    seed: int = 1
    total_timesteps: int = 50_000  # of all envs together
    num_envs: int = 8
    num_steps: int = 64  # of each env between two updates
    num_epochs: int = 10
    num_minibatches: int = 4
    learning_rate: float = 1e-3  # falls to 0
    gamma: float = 0.98
    gae_lambda: float = 0.9
    clip: float = 0.2
    entropy_weight: float = 0.0
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    eval_episodes: int = 20


def network(inputs: int, outputs: int, scale: float) -> nn.Sequential:
    """Two hidden layers; ``scale`` is that of the first outputs."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, scale), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)  # such small networks gain nothing by more
    draw = np.random.default_rng(settings.seed)
    mesh = {"url": settings.url} if settings.url else {}

    envs = RecordEpisodeStatistics(meshrl.make_vec(settings.env, settings.num_envs, mesh=mesh), buffer_length=20)
    space, choices = envs.single_observation_space, envs.single_action_space
    assert isinstance(space, Box), "observations are vectors"
    assert isinstance(choices, Discrete), "actions are one of n"
    inputs = space.shape[0]
    actor, critic = network(inputs, int(choices.n), 0.01), network(inputs, 1, 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=1e-5)

    shape = (settings.num_steps, settings.num_envs)
    batch = settings.num_steps * settings.num_envs
    observations = torch.zeros((*shape, inputs))
    actions = torch.zeros(shape, dtype=torch.long)
    log_probs, rewards, values, terminated, ended, valid = (torch.zeros(shape) for _ in range(6))

    iterations = max(1, settings.total_timesteps // batch)
    began, told = time.monotonic(), 0.0
    obs = torch.as_tensor(envs.reset(seed=settings.seed)[0])
    has_ended = torch.zeros(settings.num_envs)  # by the step before: the next one resets

    for iteration in range(1, iterations + 1):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - (iteration - 1) / iterations)

        # ------------------------------------------------------------ play

        for t in range(settings.num_steps):
            with torch.no_grad():
                policy = Categorical(logits=actor(obs))
                action = policy.sample()
                values[t] = critic(obs).squeeze(-1)
            observations[t], actions[t], log_probs[t] = obs, action, policy.log_prob(action)
            valid[t] = 1 - has_ended
            next_obs, reward, terminations, truncations, _ = envs.step(action.numpy())
            obs = torch.as_tensor(next_obs)
            rewards[t], terminated[t] = torch.as_tensor(reward), torch.as_tensor(terminations)
            ended[t] = has_ended = torch.as_tensor(terminations | truncations).float()

        # ------------------------------------------------------------ advantages

        with torch.no_grad():
            next_value = critic(obs).squeeze(-1)
        advantages = torch.zeros(shape)
        advantage = torch.zeros(settings.num_envs)
        for t in reversed(range(settings.num_steps)):
            # The observation after an episode's last step is its own last one, not the next one's first: a value
            # behind a time limit counts, and nothing of the next episode runs into this one.
            delta = rewards[t] + settings.gamma * next_value * (1 - terminated[t]) - values[t]
            advantage = delta + settings.gamma * settings.gae_lambda * (1 - ended[t]) * advantage
            advantages[t], next_value = advantage, values[t]
        returns = advantages + values

        # ------------------------------------------------------------ learn

        played = np.flatnonzero(valid.numpy())  # without the steps that only reset
        flat_observations, flat_actions = observations.reshape(batch, inputs), actions.reshape(batch)
        flat_log_probs, flat_advantages, flat_returns = (x.reshape(batch) for x in (log_probs, advantages, returns))
        for _ in range(settings.num_epochs):
            for part in np.array_split(draw.permutation(played), settings.num_minibatches):
                chosen = torch.as_tensor(part)
                policy = Categorical(logits=actor(flat_observations[chosen]))
                ratio = (policy.log_prob(flat_actions[chosen]) - flat_log_probs[chosen]).exp()
                gain = flat_advantages[chosen]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
                policy_loss = -torch.min(ratio * gain, clipped * gain).mean()
                value_loss = (critic(flat_observations[chosen]).squeeze(-1) - flat_returns[chosen]).pow(2).mean() / 2
                loss = policy_loss + settings.value_weight * value_loss
                loss = loss - settings.entropy_weight * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()

        # ------------------------------------------------------------ tell

        seconds = time.monotonic() - began
        if seconds - told > 5 or iteration == iterations:
            told = seconds
            recent = np.mean(envs.return_queue) if envs.return_queue else np.nan
            steps = iteration * batch
            print(
                f"{steps:>7,} steps in {seconds:5.1f} s: mean return {recent:6.1f} of the last 20 episodes", flush=True
            )
    envs.close()

    # ---------------------------------------------------------------- one episode in each of as many envs

    with meshrl.make_vec(settings.env, settings.eval_episodes, mesh=mesh) as eval_envs:
        obs = torch.as_tensor(eval_envs.reset(seed=settings.seed + 10_000)[0])
        episode_returns, playing = np.zeros(settings.eval_episodes), np.ones(settings.eval_episodes, np.bool_)
        while playing.any():
            with torch.no_grad():
                action = actor(obs).argmax(-1)
            next_obs, reward, terminations, truncations, _ = eval_envs.step(action.numpy())
            obs = torch.as_tensor(next_obs)
            episode_returns += reward * playing
            playing &= ~(terminations | truncations)
    print(f"learned policy: mean return {episode_returns.mean():.1f} of {settings.eval_episodes} episodes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PPO on envs leased by name.")
    for one in fields(Settings):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    main(Settings(**vars(parser.parse_args())))
