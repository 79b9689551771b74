"""Real processes under real guards; what a guard promises is seen by killing each of the three in turn."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshrl.bus import guard
from meshrl.bus.guard import Guarded
from tests.freezing import freeze

ROOT = Path(__file__).parents[3]
DEADLINE_S = 20.0

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="waits by pidfd, counts descriptors in /proc")

# Says its process id, then waits for whatever comes.
SLEEPER = [sys.executable, "-I", "-S", "-c", "import signal; print('up', flush=True); signal.pause()"]
DEAF = [
    *SLEEPER[:-1],
    (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n"
        "while True: signal.pause()"
    ),
]


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def exits(pid: int) -> bool:
    """Whether that process, which need not be a child, ends before the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE_S)[0])
    finally:
        os.close(fd)


def wait_code(guarded: Guarded) -> int | None:
    assert exits(guarded.guard_pid)
    return guarded.poll()


def parent_program(body: str) -> subprocess.Popen[str]:
    """A process that guards others, to be killed by the test; its session is its own, as a terminal's is."""
    head = "import os, signal, subprocess, sys\nfrom pathlib import Path\nfrom meshrl.bus.guard import Guarded\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + body],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def read_pids(parent: subprocess.Popen[str]) -> list[int]:
    assert parent.stdout is not None
    return [int(word) for word in parent.stdout.readline().split()]


def test_pid_is_that_of_the_command_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import os, sys; print(os.getpid(), flush=True); print('err', file=sys.stderr)"
    with Guarded.spawn([sys.executable, "-c", program], log=log) as guarded:
        assert wait_code(guarded) == 0
        assert log.read_text().split() == [str(guarded.pid), "err"]


@posix
def test_log_can_be_read_by_its_user_alone(tmp_path: Path) -> None:
    with Guarded.spawn(SLEEPER, log=tmp_path / "log"):
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("code", [0, 3, 255])
def test_guard_exits_with_the_code_of_the_command(code: int) -> None:
    with Guarded.spawn([sys.executable, "-I", "-S", "-c", f"raise SystemExit({code})"]) as guarded:
        assert wait_code(guarded) == code


@linux
def test_command_killed_by_a_signal_has_the_code_that_shells_give_it() -> None:
    with Guarded.spawn(SLEEPER) as guarded:
        assert guarded.poll() is None
        os.kill(guarded.pid, signal.SIGKILL)
        assert wait_code(guarded) == 128 + signal.SIGKILL


def test_command_gets_the_environment_it_is_given() -> None:
    program = "import os; raise SystemExit(int(os.environ['WANTED']))"
    with Guarded.spawn([sys.executable, "-c", program], env={**os.environ, "WANTED": "42"}) as guarded:
        assert wait_code(guarded) == 42


def test_command_gets_its_arguments_untouched(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-c",
        "import sys; print(sys.argv[1:], flush=True)",
        "--",
        "--remove",
        "a b",
        "--",
        "",
    ]
    with Guarded.spawn(line, log=tmp_path / "log") as guarded:
        assert wait_code(guarded) == 0
    assert (tmp_path / "log").read_text() == "['--', '--remove', 'a b', '--', '']\n"


def test_command_that_does_not_exist_raises_what_subprocess_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Guarded.spawn([str(tmp_path / "nothing")])
    assert caught.value.filename == str(tmp_path / "nothing")


