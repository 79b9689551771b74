"""Recorded episodes as MP4 and GIF: read back, they have the frames that a local env renders."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from meshrl import EnvWorker, Mesh
from meshrl.adapters.videos import MAX_FPS, rate_of, write_video
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from meshrl.errors import EpisodeDiverged, EpisodeNotRendered, UsageError
from tests.mesh.recordings import drive, listed
from tests.mesh.terminals import at_a_terminal
from tests.mesh.test_rendered import Bare, Shaky, local_frames, one_episode
from tests.mesh.test_tap_cli import playing


@pytest.fixture
def url() -> Iterator[str]:
    with EmbeddedServer.start() as server:
        yield server.url


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def read_mp4(path: Path) -> tuple[list[Any], Any]:
    with av.open(str(path)) as file:
        (stream,) = file.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        return frames, stream


def read_gif(path: Path) -> tuple[list[Any], list[int]]:
    with Image.open(path) as file:
        assert isinstance(file.info["loop"], int)
        frames, lasting = [], []
        for n in range(getattr(file, "n_frames", 1)):
            file.seek(n)
            frames.append(np.asarray(file.convert("RGB")))
            lasting.append(file.info["duration"])
    return frames, lasting


async def test_an_mp4_and_a_gif_show_each_frame_of_the_episode(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"cart": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("cart", record="actions") as env:
            told = (await drive(env, 1, 7))[0]
        (summary,) = await listed(m, "cart", 1)
        seen: list[tuple[int, int]] = []
        mp4 = await write_video(m, summary.episode_id, tmp_path / "a.mp4", progress=lambda *told: seen.append(told))
        gif = await write_video(m, summary.episode_id, tmp_path / "a.gif")
    local = local_frames(told, 7)
    assert names_in(tmp_path) == ["a.gif", "a.mp4"]
    assert seen == [(n, len(local)) for n in range(1, len(local) + 1)]
    assert {(one.frames, one.fps, one.width, one.height) for one in (mp4, gif)} == {(len(local), 50.0, 600, 400)}

    frames, stream = read_mp4(mp4.path)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert (float(stream.average_rate), stream.width, stream.height) == (50.0, 600, 400)
    assert len(frames) == len(local)
    for one, other in zip(frames, local, strict=True):
        assert np.abs(one.astype(float) - other).mean() < 3, "as near as H.264 gets"
    data = mp4.path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a browser plays what has come"

    shown, lasting = read_gif(gif.path)
    assert set(lasting) == {20}
    assert len(shown) == len(local)
    for one, other in zip(shown, local, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1, "CartPole has fewer colours than a GIF"


class Odd(Bare):
    """Its pictures have odd sides."""

    def render(self) -> Any:
        return np.full((15, 17, 3), 200, np.uint8)


class Growing(Bare):
    """Its pictures grow."""

    side = 8

    def render(self) -> Any:
        self.side += 2
        return np.zeros((self.side, self.side, 3), np.uint8)


async def test_odd_sides_become_even_and_what_goes_too_fast_leaves_frames_out(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"odd": Odd}, url), Mesh(url) as m:
        id_ = await one_episode(m, "odd")
        mp4 = await write_video(m, id_, tmp_path / "odd", format="mp4", speed=10)  # 120 a second, of which 60 are shown
        gif = await write_video(m, id_, tmp_path / "odd.gif", fps=7, speed=0.5)
    frames, stream = read_mp4(mp4.path)
    assert (stream.width, stream.height, float(stream.average_rate)) == (18, 16, 60.0)
    assert len(frames) == mp4.frames == 21
    assert np.abs(frames[0].astype(int) - 200).max() < 5
    shown, lasting = read_gif(gif.path)
    assert (len(shown), shown[0].shape) == (41, (15, 17, 3))
    assert sum(lasting) / 1000 == pytest.approx(41 / 3.5, rel=0.05)


async def test_nothing_is_left_of_a_video_that_cannot_be(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"shaky": Shaky, "growing": Growing, "bare": Bare}, url), Mesh(url) as m:
        shaky, growing, bare = [await one_episode(m, name) for name in ("shaky", "growing", "bare")]
        with pytest.raises(EpisodeDiverged):
            await write_video(m, shaky, tmp_path / "a.mp4")
        with pytest.raises(EpisodeNotRendered, match="change their size"):
            await write_video(m, growing, tmp_path / "a.gif")
        for fps, speed in ((0.0, 1.0), (None, -1.0), (math.nan, 1.0), (None, math.inf), (0.01, 1.0)):
            with pytest.raises(UsageError, match="above 0"):
                await write_video(m, bare, tmp_path / "a.gif", fps=fps, speed=speed)
        with pytest.raises(UsageError, match="mp4 or gif, not 'avi'"):
            await write_video(m, bare, tmp_path / "a.avi")
        with pytest.raises(UsageError, match="make it"):
            await write_video(m, bare, tmp_path / "no" / "a.gif")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("fps", "speed"), [(30, 1), (50, 1), (60, 1), (30, 7), (1000, 1), (15, 0.25)])
def test_a_video_takes_as_long_as_it_should(fps: float, speed: float) -> None:
    for kind, most in MAX_FPS.items():
        every, shown = rate_of(fps, speed, kind)
        assert shown * every == pytest.approx(fps * speed)
        assert shown <= most


async def test_somebody_at_a_terminal_gets_videos(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHRL_URL", url)

    async def meshrl(*arguments: object) -> int:
        return await asyncio.to_thread(main, ["export", *map(str, arguments)])

    async with EnvWorker({"odd": Odd}, url), Mesh(url) as m:
        async with await m.env("odd", record="full") as env:
            await drive(env, 2, 3, max_steps=9)
        ids = [one.episode_id for one in await listed(m, "odd", 2)]
        assert await meshrl(*ids, "--to", tmp_path / "both", "--format", "gif") == 0
        assert capsys.readouterr().out.count("10 frames, 17x15, 12 a second") == 2
        assert names_in(tmp_path / "both") == sorted(f"{id_}.gif" for id_ in ids)
        assert await meshrl(ids[0], "--to", tmp_path / "one.mp4", "--fps", 5, "--speed", 2) == 0
        assert len(read_mp4(tmp_path / "one.mp4")[0]) == 10
        capsys.readouterr()
        assert await meshrl("--env", "odd", "--to", tmp_path / "all", "--format", "mp4", "--json") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(one["episode_id"], one["frames"]) for one in lines] == [(id_, 10) for id_ in ids]
        assert names_in(tmp_path / "all") == sorted(f"{id_}.mp4" for id_ in ids)
        for arguments, said in (
            ([*ids, "--to", tmp_path / "one.gif"], "2 episodes are no one file"),
            ([ids[0], "--to", tmp_path / "one.gif", "--format", "mp4"], "give one of the two"),
            ([ids[0], "--format", "avi", "--to", tmp_path], "--format is one of minari"),
        ):
            assert await meshrl(*arguments) == 1
            assert said in capsys.readouterr().err


async def test_a_bar_shows_how_far_a_video_is(url: str, tmp_path: Path) -> None:
    async with EnvWorker({"odd": Odd}, url), Mesh(url) as m:
        async with await m.env("odd", record="actions") as env:
            await drive(env, 1, 3, max_steps=9)
        (summary,) = await listed(m, "odd", 1)
        to = ("--to", str(tmp_path / "film.gif"), "--url", url)
        code, shown = await at_a_terminal("export", summary.episode_id, *to)
    assert code == 0, shown
    assert re.search(r"film\.gif .*10/10", shown), shown
    assert f"{tmp_path / 'film.gif'}: 10 frames" in " ".join(shown.split()), shown


async def test_an_episode_under_way_is_waited_for_and_becomes_a_gif(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHRL_URL", url)
    async with playing(url, "pole", "CartPole-v1"), Mesh(url) as m:
        assert await asyncio.to_thread(main, ["tap", "pole", "--gif", str(tmp_path / "pole.gif")]) == 0
        told = capsys.readouterr()
        (id_,) = {
            word.rstrip(":") for word in told.err.split() if word.startswith(tuple("0123456789abcdef")) and "." in word
        }
        shown, _ = read_gif(tmp_path / "pole.gif")
        assert len(shown) == len(await m.episode(id_)) + 1, "the reset, and each of its steps"
