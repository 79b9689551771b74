"""What a recorded episode looked like: run again in an env that renders, proved to be that episode step by step."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meshrl.client.opening import Opening
from meshrl.client.rerunning import Rerun, chained, opened
from meshrl.client.shielded import shielded
from meshrl.client.verifying import Beside, Verdict, diverged
from meshrl.errors import EpisodeNotRendered
from meshrl.recording.episodes import RecordedEpisode
from meshrl.wire.frames import Frame

if TYPE_CHECKING:
    from meshrl.client.context import Context

MODE = "rgb_array"
# Of an env that does not say how fast it is to be shown.
FPS = 30.0


@dataclass(frozen=True, slots=True)
class EpisodeFrame:
    """A recorded episode as it looked after some steps.

    Attributes:
        step: after how many; 0 is right after the reset.
        steps: how many the episode has.
        image: uint8, (height, width, 3), red, green and blue.
        fps: frames a second at which the env says it is to be shown (``render_fps`` in its metadata); 30 if it does
            not say.
    """

    step: int
    steps: int
    image: NDArray[np.uint8]
    fps: float


async def rendered(
    context: Context, episode: RecordedEpisode, *, wait: float, where: Mapping[str, Any] | None
) -> AsyncGenerator[EpisodeFrame, None]:
    """Its frames, of the reset and of each step, in order; of each it is proved that the episode went so up to there.

    Raises:
        EpisodeNotRendered: its env has no ``rgb_array``, gives something else, or its worker sends no frames.
        EpisodeDiverged: the env did something else than was recorded.
        MeshError: as of :meth:`meshrl.Mesh.env`, or what the env's code raised.
    """
    text, recorded = str(episode.id), episode.recorded
    opening = Opening(context, "env", recorded.name, wait=wait, where=where, request={})
    metadata = (await opening.described()).metadata
    modes = metadata.get("render_modes")
    if not isinstance(modes, list | tuple) or MODE not in modes:
        known = ", ".join(map(str, modes)) if isinstance(modes, list | tuple) and modes else "none"
        raise EpisodeNotRendered(
            f"episode {text} has no pictures: {recorded.name} has no render mode {MODE} (those of its metadata: "
            f"{known}); serve it with one that has",
            episode_id=text,
            modes=list(map(str, modes or ())),
        )
    fps, steps = fps_of(metadata), len(episode.rewards)
    session = await opened(context, episode, wait=wait, where=where, render_mode=MODE)
    try:
        beside, step = Beside(episode), 0
        async for part, frame in chained(context, session, episode, render=True):
            if part.id != episode.id:
                continue
            told = Rerun(session.grant.description, [], [], [], [], [])
            told.add(frame)
            found = beside.add(told)
            if found is not None:
                raise _diverged(text, found)
            for image in _images(text, frame, len(told.obs)):
                yield EpisodeFrame(step, steps, image, fps)
                step += 1
        found = beside.end()
        if found is not None:
            raise _diverged(text, found)
    finally:
        await shielded(session.close())


def fps_of(metadata: Mapping[str, Any]) -> float:
    """Frames a second at which an env is to be shown."""
    said = metadata.get("render_fps")
    if isinstance(said, int | float | np.integer | np.floating) and 0 < said < math.inf:
        return float(said)
    return FPS


def _diverged(text: str, found: tuple[int, str]) -> Exception:
    return diverged(
        Verdict(text, "diverged", *found),
        f"`meshrl verify {text}` says whether it also does without being rendered",
    )


def _images(text: str, frame: Frame, count: int) -> list[NDArray[np.uint8]]:
    images = frame.get("frames")
    if images is None:
        raise EpisodeNotRendered(
            f"episode {text} was run again by a worker whose meshrl does not render what it runs again; upgrade it",
            episode_id=text,
        )
    if type(images) is not list or len(images) != count:
        raise EpisodeNotRendered(
            f"episode {text} was run again, and there is not one frame a step; look at its worker's log",
            episode_id=text,
        )
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise EpisodeNotRendered(
                f"episode {text} has no pictures: with {MODE} its env renders {what}, not uint8 of shape (height, "
                "width, 3); mend its render",
                episode_id=text,
            )
    return images
