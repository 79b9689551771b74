"""``meshrl export`` and ``meshrl import``, as somebody at a terminal uses them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import minari
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli import main
from tests.exports.test_importing import buffer, foreign
from tests.mesh.recordings import drive, listed
from tests.mesh.secured_server import init, secured_server


@pytest.fixture
async def told(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, int]]:
    """A server of its own with two episodes; gives their session and steps."""
    with EmbeddedServer.start() as server:
        monkeypatch.setenv("MESHRL_URL", server.url)
        monkeypatch.setenv("COLUMNS", "160")
        async with EnvWorker({"CartPole-v1": "CartPole-v1"}, server.url), Mesh(server.url) as m:
            async with await m.env("cartpole", record="actions", labels={"run": "a"}, policy="random") as env:
                session = env.session_id
                episodes = await drive(env, 2, 4)
            await listed(m, "CartPole-v1", 2)
            yield session, sum(len(one.rewards) for one in episodes)


async def meshrl(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


@pytest.mark.parametrize("format_", ["minari", "minari-arrow", "npz", "parquet"])
async def test_episodes_are_exported(
    told: tuple[str, int], tmp_path: Path, format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, steps = told
    for as_json in (True, False):
        target = f"of-tests/made{as_json:d}-v0" if "minari" in format_ else str(tmp_path / f"{as_json:d}.file")
        given = ["--format", format_, "--to", target, "--since", "1h", "--label", "run=a", "--policy", "random"]
        assert await meshrl("export", "--env", "CartPole-v1", *given, *(["--json"] if as_json else [])) == 0
        shown = capsys.readouterr()
        assert not shown.err
        if as_json:
            (line,) = shown.out.splitlines()
            said = json.loads(line)
            assert {name: said[name] for name in ("format", "target", "episodes", "steps", "skipped")} == {
                "format": format_,
                "target": target,
                "episodes": 2,
                "steps": steps,
                "skipped": [],
            }
            assert await asyncio.to_thread(Path(said["path"]).exists)
        else:
            assert shown.out.strip() == f"2 episodes, {steps} steps: {target}"


async def test_what_is_exported_is_imported(told: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    session, steps = told
    assert await meshrl("export", f"{session}.0.1", f"{session}.0.0", "--to", "both-v0") == 0
    assert [len(one) for one in minari.load_dataset("both-v0")] != []
    assert await meshrl("import", "both-v0", "--env", "back", "--json") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (first["episodes"], first["steps"], first["already"]) == (2, steps, False)
    assert await meshrl("import", "both-v0", "--env", "back") == 0
    assert "are there already" in capsys.readouterr().out
    assert await meshrl("episodes", "back", "--json", "--label", "imported=both-v0") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["episode_id"] for line in lines] == [f"{first['session']}.0.{n}" for n in range(2)]
    assert await meshrl("import", "both-v0", "--env", "back", "--again", "--label", "x=y") == 0
    assert "imported: back" in capsys.readouterr().out
    assert await meshrl("verify", f"{first['session']}.0.0") == 0
    assert "unverifiable (imported)" in capsys.readouterr().out


async def test_a_login_that_records_imports_and_others_are_told(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign("theirs-v0", [buffer(3), buffer(4)])
    home = tmp_path / "secured"
    init(home, "--team", "red", "--learner", "ann")
    async with secured_server(home) as server:

        def given(login: str) -> list[str]:
            return ["--url", server.url, "--credentials", str(server.login(login))]

        assert await meshrl("recordings", "theirs", *given("operator")) == 0
        for login in ("ann", "operator"):
            assert await meshrl("import", "theirs-v0", "--env", "theirs", *given(login)) == 1
            assert "does not permit" in capsys.readouterr().err
        assert await meshrl("import", "theirs-v0", "--env", "theirs", *given("env-worker")) == 0
        async with Mesh(server.url, credentials=server.login("operator")) as m:
            (first, _) = await listed(m, "theirs", 2)
            assert len(await m.episode(first.episode_id)) == 3


async def test_what_is_left_out_is_said(
    told: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, _ = told
    wanted = ["export", f"{session}.0.0", "abc.0.7", "--format", "npz", "--to", str(tmp_path / "x.npz")]
    assert await meshrl(*wanted) == 1
    assert "there is no episode abc.0.7" in capsys.readouterr().err
    assert await meshrl(*wanted, "--skip-unreadable") == 0
    shown = capsys.readouterr().out
    assert "left out abc.0.7" in shown
    assert "1 episodes were left out" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--to", "x-v0", "--format", "csv"], "--format is one of minari, minari-arrow, npz, parquet"),
        (["export", "--env", "CartPole-v1"], "say where to: --to"),
        (["export", "a.0.0", "--env", "CartPole-v1", "--to", "x-v0"], "not both"),
        (["export", "--env", "CartPole-v1", "--to", "x"], "is no id of a Minari dataset"),
        (["export", "--env", "nobody", "--to", "x-v0"], "there is no episode to export"),
        (["export", "--env", "CartPole-v1", "--to", "x-v0", "--until", "soon"], "--until is a time such as 90m"),
        (["import", "absent-v0"], "there is no Minari dataset absent-v0 here"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(
    told: tuple[str, int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await meshrl(*arguments) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out
