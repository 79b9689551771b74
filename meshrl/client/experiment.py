"""Experiments: what a manifest says, done by an agent of the mesh with one of its seeds.

Episode n of env i is reset with ``derive(seed, i, n)``, as of a vector with derived seeds, and the agent draws from the
same: each episode can be played again alone. On record its labels say ``seed`` and ``env_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshrl.client.manifest import Experiment
from meshrl.client.playing import Played, play
from meshrl.client.together import together
from meshrl.protocol.seeds import derive

if TYPE_CHECKING:
    from meshrl.client.mesh import Mesh


async def play_seed(mesh: Mesh, seed: int, *, wait: float, ended: Callable[[], None]) -> list[Played]:
    """The episodes of the agent of a mesh's experiment with one seed, by env and number.

    Args:
        mesh: of the experiment, which has an agent.
        seed: one of the manifest's.
        wait: seconds to wait for each slot.
        ended: called after each episode.

    Raises:
        MeshError: as of :meth:`meshrl.Mesh.env` and :meth:`meshrl.Mesh.agent`.
    """
    experiment = mesh.experiment
    assert experiment is not None, "the mesh is of one"
    count = experiment.manifest.num_envs
    told = await together(_play(mesh, experiment, seed, i, wait, ended) for i in range(count))
    return [played for of_env in told for played in of_env]


async def _play(
    mesh: Mesh, experiment: Experiment, seed: int, env_id: int, wait: float, ended: Callable[[], None]
) -> list[Played]:
    manifest = experiment.manifest
    told: list[Played] = []
    name = manifest.agent
    assert name is not None, "there is an agent"
    labels = {"seed": str(seed), "env_id": str(env_id)}
    stateful = (await mesh.describe(name, "agent", wait=wait)).stateful
    async with (
        await mesh.env(manifest.env, manifest.kwargs, labels=labels, wait=wait) as env,
        await mesh.agent(name, stateful=stateful, env=env, wait=wait) as agent,
    ):
        for episode in range(len(range(env_id, manifest.episodes, manifest.num_envs))):
            own = derive(seed, env_id, episode)
            obs, info = await env.reset(seed=own)
            if stateful:
                await agent.reset(seed=own)
            most, best = manifest.max_steps, manifest.deterministic
            told.append(await play(env, agent, obs, info, seed=own, env_id=env_id, most=most, deterministic=best))
            ended()
    return told
