"""Episodes that are run again: exact where nothing was changed, and what was changed is named."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from meshrl.client.verifying import Verdict
from meshrl.worker import describe
from tests.mesh.learners import Learned, of_all, play_one, play_pool, play_vector
from tests.mesh.recordings import listed
from tests.mesh.worker_process import WorkerProcess

EPISODES = 1000


@contextmanager
def busy() -> Iterator[None]:
    """A machine of which a processor has something else to do."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


async def test_a_thousand_episodes_that_were_recorded_under_load_are_exact(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Learned()

    async def learner(form: Any, **kwargs: Any) -> None:
        async with Mesh(server.url) as m:
            while len(told.episodes) < EPISODES:
                told.add(await form(m, "cartpole", "actions", 400, num_envs=8, seed=len(told.episodes), **kwargs))

    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(WorkerProcess(server.url, {"cartpole": "CartPole-v1"}))
        with busy():
            modes = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
            await asyncio.gather(*(learner(play_vector, mode=mode) for mode in modes), learner(play_pool))
        async with Mesh(server.url) as m:
            found = [one.episode_id for one in await listed(m, "cartpole", len(told.episodes))]
            some = dict(list(told.episodes.items())[::10])
            Learned(some).check(await of_all(m.episode, some))
        assert sorted(found) == sorted(told.episodes)
        monkeypatch.setenv("MESHRL_URL", server.url)
        assert await asyncio.to_thread(main, ["verify", "--all", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"episode_id": id_, "status": "exact"} for id_ in found]


def changed(**constants: Any) -> Any:
    """CartPole with some constants changed, which nothing that it says of itself tells."""

    def make() -> gymnasium.Env[Any, Any]:
        env = gymnasium.make("CartPole-v1")
        for name, value in constants.items():
            assert hasattr(env.unwrapped, name)
            setattr(env.unwrapped, name, value)
        return env

    return make


async def verdicts(url: str, factory: Any, ids: list[str]) -> list[Verdict]:
    """What is found where another env is served under the name."""
    async with EnvWorker({"of": factory}, url), Mesh(url) as m:
        return list((await of_all(m.verify, ids)).values())


async def recorded(url: str, level: Any) -> Learned:
    """Episodes of CartPole in each form."""
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        told = Learned()
        for form in (play_one, play_vector, play_pool):
            told.add(await form(m, "of", level, 60))
        await listed(m, "of", len(told.episodes))
        return told


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_a_constant_that_was_changed_is_found_with_step_and_field(url: str, level: Any) -> None:
    told = await recorded(url, level)
    ids = list(told.episodes)
    # Each shows in what the first push does, wherever the pole is.
    for constants in ({"total_mass": 1.2}, {"length": 0.6}, {"force_mag": 10.1}):
        for verdict in await verdicts(url, changed(**constants), ids):
            assert (verdict.status, verdict.step, verdict.field) == ("diverged", 1, "observation"), constants
    # The pole falls earlier: by an observation that is the same an episode ends that went on, or the other way round.
    for id_, verdict in zip(ids, await verdicts(url, changed(theta_threshold_radians=0.1), ids), strict=True):
        one = told.episodes[id_]
        over = [n for n, obs in enumerate(one.obs[1:], 1) if abs(obs[2]) > 0.1 and not one.terminations[n - 1]]
        told_of = ("diverged", over[0], "terminated") if over else ("exact", None, None)
        assert (verdict.status, verdict.step, verdict.field) == told_of
    assert {verdict.status for verdict in await verdicts(url, changed(), ids)} == {"exact"}


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_where_a_version_was_changed_nothing_is_said_to_have_diverged(
    url: str, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list((await recorded(url, level)).episodes)
    known = describe.versions
    for name, there in (("numpy", True), ("libc", True), ("simulator", False)):
        with monkeypatch.context() as patch:
            patch.setattr(describe, "versions", lambda env, name=name: {**known(env), name: "99.1"})
            assert {verdict.status for verdict in await verdicts(url, "CartPole-v1", ids)} == {"exact"}
            for verdict in await verdicts(url, changed(force_mag=10.1), ids):
                assert (verdict.status, verdict.reasons) == ("unverifiable", ("versions",))
                assert (verdict.step, verdict.field) == (1, "observation")
                assert verdict.details is not None
                was, now = verdict.details["versions"][name]
                assert ((was is not None), now) == (there, "99.1")


class BigEndian(gymnasium.Env[Any, Any]):
    """Tells numbers in a byte order that is not this machine's."""

    observation_space = gymnasium.spaces.Box(-10, 10, (5,), np.dtype(">f4"))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = 0
        return np.zeros(5, ">f4"), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return (np.arange(5) / 7 + self._n / 100).astype(">f4"), 1.0, self._n >= 10, False, {}


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_numbers_of_another_byte_order_are_exact(url: str, level: Any) -> None:
    async with EnvWorker({"of": BigEndian}, url), Mesh(url) as m:
        told = await play_one(m, "of", level, 35)
        await listed(m, "of", len(told.episodes))
        told.check(await of_all(m.episode, told.episodes))
        verdicts = await of_all(m.verify, told.episodes)
        assert {verdict.status for verdict in verdicts.values()} == {"exact"}
