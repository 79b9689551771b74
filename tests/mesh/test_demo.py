"""The demo: what it shows and writes, when it fails, and that nothing of it stays."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli.demo_parts import BestPolicy
from meshrl.cli.learner import Episode, Generation, Settings, learn
from meshrl.errors import UsageError
from tests.freezing import freeze
from tests.mesh.family import Family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

# CartPole returns 500 at most.
OUT_OF_REACH = ["--target", "501"]


def demo(home: Path, *arguments: str) -> Family:
    return Family(["-m", "meshrl", "demo", "--out", str(home / "out"), *arguments], home)


def failure(home: Path, learners: str) -> str:
    return f"error: {learners} did not reach 501; their logs are in {home / 'out' / 'logs'}\n"


def rows(out: str) -> list[list[str]]:
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_quick_demo_learns_shows_and_leaves_pictures_but_no_process(tmp_path: Path) -> None:
    with demo(tmp_path, "--quick", "--learners", "3", "--workers", "2") as family:
        code, out, err = family.output()
        assert (code, err) == (0, "")
        assert family.is_gone()

    learners = rows(out)
    assert [row[0] for row in learners] == ["1", "2", "3"]
    for _, env_steps, episodes, final_return, steps_per_second, by_worker in learners:
        assert int(env_steps.replace(",", "")) >= int(episodes) > 20
        assert float(final_return) >= 100
        assert int(steps_per_second.replace(",", "")) > 0
        shares = re.findall(r"([12]): (\d+)%", by_worker)
        assert sum(int(share) for _, share in shares) in {99, 100, 101}
    assert {number for row in learners for number, _ in re.findall(r"([12]): (\d+)%", row[-1])} == {"1", "2"}

    best = re.search(r"agent best \(learner (\d)'s policy\): mean return ([\d.]+) .*; agent random: ([\d.]+)", out)
    assert best is not None
    assert float(best[2]) > 100 > float(best[3])
    written = json.loads((tmp_path / "out" / "best-policy.json").read_text())
    assert written["learner"] == int(best[1])

    with Image.open(tmp_path / "out" / "learning-curves.png") as curves:
        assert curves.size == (1600, 960)
    filmed = re.search(r"episode\.gif: one of these episodes, return (\d+)", out)
    assert filmed is not None
    with Image.open(tmp_path / "out" / "episode.gif") as episode:
        assert episode.size == (600, 436)
        # The first frame, every second step, and the end; equal frames in a row are merged into longer ones.
        assert 2 <= getattr(episode, "n_frames", 1) <= int(filmed[1]) // 2 + 2


def test_demo_whose_learners_give_up_says_so_by_its_exit_code(tmp_path: Path) -> None:
    with demo(tmp_path, *OUT_OF_REACH, "--max-steps", "300", "--learners", "1", "--workers", "1") as family:
        code, out, err = family.output()
        assert family.is_gone()
    assert (code, err) == (1, failure(tmp_path, "learner 1"))
    assert "learner 1: did not reach the target" in out
    assert (tmp_path / "out" / "learning-curves.png").exists()


def test_learner_that_dies_fails_alone_and_the_demo_with_it(tmp_path: Path) -> None:
    with demo(tmp_path, *OUT_OF_REACH, "--max-steps", "8000", "--learners", "2", "--workers", "1") as family:
        family.read_until("learner 1: generation 1")
        [first] = [pid for pid in family.commands("meshrl.cli.demo_parts learner") if "--seed=0" in command_line(pid)]
        os.kill(first, signal.SIGKILL)
        code, out, err = family.output()
        assert family.is_gone()
    assert (code, err) == (1, failure(tmp_path, "learner 1, learner 2"))
    assert "learner 1 failed" in out
    assert "learner 2: did not reach the target" in out
    assert [row[3] for row in rows(out)] == ["failed", rows(out)[1][3]]


def test_learner_that_hangs_is_ended_and_the_demo_fails(tmp_path: Path) -> None:
    program = "import sys; from meshrl.cli import demo, main; demo.SILENCE_S = 8.0; sys.exit(main())"
    arguments = ["demo", "--out", str(tmp_path / "out"), *OUT_OF_REACH, "--learners", "1", "--workers", "1"]
    with Family(["-c", program, *arguments], tmp_path) as family:
        family.read_until("learner 1: generation 1")
        [learner] = family.commands("meshrl.cli.demo_parts learner")
        freeze(learner)
        code, out, err = family.output()
        assert family.is_gone()
    assert (code, err) == (1, failure(tmp_path, "learner 1"))
    assert "learner 1 said nothing for 8 s and was ended" in out
    assert [row[3] for row in rows(out)] == ["failed"]


def test_bars_move_in_a_terminal_while_it_learns(tmp_path: Path) -> None:
    """Frames are drawn over one another, and in them each learner's steps grow until it has solved it."""
    import fcntl  # not to be had everywhere, and needed here alone
    import pty
    import termios

    screen, terminal = pty.openpty()
    # Wide enough that no column of the bars is cut.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    arguments = ["demo", "--out", str(tmp_path / "out"), "--quick", "--learners", "2", "--workers", "1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MESHRL_") and name != "NO_COLOR"}
    env |= {"HOME": str(tmp_path), "MESHRL_STATE_DIR": str(tmp_path / "state"), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "meshrl", *arguments]
    with subprocess.Popen(command, env=env, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path) as process:
        os.close(terminal)
        drawn = b""
        with contextlib.suppress(OSError):  # EIO: the last process that had the terminal is gone
            while part := os.read(screen, 65536):
                drawn += part
    os.close(screen)
    assert process.returncode == 0, drawn.decode()
    text = drawn.decode()
    assert "\x1b[1A" in text, "no frame was drawn over the one before"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for number in (1, 2):
        bar = rf"learner {number} [━╸╺ ]+ +(\d+) / 100 +([\d,]+) env steps"
        frames = [(int(now), int(steps.replace(",", ""))) for now, steps in re.findall(bar, plain)]
        steps = [steps for _, steps in frames]
        assert steps == sorted(steps)
        assert len(set(steps)) > 3, frames
        assert frames[-1][0] >= 100
        assert re.search(rf"✔ learner {number} .*solved", plain), "its last frame is a full bar"


