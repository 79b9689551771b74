"""The exit codes and the errors of one line."""

import pytest

from meshrl import __version__
from meshrl.cli import main
from meshrl.cli.app import one_line

COMMANDS = ["up", "serve", "serve-agent", "ls", "check", "doctor"]


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshrl {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_options_of_the_mesh(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--url", "--namespace", "--credentials"):
        assert option in text


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["ls", "--nonsense"], 2, "--nonsense"),
        (["serve", "--slots", "x"], 2, "integer"),
        (["check"], 2, "Missing argument"),
        (["serve"], 1, "serve needs a name"),
        (["serve", "cartpole", "--kwargs", "x"], 1, "--kwargs is a JSON object"),
        (["up", "--url", "nats://localhost:1", "--port", "4333"], 1, "leave them out with --url"),
    ],
)
def test_mistake_is_told_in_one_line(line: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert says in errors


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert all(command in captured.out + captured.err for command in COMMANDS)
    assert "error" not in captured.err


@pytest.mark.parametrize("line", [["--debug", "serve"], ["serve"]])
def test_debug_shows_the_traceback(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--debug" not in line:
        monkeypatch.setenv("MESHRL_DEBUG", "1")
    assert main(line) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: serve needs a name")


def test_many_lines_become_the_first_and_the_last() -> None:
    assert one_line("it ended; its log:\n[INF] started\n[FTL] no space left\n") == (
        "it ended; its log: [FTL] no space left"
    )
    assert one_line("one") == "one"
    assert one_line("") == ""
