"""Videos of recorded episodes, written by PyAV (extra ``meshrl[video]``): MP4 that browsers play, and GIF.

::

    async with Mesh() as m:
        await write_video(m, episode_id, "episode.mp4")

Frames are encoded as they come, and none is kept: an episode of any length takes the memory of a few.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meshrl.client.mesh import Mesh
from meshrl.client.shielded import shielded
from meshrl.errors import EpisodeNotRendered, UsageError

VideoFormat = Literal["mp4", "gif"]
# Frames a second at most, of which players keep up: screens have 60; a GIF counts in hundredths of a second, and
# browsers slow down what asks for one of them. Of an episode that is to go faster, frames are left out.
MAX_FPS: Mapping[VideoFormat, int] = {"mp4": 60, "gif": 50}
MIN_FPS = 0.1
# libx264's measure of quality, where lines that are drawn stay sharp; smaller is better and larger a file.
CRF = "18"


@dataclass(frozen=True, slots=True)
class Video:
    """A file that was written.

    Attributes:
        path: of it.
        frames: how many it has.
        fps: how many are shown a second.
        width: in pixels.
        height: the same.
    """

    path: Path
    frames: int
    fps: float
    width: int
    height: int


async def write_video(
    mesh: Mesh,
    episode_id: str,
    path: str | Path,
    *,
    format: VideoFormat | None = None,  # noqa: A002  # what the command line and others call it
    fps: float | None = None,
    speed: float = 1.0,
    wait: float = 30.0,
    where: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Video:
    """Write what a recorded episode looked like as a video; see :meth:`meshrl.Mesh.frames`.

    The file is there when it is whole: until then it has another name. One that is there already is replaced.

    Args:
        mesh: of its env.
        episode_id: of :meth:`meshrl.Mesh.episodes`.
        path: of the file.
        format: ``mp4`` (H.264) or ``gif``; None goes by the path's suffix.
        fps: steps that are shown a second; None for as many as the env says, or 30.
        speed: how many times as fast.
        wait: seconds to wait for a worker and a slot.
        where: capabilities that the worker must have.
        progress: is told after each step how many of the episode's frames have come, and of how many.

    Raises:
        UsageError: PyAV is not installed, or the format or a number is none.
        EpisodeNotRendered: there are no pictures, or they change their size.
        EpisodeDiverged: it went another way. Nothing is written.
        MeshError: as of :meth:`meshrl.Mesh.frames`.
    """
    av = pyav()
    path = Path(path)
    kind = format_of(path.suffix[1:] if format is None else format)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}; make it", path=str(path))
    encoder: _Encoder | None = None
    every, shown = 1, 0.0
    with _whole(path) as part:
        try:
            async with aclosing(mesh.frames(episode_id, wait=wait, where=where)) as frames:
                async for frame in frames:
                    if encoder is None:
                        every, shown = rate_of(frame.fps if fps is None else fps, speed, kind)
                        encoder = _Encoder(av, part, kind, shown, frame.image.shape, episode_id)
                    if frame.step % every == 0 or frame.step == frame.steps:
                        await shielded(asyncio.to_thread(encoder.add, frame.image))
                    if progress is not None:
                        progress(frame.step + 1, frame.steps + 1)
            assert encoder is not None, "an episode has a reset"
            await shielded(asyncio.to_thread(encoder.finish))
        finally:
            if encoder is not None:
                encoder.close()
    return Video(path, encoder.frames, shown, encoder.width, encoder.height)


def pyav() -> Any:
    """PyAV.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import av  # noqa: PLC0415  # of the extra "video"
    except ImportError as exc:
        raise UsageError("videos need PyAV: pip install 'meshrl[video]'") from exc
    return av


def format_of(text: str) -> VideoFormat:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    for known in MAX_FPS:
        if text.lower() == known:
            return known
    raise UsageError(f"a video is written as {' or '.join(MAX_FPS)}, not {text!r}")


