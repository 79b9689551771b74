"""``meshrl export``: recorded episodes as files of other libraries."""

import json
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meshrl.adapters.datasets.exporting import Exported
from meshrl.adapters.datasets.minari import export_minari
from meshrl.adapters.datasets.npz import export_npz
from meshrl.adapters.datasets.parquet import export_parquet
from meshrl.adapters.datasets.source import Episodes
from meshrl.adapters.datasets.source import Progress as Done
from meshrl.adapters.videos import MAX_FPS
from meshrl.cli.bars import Bars
from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.recordings import Label, WaitForWorker, labels_in, mesh_at, time_of
from meshrl.cli.videos import files_of, write_videos
from meshrl.client.mesh import Mesh
from meshrl.errors import UsageError
from meshrl.recording.episodes import EpisodeSummary
from meshrl.worker.running import run


@dataclass(frozen=True)
class Wanted:
    """What an export was asked for.

    Attributes:
        episodes: which.
        target: where to.
        infos: whether those are wanted.
        wait: seconds to wait for a worker, where one is run again.
        skip_unreadable: go on where one cannot be read.
        on_progress: called after each.
    """

    episodes: Episodes
    target: str
    infos: bool
    wait: float
    skip_unreadable: bool
    on_progress: Callable[[Done], None]

    @property
    def options(self) -> dict[str, Any]:
        """What all formats take."""
        return {name: getattr(self, name) for name in ("infos", "wait", "skip_unreadable", "on_progress")}


async def _minari(m: Mesh, wanted: Wanted) -> Exported:
    return await export_minari(m, wanted.episodes, wanted.target, **wanted.options)


async def _minari_arrow(m: Mesh, wanted: Wanted) -> Exported:
    return await export_minari(m, wanted.episodes, wanted.target, storage="arrow", **wanted.options)


async def _npz(m: Mesh, wanted: Wanted) -> Exported:
    return await export_npz(m, wanted.episodes, wanted.target, **wanted.options)


async def _parquet(m: Mesh, wanted: Wanted) -> Exported:
    return await export_parquet(m, wanted.episodes, wanted.target, **wanted.options)


FORMATS: dict[str, Callable[[Mesh, Wanted], Awaitable[Exported]]] = {
    "minari": _minari,
    "minari-arrow": _minari_arrow,
    "npz": _npz,
    "parquet": _parquet,
}
ALL_FORMATS = (*FORMATS, *MAX_FPS)


def export(
    episode: Annotated[
        list[str] | None,
        typer.Argument(help="Ids, as meshrl episodes shows them.", metavar="[EPISODE]...", show_default=False),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"One of {', '.join(ALL_FORMATS)}; as TARGET ends when left out, or minari.",
            metavar="FORMAT",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="The file, or the id of a Minari dataset, such as cartpole/any-v0; of videos a directory, too.",
            metavar="TARGET",
            show_default=False,
        ),
    ] = "",
    env: Annotated[
        str | None, typer.Option(help="All of one env, by its served name.", metavar="ENV", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Those that ended since 2026-01-31, 2026-01-31T12:00 or 90m, 12h, 7d ago.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Those that ended up to then; as --since.")] = None,
    min_return: Annotated[float | None, typer.Option(help="Those with at least that return.", metavar="R")] = None,
    label: Label = None,
    policy: Annotated[str | None, typer.Option(help="Those of that policy.", metavar="NAME")] = None,
    infos: Annotated[bool, typer.Option("--infos/--no-infos", help="Store infos, too.")] = True,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out what cannot be read or run again, and say so.")
    ] = False,
    speed: Annotated[float, typer.Option(help="Of videos: how many times as fast.", metavar="X")] = 1.0,
    fps: Annotated[
        float | None,
        typer.Option(help="Of videos: steps shown a second; as the env says when left out, or 30.", metavar="N"),
    ] = None,
    wait: WaitForWorker = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Write recorded episodes as a dataset (Minari, Parquet, npz), or each as a video (MP4, GIF).

    For a video an episode is run again in an env that renders, and proved to be the same.
    """
    format_ = format_ or next((one for one in ALL_FORMATS if to.endswith(f".{one}")), "minari")
    if format_ not in ALL_FORMATS:
        raise UsageError(f"--format is one of {', '.join(ALL_FORMATS)}, not {format_!r}")
    if not to:
        raise UsageError("say where to: --to, a file or the id of a Minari dataset, such as cartpole/any-v0")
    filters: dict[str, Any] = {"since": time_of(since, "--since"), "until": time_of(until, "--until")}
    filters |= {"min_return": min_return, "labels": labels_in(label) or None, "policy": policy}
    if episode and (env, *filters.values()).count(None) < 6:
        raise UsageError("name episodes, or say which by --env, --since and the like; not both")

    async def show() -> None:
        async with mesh_at(url, namespace, credentials) as mesh:
            ids = episode or [one.episode_id async for one in mesh.episodes(env, **filters)]
            files = files_of(ids, format_, Path(to))
            await write_videos(
                mesh, files, fps=fps, speed=speed, wait=wait, as_json=as_json, skip_unreadable=skip_unreadable
            )

    if format_ in MAX_FPS:
        if episode:
            files_of(episode, format_, Path(to))  # whether they can be, before anything is asked of anybody
        run(show())
        return

    async def write() -> Exported:
        async with mesh_at(url, namespace, credentials) as mesh:
            found: AsyncIterable[EpisodeSummary] = mesh.episodes(env, **filters)
            with Bars(hidden=as_json) as bars:
                wanted = Wanted(episode or found, to, infos, wait, skip_unreadable, bars.show)
                return await FORMATS[format_](mesh, wanted)

    told = run(write())
    if as_json:
        print(json.dumps(_plain(told, format_)))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{told.episodes} episodes, {told.steps} steps: {told.target}")
    for one in told.skipped:
        console.print(f"left out {one.episode_id}: {one.why}", markup=False)
    if told.skipped:
        console.print(f"{len(told.skipped)} episodes were left out, which could not be read")


def _plain(told: Exported, format_: str) -> dict[str, Any]:
    return {
        "format": format_,
        "target": told.target,
        "path": str(Path(told.path).absolute()),
        "episodes": told.episodes,
        "steps": told.steps,
        "recoverable": told.recoverable,
        "skipped": [{"episode_id": one.episode_id, "code": one.code, "why": one.why} for one in told.skipped],
    }
