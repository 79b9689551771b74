"""Limits: the memory and the CPU time that a process may take, as its operator says (POSIX).

Memory is what the process may have allocated: on Linux its private writable memory (``RLIMIT_DATA``), which leaves out
what it has only mapped or reserved; elsewhere its address space (``RLIMIT_AS``). An allocation beyond it fails, which
in Python is a ``MemoryError``. CPU time counts over all threads of the process, from its beginning; at the limit the
kernel sends ``SIGXCPU``.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass

from meshrl.errors import LimitExceeded, UsageError

try:
    import resource
except ImportError:  # Windows
    HAS_RLIMITS = False
else:
    HAS_RLIMITS = True

# CPU seconds beyond the limit that a process has which says itself that it is over; then the kernel ends it.
GRACE_CPU_S = 30


@dataclass(frozen=True)
class Limits:
    """What one process may take.

    Attributes:
        max_memory_bytes: None for as much as there is.
        max_cpu_s: None for as long as it lives.
    """

    max_memory_bytes: int | None = None
    max_cpu_s: float | None = None

    def __bool__(self) -> bool:
        return self.max_memory_bytes is not None or self.max_cpu_s is not None

    def check(self) -> None:
        """Whether they can be had here.

        Raises:
            UsageError: this system has no rlimits, or one of them is not above 0.
        """
        if self and not HAS_RLIMITS:
            raise UsageError("limits of memory and CPU time need a POSIX system; leave max_memory and max_cpu_s out")
        for name, value in asdict(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} is a number above 0, not {value}; leave it out for no limit")

    def apply(self, *, grace_cpu_s: int = 0) -> None:
        """Set them for this process, and for those that it forks from now on; they cannot be raised again.

        Args:
            grace_cpu_s: what it has to end by itself after ``SIGXCPU``.
        """
        if self.max_memory_bytes is not None:
            _lower(_memory(), self.max_memory_bytes, self.max_memory_bytes)
        if self.max_cpu_s is not None:
            soft = math.ceil(self.max_cpu_s)
            _lower(resource.RLIMIT_CPU, soft, soft + max(1, grace_cpu_s))

    def to_text(self) -> str:
        """As :meth:`from_text` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Limits:
        """What :meth:`to_text` wrote."""
        return cls(**json.loads(text))


def of_this_process() -> Limits:
    """What this process may take, as far as it is limited."""
    if not HAS_RLIMITS:
        return Limits()
    memory, cpu = resource.getrlimit(_memory())[0], resource.getrlimit(resource.RLIMIT_CPU)[0]
    endless = resource.RLIM_INFINITY
    return Limits(None if memory == endless else memory, None if cpu == endless else float(cpu))


def memory_exceeded(what: str, op: str, max_memory_bytes: int) -> LimitExceeded:
    """The error for a ``MemoryError`` under a limit."""
    return LimitExceeded(
        f"{what}: {op} took more than the {max_memory_bytes / 2**20:,.0f} MiB of memory that its process may have; its "
        "session is over: ask for less of it, or have its operator raise --max-memory",
        limit="memory",
        max_memory_bytes=max_memory_bytes,
        op=op,
    )


def cpu_exceeded(what: str, max_cpu_s: float) -> LimitExceeded:
    """The error for a process that was told of its end by ``SIGXCPU``."""
    return LimitExceeded(
        f"{what}: its process has used the {max_cpu_s:g} s of CPU time that it may have; its session is over: open a "
        "new one, which begins to count anew, or have its operator raise --max-cpu-seconds",
        limit="cpu",
        max_cpu_s=max_cpu_s,
    )


def _memory() -> int:
    return resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS


def _lower(which: int, soft: int, hard: int) -> None:
    """Set a limit, but for what was limited further before."""
    before = [math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(which)]
    resource.setrlimit(which, (int(min(soft, before[0])), int(min(hard, before[1]))))