def rate_of(fps: float, speed: float, kind: VideoFormat) -> tuple[int, float]:
    """Of how many frames one is shown, and how many of those a second.

    Raises:
        UsageError: one of the numbers is none.
    """
    rate = fps * speed
    if not (fps > 0 and speed > 0 and MIN_FPS <= rate < math.inf):
        raise UsageError(f"fps and speed are numbers above 0, that make at least {MIN_FPS:g} frames a second")
    every = math.ceil(rate / MAX_FPS[kind])
    return every, rate / every


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file that is written; it gets its own when all went well, else it goes."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _Encoder:
    """Writes frames of one size into a file, one after another.

    Args:
        av: PyAV.
        path: of the file.
        kind: its format.
        fps: frames a second.
        shape: of the frames.
        episode_id: of the episode, for errors.

    Attributes:
        frames: how many there are so far.
        width: in pixels; even in an MP4, as yuv420p has it: the last column is shown twice where it has to be.
        height: the same.
    """

    def __init__(
        self, av: Any, path: Path, kind: VideoFormat, fps: float, shape: tuple[int, ...], episode_id: str
    ) -> None:
        self._av = av
        self._shape = shape
        self._episode_id = episode_id
        rate = Fraction(fps).limit_denominator(1001)
        self._time_base = 1 / rate
        height, width, _ = shape
        self.frames = 0
        self.height, self.width = (height + height % 2, width + width % 2) if kind == "mp4" else (height, width)
        # An MP4 begins with its index, so that it can be played before all of it has come; a GIF goes on for ever.
        options = {"movflags": "faststart"} if kind == "mp4" else {"loop": "0"}
        self._file = self._av.open(str(path), "w", format=kind, options=options)
        if kind == "mp4":
            self._stream = self._file.add_stream("libx264", rate=rate, options={"crf": CRF})
            self._stream.pix_fmt = "yuv420p"
            self._palettes = None
        else:
            self._stream = self._file.add_stream("gif", rate=rate)
            self._stream.pix_fmt = "pal8"
            self._palettes = self._palette_of_each()
        self._stream.width, self._stream.height = self.width, self.height

    def _palette_of_each(self) -> Any:
        """Gives each frame the 256 colours that are nearest to its own; of a drawing these are its own."""
        graph = self._av.filter.Graph()
        source = graph.add_buffer(width=self.width, height=self.height, format="rgb24", time_base=self._time_base)
        split, end = graph.add("split"), graph.add("buffersink")
        palettes, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1:dither=none")
        source.link_to(split)
        split.link_to(palettes, 0, 0)
        split.link_to(use, 1, 0)
        palettes.link_to(use, 0, 1)
        use.link_to(end)
        graph.configure()
        return graph

    def add(self, image: NDArray[np.uint8]) -> None:
        """The next frame."""
        if image.shape != self._shape:
            raise EpisodeNotRendered(
                f"episode {self._episode_id}: its frames change their size, from {self._shape} to {image.shape}, "
                "which no video can; mend its render",
                episode_id=self._episode_id,
            )
        below, beside = self.height - image.shape[0], self.width - image.shape[1]
        if below or beside:
            image = np.pad(image, ((0, below), (0, beside), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self.frames, self._time_base
        self.frames += 1
        self._take(frame)

    def _take(self, frame: Any) -> None:
        if self._palettes is None:
            self._file.mux(self._stream.encode(frame))
            return
        self._palettes.push(frame)
        while True:
            try:
                coloured = self._palettes.pull()
            except (self._av.BlockingIOError, self._av.EOFError):  # no more at the moment, or at all
                break
            self._file.mux(self._stream.encode(coloured))
        if frame is None:
            self._file.mux(self._stream.encode(None))

    def finish(self) -> None:
        """Write what the encoder has kept back, and the file's end."""
        self._take(None)
        self._file.close()

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        self._file.close()
