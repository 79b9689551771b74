"""The fork server: a clean process from which those of envs are forked, and which sees how each of them ends.

It has imported what every env needs, runs no env code, has one thread and is single-minded, so that a fork of it is
safe and takes some milliseconds, where a new interpreter takes a second. Its orders come over a socket from the worker,
and its news go back over it. The rules of this file:

    1. when the worker is gone, however it ended, the socket ends: every process is killed, then this one ends;
    2. when this one is killed itself, the kernel kills its children (Linux: ``PR_SET_PDEATHSIG``);
    3. each process leads a group of its own; what is left of the group when it ends is killed.

    order                       news
    b"f", number, two fds       b"b", number, pid        it was forked: its channel and where it writes
                                b"n", number, errno      it could not be
    b"k", number                                         kill it, and what it started
                                b"e", number, status     it has ended, as os.waitpid tells it
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from meshrl.worker.channel import Channel
from meshrl.worker.inside import serve
from meshrl.worker.limits import Limits

ORDER = struct.Struct("!cI")
NEWS = struct.Struct("!cIi")
# What a program runs that becomes a fork server; the path makes it import what its worker would.
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from meshrl.worker.fork_server import main; main()"

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


class ForkServer:
    """Forks and watches; used by one thread.

    Args:
        control: the socket to the worker.
        limits: of each process that it forks.
    """

    def __init__(self, control: socket.socket, limits: Limits) -> None:
        self._control = control
        self._limits = limits
        self._pids: dict[int, int] = {}  # by number
        self._numbers: dict[int, int] = {}  # by pid
        self._woken, self._wake = os.pipe()
        self._tie = _tie_to(os.getpid())

    def run(self) -> None:
        """Carry out orders until the worker is gone."""
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        try:
            while True:
                ready, _, _ = select.select([self._control.fileno(), self._woken], [], [])
                if self._woken in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                    self._reap()
                if self._control.fileno() in ready and not self._order():
                    return
        finally:
            for pid in self._numbers:
                _kill_group(pid)
            with contextlib.suppress(ChildProcessError):
                while True:  # so that none of them is there any more when this one is not
                    os.waitpid(-1, 0)

    def _order(self) -> bool:
        try:
            order, fds, _, _ = socket.recv_fds(self._control, ORDER.size, 2)
            while 0 < len(order) < ORDER.size and (more := self._control.recv(ORDER.size - len(order))):
                order += more
        except OSError:
            return False
        if len(order) < ORDER.size:
            return False
        kind, number = ORDER.unpack(order)
        if kind == b"f":
            try:
                self._fork(number, *fds)
            finally:
                for fd in fds:
                    os.close(fd)
        elif number in self._pids:
            _kill_group(self._pids[number])
        return True

    def _fork(self, number: int, channel: int, output: int) -> None:
        try:
            pid = os.fork()
        except OSError as exc:  # no memory, or too many processes
            self._tell(b"n", number, exc.errno or 0)
            return
        if not pid:
            self._become(channel, output)
        with contextlib.suppress(OSError):  # it does so itself as well: whoever is first
            os.setpgid(pid, pid)
        self._pids[number] = pid
        self._numbers[pid] = number
        self._tell(b"b", number, pid)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            _kill_group(found.si_pid)  # the number of the group cannot be another's yet: it is not reaped
            _, status = os.waitpid(found.si_pid, 0)
            number = self._numbers.pop(found.si_pid, None)
            if number is not None:
                del self._pids[number]
                self._tell(b"e", number, status)

    def _tell(self, kind: bytes, number: int, value: int) -> None:
        with contextlib.suppress(OSError):  # the worker is gone: the next order says so
            self._control.sendall(NEWS.pack(kind, number, value))

    def _become(self, channel: int, output: int) -> NoReturn:
        """The forked process: be that of an env, and end."""
        code = 1
        try:
            self._tie()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.set_inheritable(1, True)
            os.set_inheritable(2, True)
            for fd in (output, self._woken, self._wake):
                os.close(fd)
            self._control.close()
            faulthandler.enable()  # where in Python a crash of native code was
            os.set_inheritable(channel, False)
            self._limits.apply()
            serve(Channel(socket.socket(fileno=channel)))
            code = 0
        except BaseException:  # noqa: BLE001  # nothing of this process goes on in its copy
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _tie_to(parent: int) -> Callable[[], None]:
    """What ends a forked process with ``parent``, whose first thread forks it."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes  # noqa: PLC0415  # Linux only

    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return tie


def main() -> None:
    """Be a fork server: its socket, the import path and the limits are its arguments."""
    control, _path, limits = sys.argv[1:]
    sys.argv[:] = [sys.executable]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what an env prints before it crashes
    gc.collect()
    gc.freeze()  # of what is shared with every fork, no page is copied for a collection
    ForkServer(socket.socket(fileno=int(control)), Limits.from_text(limits)).run()


def command(control: int, limits: Limits) -> list[str]:
    """The command line of one whose socket is the inherited ``control``."""
    return [sys.executable, "-c", PROGRAM, str(control), json.dumps(sys.path), limits.to_text()]
