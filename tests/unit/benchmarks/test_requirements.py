"""Peers that run this system in an environment of their own have what it needs there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Of the command line, which no peer has.
NOT_NEEDED = {"typer", "rich"}


def canonical(requirement: str) -> str:
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_environment_of_the_trainer_has_what_this_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonical(one) for one in project["dependencies"]} - NOT_NEEDED
    lines = (ROOT / "benchmarks/peers/sb3/requirements.txt").read_text().splitlines()
    there = {canonical(line) for line in lines if line and not line.startswith(("#", "-"))}
    assert needed - there == set()
