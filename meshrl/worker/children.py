"""The children of a worker: the processes of its envs, forked for it, watched by one thread (R10).

That thread reads what they write, hears how they end, and kills those that are over their deadline. It never waits for
any of them, so that one which hangs holds up nobody. When it has not looked for long, the worker was stopped, and an
answer may lie there that nobody could read: then each has its whole time again, as in :mod:`~meshrl.worker.overdue`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections import deque

from meshrl.worker.channel import Channel
from meshrl.worker.child import Child
from meshrl.worker.fork_server import NEWS, ORDER, command
from meshrl.worker.isolation import Deadlines
from meshrl.worker.limits import Limits
from meshrl.worker.sealing import STATE_KEY_VARIABLE

log = logging.getLogger("meshrl.worker")

# Between looks at deadlines.
LOOK_S = 0.25
# Longer between two of them, and the worker was stopped.
LATE_S = 4 * LOOK_S
# For the fork server to begin, which imports Gymnasium and NumPy, and for a fork, on a busy machine.
BORN_S = 60.0
# It ends by itself when its socket does.
STOP_S = 5.0
_READ_BYTES = 65536
# Of one child, before the others have their turn: one may write without end.
READS_A_TURN = 16


class Children:
    """Starts the processes of a worker's envs. Usable from any thread.

    Args:
        deadlines: of what each is asked.
        limits: of each.
    """

    def __init__(self, deadlines: Deadlines, limits: Limits) -> None:
        self._deadlines = deadlines
        self._limits = limits
        self._lock = threading.Lock()
        self._family: Family | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin: the first child will find the fork server there, or about to be."""
        self._current()

    def fork(self) -> Child:
        """A new process, which is there by then, or never will be (``pid`` is 0).

        Blocks for some milliseconds; longer while the fork server begins.
        """
        child = self._current().fork(self._deadlines, self._limits)
        if not child.born.wait(BORN_S) or not child.pid:
            child.end()
        return child

    def stop(self) -> None:
        """End all of them; returns when they have ended, or after some seconds."""
        with self._lock:
            self._stopped, family = True, self._family
        if family is not None:
            family.stop()

    def _current(self) -> Family:
        with self._lock:
            if not self._stopped and (self._family is None or self._family.over.is_set()):
                self._family = Family(self._limits)  # after one whose fork server has ended
                self._family.start()
            assert self._family is not None, "a worker that is stopped makes no envs"
            return self._family


class Family(threading.Thread):
    """One fork server and its children, and the thread that watches them.

    Args:
        limits: of each child.

    Attributes:
        over: set when the fork server has ended, and all of them with it.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(name="children of a worker", daemon=True)
        self.over = threading.Event()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of orders, each of which is whole
        self._fresh: deque[Child] = deque()  # to be watched from the thread's next turn on
        self._watched: dict[int, Child] = {}  # by number; of the thread
        self._by_output: dict[int, Child] = {}
        self._news = b""
        self._stopping = False
        self._looked_at = time.monotonic()
        self._not_before = self._looked_at  # since when the worker has been running
        self._wake_out, self._wake_in = socket.socketpair()
        self._control, others = socket.socketpair()
        with others:
            # A session of its own: Ctrl-C in a terminal is the worker's alone, which then ends in good order.
            self._server = subprocess.Popen(  # noqa: S603  # this package's own program
                command(others.fileno(), limits),
                stdin=subprocess.DEVNULL,
                pass_fds=[others.fileno()],
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != STATE_KEY_VARIABLE},
            )

    def fork(self, deadlines: Deadlines, limits: Limits) -> Child:
        """Order one more; ``born`` is set when it is there, or never will be."""
        own, others = socket.socketpair()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        child = Child(next(self._numbers), Channel(own), reading, self._kill, deadlines, limits)
        try:
            with self._lock:
                self._fresh.append(child)
                with contextlib.suppress(OSError):
                    self._wake_in.send(b"x")
                with contextlib.suppress(OSError):  # the fork server has ended a moment ago, as the thread will see
                    socket.send_fds(self._control, [ORDER.pack(b"f", child.number)], [others.fileno(), writing])
                if self.over.is_set():  # or has seen already, and looks at nothing any more
                    os.close(reading)
                    _gone(child)
        finally:
            others.close()
            os.close(writing)
        return child

    def stop(self) -> None:
        """End all of them; returns when they have ended, or after some seconds."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self.join(2 * STOP_S)

    def _kill(self, number: int) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._control.sendall(ORDER.pack(b"k", number))

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        """Watch until the fork server ends."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        while self._look(poll):
            pass
        code = _wait(self._server)
        if not self._stopping:
            log.error("the fork server of the worker's envs ended with code %s; their sessions are lost", code)
        with self._lock:
            self.over.set()
            self._take_fresh(poll)
            self._control.close()
        for fd, child in self._by_output.items():
            drain(child)
            os.close(fd)
        for child in self._watched.values():
            _gone(child)
        self._wake_in.close()
        self._wake_out.close()

    def _look(self, poll: select.poll) -> bool:
        """One turn; False when the fork server has ended."""
        ready = {fd for fd, _ in poll.poll(LOOK_S * 1000)}
        if self._wake_out.fileno() in ready:
            self._wake_out.recv(_READ_BYTES)
        came = None
        if self._control.fileno() in ready:
            came = b""
            with contextlib.suppress(OSError):
                came = self._control.recv(_READ_BYTES)
        self._take_fresh(poll)  # whatever came is of children that were put there before it came
        for fd in ready & self._by_output.keys():
            if not drain(self._by_output[fd]):
                poll.unregister(fd)
                del self._by_output[fd]
                os.close(fd)
        if came is not None:
            if not came:
                return False
            self._news += came
            while len(self._news) >= NEWS.size:
                self._hear(*NEWS.unpack_from(self._news))
                self._news = self._news[NEWS.size :]
        now = time.monotonic()
        if now - self._looked_at > LATE_S:
            self._not_before = now
        self._looked_at = now
        for child in self._watched.values():
            child.look(now, self._not_before)
        return True

    def _hear(self, kind: bytes, number: int, value: int) -> None:
        child = self._watched.get(number)
        assert child is not None, "it is watched before it is ordered"
        if kind == b"b":
            child.pid = value
            child.born.set()
            return
        del self._watched[number]
        if kind == b"n":
            child.refused = os.strerror(value)
        else:
            child.status = value
        if child.output in self._by_output:
            drain(child)
        child.ended.set()
        child.born.set()

    def _take_fresh(self, poll: select.poll) -> None:
        while self._fresh:
            child = self._fresh.popleft()
            self._watched[child.number] = self._by_output[child.output] = child
            poll.register(child.output, select.POLLIN)


def _gone(child: Child) -> None:
    """Nobody will hear of it any more."""
    child.ended.set()
    child.born.set()


def drain(child: Child) -> bool:
    """Read what it wrote, keep the end of it and pass all of it on; False once nothing more can come."""
    for _ in range(READS_A_TURN):
        try:
            data = os.read(child.output, _READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        child.wrote(data)
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, data)
    return True


def _wait(server: subprocess.Popen[bytes]) -> int:
    try:
        return server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()
