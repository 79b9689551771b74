"""A process whose life is tied to its parent's, even when the parent is killed.

The rule of this file: *the child never outlives the process that asked for it*. Between the two stands the
guard, which is this file run as a program; it imports the standard library only, so that it is there in a few
hundredths of a second. It ends the child in each of these cases:

    1. its stdin says so: a line with the seconds to wait between SIGTERM and SIGKILL (:meth:`Guarded.stop`);
    2. its stdin ends: the parent is gone, by whatever way, SIGKILL included;
    3. it gets SIGTERM, SIGINT or SIGHUP itself;
    4. it is killed itself: on Linux the kernel then kills the child (``PR_SET_PDEATHSIG``). Elsewhere nothing
       does.

When the child exits, so does the guard, with the same code (128 + n for signal n, as shells have it). What is
left of the child's process group is killed then. The guard is the leader of a new session: Ctrl-C in a
terminal reaches the parent alone, which then says goodbye over a server that still runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

GRACE_S = 5.0
"""From SIGTERM to SIGKILL when nobody says otherwise: nats-server closes its store in well under a second."""

GUARD_MARGIN_S = 5.0
"""What :meth:`Guarded.stop` adds to its timeout, so that on a busy machine the guard gets to do it."""

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_CANNOT_START = 127


# --------------------------------------------------------------------------- the parent's side


class Guarded:
    """A running command and its guard, as the process that started it sees them.

    Usable from any thread, and as a context manager that stops it. Not stopping it warns, as any open process
    does. A process forked from this one has no hold on the command: there :meth:`stop` does nothing.

    Attributes:
        argv: the command.
        pid: the process id of the command itself (not of its guard).
        guard_pid: the process id of the guard.
    """

    def __init__(self, process: subprocess.Popen[bytes], argv: Sequence[str], pid: int) -> None:
        self.argv = tuple(argv)
        self.pid = pid
        self.guard_pid = process.pid
        self._process = process
        self._owner_pid = os.getpid()
        self._stopping = threading.Lock()
        _GUARDED_HERE.add(self)

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        remove: Path | None = None,
    ) -> Guarded:
        """Start a command under a guard; returns once it runs (a few hundredths of a second).

        Args:
            argv: the program and its arguments.
            log: a file to which the command's stdout and stderr are appended (made with mode 0600); without
                one they are discarded. The command's stdin is empty.
            env: its whole environment; this process's when not given.
            remove: a directory to delete after the command's end if this process is gone by then. As long as
                it lives, deleting is left to it, since it may want to read what lies there.

        Raises:
            OSError: the command cannot be started; class, number and file name are those that ``subprocess``
                gives.
        """
        options = ["--remove", os.fspath(remove)] if remove is not None else []
        # -I -S: neither the user's site packages nor PYTHON* variables, for speed and so that nothing there
        # can break the guard. The variables stay in the environment, where the command finds them.
        line = [sys.executable, "-I", "-S", __file__, *options, "--", *argv]
        errors = subprocess.DEVNULL if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        windows_flags: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        try:
            process = subprocess.Popen(  # noqa: S603  # the command is the caller's, no shell reads it
                line,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                start_new_session=True,
                creationflags=windows_flags,
            )
        finally:
            if log is not None:
                os.close(errors)
        assert process.stdout is not None
        with process.stdout as answers:
            answer = answers.readline().split()
        if len(answer) == 1:
            return cls(process, argv, int(answer[0]))
        assert process.stdin is not None
        process.stdin.close()
        code = process.wait()
        if len(answer) == 2:
            number = int(answer[1])
            raise OSError(number, os.strerror(number), argv[0])
        raise OSError(f"the guard of {argv[0]} ended with code {code} before it started it")

    def poll(self) -> int | None:
        """The command's exit code; None while it runs.

        128 + n means that signal n ended it; a negative number that one ended the guard.
        """
        code = self._process.poll()
        if code is not None:
            self._let_go()
        return code

    def stop(self, timeout_s: float = GRACE_S) -> int | None:
        """End the command and wait for its end; does nothing when it has ended already.

        Args:
            timeout_s: seconds from SIGTERM to SIGKILL; 0 kills at once.

        Returns:
            the exit code as :meth:`poll` gives it; None in a process that did not spawn the command.
        """
        if os.getpid() != self._owner_pid:
            return None
        with self._stopping:
            if self._process.poll() is None:
                assert self._process.stdin is not None
                # Said in words and closed afterwards: the end of the pipe means that this process is gone.
                with contextlib.suppress(OSError, ValueError):
                    self._process.stdin.write(b"%.3f\n" % timeout_s)
            try:
                code = self._process.wait(timeout_s + GUARD_MARGIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
            self._let_go()
            return code

    def _let_go(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _forked(self) -> None:
        """Give up the copy that a fork made: with it, the guard would not see its parent's end."""
        self._let_go()
        # Not a child of this process: nothing to wait for and nothing to warn of.
        self._process.returncode = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Guarded {self.argv[0]} pid={self.pid} guard={self.guard_pid} code={self._process.returncode}>"


