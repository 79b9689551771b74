"""``meshrl fork``: recorded episodes gone on with from the middle, in as many live envs as wanted."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.plain import plain
from meshrl.cli.recordings import EpisodeArgument, WaitForWorker, mesh_at
from meshrl.client.context import context_of
from meshrl.client.mesh import Mesh
from meshrl.client.playing import Played, end_of, play
from meshrl.client.recorded_forks import Forked, fork_of
from meshrl.client.rerunning import Rerun, actions_of
from meshrl.client.together import together
from meshrl.client.verifying import Beside
from meshrl.errors import UsageError
from meshrl.recording.episodes import RecordedEpisode
from meshrl.worker.running import run

AGENT = "random"
EQUAL = "equal"


@dataclass(frozen=True, slots=True)
class Rest:
    """What became of one copy after the fork.

    Attributes:
        played: its steps from there on.
        record: beside the recorded actions, ``equal``, or where it differs first; None beside an agent's.
    """

    played: Played
    record: str | None = None


def fork(
    episode: EpisodeArgument,
    step: Annotated[int, typer.Option(help="After how many of its steps; 0: its reset.", min=0, metavar="K")],
    agent: Annotated[
        str | None,
        typer.Option(help=f"Served name of who goes on in each copy; {AGENT} when left out.", metavar="NAME"),
    ] = None,
    as_recorded: Annotated[
        bool, typer.Option("--as-recorded", help="Go on with the recorded actions, and say whether all is equal.")
    ] = False,
    copies: Annotated[int, typer.Option(help="How many live envs.", min=1, metavar="N")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each at most; to its end when left out.", min=1, metavar="MAX")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the agent; copy n draws from this and n.", min=0, metavar="SEED")] = 0,
    wait: WaitForWorker = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Go on from the middle of a recorded episode, in live envs. Exit code 1 where --as-recorded finds a difference."""
    if as_recorded and agent is not None:
        raise UsageError("--as-recorded goes on with the recorded actions, --agent with others; give one of the two")
    name = None if as_recorded else agent or AGENT

    async def go_on() -> tuple[RecordedEpisode, list[Rest]]:
        async with mesh_at(url, namespace, credentials) as mesh:
            read = await (await context_of(mesh).library()).episode(episode)
            _check(read, step)
            forks = await _forks(mesh, read, step, copies, wait)
            goes_on = (
                _as_recorded(read, fork, step, steps)
                if name is None
                else _by_agent(mesh, name, fork, seed=seed, copy=n, step=step, most=steps, wait=wait)
                for n, fork in enumerate(forks)
            )
            return read, await together(goes_on)

    read, rests = run(go_on())
    told = _told(read, step, name, seed, rests)
    if as_json:
        print(json.dumps(plain(told)))
    else:
        _show(told)
    if any(rest.record not in {None, EQUAL} for rest in rests):
        raise typer.Exit(1)


def _check(read: RecordedEpisode, step: int) -> None:
    size = len(read.rewards)
    ended = bool(size and (read.terminations[-1] or read.truncations[-1]))
    if step > size or (ended and step == size):
        raise UsageError(f"episode {read.id} has {size} steps; --step is 0 to {size - ended}")


async def _forks(mesh: Mesh, read: RecordedEpisode, step: int, count: int, wait: float) -> list[Forked]:
    """All of them, opened at once; the mesh closes them."""
    return await together(fork_of(context_of(mesh), read, step, wait=wait) for _ in range(count))


async def _by_agent(
    mesh: Mesh, name: str, fork: Forked, *, seed: int, copy: int, step: int, most: int | None, wait: float
) -> Rest:
    """An agent goes on; one that remembers has seen nothing of what came before."""
    stateful = (await mesh.describe(name, "agent", wait=wait)).stateful
    async with await mesh.agent(name, stateful=stateful, env=fork.env, wait=wait) as agent:
        if stateful:
            await agent.reset(seed=seed + copy)
        obs, info = fork.observation, fork.info
        return Rest(await play(fork.env, agent, obs, info, seed=seed, env_id=copy, first=step, most=most))


async def _as_recorded(read: RecordedEpisode, fork: Forked, step: int, most: int | None) -> Rest:
    size = len(read.rewards)
    until = size if most is None else min(size, step + most)
    beside, found = Beside(read, after=step), None
    total, steps, end = 0.0, 0, end_of(False, False, {})
    for action in actions_of(read, step, until):
        obs, reward, terminated, truncated, info = await fork.env.step(action)
        total, steps, end = total + float(reward), steps + 1, end_of(terminated, truncated, info)
        again = Rerun(read.recorded.description, [obs], [info], [reward], [terminated], [truncated])
        found = found or beside.add(again)
        if terminated or truncated:
            break
    if found is None and until == size:
        found = beside.end()
    record = EQUAL if found is None else f"step {found[0]}: {found[1]}"
    return Rest(Played(steps, total, end), record)


# --------------------------------------------------------------------------- texts


def _told(read: RecordedEpisode, step: int, name: str | None, seed: int, rests: Sequence[Rest]) -> dict[str, Any]:
    rewards = read.rewards
    copies = []
    for n, rest in enumerate(rests):
        record = {} if rest.record is None else {"record": rest.record}
        copies.append({"copy": n, **asdict(rest.played), **record})
    return {
        "episode_id": str(read.id),
        "env": read.summary.env,
        "step": step,
        "return_before": float(rewards[:step].sum()),
        "agent": name,
        "seed": None if name is None else seed,
        "recorded": {
            "steps": len(rewards) - step,
            "episode_return": float(rewards[step:].sum()),
            "end": read.summary.reason,
        },
        "copies": copies,
    }


def _show(told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    who = "the recorded actions" if told["agent"] is None else f"{told['agent']}, seed {told['seed']}"
    console.print(f"{told['env']} after {told['step']} steps of return {told['return_before']:g}; from there: {who}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = ["copy", "steps", "return", "end", *(["record"] if told["agent"] is None else [])]
    for column in columns:
        table.add_column(column, justify="right" if column in {"steps", "return"} else "left")
    for row in ({"copy": "recorded", **told["recorded"]}, *told["copies"]):
        record = row.get("record", "")
        style = {"": "", EQUAL: "[green]"}.get(record, "[red]")
        table.add_row(
            str(row["copy"]),
            str(row["steps"]),
            f"{row['episode_return']:g}",
            row["end"],
            *([style + record][: len(columns) - 4]),
        )
    console.print(table)
