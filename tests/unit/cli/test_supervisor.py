"""Worker processes that cannot live: their reason is told, and they are given up."""

from pathlib import Path

import pytest

from meshrl.cli import supervisor
from meshrl.cli.supervisor import Supervisor, WorkerProcess
from meshrl.errors import WorkerError


def hopeless(directory: Path, told: list[str]) -> WorkerProcess:
    return WorkerProcess(1, ["--no-such-option"], "nats://127.0.0.1:1", directory, told.append)


async def test_worker_that_cannot_start_is_told_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    supervised = Supervisor([hopeless(tmp_path, [])], None, print)
    with pytest.raises(WorkerError, match=r"worker process 1 ended with code 2: .*--no-such-option"):
        await supervised.start()
    await supervised.stop()


async def test_worker_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 2)
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.01)
    told: list[str] = []
    supervised = Supervisor([hopeless(tmp_path, told)], None, told.append)
    with pytest.raises(WorkerError, match="ended with code 2"):
        await supervised.start()
    with pytest.raises(WorkerError, match="3 times in a row; it is given up"):
        await supervised.watch()
    await supervised.stop()
    assert [line.rpartition("; ")[2] for line in told] == [
        "it is started again in 0.01 s",
        "it is started again in 0.02 s",
    ]


async def test_supervisor_that_was_never_started_stops(tmp_path: Path) -> None:
    await Supervisor([hopeless(tmp_path, [])], None, print).stop()
