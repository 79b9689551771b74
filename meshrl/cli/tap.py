"""``meshrl tap``: an episode that is under way, in the terminal or as a GIF."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from meshrl.cli.options import CredentialsFile, Json, Namespace, Url
from meshrl.cli.pixels import drawn, picture_in
from meshrl.cli.recordings import WaitForWorker, line_of, mesh_at, short, step_of
from meshrl.cli.videos import files_of, write_videos
from meshrl.client.mesh import Mesh
from meshrl.client.tap import Tapped
from meshrl.errors import UsageError
from meshrl.worker.running import run

# Nothing was seen for so long: it is said what may be wrong.
PATIENCE_S = 5.0
# An episode is listed so many seconds after its end, at most.
LISTED_S = 15.0
LOOK_S = 0.2


def tap(
    env: Annotated[
        str | None, typer.Argument(help="Of one env alone, by its served name.", metavar="ENV", show_default=False)
    ] = None,
    session: Annotated[str | None, typer.Option(help="Of one session alone, by its id.", metavar="ID")] = None,
    steps: Annotated[int, typer.Option(help="End after so many steps; 0 for never.", min=0, metavar="N")] = 0,
    all_: Annotated[bool, typer.Option("--all", help="All that is under way, not one episode after another.")] = False,
    gif: Annotated[
        Path | None,
        typer.Option(help="Wait for the end of the episode, and write it as a GIF (or .mp4).", metavar="FILE"),
    ] = None,
    wait: WaitForWorker = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Show an episode that is under way, without touching it. Sessions are seen that are recorded."""
    if gif is not None and (all_ or steps or as_json):
        raise UsageError("--gif takes one whole episode; leave --all, --steps and --json out")
    if gif is not None:
        files_of(["an episode"], None, gif)  # whether it could be written

    async def show() -> None:
        async with mesh_at(url, namespace, credentials) as mesh, aclosing(mesh.tap(env, session)) as seen:
            shown = _patient(seen, env)
            if gif is not None:
                await _write(mesh, await _last_of_an_episode(shown), gif, wait)
                return
            count = 0
            async with aclosing(shown if all_ else _one_after_another(shown)) as chosen:
                with _Screen(as_json=as_json, wide=all_) as screen:
                    async for one in chosen:
                        screen.show(one)
                        count += 1
                        if count == steps:
                            return

    run(show())


async def _patient(seen: AsyncIterator[Tapped], env: str | None) -> AsyncGenerator[Tapped, None]:
    """The same; what may be wrong is said where nothing comes."""
    saying = asyncio.get_running_loop().call_later(PATIENCE_S, _say_nothing_comes, env)
    try:
        async for one in seen:
            saying.cancel()
            yield one
    finally:
        saying.cancel()


def _say_nothing_comes(env: str | None) -> None:
    of = f" of {env}" if env else ""
    print(
        f"nothing{of} is under way; what is seen is recorded (not record='off') and steps; meshrl ls lists the names",
        file=sys.stderr,
        flush=True,
    )


async def _one_after_another(seen: AsyncIterator[Tapped]) -> AsyncGenerator[Tapped, None]:
    """Those of one sub-environment, until its session is seen no more."""
    followed: Tapped | None = None
    missed = 0
    async for one in seen:
        if followed is None or missed > 1000 or (one.session, one.env_id) == (followed.session, followed.env_id):
            followed, missed = one, 0
            yield one
        else:
            missed += 1


async def _last_of_an_episode(seen: AsyncIterator[Tapped]) -> Tapped:
    async for one in _one_after_another(seen):
        print(f"\r{one.episode_id}: step {one.transition.step}", end="", file=sys.stderr, flush=True)
        if one.transition.terminated or one.transition.truncated:
            print(file=sys.stderr)
            return one
    raise UsageError("the mesh was closed before an episode had ended")


async def _write(mesh: Mesh, last: Tapped, path: Path, wait: float) -> None:
    for _ in range(int(LISTED_S / LOOK_S)):
        if await _is_listed(mesh, last.episode_id):
            break
        await asyncio.sleep(LOOK_S)
    await write_videos(mesh, files_of([last.episode_id], None, path), fps=None, speed=1.0, wait=wait)


async def _is_listed(mesh: Mesh, episode_id: str) -> bool:
    return any([one.episode_id == episode_id async for one in mesh.episodes()])


class _Screen:
    """Where steps are shown: one after another as lines, or in place where this is a terminal."""

    def __init__(self, *, as_json: bool, wide: bool) -> None:
        self._as_json = as_json
        self._wide = wide
        self._live: Live | None = None
        if not as_json and not wide and sys.stdout.isatty():
            self._live = Live(console=Console(highlight=False), auto_refresh=False, transient=False)
        self._episode, self._return = "", 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, one: Tapped) -> None:
        """Show a step."""
        if one.episode_id != self._episode:
            self._episode, self._return = one.episode_id, 0.0
        self._return += one.transition.reward
        if self._as_json:
            named = {"session": one.session, "env": one.env, "env_id": one.env_id, "episode_id": one.episode_id}
            print(json.dumps({**named, **step_of(one.transition)}), flush=True)
        elif self._live is None:
            prefix = f"{one.episode_id}  " if self._wide else ""
            print(prefix + line_of(one.transition), flush=True)
        else:
            self._live.update(self._drawn(one), refresh=True)

    def _drawn(self, one: Tapped) -> Group:
        step = one.transition
        picture = picture_in(step.next_observation)
        end = " terminated" if step.terminated else " truncated" if step.truncated else ""
        head = f"{one.env} {one.env_id}, episode {one.episode_id}, step {step.step}{end}"
        told = f"action {short(step.action)}   reward {step.reward:g}   since it is seen {self._return:g}"
        shown = Text(f"observation {short(step.next_observation)}") if picture is None else drawn(picture)
        return Group(Text(head), Text(told), shown)
