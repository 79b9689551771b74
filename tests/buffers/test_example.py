"""DQN learns CartPole from others' episodes: the example, run as its readers will run it."""

import re
import sys
from pathlib import Path

import pytest

from tests.mesh.test_examples import output_of


@pytest.mark.timeout(600)  # about half a minute of two cores
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_dqn_learns_cartpole_from_the_episodes_of_others(tmp_path: Path) -> None:
    out = output_of("dqn_from_the_stream.py", tmp_path)
    told = re.search(r"^learned policy: mean return ([\d.]+) of 20 episodes$", out, re.MULTILINE)
    assert told is not None, out
    assert float(told[1]) >= 475, out
    others = re.findall(r"([\d,]+) transitions of others", out)
    assert int(others[-1].replace(",", "")) >= 20_000
