"""What a process writes, how it ends, and when it is given up; the processes are small programs, without a mesh."""

import asyncio
import io
import signal
import sys
from pathlib import Path

import pytest

from meshrl.cli import processes, supervisor
from meshrl.cli.processes import Output, ServingProcess, how_it_ended, ready_line, spawn_with_pipe
from meshrl.cli.supervisor import Supervisor
from meshrl.errors import WorkerError

URL = "nats://me:secret@127.0.0.1:1"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def process_of(program: str, told: list[str], *arguments: str) -> ServingProcess:
    return ServingProcess(7, [sys.executable, "-c", program, *arguments], URL, told.append)


def taken(*lines: str) -> tuple[Output, list[str]]:
    told: list[str] = []
    output = Output(2, io.BytesIO(), told.append)
    for line in lines:
        output.take(line)
    return output, told


# --------------------------------------------------------------------------- what it writes


def test_lines_are_passed_on_with_the_number_of_their_process() -> None:
    output, told = taken("loading", "", "done")
    assert told == ["process 2: loading", "process 2: ", "process 2: done"]
    assert not output.ready.is_set()
    assert output.last == "done"


def test_that_it_is_ready_is_not_passed_on() -> None:
    output, told = taken(ready_line("e123"), "after")
    assert output.ready.is_set()
    assert output.worker == "e123"
    assert told == ["process 2: after"]


def test_it_is_ready_although_something_without_an_end_of_line_stands_before() -> None:
    output, told = taken(f"hello {ready_line('e123')}")
    assert (output.ready.is_set(), output.worker) == (True, "e123")
    assert told == ["process 2: hello "]


def test_error_that_is_the_last_word_before_it_is_ready_is_kept() -> None:
    output, told = taken("loading", "error: no licence")
    assert told == ["process 2: loading"]
    assert output.error == "no licence"


def test_error_that_is_not_the_last_word_is_passed_on() -> None:
    output, told = taken("error: first", "error: second", ready_line("e1"), "error: third")
    assert told == [f"process 2: error: {which}" for which in ("first", "second", "third")]
    assert output.error == ""


def test_bytes_that_are_no_text_and_lines_that_do_not_end_are_passed_on() -> None:
    told: list[str] = []
    output = Output(1, io.BytesIO(b"\xff\r\n" + b"x" * (processes.LINE_BYTES + 1)), told.append)
    output.run()
    assert told == ["process 1: �", f"process 1: {'x' * processes.LINE_BYTES}", "process 1: x"]


@posix
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (128, "ended with exit code 128"),
        (137, "was ended by SIGKILL"),
        (139, "was ended by SIGSEGV"),
        (75, "ended with exit code 75, since its worker was condemned"),
        (255, "ended with exit code 255"),
        (0xC0000005, "ended with exit code 0xc0000005"),
        (-9, "lost its guard, which was ended by SIGKILL"),
        (-200, "lost its guard, which was ended by signal 200"),
    ],
)
def test_exit_code_is_told_in_words(code: int, words: str) -> None:
    assert how_it_ended(code) == words


# --------------------------------------------------------------------------- its life


async def test_its_error_is_the_error_of_the_start() -> None:
    told: list[str] = []
    process = process_of("import sys; print('loading'); sys.exit('error: no licence')", told)
    with pytest.raises(WorkerError) as caught:
        await process.start()
    process.stop()
    assert caught.value.message == "no licence (process 7)"
    assert told == ["process 7: loading"]


async def test_start_that_ends_without_an_error_is_told_with_the_last_line() -> None:
    process = process_of("print('loading'); raise SystemExit(3)", [])
    with pytest.raises(WorkerError, match="process 7 ended with exit code 3 before it served: loading"):
        await process.start()


async def test_program_that_does_not_exist_is_an_error_of_the_start() -> None:
    process = ServingProcess(7, ["/no/such/program"], URL, print)
    with pytest.raises(WorkerError, match=r"process 7 cannot be started: FileNotFoundError: .*/no/such/program"):
        await process.start()
    process.stop()
    with pytest.raises(FileNotFoundError, match="/no/such/program"):
        spawn_with_pipe(["/no/such/program"], {})


