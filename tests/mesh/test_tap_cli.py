"""``meshrl tap``, as somebody at a terminal uses it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.cli import main
from tests.mesh.conftest import until
from tests.mesh.terminals import at_a_terminal
from tests.mesh.test_tap import Pictures


@asynccontextmanager
async def playing(url: str, env: str, served: object) -> AsyncIterator[str]:
    """Episode after episode, for as long as the block lasts."""
    async with EnvWorker({env: served}, url, record="actions"), Mesh(url) as m:  # type: ignore[dict-item]
        async with await m.env(env) as opened:

            async def play() -> None:
                while True:
                    await opened.reset()
                    over = False
                    while not over:
                        _, _, terminated, truncated, _ = await opened.step(1)
                        over = terminated or truncated
                        await asyncio.sleep(0.01)

            task = asyncio.create_task(play())
            try:
                yield opened.session_id
            finally:
                task.cancel()
                await asyncio.wait([task])


async def meshrl(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


async def test_steps_are_shown_in_lines_and_as_json(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHRL_URL", url)
    async with playing(url, "of", "CartPole-v1") as session:
        assert await meshrl("tap", "of", "--steps", "12") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 12
        assert all("action 1  reward 1" in line for line in lines)
        assert await meshrl("tap", "--session", session, "--steps", "25", "--json") == 0
        steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {(one["session"], one["env"], one["env_id"]) for one in steps} == {(session, "of", 0)}
        for one, following in itertools.pairwise(steps):
            if one["episode_id"] == following["episode_id"]:
                assert following["step"] == one["step"] + 1
                assert following["observation"] == one["next_observation"]
            else:
                assert one["terminated"]
        assert await meshrl("tap", "--all", "--steps", "3") == 0
        assert all(line.startswith(session) for line in capsys.readouterr().out.splitlines())


async def test_where_nothing_is_under_way_it_is_said(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHRL_URL", url)
    monkeypatch.setattr("meshrl.cli.tap.PATIENCE_S", 0.3)
    async with Mesh(url):
        shown = asyncio.create_task(meshrl("tap", "of", "--steps", "1"))
        said: list[str] = []

        def is_said() -> bool:
            said.append(capsys.readouterr().err)
            return "nothing of of is under way" in "".join(said)

        await until(is_said, "it is said")
        async with playing(url, "of", "CartPole-v1"):
            assert await shown == 0


async def test_a_gif_and_other_output_are_not_both_to_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert await meshrl("tap", "of", "--gif", "x.gif", "--json") == 1
    assert "--gif takes one whole episode" in capsys.readouterr().err


async def test_pictures_are_drawn_in_a_terminal(url: str) -> None:
    async with playing(url, "of", Pictures):
        code, shown = await at_a_terminal("tap", "of", "--steps", "3", "--url", url)
        assert code == 0, shown
    assert shown.count("▀") >= 40 * 20
    assert "\x1b[38;2;" in shown
    assert "step " in shown
