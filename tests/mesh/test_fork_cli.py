"""``meshrl fork``: a recorded episode is gone on with from its middle, by an agent or as it went."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from meshrl.worker.policies import random_policy
from tests.mesh.recordings import Told, drive, listed
from tests.mesh.test_agents import Remembers

SERVED = "CartPole-v1"
STEP = 3


class Leans:
    """A stateful agent: pushes to where the pole leans."""

    def reset(self, seed: int | None = None) -> None:
        pass

    def act(self, obs: Any) -> int:
        return int(obs[2] + obs[3] > 0)

    def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
        pass


def heavy() -> gymnasium.Env[Any, Any]:
    env = gymnasium.make("CartPole-v1")
    env.unwrapped.gravity = 9.9  # type: ignore[attr-defined]
    return env


@pytest.fixture
async def told(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, Told]]:
    monkeypatch.setenv("MESHRL_URL", server.url)
    monkeypatch.setenv("COLUMNS", "160")
    agents = AgentWorker({"random": random_policy, "leans": Leans, "counts": Remembers}, server.url)
    async with EnvWorker({SERVED: SERVED}, server.url), agents, Mesh(server.url) as m:
        async with await m.env(SERVED, record="actions") as env:
            episode = (await drive(env, 1, 4))[0]
        (summary,) = await listed(m, SERVED, 1)
        yield summary.episode_id, episode


async def fork(*arguments: object) -> int:
    return await asyncio.to_thread(main, ["fork", *map(str, arguments)])


def continued(told: Told, copy: int) -> dict[str, Any]:
    """What a random agent does, locally."""
    with gymnasium.make(SERVED) as env:
        env.reset(seed=4)
        for action in told.actions[:STEP]:
            env.step(action)
        steps, ended = 0, False
        while not ended:
            action = random_policy(None, seed=7, env_id=copy, step=STEP + steps, action_space=env.action_space)
            _, _, terminated, truncated, _ = env.step(np.int64(action))
            steps, ended = steps + 1, terminated or truncated
    return {"copy": copy, "steps": steps, "episode_return": float(steps), "end": "terminated"}


async def test_copies_go_on_by_an_agent_as_local_envs_do(
    told: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    id_, episode = told
    asked = (id_, "--step", STEP, "--copies", 3, "--seed", 7, "--json")
    assert await fork(*asked) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["copies"] == [continued(episode, copy) for copy in range(3)]
    rest = len(episode.actions) - STEP
    assert shown["recorded"] == {"steps": rest, "episode_return": float(rest), "end": "terminated"}
    assert (shown["return_before"], shown["agent"]) == (float(STEP), "random")
    assert await fork(*asked) == 0
    assert json.loads(capsys.readouterr().out) == shown, "the same again"


async def test_an_agent_that_remembers_goes_on_in_each_copy_until_it_is_stopped(
    told: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    id_, _ = told
    assert await fork(id_, "--step", STEP, "--copies", 2, "--agent", "leans", "--steps", 9) == 0
    shown = capsys.readouterr().out
    assert "CartPole-v1 after 3 steps of return 3; from there: leans, seed 0" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert [row for row in rows if row[:1] in (["0"], ["1"])] == [[str(copy), "9", "9", "stopped"] for copy in range(2)]


async def test_the_recorded_actions_lead_where_they_led(
    told: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    id_, episode = told
    for step, most in ((0, None), (STEP, None), (STEP, 2)):
        assert await fork(id_, "--step", step, "--as-recorded", *(["--steps", most] if most else ())) == 0
        shown = capsys.readouterr().out
        assert "equal" in shown
        assert f" {most or len(episode.actions) - step} " in shown


class Drifting(gymnasium.Env[Any, Any]):
    """Goes another way from its fifth step on, each time that it is made."""

    observation_space = gymnasium.spaces.Discrete(1000)
    action_space = gymnasium.spaces.Discrete(2)
    made = 0

    def __init__(self) -> None:
        Drifting.made += 1
        self.mine, self.count = Drifting.made, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return 0, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return (self.mine if self.count > 4 else 0), 1.0, self.count == 8, False, {}


async def test_where_the_rest_differs_it_is_said(
    told: tuple[str, Told], server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with EnvWorker({"drifts": Drifting}, server.url), Mesh(server.url) as m:
        async with await m.env("drifts", record="actions") as env:
            await drive(env, 1, 4)
        (summary,) = await listed(m, "drifts", 1)
        assert await fork(summary.episode_id, "--step", 2, "--as-recorded", "--json") == 1
        (copy,) = json.loads(capsys.readouterr().out)["copies"]
        assert copy == {
            "copy": 0,
            "steps": 6,
            "episode_return": 6.0,
            "end": "terminated",
            "record": "step 5: observation",
        }
        assert await fork(summary.episode_id, "--step", 6, "--wait", 1) == 1
        assert "was run again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", 9999], "steps; --step is 0 to"),
        (["--step", 1, "--agent", "random", "--as-recorded"], "give one of the two"),
        (["--step", 1, "--agent", "nobody", "--wait", 0.5], "nobody"),
        (["--step", 1, "--agent", "counts"], "action space"),
    ],
)
async def test_what_cannot_be_gone_on_with_is_said_in_one_line(
    told: tuple[str, Told], arguments: list[object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    id_, episode = told
    assert await fork(id_, *arguments) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert (len(shown.err.splitlines()), shown.out) == (1, "")
    assert await fork(id_, "--step", len(episode.actions)) == 1, "it has ended there"