def test_demo_ends_with_the_name_of_a_worker_that_died(tmp_path: Path) -> None:
    with demo(tmp_path, *OUT_OF_REACH, "--learners", "1", "--workers", "1") as family:
        family.read_until("generation 1")
        [worker] = family.commands("meshrl.cli.demo_parts envs")
        os.kill(worker, signal.SIGKILL)
        code, _, err = family.output()
        assert family.is_gone()
    assert code == 1
    assert err.startswith("error: env worker 1 ended with code 137")
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_of_a_demo_outlives_it(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path, *OUT_OF_REACH, "--learners", "2", "--workers", "2") as family:
        family.read_until("generation 1")
        for part, count in (
            ("nats-server", 1),
            ("meshrl.cli.demo_parts envs", 2),
            ("meshrl.cli.demo_parts agents", 1),
            ("meshrl.cli.demo_parts learner", 2),
        ):
            assert len(family.commands(part)) == count, part
        family.process.send_signal(number)
        code, _, err = family.output()
        assert code == (130 if number == signal.SIGINT else -number)
        assert err == ""
        assert family.is_gone()
        assert not list(tmp_path.glob("meshrl-nats-*")), "the server left its files"


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("PIL", "pillow"), ("pygame", "pygame")])
def test_missing_package_is_named_in_one_line_before_anything_starts(tmp_path: Path, module: str, package: str) -> None:
    # None in sys.modules is how the import system itself writes down that a module cannot be had.
    program = f"import sys; sys.modules[{module!r}] = None; from meshrl.cli import main; sys.exit(main())"
    with Family(["-c", program, "demo", "--out", str(tmp_path / "out")], tmp_path) as family:
        assert family.output() == (1, "", f"error: the demo needs {package}: pip install 'meshrl[demo]'\n")
    assert not (tmp_path / "out").exists()


async def test_course_of_a_learner_depends_on_its_seed_alone() -> None:
    with EmbeddedServer.start() as server:
        async with (
            EnvWorker({"CartPole-v1": "CartPole-v1"}, server.url),
            EnvWorker({"CartPole-v1": "CartPole-v1"}, server.url),
            Mesh(server.url) as m,
        ):
            events: list[Episode | Generation] = []
            alone = await learn(m, Settings(seed=3, target=100, envs=3), events.append)
            again = await learn(m, Settings(seed=3, target=100, envs=8))
            other = await learn(m, Settings(seed=4, target=100, envs=8))
    assert (alone.weights, alone.steps, alone.mean_return) == (again.weights, again.steps, again.mean_return)
    assert alone.weights != other.weights
    assert sum(alone.workers.values()) == alone.steps
    episodes = [event for event in events if isinstance(event, Episode)]
    assert sum(event.episode_return for event in episodes) == alone.steps == episodes[-1].steps
    evaluated = [event.episode_return for event in episodes if event.evaluation][-20:]
    assert sum(evaluated) / 20 == pytest.approx(alone.mean_return)


def test_settings_are_the_command_line() -> None:
    settings = Settings(env="Other-v0", seed=7, target=12.5, max_steps=10)
    assert Settings.from_command_line(settings.command_line()) == settings
    assert Settings.from_command_line([]) == Settings()


def test_best_policy_is_that_of_the_file_and_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    policy = BestPolicy(path, "CartPole-v1")
    with pytest.raises(UsageError, match="no learner has finished"):
        policy.act([1.0, 0.0, 0.0, 0.0])
    path.write_text('{"weights": [1, 0, 0, 0]}')
    assert policy.act([1.0, 0.0, 0.0, 0.0]) == 1
    path.write_text('{"weights": [-1, 0, 0, 0]}')
    os.utime(path, ns=(0, 1))  # another time than before, however coarse the file system's clock is
    assert policy.act([1.0, 0.0, 0.0, 0.0]) == 0


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
