"""PPO learns CartPole through the mesh: the example, run as its readers will run it."""

import re
import sys
from pathlib import Path

import pytest

from tests.mesh.family import Family

EXAMPLE = Path(__file__).parents[2] / "examples" / "ppo_sb3.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.mark.timeout(900)  # about a minute of one core
def test_ppo_learns_cartpole_to_475_on_a_mesh_that_it_starts(tmp_path: Path) -> None:
    with Family([str(EXAMPLE), "--total-timesteps", "100000"], tmp_path) as family:
        code, out, err = family.output()
        assert (code, err) == (0, "")
        assert family.is_gone()
    progress = re.findall(r"^ *([\d,]+) steps, +[\d.]+ s: mean return ([\d.]+)$", out, re.MULTILINE)
    assert [steps for steps, _ in progress] == [f"{n}0,000" for n in range(1, 11)]
    told = re.search(r"^evaluation: mean return ([\d.]+) \(deviation [\d.]+\) of 20 episodes$", out, re.MULTILINE)
    assert told is not None, out
    assert float(told[1]) >= 475, out
