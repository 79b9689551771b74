"""The demo's pictures: learning curves as a PNG, one episode as a GIF."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from meshrl.client.mesh import Mesh

# Okabe and Ito's colours, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
INK, FAINT = "#1F2933", "#9AA5B1"
# A curve is the mean over this many episodes. A learner's generation has as many: with fewer the curve would have
# teeth, since the short episodes of a generation end first.
WINDOW = 24
# CartPole runs at 50 steps a second; every second one is shown, for 40 ms, so that the GIF plays in real time.
STEPS_A_FRAME = 2
FRAME_MS = 40
FINAL_FRAME_MS = 1500
CAPTION_PX = 36


def colour_of(learner: int) -> str:
    """The colour of a learner, numbered from 1, in every picture."""
    return PALETTE[(learner - 1) % len(PALETTE)]


@dataclass
class Curve:
    """The course of one learner.

    Attributes:
        steps: env steps of the learner at the end of each training episode.
        returns: of these episodes.
        final: (env steps, mean return) of the last evaluation.
    """

    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    final: tuple[int, float] | None = None

    def recent(self) -> float:
        """Mean return of the last episodes, 0 before the first."""
        return float(np.mean(self.returns[-WINDOW:])) if self.returns else 0.0


def draw_curves(path: Path, curves: Sequence[Curve], *, env: str, target: float, random_return: float) -> None:
    """Write the learning curves as a PNG of 1600 x 960 pixels."""
    # It warns when it takes its time to list this machine's fonts, which it does once.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure  # noqa: PLC0415  # of the extra "demo"; no pyplot, so no display

    figure = Figure(figsize=(10, 6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(target, color=INK, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
    axes.axhline(random_return, color=FAINT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    for number, curve in enumerate(curves, 1):
        colour = colour_of(number)
        axes.scatter(curve.steps, curve.returns, s=9, color=colour, alpha=0.22, linewidths=0, zorder=2)
        means = [float(np.mean(curve.returns[max(0, end - WINDOW) : end])) for end in range(1, len(curve.returns) + 1)]
        axes.plot(curve.steps, means, color=colour, linewidth=2.2, label=f"learner {number}", zorder=3)
        if curve.final is not None and means:
            steps, final = curve.final
            way = ([curve.steps[-1], steps], [means[-1], final])
            axes.plot(*way, color=colour, linewidth=1.1, linestyle=(0, (2, 2)), alpha=0.8, zorder=2)
            axes.plot(steps, final, "*", color=colour, markersize=17, markeredgecolor="white", zorder=4)
    axes.plot(
        [], [], "*", color=INK, markersize=13, linestyle="none", label="final evaluation,\n20 episodes without noise"
    )
    axes.plot([], [], color=INK, linewidth=1.2, linestyle=(0, (5, 4)), label=f"target: {target:g}")
    axes.plot([], [], color=FAINT, linewidth=1.2, linestyle=(0, (1, 2)), label=f"random policy: {random_return:.0f}")

    title = f"{len(curves)} learners, one pool of {env} on the mesh"
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=28)
    subtitle = f"cross-entropy search of a linear policy; dots: training episodes, lines: mean of the last {WINDOW}"
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=10.5, color="#52606D")
    axes.set_xlabel("env steps of the learner", fontsize=11.5, color=INK)
    axes.set_ylabel("episode return (steps balanced, at most 500)", fontsize=11.5, color=INK)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 520)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color="#E4E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#52606D", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10.5, labelcolor=INK)
    figure.savefig(path)


async def film(mesh: Mesh, path: Path, *, env: str, agent: str, seed: int, caption: str, colour: str) -> float:
    """Play one episode of a served agent in a served env and write it as a GIF; gives its return.

    Args:
        mesh: where both are served.
        path: of the GIF.
        env: the env's served name.
        agent: the agent's served name.
        seed: of the episode.
        caption: what stands under the picture, before the return.
        colour: behind the caption, as #RRGGBB.
    """
    frames: list[tuple[Any, float]] = []
    async with await mesh.env(env, render_mode="rgb_array") as remote:
        policy = await mesh.agent(agent, env=remote)
        observation, info = await remote.reset(seed=seed)
        total, step, ended = 0.0, 0, False
        while not ended:
            if step % STEPS_A_FRAME == 0:
                frames.append((await remote.render(), total))
            action = await policy.act(observation, info, deterministic=True, step=step)
            observation, reward, terminated, truncated, info = await remote.step(action)
            total, step, ended = total + reward, step + 1, terminated or truncated
        frames.append((await remote.render(), total))
    _write_gif(path, frames, caption, colour)
    return total


def _write_gif(path: Path, frames: Sequence[tuple[Any, float]], caption: str, colour: str) -> None:
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415  # of the extra "demo"

    font = ImageFont.load_default(size=17)
    images = []
    for frame, total in frames:
        height, width, _ = frame.shape
        image = Image.new("RGB", (width, height + CAPTION_PX), "white")
        image.paste(Image.fromarray(frame), (0, 0))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, height, width, height + CAPTION_PX), fill=colour)
        middle = height + CAPTION_PX // 2
        draw.text((14, middle), caption, fill="white", font=font, anchor="lm")
        draw.text((width - 14, middle), f"return {total:.0f}", fill="white", font=font, anchor="rm")
        images.append(image)
    # One palette for all frames, made from the last: with one a frame, colours flicker.
    palette = images[-1].quantize(colors=64, dither=Image.Dither.NONE)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [FRAME_MS] * (len(small) - 1) + [FINAL_FRAME_MS]
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=False)
