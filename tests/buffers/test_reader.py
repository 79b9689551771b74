"""``ExperienceReader``: the feed for trainers that do not await."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from tianshou.data import PrioritizedReplayBuffer

from meshrl import Mesh, make
from meshrl.adapters.experience import ExperienceReader
from meshrl.adapters.portal import Portal
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import MeshUnreachable, SessionClosed, UsageError
from tests.buffers.made import columns_of
from tests.mesh.recordings import Told, drive, listed
from tests.mesh.test_make import in_a_fork
from tests.mesh.worker_process import WorkerProcess

pytestmark = pytest.mark.timeout(300)  # numba compiles for tianshou, once a process


def play(url: str, env: str, episodes: int, seed: int = 1) -> list[Told]:
    """Episodes that are recorded when this returns."""

    async def main() -> list[Told]:
        async with Mesh(url) as m:
            before = len([one async for one in m.episodes(env)])
            async with await m.env(env, record="full") as remote:
                told = await drive(remote, episodes, seed)
            await listed(m, env, before + episodes)
            return told

    return asyncio.run(main())


def test_a_trainer_that_does_not_await_learns_from_the_stream(server: EmbeddedServer) -> None:
    with WorkerProcess(server.url, {"CartPole-v1": "CartPole-v1"}):
        told = play(server.url, "CartPole-v1", 20)
        with make("CartPole-v1", mesh={"url": server.url}) as env:
            model = DQN("MlpPolicy", env, learning_starts=0, device="cpu", buffer_size=2000)
            model.set_logger(Logger(None, []))
            before = [one.detach().clone() for one in model.q_net.parameters()]
            assert isinstance(model.replay_buffer, ReplayBuffer)
            with ExperienceReader("CartPole-v1", mesh=server.url, name="dqn", follow=False) as reader:
                count = reader.fill(model.replay_buffer, least=10_000)
                model.train(gradient_steps=5, batch_size=32)
            assert count == model.replay_buffer.pos == sum(len(one.rewards) for one in told)
            assert any(not one.equal(other) for one, other in zip(before, model.q_net.parameters(), strict=True))


def test_what_is_not_there_in_time_is_there_later(server: EmbeddedServer) -> None:
    buffer = PrioritizedReplayBuffer(1000, alpha=0.6, beta=0.4)
    with WorkerProcess(server.url, {"of": "tests.buffers.made:Counts"}):
        with ExperienceReader("of", mesh=server.url, batch_size=8) as reader:
            assert reader.fill(buffer, timeout=0.0) == 0
            with pytest.raises(TimeoutError):
                reader.read(timeout=0.01)
            told = play(server.url, "of", 4)
            count = sum(len(one.rewards) for one in told)
            assert reader.fill(buffer, least=count) == count
            position = reader.position
            assert reader.fill(buffer, timeout=0.0) == 0
            assert reader.position == position
            more = play(server.url, "of", 2, seed=5)
            for _ in range(200):  # what was asked for in vain comes meanwhile, and nobody has it yet
                if reader._fed.feed.position != position:
                    break
                time.sleep(0.05)
            assert reader._fed.feed.position != position
            assert reader.position == position
            batch = reader.read(timeout=30)
            assert reader.position != position
            assert batch is not None
            wanted = columns_of([*told, *more])["obs"]
            np.testing.assert_array_equal(buffer[:].obs, wanted[:count])
            np.testing.assert_array_equal(batch.observations, wanted[count : count + len(batch)])
        assert reader.closed
        for call in (reader.read, reader.commit):
            with pytest.raises(SessionClosed):
                call()


def test_an_interrupt_loses_no_batch(server: EmbeddedServer) -> None:
    with WorkerProcess(server.url, {"of": "tests.buffers.made:Counts"}):
        told: list[Told] = []
        with ExperienceReader("of", mesh=server.url, name="mine") as reader:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                reader.read()
            told += play(server.url, "of", 2)
            got = np.zeros((0, 2))
            while len(got) < sum(len(one.rewards) for one in told):
                batch = reader.read(timeout=30)
                assert batch is not None
                got = np.concatenate([got, batch.observations])
            np.testing.assert_array_equal(got, columns_of(told)["obs"])


def test_what_a_buffer_refuses_is_given_again(server: EmbeddedServer) -> None:
    box, actions = spaces.Box(0, 1e10, (2,), np.float64), spaces.Discrete(5)
    wrong = ReplayBuffer(100, spaces.Box(0, 1, (3,)), actions, device="cpu")
    right, wide = (ReplayBuffer(100, box, actions, device="cpu", n_envs=envs) for envs in (1, 3))
    with WorkerProcess(server.url, {"of": "tests.buffers.made:Counts"}):
        told = play(server.url, "of", 3)
        with ExperienceReader("of", mesh=server.url, name="mine", follow=False) as reader:
            with pytest.raises(UsageError, match="multiple_of=3"):
                reader.fill(wide)
            with pytest.raises(UsageError, match=r"of shape \(3,\)"):
                reader.fill(wrong)
            reader.fill(right, least=1000)
            assert list(reader) == []
        np.testing.assert_array_equal(right.observations[: right.pos, 0], columns_of(told)["obs"])


def test_a_forked_process_does_not_read_its_parents_feed(server: EmbeddedServer) -> None:
    with ExperienceReader("of", mesh=server.url, name="mine") as reader:

        def read() -> None:
            try:
                reader.read(timeout=1.0)
            finally:
                reader.close()  # which is nothing here

        with pytest.raises(UsageError, match="parent"):
            in_a_fork(read)
        with pytest.raises(TimeoutError):
            reader.read(timeout=0.0)


def test_it_says_what_is_wrong_and_leaves_nothing_behind(server: EmbeddedServer) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        ExperienceReader("of", mesh=server.url, batch_size=0)
    with pytest.raises(MeshUnreachable):
        ExperienceReader("of", mesh={"url": "nats://127.0.0.1:9", "timeout": 0.2})
    reader: Any = ExperienceReader("of", mesh=server.url)
    portal: Portal = reader._portal
    with pytest.warns(ResourceWarning, match="unclosed"):
        del reader
    until = time.monotonic() + 10
    while portal.running and time.monotonic() < until:
        time.sleep(0.01)
    assert not portal.running
