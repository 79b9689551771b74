"""What a recorded episode looked like: each frame is proved to be of that episode, and is as a local env renders it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.cli import main
from meshrl.errors import EpisodeDiverged, EpisodeNotRendered
from meshrl.worker import rerun
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.rerun import Rerun
from tests.mesh.recordings import Told, drive, listed


def local_frames(told: Told, seed: int) -> list[Any]:
    with gymnasium.make("CartPole-v1", render_mode="rgb_array") as env:
        env.reset(seed=seed)
        frames = [env.render()]
        for action in told.actions:
            env.step(action)
            frames.append(env.render())
    return frames


async def shown(m: Mesh, episode_id: str) -> list[Any]:
    return [one async for one in m.frames(episode_id, wait=5.0)]


@pytest.mark.parametrize(
    ("isolation", "render_mode", "level"), [("thread", None, "actions"), ("process", "rgb_array", "full")]
)
async def test_frames_are_those_of_a_local_env_to_the_bit(
    url: str, isolation: Any, render_mode: str | None, level: Any
) -> None:
    async with EnvWorker({"cart": "CartPole-v1"}, url, isolation=isolation), Mesh(url) as m:
        async with await m.env("cart", render_mode=render_mode, record=level) as env:
            told = (await drive(env, 1, 7))[0]
        (summary,) = await listed(m, "cart", 1)
        frames = await shown(m, summary.episode_id)
    assert [one.step for one in frames] == list(range(len(told.actions) + 1))
    assert {(one.steps, one.fps) for one in frames} == {(len(told.actions), 50.0)}
    for one, local in zip(frames, local_frames(told, 7), strict=True):
        np.testing.assert_array_equal(one.image, local)


async def test_an_episode_that_began_without_a_seed_is_shown(url: str) -> None:
    async with EnvWorker({"cart": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("cart", record="actions") as env:
            told = (await drive(env, 2, 7, max_steps=30))[1]
        summary = (await listed(m, "cart", 2))[1]
        frames = await shown(m, summary.episode_id)
    assert len(frames) == len(told.actions) + 1
    with gymnasium.make("CartPole-v1", render_mode="rgb_array") as env:
        env.reset(seed=0)
        bare: Any = env.unwrapped
        bare.state = tuple(map(float, told.obs[0]))
        np.testing.assert_array_equal(frames[0].image, env.render())


async def test_an_answer_ends_where_its_frames_are_large(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "MAX_FRAMES_BYTES", 1_500_000)  # two frames of CartPole, and a bit
    answers = []
    run = HostedEnv.run

    def noted(self: HostedEnv, op: str, body: Any) -> Any:
        frame = run(self, op, body)
        if op == "rerun":
            answers.append(len(frame["frames"]))
        return frame

    monkeypatch.setattr(HostedEnv, "run", noted)
    async with EnvWorker({"cart": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("cart", record="actions") as env:
            told = (await drive(env, 1, 7))[0]
        (summary,) = await listed(m, "cart", 1)
        frames = await shown(m, summary.episode_id)
    assert len(frames) == len(told.actions) + 1 == sum(answers)
    assert max(answers) == 3
    for one, local in zip(frames, local_frames(told, 7), strict=True):
        np.testing.assert_array_equal(one.image, local)


async def test_frames_that_nobody_looks_at_any_more_hold_no_slot(url: str) -> None:
    async with EnvWorker({"cart": "CartPole-v1"}, url, slots=1), Mesh(url) as m:
        async with await m.env("cart", record="actions") as env:
            await drive(env, 1, 7)
        (summary,) = await listed(m, "cart", 1)
        frames = m.frames(summary.episode_id)
        assert (await anext(frames)).step == 0
        await frames.aclose()
        async with await m.env("cart", wait=5.0):
            pass


class Bare(gymnasium.Env[Any, Any]):
    """Draws what comes next from its generator; what it renders is said by its mode."""

    observation_space = spaces.Box(0, 1, (1,), np.float64)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 12}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.random(1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.random(1), 1.0, False, False, {}

    def render(self) -> Any:
        return np.zeros((4, 4, 3), np.uint8)


class Shaky(Bare):
    """Its camera shakes, by the generator that its steps draw from: whoever looks changes what comes next."""

    def render(self) -> Any:
        return self.np_random.integers(0, 255, (4, 4, 3), np.uint8)


class Mute(Bare):
    """It has no pictures, and counts how often any of it was reset."""

    metadata = {"render_modes": ["ansi"]}
    resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        Mute.resets += 1
        return super().reset(seed=seed)


class Grey(Bare):
    """Its pictures are no colours."""

    def render(self) -> Any:
        return np.zeros((4, 4), np.uint8)


async def one_episode(m: Mesh, name: str) -> str:
    async with await m.env(name, record="actions") as env:
        await drive(env, 1, 3, max_steps=40)
    return (await listed(m, name, 1))[0].episode_id


async def test_an_env_whose_render_changes_what_comes_next_is_found_out(url: str) -> None:
    async with EnvWorker({"shaky": Shaky, "bare": Bare}, url), Mesh(url) as m:
        id_ = await one_episode(m, "shaky")
        with pytest.raises(EpisodeDiverged, match=r"observation of step 1 .*meshrl verify") as caught:
            await anext(m.frames(id_))
        assert caught.value.details["step"] == 1
        assert await m.verify(id_)
        assert {one.fps for one in await shown(m, await one_episode(m, "bare"))} == {12.0}


async def test_what_has_no_pictures_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with EnvWorker({"mute": Mute, "grey": Grey, "bare": Bare}, url), Mesh(url) as m:
        mute = await one_episode(m, "mute")
        resets = Mute.resets
        with pytest.raises(EpisodeNotRendered, match=r"mute has no render mode rgb_array .*ansi"):
            await shown(m, mute)
        assert Mute.resets == resets, "it was run again all the same"
        with pytest.raises(EpisodeNotRendered, match=r"uint8 of shape \(4, 4\), not"):
            await shown(m, await one_episode(m, "grey"))

        def ignorant(self: Rerun, body: Any, space: Any) -> None:
            known(self, {key: value for key, value in body.items() if key != "render"}, space)

        known = Rerun.__init__
        monkeypatch.setattr(Rerun, "__init__", ignorant)
        with pytest.raises(EpisodeNotRendered, match="does not render what it runs again; upgrade it"):
            await shown(m, await one_episode(m, "bare"))


async def test_a_video_without_its_library_names_the_extra(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setenv("MESHRL_URL", url)
    assert await asyncio.to_thread(main, ["export", "abc.0.0", "--format", "mp4", "--to", "x.mp4"]) == 1
    assert capsys.readouterr().err == "error: videos need PyAV: pip install 'meshrl[video]'\n"
