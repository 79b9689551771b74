"""The command line by which a command runs itself as one of several processes."""

import pytest
import typer.main

from meshrl.cli import app
from meshrl.cli.serving import NOT_PASSED_ON, process_line

SECRET = "nats://me:secret@host:4222"
LINES = [
    ["serve", "cartpole", "--processes", "3"],
    ["serve", "--on-demand", "--processes", "auto", "--url", SECRET],
    ["serve", "cartpole", "--processes", "2", "--state-key", "my state.key"],
    [
        *("serve", "a=cartpole", "b=mine:Maze", "--processes=3", "--slots", "3", "--wait", "0.5", f"--url={SECRET}"),
        *("--kwargs", '{"text": "a b\\" -- --"}', "--allow-kwargs", "*", "--allow", "a,b", "--namespace", "lab"),
        *("--capability", "gpu=true", "--capability", "zone=eu 1", "--credentials", "my file.creds"),
    ],
    ["serve-agent", "greedy=mine:greedy", "random", "--slots", "3", "--processes", "2", "--capability", "a=b"],
]


def context(line: list[str]) -> typer.Context:
    """What the command of that line is called with; it is not called."""
    group = typer.main.get_command(app)
    command = group.commands[line[0]]  # type: ignore[attr-defined]
    read: typer.Context = command.make_context(line[0], line[1:])
    return read


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_process_gets_everything_but_url_and_number_of_processes(line: list[str]) -> None:
    given = context(line)
    made = process_line(given, 3)
    assert "secret" not in " ".join(made)
    again = context(made[made.index(line[0]) :])
    assert {name: again.params[name] for name in NOT_PASSED_ON} == {"url": None, "processes": "1", "process": 3}
    for name, value in given.params.items():
        if name not in NOT_PASSED_ON:
            assert again.params[name] == value, name


def test_values_of_the_environment_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHRL_NAMESPACE", "lab")
    given = context(["serve", "cartpole", "--processes", "2"])
    monkeypatch.delenv("MESHRL_NAMESPACE")
    made = process_line(given, 1)
    again = context(made[made.index("serve") :])
    assert again.params["namespace"] == "lab"
