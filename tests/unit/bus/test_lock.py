"""The lock between real processes, held, given back and left behind by killing its holder."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from meshrl.bus.lock import FileLock, held
from meshrl.errors import UsageError

ROOT = Path(__file__).parents[3]

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def program(body: str) -> subprocess.Popen[str]:
    head = "import os, signal, subprocess, sys\nfrom pathlib import Path\nfrom meshrl.bus.lock import FileLock, held\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + body],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def holder(path: Path, also: str = "") -> subprocess.Popen[str]:
    """A process that has the lock when this returns, and gives it back when its stdin ends."""
    process = program(
        f"lock = FileLock(Path({str(path)!r}))\nassert lock.acquire()\n{also}\n"
        "print('has it', flush=True); sys.stdin.read()\n"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.lock"


def test_lock_is_taken_and_given_back(path: Path) -> None:
    lock = FileLock(path)
    assert lock.acquire()
    assert held(path)
    lock.release()
    assert not held(path)
    with lock:
        assert held(path)
    assert not held(path)


def test_lock_without_a_file_is_not_held_and_asking_makes_none(path: Path) -> None:
    assert not held(path)
    assert not path.exists()


def test_asking_takes_nothing_away_from_the_holder(path: Path) -> None:
    with FileLock(path):
        assert held(path)
        assert not FileLock(path).acquire(blocking=False)
        assert held(path)


def test_two_objects_of_one_process_exclude_each_other(path: Path) -> None:
    with FileLock(path):
        assert not FileLock(path).acquire(blocking=False)
        assert not FileLock(path).acquire(timeout_s=0.05)
    with FileLock(path):
        pass


def test_taking_it_twice_by_one_object_is_an_error_and_keeps_it(path: Path) -> None:
    with FileLock(path) as lock:
        with pytest.raises(UsageError):
            lock.acquire(blocking=False)
        assert held(path)


def test_giving_back_what_is_not_held_does_nothing(path: Path) -> None:
    FileLock(path).release()
    with FileLock(path) as lock:
        lock.release()
        lock.release()
    assert not held(path)


def test_failed_attempts_leave_no_descriptors(path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")
    with FileLock(path):
        before = open_descriptors()
        assert not FileLock(path).acquire(blocking=False)
        assert held(path)
        assert open_descriptors() == before


def test_dropped_lock_is_free_and_warns(path: Path) -> None:
    lock = FileLock(path)
    assert lock.acquire()
    with pytest.warns(ResourceWarning):
        del lock
    assert not held(path)


def test_waiting_ends_when_the_holder_gives_it_back(path: Path) -> None:
    process = holder(path)
    waiting = FileLock(path)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(waiting.acquire(timeout_s=30)))
    with process:
        thread.start()
        assert not answers
    thread.join()
    assert answers == [True]
    waiting.release()


def test_lock_is_free_once_its_holder_is_killed(path: Path) -> None:
    with holder(path) as process:
        assert held(path)
        process.kill()
        process.wait()
        assert not held(path)
        with FileLock(path):
            pass


@posix
def test_children_of_the_holder_do_not_keep_it_when_the_holder_is_killed(path: Path) -> None:
    also = (
        "started = subprocess.Popen(['sleep', '600'], close_fds=False, stdout=2, stdin=subprocess.DEVNULL)\n"
        "runs, says_so = os.pipe()\n"
        "forked = os.fork()\n"
        "if not forked: os.dup2(2, 1); os.write(says_so, b'!'); signal.pause()\n"
        "os.read(runs, 1)\n"
        f"Path('{path}.pids').write_text(f'{{started.pid}} {{forked}}')"
    )
    with holder(path, also) as process:
        children = [int(word) for word in Path(f"{path}.pids").read_text().split()]
        try:
            process.kill()
            process.wait()
            assert not held(path)
            for child in children:
                os.kill(child, 0)
        finally:
            for child in children:
                os.kill(child, 9)


@posix
def test_forked_process_cannot_give_back_its_parents_lock(path: Path) -> None:
    with FileLock(path) as lock:
        child = os.fork()
        if not child:
            lock.release()
            os._exit(0 if not lock.is_held and held(path) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert held(path)


def test_of_processes_that_race_for_it_exactly_one_has_it(path: Path) -> None:
    body = (
        f"lock = FileLock(Path({str(path)!r}))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(lock.acquire(blocking=False), flush=True); sys.stdin.readline()\n"
    )
    racers = [program(body) for _ in range(4)]
    assert {racer.stdout.readline() for racer in racers if racer.stdout} == {"ready\n"}
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    assert sorted(answers) == ["False", "False", "False", "True"]
    for racer in racers:
        racer.communicate("end\n")


def asker(path: Path) -> subprocess.Popen[str]:
    process = program(f"print('asks', flush=True)\nwhile True: held(Path({str(path)!r}))")
    assert process.stdout is not None
    assert process.stdout.readline() == "asks\n"
    return process


def test_those_who_ask_do_not_make_an_attempt_fail(path: Path) -> None:
    path.touch()
    with asker(path) as asking:
        try:
            for _ in range(5000):
                lock = FileLock(path)
                assert lock.acquire(blocking=False)
                lock.release()
        finally:
            asking.kill()


def test_those_who_ask_at_once_do_not_take_each_other_for_the_holder(path: Path) -> None:
    path.touch()
    with asker(path) as asking:
        try:
            assert not any(held(path) for _ in range(5000))
        finally:
            asking.kill()
