"""Gymnasium's vector wrappers that need packages of their own: videos by MoviePy, tensors of PyTorch."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers
from imageio_ffmpeg import get_ffmpeg_exe

import meshrl

ENVS = 4
STEPS = 60  # of which some end an episode
HEIGHT, WIDTH = 800, 1200  # four pictures of CartPole in two rows


def sync(mode: AutoresetMode = AutoresetMode.NEXT_STEP, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1", **kwargs)] * ENVS, autoreset_mode=mode)


def frames_of(video: Path) -> Any:
    """uint8 of shape (frames, HEIGHT, WIDTH, 3)."""
    command = [get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


@pytest.mark.filterwarnings("ignore:.*same-step")  # which says that last frames are not in the video
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_videos_show_what_they_show_of_a_sync_vector_env(
    mesh: dict[str, Any], tmp_path: Path, mode: AutoresetMode
) -> None:
    remote = meshrl.make_vec("CartPole-v1", ENVS, mesh=mesh, render_mode="rgb_array", autoreset_mode=mode.value)
    for name, envs in (("ours", remote), ("theirs", sync(mode, render_mode="rgb_array"))):
        recorded = wrappers.RecordVideo(envs, str(tmp_path / name), episode_trigger=lambda episode: episode < 2)
        recorded.reset(seed=3)
        actions = np.random.default_rng(3)
        for _ in range(STEPS):
            recorded.step(actions.integers(2, size=ENVS))
        recorded.close()
    ours, theirs = (sorted((tmp_path / name).iterdir()) for name in ("ours", "theirs"))
    assert [video.name for video in ours] == [video.name for video in theirs]
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        shown = frames_of(one)
        assert len(shown) > 10
        np.testing.assert_array_equal(shown, frames_of(other))
    assert remote.closed


def test_tensors_are_those_around_a_sync_vector_env(mesh: dict[str, Any]) -> None:
    ours = wrappers.NumpyToTorch(meshrl.make_vec("CartPole-v1", ENVS, mesh=mesh))
    theirs = wrappers.NumpyToTorch(sync())
    assert_same(ours.reset(seed=5), theirs.reset(seed=5))
    draw = torch.Generator().manual_seed(5)
    ended = 0
    for _ in range(STEPS):
        actions = torch.randint(2, (ENVS,), generator=draw)
        mine, its = ours.step(actions), theirs.step(actions)
        assert_same(mine, its)
        ended += int((its[2] | its[3]).sum())
    assert ended
    ours.close()


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit, tensors of one dtype on one device."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, tuple | list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_equal(ours, theirs)