_GUARDED_HERE: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _forget_all() -> None:
    for guarded in list(_GUARDED_HERE):
        guarded._forked()  # noqa: SLF001  # same file
    _GUARDED_HERE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --------------------------------------------------------------------------- the guard

_EXITED, _STOP, _PARENT_GONE = "exited", "stop", "parent gone"
_Events = queue.SimpleQueue[tuple[str, float]]  # of all queues, the one whose put is safe in a signal handler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the guard of the command after ``--``; returns the exit code to end with."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = given.index("--") if "--" in given else 0  # cut here by hand: the command may have its own "--"
    parser = argparse.ArgumentParser(prog="guard", description="Run a command that ends with the parent process.")
    parser.add_argument("--remove", metavar="DIR", help="delete it after the command's end if the parent is gone")
    options, command = parser.parse_args(given[:first]), given[first + 1 :]
    if not command:
        parser.error("no command after --")

    events = _Events()
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: events.put((_STOP, GRACE_S)))
    if hasattr(signal, "pthread_sigmask"):
        # A parent thread's blocked signals are inherited, and the command would be deaf to SIGTERM.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    try:
        # Started by the main thread and before there are others: the kernel ties the child to the *thread*
        # that forked it.
        child = subprocess.Popen(  # noqa: S603  # the command is the caller's, no shell reads it
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            preexec_fn=_tie_to_guard(),  # noqa: PLW1509  # there are no threads yet
            process_group=None if sys.platform == "win32" else 0,
        )
    except OSError as error:
        _answer(b"error %d\n" % (error.errno or 0))
        return _CANNOT_START
    _answer(b"%d\n" % child.pid)

    threading.Thread(target=_watch_parent, args=(events,), daemon=True).start()
    threading.Thread(target=_watch_child, args=(child, events), daemon=True).start()
    parent_gone = _until_exit(child, events)
    # What the command left behind. The group's number cannot be another's yet: the command is not reaped.
    _kill_group(child)
    code = child.wait()
    if parent_gone and options.remove:
        import shutil  # noqa: PLC0415  # only now, for a quick start

        shutil.rmtree(options.remove, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _answer(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the parent is gone already: stdin is about to say so
        os.write(1, line)


def _until_exit(child: subprocess.Popen[bytes], events: _Events) -> bool:
    """Wait for the child's exit, ending it when told to. Returns whether the parent is gone."""
    parent_gone = False
    kill_at: float | None = None  # None: not told to end it, or killed already
    terminated = False
    while True:
        try:
            event, grace_s = events.get(timeout=None if kill_at is None else max(0.0, kill_at - time.monotonic()))
        except queue.Empty:
            _kill_group(child)
            kill_at = None
            continue
        if event == _EXITED:
            return parent_gone
        parent_gone = parent_gone or event == _PARENT_GONE
        if not terminated and grace_s > 0:
            terminated = True
            _terminate(child)
        until = time.monotonic() + grace_s
        kill_at = until if kill_at is None else min(kill_at, until)


def _watch_parent(events: _Events) -> None:
    """Read stdin past Python's buffers: a thread inside those makes the interpreter's exit fail."""
    pending = b""
    while True:
        try:
            received = os.read(0, 64)
        except OSError:
            received = b""
        if not received:
            events.put((_PARENT_GONE, GRACE_S))
            return
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            events.put((_STOP, float(line)))


def _watch_child(child: subprocess.Popen[bytes], events: _Events) -> None:
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves the zombie, so that its number stays taken
    else:
        child.wait()
    events.put((_EXITED, 0.0))


def _terminate(child: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        child.terminate()
    else:
        with contextlib.suppress(OSError):
            os.kill(child.pid, signal.SIGTERM)  # it alone: what it started is its own to end in good order


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        child.kill()
    else:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)


def _tie_to_guard() -> Callable[[], None] | None:
    """What the child runs between fork and exec: on Linux, a request to be killed when the guard ends."""
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415  # Linux only

    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: after it, as little as possible
    guard_pid = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard_pid:  # the guard died before the line above
            os._exit(_CANNOT_START)

    return tie


if __name__ == "__main__":
    sys.exit(main())
