"""The gate's own gate: a skip that nobody expects fails a run in CI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EXPECTED, NO_SKIPS

ROOT = Path(__file__).parents[2]
IN_A_TEST = """
import pytest

def test_one(): pass

@pytest.mark.skipif(True, reason={reason!r})
def test_two(): pass
"""
OF_A_MODULE = "import pytest; pytest.skip({reason!r}, allow_module_level=True)"


@pytest.mark.parametrize(
    ("reason", "told", "workers", "fails"),
    [
        ("port 4222 is taken", "1", "2", True),
        ("port 4222 is taken", "", "0", False),
        (next(iter(EXPECTED)), "1", "0", False),
    ],
)
def test_run_fails_by_a_skip_that_is_not_expected_where_it_is_told_to(
    tmp_path: Path, reason: str, told: str, workers: str, fails: bool
) -> None:
    (tmp_path / "test_in.py").write_text(IN_A_TEST.format(reason=reason))
    (tmp_path / "test_of.py").write_text(OF_A_MODULE.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-n", workers]
    ran = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, NO_SKIPS: told},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == (1 if fails else 0), ran.stdout + ran.stderr
    assert "1 passed, 2 skipped" in ran.stdout
    assert ran.stdout.count(f".py: {reason}\n") == ran.stdout.count(f"test_two: {reason}\n") == int(fails)
    assert ("s (budget 300 s)" in ran.stdout) is bool(told)
