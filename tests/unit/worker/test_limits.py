"""Limits: what may be asked for, and what becomes of a process that has them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from meshrl.errors import UsageError
from meshrl.worker import limits
from meshrl.worker.limits import Limits, of_this_process

posix = pytest.mark.skipif(sys.platform == "win32", reason="rlimits")


def run_under(applied: Limits, program: str, grace_cpu_s: int = 0) -> subprocess.CompletedProcess[str]:
    setup = (
        f"from meshrl.worker.limits import *; Limits.from_text({applied.to_text()!r}).apply(grace_cpu_s={grace_cpu_s})"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{setup}\n{program}"], capture_output=True, text=True, timeout=60, check=False
    )


def test_no_limits_are_none() -> None:
    assert not Limits()
    assert Limits(max_cpu_s=1.0)
    assert Limits.from_text(Limits(1 << 30, 2.5).to_text()) == Limits(1 << 30, 2.5)


@pytest.mark.parametrize("wrong", [Limits(0), Limits(-1), Limits(None, 0.0), Limits(None, float("inf"))])
def test_limits_that_are_none_are_refused(wrong: Limits) -> None:
    with pytest.raises(UsageError, match="is a number above 0"):
        wrong.check()


def test_system_without_rlimits_refuses_them_and_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HAS_RLIMITS", False)
    Limits().check()
    with pytest.raises(UsageError, match="need a POSIX system"):
        Limits(1 << 30).check()
    assert of_this_process() == Limits()


@posix
def test_process_knows_its_limits_and_cannot_have_more_memory() -> None:
    done = run_under(
        Limits(1 << 30, 50.0),
        "print(of_this_process())\n"
        "try: bytearray(2 << 30)\n"
        "except MemoryError: print('refused')\n"
        "Limits(4 << 30, 60.0).apply()\n"  # not raised again
        "print(of_this_process())\n",
    )
    same = str(Limits(1 << 30, 50.0))
    assert done.stdout.splitlines() == [same, "refused", same], done.stderr


@posix
def test_process_over_its_cpu_time_is_ended_by_a_signal_of_its_own() -> None:
    done = run_under(Limits(None, 1.0), "while True: pass")
    assert done.returncode == -signal.SIGXCPU
    handled = "import os, signal; signal.signal(signal.SIGXCPU, lambda *_: os._exit(5))\nwhile True: pass"
    assert run_under(Limits(None, 1.0), handled, grace_cpu_s=30).returncode == 5


def test_this_process_is_not_limited_by_any_of_that() -> None:
    assert of_this_process().max_memory_bytes is None or os.environ.get("CI")
