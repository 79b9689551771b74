"""Worker processes that cannot live: their reason is told, and they are given up."""

from pathlib import Path

import pytest

from meshrl.cli import crew
from meshrl.cli.crew import Crew, Hand
from meshrl.errors import WorkerError


def hopeless(directory: Path, told: list[str]) -> Hand:
    return Hand(1, ["--no-such-option"], "nats://127.0.0.1:1", directory, told.append)


async def test_worker_that_cannot_start_is_told_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    team = Crew([hopeless(tmp_path, [])], None, print)
    with pytest.raises(WorkerError, match=r"worker process 1 ended with code 2: .*--no-such-option"):
        await team.start()
    await team.stop()


async def test_worker_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "MAX_DEATHS", 2)
    monkeypatch.setattr(crew, "FIRST_WAIT_S", 0.01)
    told: list[str] = []
    team = Crew([hopeless(tmp_path, told)], None, told.append)
    with pytest.raises(WorkerError, match="ended with code 2"):
        await team.start()
    with pytest.raises(WorkerError, match="3 times in a row; it is given up"):
        await team.watch()
    await team.stop()
    assert [line.rpartition("; ")[2] for line in told] == [
        "it is started again in 0.01 s",
        "it is started again in 0.02 s",
    ]


async def test_crew_that_was_never_started_stops(tmp_path: Path) -> None:
    await Crew([hopeless(tmp_path, [])], None, print).stop()
