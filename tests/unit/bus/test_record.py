"""The lock and record of ``meshrl up``, with a second process where it takes two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshrl.bus.lock import FileLock
from meshrl.bus.record import LOCK_NAME, RECORD_NAME, Record, UpLock, read_record, state_dir, write_record
from meshrl.errors import UsageError

ROOT = Path(__file__).parents[3]
URL = "nats://user:secret@127.0.0.1:4321"

posix = pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the directories of Linux")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESHRL_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def other_up() -> subprocess.Popen[str]:
    """Another ``meshrl up`` with its record written, which ends in good order when its stdin does."""
    body = (
        "import sys\nfrom meshrl.bus.record import UpLock, write_record\n"
        f"with UpLock():\n  write_record({URL!r}); print('up', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", body],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_record_is_found_while_up_runs_and_not_after() -> None:
    assert read_record() is None
    with UpLock():
        assert read_record() is None
        written = write_record(URL, monitor_url="http://127.0.0.1:8222")
        assert read_record() == written
        assert (written.url, written.pid) == (URL, os.getpid())
    assert read_record() is None


def test_record_of_another_process_is_found_until_it_ends() -> None:
    with other_up() as other:
        found = read_record()
        assert found is not None
        assert (found.url, found.pid) == (URL, other.pid)
    assert read_record() is None


def test_record_of_a_killed_up_is_not_believed_even_once_the_next_one_starts(directory: Path) -> None:
    with other_up() as other:
        other.kill()
        other.wait()
        assert (directory / RECORD_NAME).exists()
        assert read_record() is None
        with UpLock():
            assert read_record() is None


def test_second_up_is_refused_and_told_of_the_first() -> None:
    with other_up() as other:
        with pytest.raises(UsageError, match=f"process {other.pid}") as caught, UpLock():
            pass
        assert caught.value.details["pid"] == other.pid
        assert read_record() is not None


def test_second_up_that_was_refused_leaves_the_record_of_the_first() -> None:
    with other_up():
        second = UpLock()
        assert not second.acquire()
        second.release()
        assert read_record() is not None


def test_record_is_not_written_without_the_lock() -> None:
    with pytest.raises(UsageError):
        write_record(URL)


def test_password_is_not_shown_by_repr() -> None:
    assert "secret" not in repr(Record(url=URL, pid=1, started=0.0))


def test_record_of_a_later_version_is_read(directory: Path) -> None:
    with UpLock():
        (directory / RECORD_NAME).write_text('{"url": "nats://h", "pid": 1, "started": 0.5, "shoe_size": 43}')
        assert read_record() == Record(url="nats://h", pid=1, started=0.5)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": "nats://h"}', '{"url": 1, "pid": 1, "started": 1}'])
def test_damaged_record_is_no_record(directory: Path, content: str) -> None:
    with UpLock():
        (directory / RECORD_NAME).write_text(content)
        assert read_record() is None


@posix
def test_directory_and_files_are_their_users_alone(directory: Path) -> None:
    with UpLock():
        write_record(URL)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in directory.iterdir()} == {LOCK_NAME, RECORD_NAME}
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


@posix
def test_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(UsageError, match="MESHRL_STATE_DIR"):
        read_record()


def test_directory_that_cannot_be_made_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MESHRL_STATE_DIR", str(tmp_path / "file" / "state"))
    with pytest.raises(UsageError, match="MESHRL_STATE_DIR"):
        state_dir()
    assert read_record() is None


def test_looking_makes_no_directory(directory: Path) -> None:
    assert read_record() is None
    assert not directory.exists()


@linux
def test_runtime_directory_is_preferred_and_the_state_directory_of_home_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESHRL_STATE_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    assert state_dir() == tmp_path / ".local" / "state" / "meshrl"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state_dir() == tmp_path / "meshrl"


def test_lock_alone_without_a_record_is_an_up_that_is_not_ready(directory: Path) -> None:
    with UpLock():
        assert not FileLock(directory / LOCK_NAME).acquire(blocking=False)
        assert read_record() is None
