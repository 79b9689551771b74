"""A lock between processes that its holder's death releases.

The rule of this file: *the kernel holds the lock, the file is only its name*. So there is nothing to clean up
after a SIGKILL, the file is never deleted (a deleted one could be held by one process and made anew by
another), and whether somebody holds the lock is found out by trying, never by reading a process id.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from io import FileIO
from typing import TYPE_CHECKING, Self

from meshrl.errors import RequestTimeout, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

RETRY_S = 0.01
"""Between two attempts where the kernel offers no wait with a timeout."""

PROBE_S = 0.1
"""How long an attempt that does not block goes on before it says no: the refusal may come from a :func:`held`
in another process, which has the lock for some microseconds only."""


class FileLock:
    """An exclusive lock named by a file; at most one object anywhere on this machine holds it.

    Two objects of one process exclude each other too. Usable from any thread. Neither children started with
    exec nor forked ones keep the lock alive. An object dropped while it holds the lock gives it back, with a
    ResourceWarning.

    Attributes:
        path: the file; its directory must exist. Its content is not touched.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._changing = threading.Lock()

    @property
    def is_held(self) -> bool:
        """Whether this very object holds the lock."""
        return self._file is not None

    def acquire(self, blocking: bool = True, timeout_s: float | None = None) -> bool:
        """Take the lock.

        Args:
            blocking: wait for it; otherwise the answer comes within a tenth of a second.
            timeout_s: seconds to wait at most; without it as long as it takes.

        Returns:
            whether the lock is now held.

        Raises:
            UsageError: this object holds it already.
            OSError: the file cannot be made or opened.
        """
        with self._changing:
            if self._file is not None:
                raise UsageError(f"the lock {self.path} is held by this object already")
            wait_s = timeout_s if blocking else PROBE_S
            deadline = None if wait_s is None else time.monotonic() + wait_s
            with contextlib.ExitStack() as on_failure:
                file = on_failure.enter_context(FileIO(self.path, "r+", opener=_open_or_make))
                while not _try_lock(file.fileno(), shared=False):
                    if deadline is not None and time.monotonic() >= deadline:
                        return False
                    time.sleep(RETRY_S)
                on_failure.pop_all()
            self._file = file
            _LOCKS_HERE.add(self)
            return True

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        with self._changing:
            file, self._file = self._file, None
            _LOCKS_HERE.discard(self)
            if file is not None:
                with file:
                    _unlock(file.fileno())

    def _forked(self) -> None:
        """Drop the copy that a fork made, by closing only: unlocking would take the lock from the parent."""
        self._changing = threading.Lock()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        if not self.acquire():
            raise RequestTimeout(f"the lock {self.path} was not to be had")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<FileLock {self.path} {'held' if self.is_held else 'not held'}>"


def held(path: Path) -> bool:
    """Whether somebody alive holds the lock of that file (this process included); no file, no holder.

    Raises:
        OSError: the file cannot be opened (it is another user's, say).
    """
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who ask at once don't take each other for the holder. Windows has no shared
        # form: there the question is repeated.
        deadline = time.monotonic() + (PROBE_S if sys.platform == "win32" else 0.0)
        while not _try_lock(fd, shared=True):
            if time.monotonic() >= deadline:
                return True
            time.sleep(RETRY_S)
        _unlock(fd)
        return False
    finally:
        os.close(fd)


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _try_lock(fd: int, *, shared: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415  # Windows only

        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl  # noqa: PLC0415  # not on Windows

    # flock and not lockf: those locks belong to the process and go when *any* of its descriptors of the file
    # closes, such as the one in held().
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int) -> None:
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415  # Windows only

        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
    else:
        import fcntl  # noqa: PLC0415  # not on Windows

        fcntl.flock(fd, fcntl.LOCK_UN)


_LOCKS_HERE: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_LOCKS_HERE):
        lock._forked()  # noqa: SLF001  # same file
    _LOCKS_HERE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
