"""A child: the process of one env, as its worker sees it, and why it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Literal

from meshrl.errors import DeadlineExceeded, EnvError, EnvProcessDied, MalformedMessage
from meshrl.worker.channel import Channel
from meshrl.worker.isolation import Deadlines
from meshrl.worker.limits import Limits, cpu_exceeded

# Of what it wrote, the end is kept for whoever asks why it ended.
KEPT_BYTES = 8192
KEPT_LINES = 25
# From the end of its channel to the news of its own: then it is killed, for one that lives on has let go of it.
END_S = 5.0

# By which an allocation that failed ends native code.
_OF_MEMORY = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS"})


class ChildGone(Exception):
    """The channel has ended; :meth:`Child.cause` says why."""


class Child:
    """One process; asked by one thread at a time, killed by any.

    Args:
        number: by which the fork server knows it.
        channel: to it.
        output: what reads what it writes.
        kill: has the fork server kill it.
        deadlines: of what it is asked.
        limits: those that it has.

    Attributes:
        pid: its process id, once it is there.
        born: set when it is there, or never will be.
        ended: set when it has ended.
        status: how, as ``os.waitpid`` tells it; None where nobody could see it.
        refused: why it could not be forked, in words.
        due: when what it is asked is over its deadline; read by the thread that looks for that.
    """

    def __init__(
        self,
        number: int,
        channel: Channel,
        output: int,
        kill: Callable[[int], None],
        deadlines: Deadlines,
        limits: Limits,
    ) -> None:
        self.number = number
        self.output = output
        self.pid = 0
        self.born = threading.Event()
        self.ended = threading.Event()
        self.status: int | None = None
        self.refused = ""
        self.due = float("inf")
        self._channel = channel
        self._kill = kill
        self._deadlines = deadlines
        self._limits = limits
        self._allowed_s = 0.0  # from when it was asked, or was abandoned
        self._asked: tuple[Literal["step", "reset"], float] = ("step", 0.0)
        self._overdue: tuple[Literal["step", "reset"], float] | None = None
        self._unwanted = False
        self._tail = b""

    def __repr__(self) -> str:
        return f"<Child {self.number}, process {self.pid}, {'ended' if self.ended.is_set() else 'running'}>"

    # ---------------------------------------------------------------- asked

    def ask(self, request: bytes, which: Literal["step", "reset"], seconds: float | None = None) -> bytes | bytearray:
        """The answer to one request.

        Args:
            request: its bytes.
            which: the deadline that counts.
            seconds: another length of it.

        Raises:
            ChildGone: it ended, or was ended, before it answered.
        """
        seconds = self._deadlines.seconds(which) if seconds is None else seconds
        self._asked = (which, seconds)
        self._allowed_s = seconds
        self.due = time.monotonic() + seconds
        try:
            self._channel.send(request)
            return self._channel.receive()
        except MalformedMessage as exc:
            self.wrote(f"{exc.message}\n".encode())
            self._kill(self.number)
            raise ChildGone from exc
        except (EOFError, OSError) as exc:
            raise ChildGone from exc
        finally:
            self.due = float("inf")

    def look(self, now: float, not_before: float) -> None:
        """Kill it if it is over its deadline; on the thread that looks at all of them.

        Args:
            now: by the clock of ``time.monotonic``.
            not_before: its time did not begin before that.
        """
        if now >= max(self.due, not_before + self._allowed_s):
            self._overdue = self._overdue or self._asked
            self._kill(self.number)

    def abandon(self, seconds: float) -> None:
        """Nobody waits for what it is asked any more: it has so many seconds to finish."""
        if self.due != float("inf"):
            self._unwanted = True
            self._allowed_s = min(self._allowed_s, seconds)
            self.due = min(self.due, time.monotonic() + seconds)

    def end(self) -> None:
        """End it now, and wait for that, for :data:`END_S` at most."""
        self._kill(self.number)
        self.ended.wait(END_S)
        self._channel.close()

    # ---------------------------------------------------------------- its end

    def wrote(self, data: bytes) -> None:
        """It wrote something."""
        self._tail = (self._tail + data)[-KEPT_BYTES:]

    def last_words(self) -> str:
        """The last lines that it wrote."""
        lines = self._tail.decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-KEPT_LINES:])

    def cause(self, name: str, op: str) -> EnvError:
        """Why it has ended, as the error for its client.

        Args:
            name: the env's, as served.
            op: what it was asked.
        """
        if not self.ended.wait(END_S):
            self._kill(self.number)
            self.ended.wait(END_S)
        if self._overdue is not None and not self._unwanted:
            return self._late(name, op)
        signal_name, exit_code = self._how()
        if signal_name == "SIGXCPU" and self._limits.max_cpu_s is not None:
            return cpu_exceeded(name, self._limits.max_cpu_s)
        facts: dict[str, object] = {"op": op}
        if signal_name:
            how, facts["signal"] = f"was ended by {signal_name}", signal_name
        elif exit_code is not None:
            how, facts["exit_code"] = f"ended itself with exit code {exit_code}", exit_code
        else:
            how = "was lost"
        remedy = "its session is over, open a new one; what the process wrote last stands below, if it wrote anything"
        if signal_name == "SIGKILL" and not self._unwanted:
            remedy = f"somebody killed it, maybe the system for want of memory; {remedy}"
        if signal_name in _OF_MEMORY and self._limits.max_memory_bytes is not None:
            allowed = f"{self._limits.max_memory_bytes / 2**20:,.0f} MiB"
            remedy = f"native code may end so when it is refused memory, of which it may have {allowed}; {remedy}"
        words = self.last_words()
        return EnvProcessDied(
            f"{name}: the env's process {how} during {op}; {remedy}",
            remote_traceback=words or None,
            stderr=words,
            **facts,
        )

    def not_forked(self, name: str) -> EnvProcessDied:
        """The error where there never was a process."""
        return EnvProcessDied(
            f"{name}: no process could be started for the env: {self.refused or 'the fork server did not answer'}; "
            "end some, or serve fewer slots on this machine",
            op="constructor",
        )

    def _late(self, name: str, op: str) -> DeadlineExceeded:
        assert self._overdue is not None
        which, seconds = self._overdue
        words = self.last_words()
        return DeadlineExceeded(
            late_message(name, op, which, seconds, "its process was killed and its session is over, open a new one"),
            remote_traceback=words or None,
            deadline=which,
            deadline_s=seconds,
            op=op,
        )

    def _how(self) -> tuple[str, int | None]:
        if self.status is None:
            return "", None
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = f"signal {number}"
            with contextlib.suppress(ValueError):
                name = signal.Signals(number).name
            return name, None
        return "", os.waitstatus_to_exitcode(self.status)


def late_message(name: str, op: str, which: Literal["step", "reset"], seconds: float, what_then: str) -> str:
    """What is said of env code that was over a deadline."""
    return (
        f"{name}: {op} took longer than the {which} deadline of {seconds:g} s; {what_then}; if it may take so long, "
        f"its operator raises --{which}-deadline"
    )
