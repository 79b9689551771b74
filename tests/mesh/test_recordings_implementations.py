"""Recordings of vector implementations: the rows of each sub-environment, cut into episodes by what they told."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from meshrl import EnvWorker, Mesh
from meshrl.errors import EpisodeDiverged
from meshrl.worker.recorded_vector import row_infos
from tests.mesh.conftest import until
from tests.mesh.recordings import Told, listed
from tests.mesh.test_recordings import same_as

COUNT = 3


class Counters(VectorEnv[Any, Any, Any]):
    """Counts the steps of each of its sub-environments, which end after 2, 3 and 4; always the same arrays."""

    def __init__(self, num_envs: int = 1, mode: AutoresetMode = AutoresetMode.NEXT_STEP, **_: Any) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
        self.single_action_space = spaces.Discrete(9)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self._obs = np.zeros((num_envs, 2), np.float32)
        self._over = np.zeros(num_envs, bool)
        self._episode = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._obs[:] = 0
        self._over[:] = False
        return self._obs, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        same = self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        reset = self._over.copy() if not same else np.zeros(self.num_envs, bool)
        self._obs[:, 0] = np.where(reset, 0, self._obs[:, 0] + 1)
        self._obs[:, 1] = np.where(reset, -1, actions)
        ended = ~reset & (self._obs[:, 0] >= 2 + np.arange(self.num_envs))
        rewards = np.where(reset, 0.0, actions.astype(float)).astype(np.float32)
        infos: dict[str, Any] = {
            "count": self._obs[:, 0].astype(int),
            "_count": ~reset,
            "lives": np.full(len(reset), 7),
        }
        if same and ended.any():
            finals: Any = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(ended):
                finals[i] = self._obs[i].copy()
            infos |= {"final_obs": finals, "_final_obs": ended}
            infos |= {"final_info": {"count": infos["count"], "_count": ended}, "_final_info": ended}
            infos["_count"] = ~ended
            self._obs[ended] = 0
        self._over = ended
        return self._obs, rewards, ended, np.zeros_like(ended), infos


def expected(mode: AutoresetMode, steps: list[np.ndarray[Any, Any]]) -> dict[tuple[int, int], Told]:
    """The episodes that ended, by lane and number."""
    episodes: dict[tuple[int, int], Told] = {}
    for i in range(COUNT):
        told, number, reset = Told([np.zeros(2, np.float32)], [{}]), 0, False
        for actions in steps:
            if reset:
                told, reset = Told([np.array([0, -1], np.float32)], [{"lives": np.int64(7)}]), False
                continue
            count = len(told.actions) + 1
            told.actions.append(int(actions[i]))
            told.rewards.append(float(actions[i]))
            told.obs.append(np.array([count, actions[i]], np.float32))
            told.terminations.append(count >= 2 + i)
            told.truncations.append(False)
            same = mode == AutoresetMode.SAME_STEP and told.ended
            told.infos.append({"count": np.int64(count), **({} if same else {"lives": np.int64(7)})})
            if told.ended:
                episodes[i, number] = told
                number, reset = number + 1, mode == AutoresetMode.NEXT_STEP
                if same:
                    told = Told([np.zeros(2, np.float32)], [{"lives": np.int64(7)}])
    return episodes


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
async def test_each_sub_environment_has_its_episodes(url: str, mode: AutoresetMode) -> None:
    alone: Any = Single
    gymnasium.register("Counters-v0", alone, vector_entry_point=lambda **kw: Counters(mode=mode, **kw))
    try:
        async with (
            EnvWorker({"of": "Counters-v0"}, url, vectors="gymnasium", record="full") as worker,
            Mesh(url) as m,
        ):
            rng = np.random.default_rng(1)
            steps = [rng.integers(0, 9, COUNT) for _ in range(30)]
            async with await m.vector("of", COUNT, shards=1, seeding="implementation", autoreset_mode=mode) as envs:
                await envs.reset(seed=5)
                for actions in steps:
                    await envs.step(actions)
            told = expected(mode, steps)
            found = {}
            for one in await listed(m, "of", len(told) + open_at_the_end(told, mode, len(steps))):
                _, lane, number = one.episode_id.split(".")
                found[int(lane), int(number)] = one
            assert worker.recorded.lost == 0
            for key, its in told.items():
                episode = await m.episode(found[key].episode_id)
                same_as(its, episode)
                assert not episode.remade
                assert (episode.env_id, episode.seed) == (key[0], 5 + key[0] if key[1] == 0 else None)
                verdict = await m.verify(found[key].episode_id)
                assert (verdict.status, verdict.reasons) == ("unverifiable", ("implementation",))
            transitions = [batch async for batch in m.experience("of", follow=False)]
            assert sum(map(len, transitions)) == sum(one.steps for one in found.values())
            with pytest.raises(EpisodeDiverged):
                await m.fork(found[0, 0].episode_id, step=1)
    finally:
        del gymnasium.registry["Counters-v0"]


def open_at_the_end(told: dict[tuple[int, int], Told], mode: AutoresetMode, steps: int) -> int:
    """How many were under way, and have steps, when all was closed."""
    last = 0
    for i in range(COUNT):
        rows = sum(len(one.actions) for (lane, _), one in told.items() if lane == i)
        resets = sum(lane == i for lane, _ in told) if mode == AutoresetMode.NEXT_STEP else 0
        last += steps > rows + resets
    return last


class Single(gymnasium.Env[Any, Any]):
    """One by itself, which does something else."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(9)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, _action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full(2, -5, np.float32), 0.0, False, False, {}


async def test_nothing_is_recorded_of_what_could_not_be_run_again_but_with_observations(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url, vectors="gymnasium") as worker, Mesh(url) as m:
        for record in (None, "actions", "full"):
            async with await m.vector("of", 8, shards=1, seeding="implementation", record=record) as envs:
                await envs.reset(seed=1)
                for n in range(20):
                    await envs.step(np.full(8, n % 2))
            if record == "full":
                await until(lambda: worker.recorded.recorded == 8 * 21, "it is stored")
            else:
                assert worker.recorded.recorded == 0


def test_infos_that_were_merged_come_apart_by_their_masks() -> None:
    infos = {
        "a": np.array([1, 2, 3]),
        "_a": np.array([True, False, True]),
        "b": {"c": np.array([0.5, 0.25, 0.0]), "_c": np.array([False, True, False])},
        "all": np.array([[1, 2], [3, 4], [5, 6]]),
        "one": "text",
    }
    first, second, third = (info for _, info in row_infos(infos, 3))
    assert first["a"] == 1
    assert third["a"] == 3
    assert "a" not in second
    assert second["b"] == {"c": 0.25}
    assert "b" not in first
    assert [info["all"].tolist() for info in (first, second, third)] == [[1, 2], [3, 4], [5, 6]]
    assert {info["one"] for info in (first, second, third)} == {"text"}