async def test_url_is_handed_over_in_the_environment() -> None:
    told: list[str] = []
    process = process_of(f"import os; print(os.environ['MESHRL_URL']); print('''{ready_line('e1')}''')", told)
    await process.start()
    process.stop()
    assert told == [f"process 7: {URL}"]


async def test_process_that_never_serves_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.01)
    once = f"""
import pathlib, sys
if pathlib.Path(sys.argv[1]).exists():
    sys.exit("error: gone")
pathlib.Path(sys.argv[1]).touch()
print('''{ready_line("e1")}''', flush=True)
sys.exit(3)
"""
    told: list[str] = []
    process = process_of(once, told, str(tmp_path / "started"))
    await process.start()
    with pytest.raises(WorkerError, match="served: gone; 5 starts in a row have failed, so all processes are ended"):
        await process.watch()
    assert [line.rpartition("again in ")[2] for line in told] == ["0.01 s", "0.02 s", "0.04 s", "0.08 s", "0.16 s"]
    assert told[0].startswith("process 7 ended with exit code 3; ")
    assert told[1].startswith("process 7 ended with exit code 1 before it served: gone; ")


async def test_process_that_dies_but_serves_in_between_is_started_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.001)
    told: list[str] = []
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(line: str) -> None:
        told.append(line)
        if len(told) > 2 * processes.MAX_FAILED_STARTS:
            loop.call_soon_threadsafe(enough.set)

    process = ServingProcess(7, [sys.executable, "-c", f"print('''{ready_line('e1')}''')"], URL, tell)
    await process.start()
    watching = asyncio.create_task(process.watch())
    await enough.wait()
    assert not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    process.stop()
    assert not process.failure


async def test_process_that_serves_and_dies_at_once_too_often_ends_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(processes, "MAX_CRASHES", 3)
    told: list[str] = []
    crashing = f"import sys; print('''{ready_line('e1')}'''); sys.exit(9)"
    process = ServingProcess(7, [sys.executable, "-c", crashing], URL, told.append)
    supervised = Supervisor([process], None, told.append)
    await supervised.start()
    with pytest.raises(WorkerError, match="ended with exit code 9, 4 times in a row and each time within 30 s, so all"):
        await supervised.watch()
    await supervised.stop()
    assert len([line for line in told if "it is started again in" in line]) == 3


@posix
async def test_process_that_does_not_end_is_killed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_S", 0.2)
    deaf = f"""
import signal, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('''{ready_line("e1")}''', flush=True)
threading.Event().wait()
"""
    process = process_of(deaf, [])
    supervised = Supervisor([process], None, print)
    await supervised.start()
    await supervised.stop()
    assert process.failure == "process 7 did not end within 0.2 s and was killed"


@posix
async def test_process_that_fails_at_its_end_is_told() -> None:
    failing = f"""
import signal, sys, threading
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print('''{ready_line("e1")}''', flush=True)
threading.Event().wait()
"""
    process = process_of(failing, [])
    await process.start()
    process.stop()
    assert process.failure == "process 7 ended with exit code 5 when it was to stop"


@posix
async def test_process_that_fails_before_it_serves_is_no_failure_of_its_stop() -> None:
    failing = """
import signal, sys, threading
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("starting", flush=True)
threading.Event().wait()
"""
    starting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(_line: str) -> None:
        loop.call_soon_threadsafe(starting.set)

    process = ServingProcess(7, [sys.executable, "-c", failing], URL, tell)
    start = asyncio.create_task(process.start())
    await starting.wait()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    process.stop()
    assert not process.failure


async def test_process_that_was_never_started_stops() -> None:
    process = process_of("", [])
    process.stop()
    assert not process.failure


@posix
async def test_process_that_ended_before_its_stop_has_not_failed_to_stop() -> None:
    process = process_of(
        f"import os, signal; print('''{ready_line('e1')}''', flush=True); os.kill(os.getpid(), {signal.SIGKILL})", []
    )
    await process.start()
    assert process._guarded is not None
    assert process._guarded._process.wait() == 128 + signal.SIGKILL
    process.stop()
    assert not process.failure
