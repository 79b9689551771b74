"""The compose stack in real containers: found, stepped, scaled, killed and gone without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import nats
import numpy as np
import pytest

from meshrl import Mesh, RemoteEnv
from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.locate import URL_VARIABLE
from meshrl.bus.record import STATE_DIR_VARIABLE
from meshrl.errors import SessionLost
from tests.compose.stack import Engine, Stack

# Images are built within it, the first time.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

DEADLINE_S = 60.0
# Less than the 10 s after which Docker stops asking and kills.
STOP_S = 8

Step = tuple[Any, float, bool, bool]


def balance(obs: Any) -> int:
    """A policy that keeps CartPole up for some hundred steps."""
    return int(obs[2] + obs[3] > 0)


def local_episode(seed: int) -> list[Step]:
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=seed)
    steps: list[Step] = [(obs, 0.0, False, False)]
    while not (steps[-1][2] or steps[-1][3]):
        obs, reward, terminated, truncated, _ = env.step(balance(obs))
        steps.append((obs, float(reward), terminated, truncated))
    env.close()
    return steps


async def remote_episode(env: RemoteEnv, seed: int) -> list[Step]:
    obs, _ = await env.reset(seed=seed)
    steps: list[Step] = [(obs, 0.0, False, False)]
    while not (steps[-1][2] or steps[-1][3]):
        obs, reward, terminated, truncated, _ = await env.step(balance(obs))
        steps.append((obs, reward, terminated, truncated))
    return steps


def same(remote: list[Step], local: list[Step]) -> bool:
    return len(remote) == len(local) and all(
        a[0].dtype == b[0].dtype and np.array_equal(a[0], b[0]) and a[1:] == b[1:]
        for a, b in zip(remote, local, strict=True)
    )


async def advertised(mesh: Mesh, count: int, name: str = "CartPole-v1") -> set[str]:
    """Wait until exactly that many workers say that they serve ``name``; gives their ids."""

    async def now() -> set[str]:
        return {it.worker for it in await mesh.envs() if it.name == name and not it.draining}

    async with asyncio.timeout(DEADLINE_S):
        if len(workers := await now()) != count:
            async for _ in mesh.watch():
                if len(workers := await now()) == count:
                    break
    return workers


@dataclass
class Learner:
    """Plays one seed again and again, on a new env where it lost the last."""

    mesh: Mesh
    seed: int
    workers: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    episodes: list[list[Step]] = field(default_factory=list)
    playing: asyncio.Event = field(default_factory=asyncio.Event)

    async def learn(self, killed: asyncio.Event) -> None:
        """Until two episodes have ended after ``killed``: the one that was under way, and a whole one."""
        ended_after = 0
        while ended_after < 2:
            async with await self.mesh.env("cartpole", on_loss="raise") as env:
                self.workers.append(env.worker)
                with contextlib.suppress(SessionLost):
                    while ended_after < 2:
                        self.episodes.append(await remote_episode(env, self.seed))
                        self.playing.set()
                        ended_after += killed.is_set()
                    return
                self.lost.append(env.worker)


async def test_an_env_by_name_steps_an_episode_as_a_local_one_does(up: Stack) -> None:
    async with Mesh(up.url) as mesh, await mesh.env("cartpole") as env:
        assert env.name == "CartPole-v1"
        assert same(await remote_episode(env, seed=7), local_episode(seed=7))


async def test_everything_that_the_env_worker_is_told_to_serve_resets_and_steps(up: Stack) -> None:
    async with Mesh(up.url) as mesh:
        names = {advertisement.name for advertisement in await mesh.envs()}
        assert {"CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"} <= names
        for name in sorted(names):
            async with await mesh.env(name) as env:
                obs, _ = await env.reset(seed=3)
                assert obs in env.observation_space
                obs, *_ = await env.step(env.action_space.sample())
                assert obs in env.observation_space


@pytest.mark.parametrize("name", ["cartpole", "frozenlake"])
async def test_frames_are_drawn_without_a_screen_or_a_writable_disk(up: Stack, name: str) -> None:
    async with Mesh(up.url) as mesh, await mesh.env(name, render_mode="rgb_array") as env:
        await env.reset(seed=0)
        frame = await env.render()
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert np.unique(frame).size > 1


async def test_agent_random_acts_and_repeats_itself_for_a_seed(up: Stack) -> None:
    async with Mesh(up.url) as mesh, await mesh.env("cartpole") as env:
        agent = await mesh.agent("random", env=env)
        obs, _ = await env.reset(seed=0)
        actions = [await agent.act(obs, seed=5, step=i) for i in range(20)]
        assert actions == [await agent.act(obs, seed=5, step=i) for i in range(20)]
        assert set(actions) == {0, 1}
        await env.step(actions[0])


def test_workers_are_not_root_and_write_nothing_but_tmp(up: Stack) -> None:
    for container in up.containers("env") + up.containers("agent"):
        code, printed = container.exec_run(["id", "-u"])
        assert (code, int(printed)) != (0, 0)
        code, printed = container.exec_run(["sh", "-c", "touch /tmp/here && touch /opt/meshrl/there"])
        assert code != 0
        assert b"Read-only file system" in printed


def test_nothing_is_published_but_nats_on_the_loopback(up: Stack) -> None:
    published = {
        port: [binding["HostIp"] for binding in bindings]
        for service in ("nats", "env", "agent")
        for container in up.containers(service)
        for port, bindings in container.ports.items()
        if bindings
    }
    assert published == {"4222/tcp": ["127.0.0.1"]}


async def test_a_killed_worker_costs_its_own_learners_one_episode_and_the_others_nothing(up: Stack) -> None:
    await asyncio.to_thread(up.scale, 3)
    async with contextlib.AsyncExitStack() as meshes:
        clients = [await meshes.enter_async_context(Mesh(up.url)) for _ in range(3)]
        for client in clients:
            await advertised(client, 3)
        # Each client spreads its own three over the three workers.
        learners = [Learner(client, seed=i) for i, client in enumerate(clients * 3)]
        killed = asyncio.Event()
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for learner in learners:
                group.create_task(learner.learn(killed))
            for learner in learners:
                await learner.playing.wait()
            victim = learners[0].workers[0]
            container = await asyncio.to_thread(up.container_of, victim)
            await asyncio.to_thread(container.kill)
            killed.set()

    bereaved = [learner for learner in learners if learner.workers[0] == victim]
    others = [learner for learner in learners if learner.workers[0] != victim]
    assert len({learner.workers[0] for learner in learners}) == 3
    for learner in bereaved:
        assert learner.lost == [victim]
        assert learner.workers[1] != victim
    for learner in others:
        assert learner.lost == []
        assert len(learner.workers) == 1
    for learner in learners:
        local = local_episode(learner.seed)
        assert all(same(episode, local) for episode in learner.episodes)


async def test_a_killed_worker_is_replaced_by_scaling_again(up: Stack) -> None:
    await asyncio.to_thread(up.scale, 2)
    async with Mesh(up.url) as mesh:
        before = await advertised(mesh, 2)
        container = await asyncio.to_thread(up.container_of, min(before))
        await asyncio.to_thread(container.kill)
        assert await advertised(mesh, 1) == {max(before)}
        await asyncio.to_thread(up.scale, 2)
        assert max(before) in await advertised(mesh, 2)


async def test_a_stopped_worker_says_goodbye_and_ends_with_0_though_an_env_is_leased(up: Stack) -> None:
    await asyncio.to_thread(up.scale, 1)
    async with Mesh(up.url) as mesh:
        (worker,) = await advertised(mesh, 1)
        env = await mesh.env("cartpole", on_loss="raise")
        await env.reset(seed=0)
        assert env.worker == worker
        container = await asyncio.to_thread(up.container_of, worker)
        await asyncio.to_thread(container.stop, timeout=STOP_S)
        await asyncio.to_thread(container.reload)
        # 137, had it been killed after STOP_S.
        assert container.attrs["State"]["ExitCode"] == 0
        assert await advertised(mesh, 0) == set()
        with pytest.raises(SessionLost):
            await env.step(0)
    await asyncio.to_thread(up.scale, 1)


# Docker's proxy takes connections while nobody is behind it and drops them at once; nats-py forgets to close its
# side of such an attempt before it makes the next.
@pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")
async def test_a_new_nats_container_has_the_old_ones_streams_and_the_workers_come_back(up: Stack) -> None:
    await asyncio.to_thread(up.scale, 1)
    async with Mesh(up.url) as mesh:
        env = await mesh.env("cartpole")
        await env.reset(seed=0)
        client = await nats.connect(up.url)
        await client.jetstream().add_stream(name="kept", subjects=["kept"])
        await client.jetstream().publish("kept", b"by the volume")
        await client.close()

        await asyncio.to_thread(up.compose, "up", "--detach", "--no-build", "--no-deps", "--force-recreate", "nats")

        # The lease stood still while its worker was away.
        async with asyncio.timeout(DEADLINE_S):
            await env.step(0)
        client = await nats.connect(up.url)
        assert (await client.jetstream().get_last_msg("kept", "kept")).data == b"by the volume"
        await client.close()
    gc.collect()  # what nats-py forgot goes here and not in another test


async def test_mesh_finds_the_stack_on_the_default_port_by_itself_and_down_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    try:
        socket.create_server(("127.0.0.1", 4222)).close()
    except OSError as exc:
        pytest.skip(f"port 4222 is taken here: {exc}")
    # Neither this shell's mesh nor one that `meshrl up` left running here.
    for variable in (URL_VARIABLE, EMBEDDED_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(STATE_DIR_VARIABLE, str(tmp_path))

    # In a namespace of its own, so that tests beside this one that say Mesh() do not come here.
    namespace = "compose-test"
    with Stack(engine, namespace=namespace) as stack:
        async with Mesh(stack.url, namespace=namespace) as mesh:
            workers = await advertised(mesh, 1)
        async with Mesh(namespace=namespace) as mesh, await mesh.env("cartpole") as env:
            assert env.worker in workers
            assert same(await remote_episode(env, seed=1), local_episode(seed=1))
        assert {type(it).__name__ for it in stack.leftovers()} == {"Container", "Network", "Volume"}
    assert stack.leftovers() == []
