"""The examples that need torch, run as their readers will run them."""

import re
import sys
from pathlib import Path

import pytest

from tests.mesh.test_examples import output_of

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]


def test_ppo_in_one_file_learns_cartpole_on_a_mesh_that_it_starts(tmp_path: Path) -> None:
    out = output_of("ppo_cleanrl_style.py", tmp_path)
    learned = re.search(r"^learned policy: mean return ([\d.]+) of 20 episodes$", out, re.MULTILINE)
    assert learned is not None
    assert float(learned[1]) >= 475


def test_ppo_in_one_file_takes_its_settings_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--total-timesteps", "1024", "--num-envs", "4", "--eval-episodes", "2"]
    lines = output_of("ppo_cleanrl_style.py", tmp_path, *arguments).splitlines()
    assert re.match(r"\s*1,024 steps in ", lines[-2])
    assert re.fullmatch(r"learned policy: mean return [\d.]+ of 2 episodes", lines[-1])
