"""Playing: an agent that acts in an env from where that stands, to the end of the episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from meshrl.client.agent import RemoteAgent
    from meshrl.client.env import RemoteEnv

End = Literal["terminated", "truncated", "lost", "stopped"]


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it.

    Attributes:
        steps: how many were taken.
        episode_return: the sum of their rewards.
        end: how it ended: ``terminated``, ``truncated``, ``lost`` with its session, or ``stopped`` before an end.
    """

    steps: int
    episode_return: float
    end: End


async def play(
    env: RemoteEnv,
    agent: RemoteAgent,
    obs: Any,
    info: Mapping[str, Any],
    *,
    seed: int | None = None,
    env_id: int = 0,
    first: int = 0,
    most: int | None = None,
    deterministic: bool = False,
) -> Played:
    """Let an agent act until the episode ends.

    Args:
        env: was reset.
        agent: was reset, if it is stateful.
        obs: the env's last observation.
        info: that came with it.
        seed: with ``env_id`` and the number of the step, what a random policy draws from.
        env_id: as of :meth:`~meshrl.client.agent.RemoteAgent.act`.
        first: the number of the next step in its episode.
        most: steps to take at most; None for all.
        deterministic: ask for the best action rather than a sample.

    Raises:
        MeshError: of the env or the agent.
    """
    total, steps = 0.0, 0
    while most is None or steps < most:
        action = await agent.act(obs, info, deterministic, seed=seed, env_id=env_id, step=first + steps)
        obs, reward, terminated, truncated, info = await env.step(action)
        if agent.stateful:
            await agent.observe(reward, terminated, truncated)
        total, steps = total + float(reward), steps + 1
        if terminated or truncated:
            return Played(steps, total, end_of(terminated, truncated, info))
    return Played(steps, total, "stopped")


def end_of(terminated: bool, truncated: bool, info: Mapping[str, Any]) -> End:
    """How a step left its episode."""
    if terminated:
        return "terminated"
    if not truncated:
        return "stopped"
    return "lost" if "session_lost" in info else "truncated"
