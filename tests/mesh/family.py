"""A program run as a user would run it, and the processes that come of it.

Every process below it inherits a mark in its environment, by which it is found in /proc, whoever its parent is by then.
"""

import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

DEADLINE_S = 30.0
MARK = "MESHRL_TEST_FAMILY"


class Family:
    """A Python program with a home of its own, which finds no mesh but one that it starts.

    Used as a context manager that kills what is still there at the end.
    """

    def __init__(self, arguments: Sequence[str], home: Path) -> None:
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("MESHRL_")}
        env |= {"HOME": str(home), "MESHRL_STATE_DIR": str(home / "state"), "TMPDIR": str(home)}
        env |= dict([self._mark.split("=")])
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=env,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def output(self) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr (what was not read before), once it has ended."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def read_until(self, part: str) -> str:
        """Its stdout up to and with the first line that contains ``part``."""
        assert self.process.stdout is not None
        read = ""
        for line in self.process.stdout:
            read += line
            if part in line:
                return read
        raise AssertionError(f"no line with {part!r} in:\n{read}")

    def members(self, part: str = "") -> list[int]:
        """Process ids of those alive whose command line contains ``part``."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                marked = self._mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if marked and part in command:
                found.append(int(entry.name))
        return found

    def commands(self, part: str) -> list[int]:
        """The same without the guards, whose command line contains that of what they guard."""
        guards = set(self.members("guard.py"))
        return [pid for pid in self.members(part) if pid not in guards]

    def is_gone(self) -> bool:
        """Whether all of its processes end before the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while pids := self.members():
            for pid in pids:
                if not exits(pid, deadline - time.monotonic()):
                    return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def exits(pid: int, timeout_s: float) -> bool:
    """Whether that process, which need not be a child, ends within the time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], max(0.0, timeout_s))[0])
    finally:
        os.close(fd)
