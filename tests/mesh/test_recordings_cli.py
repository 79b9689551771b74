"""``meshrl episodes``, ``replay``, ``verify`` and ``recordings``, as somebody at a terminal uses them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.streams import bounds
from meshrl.cli import main
from tests.mesh.recordings import Told, drive, listed
from tests.mesh.resumed_envs import Slow


@pytest.fixture
async def told(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, list[Told]]]:
    monkeypatch.setenv("MESHRL_URL", server.url)
    monkeypatch.setenv("COLUMNS", "160")
    async with EnvWorker({"CartPole-v1": "CartPole-v1"}, server.url), Mesh(server.url) as m:
        async with await m.env("cartpole", record="actions", labels={"run": "a"}, policy="random") as env:
            session = env.session_id
            episodes = await drive(env, 2, 4)
        await listed(m, "CartPole-v1", 2)
        yield session, episodes


async def meshrl(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


async def test_episodes_are_listed_for_people_and_for_programs(
    told: tuple[str, list[Told]], capsys: pytest.CaptureFixture[str]
) -> None:
    session, episodes = told
    assert await meshrl("episodes") == 0
    shown = capsys.readouterr().out
    assert all(f"{session}.0.{n}" in shown for n in range(2))
    assert "run=a policy=random" in shown
    assert await meshrl("episodes", "CartPole-v1", "--json", "--since", "1h", "--label", "run=a") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["steps"], line["episode_return"], line["reason"]) for line in lines] == [
        (len(one.rewards), sum(one.rewards), "terminated") for one in episodes
    ]
    for arguments in (["--label", "run=b"], ["--min-return", "1e9"], ["Taxi-v3"], ["--policy", "other"]):
        assert await meshrl("episodes", *arguments) == 0
        assert "no episodes" in capsys.readouterr().out
    assert await meshrl("episodes", "--last", "1", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["episode_id"] == f"{session}.0.1"


async def test_an_episode_is_replayed_step_by_step(
    told: tuple[str, list[Told]], capsys: pytest.CaptureFixture[str]
) -> None:
    session, episodes = told
    assert await meshrl("replay", f"{session}.0.0", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["action"] for line in lines] == [int(action) for action in episodes[0].actions]
    assert all(line["remade"] for line in lines)
    assert [line["observation"] for line in lines] == [obs.tolist() for obs in episodes[0].obs[:-1]]
    assert await meshrl("replay", f"{session}.0.0", "--start", str(len(lines) - 1)) == 0
    assert "terminated" in capsys.readouterr().out
    assert await meshrl("replay", f"{session}.0.0") == 0
    said, *shown = capsys.readouterr().out.splitlines()
    assert said.startswith("observations were made by running it again")
    assert len(shown) == len(lines)


async def test_what_goes_as_it_did_is_said_to(told: tuple[str, list[Told]], capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = told
    assert await meshrl("verify", f"{session}.0.1") == 0
    assert "exact" in capsys.readouterr().out
    assert await meshrl("verify", "--all") == 0
    assert "2 exact" in capsys.readouterr().out
    assert await meshrl("verify", "--all", "--json") == 0
    assert {json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()} == {"exact"}


async def test_what_nobody_serves_any_more_keeps_the_rest_from_nothing(
    server: EmbeddedServer, told: tuple[str, list[Told]], capsys: pytest.CaptureFixture[str]
) -> None:
    async with EnvWorker({"gone": "CartPole-v1"}, server.url), Mesh(server.url) as m:
        async with await m.env("gone", record="actions") as env:
            await drive(env, 2, 1)
        await listed(m, "gone", 2)
    assert await meshrl("verify", "--all", "--wait", "1") == 1
    assert "2 exact, 2 failed" in capsys.readouterr().out
    assert await meshrl("verify", "--all", "--env", "gone", "--wait", "1", "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["status"], line["code"]) for line in lines] == [("failed", "unknown_name")] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify"], "name an episode, or give --all"),
        (["replay", "nothing"], "is no episode's id"),
        (["replay", "abc.0.0"], "there is no episode abc.0.0"),
        (["episodes", "--since", "soon"], "--since is a time such as 90m"),
        (["episodes", "--label", "x"], "--label is KEY=VALUE"),
        (["recordings", "cartpole", "--record-bytes", "much"], "is a size such as"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(
    server: EmbeddedServer,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MESHRL_URL", server.url)
    assert await meshrl(*arguments) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out


async def test_an_operator_makes_the_streams(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHRL_URL", server.url)
    made = ["recordings", "ALE/Pong-v5", "cartpole", "--record-bytes", "16M", "--record-age", "7d"]
    assert await meshrl(*made) == 0
    assert "MESHRL_REC_default~ALE%2FPong-v5" in capsys.readouterr().out
    assert await meshrl(*made) == 0
    assert capsys.readouterr().out.count("already") == 2
    async with connect(server.url) as connection:
        assert await bounds(connection, "MESHRL_REC_default~cartpole") == (1, 0)


async def test_where_there_is_room_for_one_at_a_time_they_do_not_wait_for_each_other_in_vain(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHRL_URL", server.url)
    async with EnvWorker({"slow": Slow}, server.url, slots=1), Mesh(server.url) as m:
        async with await m.env("slow", record="actions") as env:
            session = env.session_id
            for seed in range(4):
                await drive(env, 1, seed, max_steps=25)
        await listed(m, "slow", 4)
        assert await meshrl("verify", "--all", "--wait", "1", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"episode_id": f"{session}.0.{n}", "status": "exact"} for n in range(4)]