@posix
def test_command_that_may_not_be_executed_raises_what_subprocess_raises(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("data")
    with pytest.raises(PermissionError):
        Guarded.spawn([str(tmp_path / "data")])


@linux
def test_stop_ends_the_command_and_can_be_repeated() -> None:
    guarded = Guarded.spawn(SLEEPER)
    code = guarded.stop()
    assert code == 128 + signal.SIGTERM
    assert exits(guarded.pid)
    assert guarded.stop() == guarded.poll() == code


@linux
def test_stop_kills_a_command_that_ignores_sigterm(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)  # so that the guard's end opens at once
    try:
        guarded = Guarded.spawn(DEAF, log=tmp_path / "log")
        select.select([reader], [], [])
        assert os.read(reader, 100) == b"up\n"
        assert guarded.stop(timeout_s=0.05) == 128 + signal.SIGKILL
    finally:
        os.close(reader)


@linux
def test_stop_kills_a_command_that_is_frozen() -> None:
    guarded = Guarded.spawn(SLEEPER)
    freeze(guarded.pid)  # a SIGTERM that finds it not yet frozen would come first
    assert guarded.stop(timeout_s=0.05) == 128 + signal.SIGKILL


@linux
def test_stop_with_no_time_kills_at_once() -> None:
    assert Guarded.spawn(SLEEPER).stop(timeout_s=0) == 128 + signal.SIGKILL


@linux
def test_guarding_leaves_no_descriptors_and_no_zombies() -> None:
    Guarded.spawn(SLEEPER).stop()
    before = open_descriptors()
    stopped = Guarded.spawn(SLEEPER)
    stopped.stop()
    ended = Guarded.spawn([sys.executable, "-I", "-S", "-c", "pass"])
    assert wait_code(ended) == 0
    with pytest.raises(FileNotFoundError):
        Guarded.spawn(["/nonexistent/program"])
    assert open_descriptors() == before
    for guarded in (stopped, ended):
        with pytest.raises(ProcessLookupError):  # a zombie could still be found
            os.kill(guarded.guard_pid, 0)


@linux
def test_command_goes_when_its_parent_is_killed_and_so_does_its_directory(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "file").touch()
    with parent_program(
        f"g = Guarded.spawn({SLEEPER!r}, remove=Path({str(scratch)!r}))\n"
        "print(g.pid, g.guard_pid, flush=True); signal.pause()"
    ) as parent:
        pid, guard_pid = read_pids(parent)
        parent.kill()
        assert exits(pid)
        assert exits(guard_pid)
        assert not scratch.exists()


@linux
def test_deaf_command_goes_too_when_its_parent_is_killed() -> None:
    with parent_program(
        f"g = Guarded.spawn({DEAF!r})\nprint(g.pid, g.guard_pid, flush=True); signal.pause()"
    ) as parent:
        pid, guard_pid = read_pids(parent)
        parent.kill()
        assert exits(pid)
        assert exits(guard_pid)


@linux
def test_directory_is_left_to_a_parent_that_lives(tmp_path: Path) -> None:
    with Guarded.spawn([sys.executable, "-I", "-S", "-c", "pass"], remove=tmp_path) as guarded:
        assert wait_code(guarded) == 0
    Guarded.spawn(SLEEPER, remove=tmp_path).stop()
    assert tmp_path.exists()


@linux
def test_command_goes_when_its_guard_is_killed() -> None:
    with Guarded.spawn(SLEEPER) as guarded:
        os.kill(guarded.guard_pid, signal.SIGKILL)
        assert exits(guarded.pid)
        assert wait_code(guarded) == -signal.SIGKILL


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_guard_ends_the_command(number: signal.Signals) -> None:
    with Guarded.spawn(SLEEPER) as guarded:
        os.kill(guarded.guard_pid, number)
        assert wait_code(guarded) == 128 + signal.SIGTERM
        assert exits(guarded.pid)


@linux
def test_neither_started_nor_forked_processes_of_the_parent_keep_the_command_alive() -> None:
    with parent_program(
        f"g = Guarded.spawn({SLEEPER!r})\n"
        "started = subprocess.Popen(['sleep', '600'], close_fds=False, stdout=subprocess.DEVNULL)\n"
        "forked = os.fork()\n"
        "if not forked: os.dup2(2, 1); signal.pause()\n"
        "print(g.pid, started.pid, forked, flush=True); signal.pause()"
    ) as parent:
        pid, *others = read_pids(parent)
        try:
            parent.kill()
            assert exits(pid)
            for other in others:
                os.kill(other, 0)
        finally:
            for other in others:
                os.kill(other, signal.SIGKILL)


@linux
def test_forked_process_cannot_stop_the_command() -> None:
    with Guarded.spawn(SLEEPER) as guarded:
        child = os.fork()
        if not child:
            os._exit(0 if guarded.stop() is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert guarded.poll() is None


@linux
def test_interrupt_in_the_terminal_does_not_reach_the_command() -> None:
    with parent_program(
        f"g = Guarded.spawn({SLEEPER!r})\n"
        "try: print(g.pid, flush=True); signal.pause()\n"
        "except KeyboardInterrupt: print(int(g.poll() is None), flush=True); g.stop()"
    ) as parent:
        (pid,) = read_pids(parent)
        assert os.getpgid(pid) != parent.pid
        os.killpg(parent.pid, signal.SIGINT)  # what the terminal's driver does at Ctrl-C
        assert read_pids(parent) == [1]
        assert exits(pid)
        assert parent.wait() == 0


@linux
def test_what_the_command_started_goes_with_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    program = (
        "import subprocess, os\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "input_end, _ = os.pipe(); os.read(input_end, 1)"
    )
    try:
        guarded = Guarded.spawn([sys.executable, "-c", program], log=tmp_path / "log")
        select.select([reader], [], [])
        grandchild = int(os.read(reader, 100))
        guarded.stop()
        assert exits(grandchild)
    finally:
        os.close(reader)


@linux
def test_command_hears_sigterm_though_its_parent_thread_had_blocked_it() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert Guarded.spawn(SLEEPER).stop() == 128 + signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_guard_imports_the_standard_library_only() -> None:
    line = [
        sys.executable,
        "-X",
        "importtime",
        "-I",
        "-S",
        guard.__file__,
        "--",
        sys.executable,
        "-S",
        "-c",
        "",
    ]
    done = subprocess.run(line, input=b"", capture_output=True, check=False)
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.decode().splitlines()}
    assert "subprocess" in imported
    assert not {name.partition(".")[0] for name in imported} & {
        "meshrl",
        "numpy",
        "gymnasium",
        "asyncio",
        "site",
    }
