"""``meshrl experiment``: does what a manifest says, with each of its seeds, and compares it with earlier runs."""

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meshrl.bus.locate import URL_VARIABLE, locate
from meshrl.bus.login import CREDENTIALS_VARIABLE
from meshrl.cli.bars import bar
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.plain import plain
from meshrl.client.experiment import play_seed
from meshrl.client.manifest import Experiment, ManifestFile, read_manifest
from meshrl.client.mesh import Mesh
from meshrl.client.runs import Difference, compare, runs_of
from meshrl.errors import UsageError
from meshrl.recording.episodes import EpisodeSummary
from meshrl.worker.running import run

# Episodes are listed within about a second of their end; those of an agent are waited for so long, being counted.
LISTED_S = 15.0
# Nobody knows how many a script's are: they are all there when no more have come for so long.
QUIET_S = 2.5
PAUSE_S = 0.25


@dataclass(slots=True)
class Result:
    """Of one seed.

    Attributes:
        seed: it.
        steps: of each episode.
        returns: of each.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of this run with an earlier one.

    Attributes:
        run: the earlier one.
        episodes: how many it has.
        equal: how many are equal.
        differences: by seed.
    """

    run: str
    episodes: int
    equal: int
    differences: Sequence[Difference]


def experiment(
    manifest: Annotated[Path, typer.Argument(help="What it is; see docs/experiments.md.", metavar="MANIFEST.toml")],
    check: Annotated[
        bool, typer.Option("--check", help="Compare this run with an earlier one on record. Exit code 1 if it differs.")
    ] = False,
    only_hash: Annotated[bool, typer.Option("--hash", help="Say its hash, and run nothing.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for workers and slots.", metavar="S")] = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Run an experiment: an agent or a script with each seed of a manifest, recorded under its hash."""
    file = read_manifest(manifest)
    if only_hash:
        print(file.hash)
        return

    async def go() -> tuple[str, list[Result], int, Comparison | None]:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        of = Experiment(hash=file.hash, manifest=file.manifest, run=now)
        async with Mesh(address, namespace=namespace, credentials=credentials, experiment=of) as mesh:
            file.manifest.check_wrappers(await mesh.describe(file.manifest.env, wait=wait))
            reference = _reference(await runs_of(mesh, file.hash)) if check else None
            if file.script is None:
                results = await _by_agent(mesh, file, wait)
                listed = await _listed(mesh, of, sum(len(one.steps) for one in results))
            else:
                variables = {URL_VARIABLE: address, "MESHRL_NAMESPACE": namespace}
                variables |= {} if credentials is None else {CREDENTIALS_VARIABLE: str(credentials.absolute())}
                for seed in file.manifest.seeds:
                    await _script(file, of, seed, variables, as_json=as_json)
                listed = await _listed(mesh, of, None)
                results = _on_record(file, listed)
            if reference is None:
                return now, results, len(listed), None
            equal, differences = await compare(mesh, listed, reference[1])
            return now, results, len(listed), Comparison(reference[0], len(reference[1]), equal, differences)

    now, results, recorded, comparison = run(go())
    if as_json:
        print(json.dumps(plain(_told(file, now, results, recorded, comparison))))
    else:
        _show(file, results, recorded, comparison)
    if comparison is not None and comparison.differences:
        raise typer.Exit(1)


def _reference(runs: dict[str, list[EpisodeSummary]]) -> tuple[str, list[EpisodeSummary]]:
    """The newest of the runs that have the most episodes, so that one that was broken off is none to go by."""
    if not runs:
        raise UsageError("--check compares with an earlier run, and none of this manifest is on record; run it first")
    most = max(map(len, runs.values()))
    return [(name, episodes) for name, episodes in runs.items() if len(episodes) == most][-1]


async def _by_agent(mesh: Mesh, file: ManifestFile, wait: float) -> list[Result]:
    manifest, results, done = file.manifest, [], 0
    total = len(manifest.seeds) * manifest.episodes
    with bar(manifest.name) as told:

        def ended() -> None:
            nonlocal done
            done += 1
            told(done, total)

        told(0, total)
        for seed in manifest.seeds:
            played = await play_seed(mesh, seed, wait=wait, ended=ended)
            results.append(Result(seed, [one.steps for one in played], [one.episode_return for one in played]))
    return results


async def _script(file: ManifestFile, of: Experiment, seed: int, variables: dict[str, str], *, as_json: bool) -> None:
    """Run it once; whatever mesh it opens records for the experiment.

    Raises:
        UsageError: it ended with an error.
    """
    print(f"seed {seed}: {file.script} {' '.join(file.manifest.arguments)}".rstrip(), file=sys.stderr, flush=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(file.script),
        *file.manifest.arguments,
        env={**os.environ, **variables, **of.model_copy(update={"seed": seed}).to_environment()},
        stdout=sys.__stderr__ if as_json else None,
    )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if code:
        raise UsageError(
            f"{file.script} ended with exit code {code} at seed {seed}; mend it, and run the manifest again", code=code
        )


async def _listed(mesh: Mesh, of: Experiment, expected: int | None) -> list[EpisodeSummary]:
    """The run's episodes, once all are on record; or what there is when that has taken too long."""
    since, found = time.monotonic(), -1
    while True:
        listed = [one async for one in mesh.episodes(manifest=of.hash, labels={"experiment_run": of.run})]
        if len(listed) != found:
            since, found = time.monotonic(), len(listed)
        if found == expected or time.monotonic() - since > (QUIET_S if expected is None else LISTED_S):
            return listed
        await asyncio.sleep(PAUSE_S)


def _on_record(file: ManifestFile, listed: Sequence[EpisodeSummary]) -> list[Result]:
    results = {str(seed): Result(seed) for seed in file.manifest.seeds}
    for one in listed:
        result = results.get(one.labels.get("seed", ""))
        if result is not None:
            result.steps.append(one.steps)
            result.returns.append(one.episode_return)
    return list(results.values())


# --------------------------------------------------------------------------- texts


def _row(result: Result) -> dict[str, Any]:
    returns = np.array(result.returns) if result.returns else np.array([np.nan])
    return {
        "seed": result.seed,
        "episodes": len(result.steps),
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
        "steps": sum(result.steps),
    }


def _told(
    file: ManifestFile, now: str, results: Sequence[Result], recorded: int, comparison: Comparison | None
) -> dict[str, Any]:
    told: dict[str, Any] = {"name": file.manifest.name, "manifest": file.hash, "run": now, "recorded": recorded}
    told["seeds"] = [_row(result) for result in results]
    return told if comparison is None else {**told, "check": asdict(comparison)}


def _show(file: ManifestFile, results: Sequence[Result], recorded: int, comparison: Comparison | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("seed", "episodes", "mean return", "std", "steps"):
        table.add_column(column, justify="right")
    for result in results:
        row = _row(result)
        numbers = f"{row['mean_return']:.2f}", f"{row['std_return']:.2f}"
        table.add_row(str(row["seed"]), str(row["episodes"]), *numbers, str(row["steps"]))
    console.print(table)
    played = sum(len(result.steps) for result in results)
    if recorded < played:
        console.print(f"[red]{recorded} of {played} episodes are on record[/]; the workers' logs say why")
    console.print(f"{file.manifest.name}: meshrl episodes --manifest {file.hash[:12]}")
    if comparison is None:
        return
    if not comparison.differences:
        console.print(f"[green]same[/] as run {comparison.run}, all {comparison.episodes} episodes")
    for one in comparison.differences:
        seed = f"seed {one.seed}: " if one.seed else ""
        first = f", the first at {one.first}" if one.first else ""
        console.print(
            f"{seed}[red]differs[/] from run {comparison.run}: {one.equal} episodes are equal, of {one.episodes} and "
            f"{one.reference}{first}"
        )
