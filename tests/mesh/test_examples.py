"""The examples, run as their readers will run them: with nothing but Python, and no mesh there."""

import re
import sys
from pathlib import Path

import pytest

from tests.mesh.family import Family

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def output_of(name: str, home: Path, *arguments: str) -> str:
    """The stdout of an example that ends well, says nothing on stderr, and leaves nothing behind."""
    with Family([str(EXAMPLES / name), *arguments], home) as family:
        code, out, err = family.output()
        assert (code, err) == (0, "")
        assert family.is_gone()
        assert not list(home.glob("meshrl-nats-*")), "the embedded server left its files"
    return out


def test_every_example_is_tested_here_or_with_torch() -> None:
    with_torch = {"dqn_from_the_stream.py", "ppo_cleanrl_style.py", "ppo_sb3.py"}  # tests/sb3, tests/buffers
    assert {path.name for path in EXAMPLES.glob("*.py")} - with_torch == {
        "many_learners.py",
        "quickstart.py",
        "serve_my_env.py",
    }


def test_quickstart_runs_an_episode_on_a_mesh_that_it_starts(tmp_path: Path) -> None:
    out = output_of("quickstart.py", tmp_path)
    assert re.fullmatch(r"CartPole-v1 at worker e[0-9a-f]{10}: return 500\n", out)


def test_serve_my_env_finds_the_number_of_its_seed(tmp_path: Path) -> None:
    lines = output_of("serve_my_env.py", tmp_path).splitlines()
    assert lines[0] == "49: too low"
    assert lines[-1] == "94: found"


def test_many_learners_share_one_pool_and_reach_their_target(tmp_path: Path) -> None:
    out = output_of("many_learners.py", tmp_path, "--learners", "2", "--target", "100")
    learned = re.findall(r"learner (\d): mean return ([\d.]+) after .* served by (e[0-9a-f]{10})$", out, re.MULTILINE)
    assert [number for number, _, _ in learned] == ["1", "2"]
    assert all(float(mean_return) >= 100 for _, mean_return, _ in learned)
    assert len({worker for _, _, worker in learned}) == 1
    by_chance = re.search(r"a random policy: mean return ([\d.]+)$", out.strip())
    assert by_chance is not None
    assert float(by_chance[1]) < 50
