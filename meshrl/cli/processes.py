"""The processes of ``meshrl serve --processes N``: each is a worker of its own, under a guard.

The rules of this file:

    1. a process that dies is started again, later each time, and the reason is told;
    2. one whose starts fail :data:`MAX_FAILED_STARTS` times in a row ends the command: what it serves has become
       impossible (an env whose package was replaced, a login that was taken back); so does one that serves and dies
       soon more than :data:`MAX_CRASHES` times in a row, for what is asked of it kills it;
    3. what a process writes, on either stream, comes out on this one's stderr with its number in front. It goes
       through a pipe, line by line, so nothing is lost and nothing lies on a disk;
    4. that it serves is a line too, which is not passed on (:func:`ready_line`).

Each runs the command line that its parent was given, with ``--process NUMBER`` in place of ``--processes`` and without
the url, which may hold a password and is handed over in the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO, cast

from meshrl.bus import guard
from meshrl.bus.guard import Guarded
from meshrl.bus.locate import URL_VARIABLE
from meshrl.cli.supervisor import MAX_DEATHS, WATCH_S, WELL_S, wait_before_restart_s
from meshrl.errors import WorkerError
from meshrl.worker.running import CONDEMNED_CODE

log = logging.getLogger("meshrl.cli")

STOP_S = 8.0
"""From SIGTERM to SIGKILL, beside the time for its sessions to move: a worker closes its envs for at most 5 s."""

MAX_FAILED_STARTS = 5
"""In a row; the waits between them add up to 15 s at most, for something that comes back by itself."""

MAX_CRASHES = 12
"""In a row, each within half a minute; with the waits between them, over a minute in which nobody had a worker."""

# Of a process that ended by the guard's signal itself; on Windows none says goodbye.
TERMINATED = 1 if sys.platform == "win32" else 128 + signal.SIGTERM
# Of one that was at its end already when it was interrupted.
INTERRUPTED = 128 + signal.SIGINT
# What is still in the pipe of a process that has ended; a process that it left behind may hold the pipe open.
DRAIN_S = 1.0
# A progress bar writes no end of line for hours.
LINE_BYTES = 65536
READY = '{"event": "ready"'
ERROR = "error: "


def ready_line(worker: str) -> str:
    """What a process prints once it is advertised.

    Args:
        worker: its id.
    """
    return json.dumps({"event": "ready", "worker": worker})


def how_it_ended(code: int) -> str:
    """An exit code of :meth:`Guarded.poll`, in words.

    Args:
        code: 128 + n means signal n, a negative number -n a signal that ended the guard.
    """
    number = -code if code < 0 else code - 128
    # A code of 129 and up that is no signal's was the process's own; Windows has 32 bits of them, known in hexadecimal.
    name = ""
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
    if code < 0:
        return f"lost its guard, which was ended by {name or f'signal {number}'}"
    if code > 128 and name:
        return f"was ended by {name}"
    if code == CONDEMNED_CODE:
        return f"ended with exit code {code}, since its worker was condemned"
    return f"ended with exit code {code if code < 256 else hex(code)}"


class Output(threading.Thread):
    """Passes on what one process writes, until its pipe ends. A thread, as Windows cannot await a pipe.

    An error message before the process is ready is kept for whoever started it: of several processes that fail for
    one reason, one is to tell it.

    Args:
        number: of the process.
        pipe: its stdout and stderr; closed at its end.
        say: takes each line; called on this thread.

    Attributes:
        ready: set when the process serves.
        worker: its worker's id, once it serves.
        error: the message of meshrl's with which it ended before it served, else empty.
        last: the last line that was passed on and was not empty.
    """

    def __init__(self, number: int, pipe: IO[bytes], say: Callable[[str], None]) -> None:
        super().__init__(name=f"output of process {number}", daemon=True)
        self.ready = threading.Event()
        self.worker = ""
        self.error = ""
        self.last = ""
        self._number = number
        self._pipe = pipe
        self._say = say

    def run(self) -> None:
        """Read until the end."""
        with self._pipe as pipe:
            for line in iter(partial(pipe.readline, LINE_BYTES), b""):
                self.take(line.decode("utf-8", "replace").rstrip("\r\n"))

    def take(self, line: str) -> None:
        """Do with one line what is to be done with it."""
        # An env may have printed something without an end of line before it.
        line, ready, rest = line.partition(READY)
        if ready:
            self._release()
            if line:
                self._pass_on(line)
            with contextlib.suppress(ValueError):
                self.worker = str(json.loads(ready + rest).get("worker", ""))
            self.ready.set()
            return
        self._release()
        if line.startswith(ERROR) and not self.ready.is_set():
            self.error = line.removeprefix(ERROR)
        else:
            self._pass_on(line)

    def _release(self) -> None:
        """What was kept was not the last word."""
        if self.error:
            error, self.error = self.error, ""
            self._pass_on(f"{ERROR}{error}")

    def _pass_on(self, line: str) -> None:
        self.last = line.strip() or self.last
        self._say(f"process {self._number}: {line}")


class ServingProcess:
    """One of the processes; a :class:`~meshrl.cli.supervisor.Supervisor` keeps it.

    Args:
        number: from 1, for people.
        line: its command line, which lets it print :func:`ready_line` when it is ready.
        url: of the server, password included; it is handed over in the environment.
        say: tells people what happened, and what the process writes; called on several threads.
        drain_s: how long it may take, when it is stopped, until its sessions are elsewhere.

    Attributes:
        failure: how its stop went wrong; empty while it did not.
    """

    def __init__(
        self, number: int, line: Sequence[str], url: str, say: Callable[[str], None], *, drain_s: float = 0.0
    ) -> None:
        self.number = number
        self.failure = ""
        self._line = [*line]
        self._url = url
        self._say = say
        self._stop_s = STOP_S + drain_s
        self._guarded: Guarded | None = None
        self._output: Output | None = None
        self._unborn = ""
        self._born = 0.0

    async def start(self) -> None:
        """Start it and wait until it is advertised, for as long as its envs take to be made.

        Raises:
            WorkerError: it ended before that.
        """
        self._spawn()
        while not self._serves():
            if self._ended:
                how = await self._last_words()
                if self._serves():  # it was read only now; what becomes of it is for watch()
                    break
                told = self._output.error if self._output is not None else ""
                raise WorkerError(f"{told} (process {self.number})" if told else how)
            await asyncio.sleep(WATCH_S / 2)
        self._log_ready()

    async def watch(self) -> None:
        """Start it again whenever it ends, later each time.

        Raises:
            WorkerError: too many starts in a row have failed.
        """
        deaths = failed_starts = 0
        while True:
            while not self._ended:  # noqa: ASYNC110  # a guarded process can only be polled
                await asyncio.sleep(WATCH_S)
            how, served = await self._last_words(), self._serves()
            if served and self._guarded is not None and self._guarded.poll() == 0:
                self._say(f"process {self.number} has left, as it was told to; it is started again")
                self._spawn()
                await self._until_ready_or_ended()
                continue
            failed_starts = 0 if served else failed_starts + 1
            deaths = 1 if served and time.monotonic() - self._born > WELL_S else deaths + 1
            if failed_starts >= MAX_FAILED_STARTS:
                raise WorkerError(f"{how}; {failed_starts} starts in a row have failed, so all processes are ended")
            if deaths > MAX_CRASHES:
                raise WorkerError(
                    f"{how}, {deaths} times in a row and each time within {WELL_S:g} s, so all processes are ended; "
                    'what it wrote stands above. isolation "process" keeps an env that crashes from ending its worker'
                )
            wait_s = wait_before_restart_s(min(deaths, MAX_DEATHS))
            assert wait_s is not None
            self._say(f"{how}; it is started again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            self._spawn()
            await self._until_ready_or_ended()

    def hurry(self, name: signal.Signals) -> None:
        """Have it end without waiting for its sessions: by SIGINT before :meth:`stop`, by SIGTERM meanwhile."""
        if self._guarded is None or self._guarded.poll() is not None or not self._serves():
            return  # one that does not serve yet ends by SIGTERM at once
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._guarded.pid, name)

    def stop(self) -> None:
        """End it in good order, after that time and :data:`STOP_S` by force; blocks until it has ended."""
        if self._guarded is None or self._guarded.poll() is not None:
            return
        began = time.monotonic()
        code = self._guarded.stop(self._stop_s)
        took_s = time.monotonic() - began
        assert self._output is not None
        self._output.join(DRAIN_S)
        if took_s >= self._stop_s:
            self.failure = f"process {self.number} did not end within {self._stop_s:g} s and was killed"
        # One that does not serve yet may fail in any way, as it does where none of them can start.
        elif self._serves() and code not in {0, TERMINATED, INTERRUPTED}:
            assert code is not None
            self.failure = f"process {self.number} {how_it_ended(code)} when it was to stop"

    def _serves(self) -> bool:
        return self._output is not None and self._output.ready.is_set()

    @property
    def _ended(self) -> bool:
        return self._guarded is None or self._guarded.poll() is not None

    def _spawn(self) -> None:
        # On the event loop, although it blocks for some hundredths of a second: a cancelled wait for a thread would
        # leave a process behind that nobody knows.
        self._born = time.monotonic()
        try:
            self._guarded, pipe = spawn_with_pipe(self._line, {**os.environ, URL_VARIABLE: self._url})
        except OSError as exc:  # no memory, too many processes: to be tried again as any other failed start
            self._guarded, self._output, self._unborn = None, None, f"{type(exc).__name__}: {exc}"
            return
        self._output = Output(self.number, pipe, self._say)
        self._output.start()

    async def _until_ready_or_ended(self) -> None:
        while not self._ended:
            if self._serves():
                assert self._output is not None
                self._say(f"process {self.number} serves again (worker {self._output.worker})")
                self._log_ready()
                return
            await asyncio.sleep(WATCH_S)

    async def _last_words(self) -> str:
        """How it ended, and why as far as is known."""
        if self._guarded is None or self._output is None:
            return f"process {self.number} cannot be started: {self._unborn}"
        await asyncio.to_thread(self._output.join, DRAIN_S)
        code = self._guarded.poll()
        assert code is not None
        how = f"process {self.number} {how_it_ended(code)}"
        if self._serves():
            return how  # its last line may be of long ago, and was passed on anyway
        reason = self._output.error or self._output.last
        return f"{how} before it served: {reason}" if reason else f"{how} before it served"

    def _log_ready(self) -> None:
        assert self._guarded is not None
        assert self._output is not None
        log.info("process %d is %d and serves as worker %s", self.number, self._guarded.pid, self._output.worker)


def spawn_with_pipe(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Guarded, IO[bytes]]:
    """Start a command under a guard, as :meth:`Guarded.spawn` does, with its output in a pipe in place of a file.

    Args:
        argv: the program and its arguments.
        env: its whole environment.

    Returns:
        the command and the pipe, which has what it writes to stdout and stderr, and what its guard has to say.

    Raises:
        OSError: it cannot be started.
    """
    windows_flags: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    process = subprocess.Popen(  # noqa: S603  # the command is this one's own, no shell reads it
        [sys.executable, "-I", "-S", guard.__file__, "--", *argv],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
        creationflags=windows_flags,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pipe = io.BufferedReader(cast("io.RawIOBase", process.stderr))
    with process.stdout as answers:
        answer = answers.readline().split()
    if len(answer) == 1:
        return Guarded(process, argv, int(answer[0])), pipe
    process.stdin.close()
    with pipe:
        said = pipe.read().decode("utf-8", "replace").strip()
    code = process.wait()
    if len(answer) == 2:
        raise OSError(int(answer[1]), os.strerror(int(answer[1])), argv[0])
    raise OSError(f"the guard of {argv[0]} ended with code {code} before it started it: {said}")
