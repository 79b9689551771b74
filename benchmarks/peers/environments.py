"""The peers' virtual environments, one a peer, made on first use under ``benchmarks/.envs``.

Standard library only. A peer's ``requirements.txt`` is the whole closure, pinned: pip resolves nothing, so that a run
next year measures the same packages, and nothing heavy comes in unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PEERS = Path(__file__).resolve().parent
ENVIRONMENTS = PEERS.parent / ".envs"
STAMP = "requirements.sha256"
INSTALL_TIMEOUT_S = 900.0


class NotInstallable(Exception):
    """A peer's environment could not be made; the message says why."""


def ensure(peer: str) -> Path:
    """The Python of the environment of ``peer`` (a directory under peers/), which is made first where it is not there.

    Raises:
        NotInstallable: it cannot be made here.
    """
    requirements = PEERS / peer / "requirements.txt"
    directory = ENVIRONMENTS / peer
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = _stamp(requirements)
    ENVIRONMENTS.mkdir(exist_ok=True)
    with _locked(ENVIRONMENTS / f"{peer}.lock"):
        stamp = directory / STAMP
        if stamp.is_file() and stamp.read_text() == wanted and python.exists():
            return python
        count = sum(1 for line in requirements.read_text().splitlines() if "==" in line)
        _say(f"{peer}: making its environment, {count} packages ...")
        began = time.monotonic()
        if directory.exists():
            shutil.rmtree(directory)
        _run(peer, [sys.executable, "-m", "venv", str(directory)])
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        _run(peer, [str(python), *install, "--requirement", str(requirements)])
        stamp.write_text(wanted)  # last: an interrupted build is no build
        _say(f"{peer}: ready after {time.monotonic() - began:.0f} s, {size_mb(peer):.0f} MB")
    return python


def size_mb(peer: str) -> float:
    """What the environment of ``peer`` takes on disk, in megabytes."""
    return sum(path.lstat().st_size for path in (ENVIRONMENTS / peer).rglob("*") if not path.is_dir()) / 1e6


def _stamp(requirements: Path) -> str:
    return hashlib.sha256(f"{sys.version_info[:3]} {sys.platform}\n{requirements.read_text()}".encode()).hexdigest()


def _run(peer: str, argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstallable(f"cannot install {peer}: {error}") from error
    if done.returncode:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("ERROR")]
        raise NotInstallable(f"cannot install {peer}: {errors[-1] if errors else done.stderr.strip()[-300:]}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two benchmarks started at once make an environment once."""
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl  # noqa: PLC0415  not on Windows

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.parent.name for path in PEERS.glob("*/requirements.txt")):
        try:
            ensure(name)
        except NotInstallable as error:
            _say(f"{name}: unavailable: {error}")
