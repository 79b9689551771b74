"""What ``meshrl up`` leaves for others to find it by: a lock that it holds, and a record with its url.

The rule of this file: *a record counts only while its lock is held*. A ``meshrl up`` that was killed leaves a
record that nobody believes, and two that start at once don't race: one has the lock.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshrl.bus.lock import FileLock, held
from meshrl.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

STATE_DIR_VARIABLE = "MESHRL_STATE_DIR"
LOCK_NAME = "up.lock"
RECORD_NAME = "up.json"


class Record(BaseModel):
    """A running ``meshrl up``.

    Attributes:
        url: where to connect, with its password (and so not shown by ``repr``).
        pid: the process id of ``meshrl up``.
        started: when it started, in seconds since 1970 by this machine's clock; for people to read.
        monitor_url: the base address of the server's HTTP monitoring, if it has it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # later versions may write more

    url: str = Field(repr=False)
    pid: int
    started: float
    monitor_url: str | None = None


def state_dir(*, create: bool = True) -> Path:
    r"""The directory of this user's lock and record: ``$MESHRL_STATE_DIR``, else the platform's own place.

    That is ``$XDG_RUNTIME_DIR/meshrl``, else ``~/.local/state/meshrl`` (``$XDG_STATE_HOME``); on macOS
    ``~/Library/Application Support/meshrl``, on Windows ``%LOCALAPPDATA%\meshrl``.

    Args:
        create: make it, with mode 0700, if it does not exist.

    Raises:
        UsageError: it cannot be made, or others can write to it: they could plant a record that leads to a
            server of theirs.
    """
    directory = _chosen_dir()
    try:
        if create:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform != "win32" and directory.exists():
            status = directory.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise UsageError(
                    f"others can write to the state directory {directory}: "
                    f"make it yours alone (chmod 700) or name another with {STATE_DIR_VARIABLE}",
                    path=str(directory),
                )
    except OSError as error:
        raise UsageError(
            f"the state directory {directory} cannot be used ({error}): name another with {STATE_DIR_VARIABLE}",
            path=str(directory),
        ) from error
    return directory


def _chosen_dir() -> Path:
    if chosen := os.environ.get(STATE_DIR_VARIABLE):
        return Path(chosen)
    home = Path("~").expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "meshrl"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "meshrl"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Under sudo the variable may still name the directory of the user who called it.
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.getuid():  # noqa: PTH112, PTH116
        return Path(runtime) / "meshrl"
    return Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "meshrl"


class UpLock:
    """The right to be this user's one ``meshrl up``, held until released or until the process ends.

    Attributes:
        directory: where lock and record are.
    """

    def __init__(self) -> None:
        self.directory = state_dir()
        self._lock = FileLock(self.directory / LOCK_NAME)

    def acquire(self) -> bool:
        """Take it if nobody alive has it; returns whether this object has it now.

        Raises:
            UsageError: this object has it already.
        """
        if not self._lock.acquire(blocking=False):
            return False
        # The record of a predecessor that was killed: from now on it would be believed. Who reads it in the
        # microseconds between these two lines finds no server at its url.
        (self.directory / RECORD_NAME).unlink(missing_ok=True)
        return True

    def release(self) -> None:
        """Remove the record, then let the next one start; does nothing when it is not held."""
        if self._lock.is_held:
            (self.directory / RECORD_NAME).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        if not self.acquire():
            other = read_record()
            who = "starting" if other is None else f"running as process {other.pid}"
            raise UsageError(
                f"a 'meshrl up' of this user is {who} already: stop it first, or set {STATE_DIR_VARIABLE} "
                "to another directory for a second one",
                pid=None if other is None else other.pid,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def write_record(url: str, *, monitor_url: str | None = None) -> Record:
    """Tell this user's other processes where this ``meshrl up`` is; the caller holds the :class:`UpLock`.

    Args:
        url: where to connect, with user and password.
        monitor_url: the base address of the server's HTTP monitoring.

    Raises:
        UsageError: nobody holds the lock, so that nobody would believe the record.
    """
    directory = state_dir()
    if not held(directory / LOCK_NAME):
        raise UsageError("the record of 'meshrl up' is written by the process that holds its lock")
    record = Record(url=url, pid=os.getpid(), started=time.time(), monitor_url=monitor_url)
    # Beside it and then renamed, so that nobody reads the half of it. Made with mode 0600.
    number, name = tempfile.mkstemp(prefix=RECORD_NAME, dir=directory)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(record.model_dump_json())
    Path(name).replace(directory / RECORD_NAME)
    return record


def read_record() -> Record | None:
    """The ``meshrl up`` that this user has running; None if there is none, or none that is ready.

    Raises:
        UsageError: others can write to the state directory (see :func:`state_dir`).
    """
    directory = state_dir(create=False)
    try:
        if not held(directory / LOCK_NAME):
            return None
        return Record.model_validate_json((directory / RECORD_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
