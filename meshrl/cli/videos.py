"""Recorded episodes as MP4 or GIF, for ``meshrl export`` and ``meshrl tap``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from meshrl.adapters.videos import MAX_FPS, VideoFormat, format_of, pyav, write_video
from meshrl.cli.bars import bar
from meshrl.client.mesh import Mesh
from meshrl.client.rerunning import NEVER_AGAIN
from meshrl.errors import UsageError


async def write_videos(
    mesh: Mesh,
    files: Sequence[tuple[str, Path, VideoFormat]],
    *,
    fps: float | None,
    speed: float,
    wait: float,
    as_json: bool = False,
    skip_unreadable: bool = False,
) -> None:
    """Write a file for each episode, with a bar of how far it is.

    Args:
        mesh: of their envs.
        files: of :func:`files_of`.
        fps: as of :func:`~meshrl.adapters.videos.write_video`.
        speed: the same.
        wait: the same.
        as_json: tell of each file as JSON.
        skip_unreadable: say of an episode that cannot be shown why, and go on.
    """
    for id_, path, kind in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with bar(path.name) as told:
                written = await write_video(
                    mesh, id_, path, format=kind, fps=fps, speed=speed, wait=wait, progress=told
                )
        except NEVER_AGAIN as exc:
            if not skip_unreadable:
                raise
            print(f"left out {id_}: {exc.message}", file=sys.stderr)
            continue
        if as_json:
            print(json.dumps({"episode_id": id_, **asdict(written), "path": str(path.absolute())}), flush=True)
        else:
            print(f"{path}: {written.frames} frames, {written.width}x{written.height}, {written.fps:g} a second")


def files_of(episodes: Sequence[str], format_: str | None, to: Path) -> list[tuple[str, Path, VideoFormat]]:
    """The file of each episode, and its format.

    Args:
        episodes: their ids.
        format_: of all of them; None goes by ``to``.
        to: a file, where there is one episode and it has a format's suffix; else a directory, made where there is none.

    Raises:
        UsageError: there is no such format, several episodes are to become one file, or PyAV is missing.
    """
    pyav()
    suffix = to.suffix[1:].lower()
    is_file = not to.is_dir() and bool(suffix)
    kind = format_of(format_ or (suffix if is_file else "mp4"))
    if is_file and suffix in MAX_FPS and suffix != kind:
        raise UsageError(f"{to} would be a {kind} by --format; give one of the two")
    if is_file and len(episodes) > 1:
        raise UsageError(f"{len(episodes)} episodes are no one file {to}; give --to a directory")
    return [(id_, to if is_file else to / f"{id_}.{kind}", kind) for id_ in episodes]
