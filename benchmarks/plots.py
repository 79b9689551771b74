"""A run's pictures: steps/s against num_envs, latency distributions, first-ready against lockstep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks import estimates
from benchmarks.works import VECTOR_SIZES

Results = Mapping[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too; lines differ in their marks or dashes as well.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#666666",
)
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
DPI = 150


def draw(results: Results, directory: Path) -> list[Path]:
    """Writes those pictures of which there are figures; gives their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    pictures: dict[str, Callable[[Results], Any]] = {
        "bench-num-envs.png": throughput,
        "bench-latency.png": latency,
        "bench-first-ready.png": first_ready,
    }
    with mpl.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(results)
            if figure is not None:
                figure.savefig(directory / name, dpi=DPI, bbox_inches="tight")
                plt.close(figure)
                drawn.append(directory / name)
    return drawn


def values_of(results: Results, turn: str, quantity: str = "rate") -> list[float]:
    return estimates.present(results["series"].get(turn, {}).get(quantity, ()))


def throughput(results: Results) -> Any:
    """Env steps a second against the number of sub-environments."""
    lines = (
        ("meshrl/vector{}_2", "meshrl, 2 worker processes", BLUE, "o"),
        ("meshrl/vector{}_1", "meshrl, 1 worker process", SKY, "s"),
        ("gymnasium_sync/vector{}", "SyncVectorEnv, local", ORANGE, "^"),
        ("gymnasium_async/vector{}", "AsyncVectorEnv, local, a process each", RED, "D"),
    )
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    for turn, label, colour, mark in lines:
        points = [(size, values_of(results, turn.format(size))) for size in VECTOR_SIZES]
        points = [(size, values) for size, values in points if values]
        if not points:
            continue
        sizes = [size for size, _ in points]
        figures = [estimates.estimate(values) for _, values in points]
        axes.plot(sizes, [one.value for one in figures], color=colour, marker=mark, label=label, markersize=6)
        axes.fill_between(
            sizes, [one.low for one in figures], [one.high for one in figures], color=colour, alpha=0.18, lw=0
        )
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(VECTOR_SIZES, [f"{size:,}" for size in VECTOR_SIZES])
    _plain(axes.yaxis)
    axes.set_xlabel("sub-environments (num_envs)")
    axes.set_ylabel("env steps per second")
    axes.set_title("CartPole in Python, stepped as one vector: medians and 95 % intervals")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def latency(results: Results) -> Any:
    """How a step's latency is distributed at each remote system."""
    lines = (
        ("tcp/echo", "bare TCP echo, no env", GREY, ":"),
        ("meshrl/echo", "bare echo on meshrl's bus, no env", GREY, "--"),
        ("meshrl/single", "meshrl", BLUE, "-"),
        ("rlmesh/single", "RLMesh", GREEN, (0, (6, 1.5))),
        ("openenv_best/single", "OpenEnv, best case", ORANGE, "-."),
        ("openenv/single", "OpenEnv, as documented", RED, (0, (3, 1, 1, 1, 1, 1))),
        ("dm_env_rpc/single", "dm_env_rpc", PURPLE, (0, (2, 1))),
    )
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    edges = []
    for turn, label, colour, dashes in lines:
        quantiles = results["latency_quantiles_us"].get(turn)
        if not quantiles:
            continue
        fractions = np.linspace(0, 1, len(quantiles))
        width = 2.4 if turn == "meshrl/single" else 1.6
        axes.plot(quantiles, 100 * fractions, color=colour, ls=dashes, lw=width, label=label)
        edges += [quantiles[0], np.interp(0.99, fractions, quantiles)]
    if not edges:
        plt.close(figure)
        return None
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(edges), 1.25 * max(edges))
    axes.set_ylim(0, 100)
    _plain(axes.xaxis)
    axes.set_xlabel("latency of one CartPole step (µs)")
    axes.set_ylabel("steps that took at most so long (%)")
    axes.set_title("One env, one client, one step at a time: all rounds together")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def first_ready(results: Results) -> Any:
    """What waiting for the slowest costs: 64 slow envs in lockstep and as a pool, a dot a round."""
    panels = (
        (
            "10 ms a step in the mean, lognormal, σ = 1",  # noqa: RUF001
            (
                ("meshrl/lognormal_vector", "lockstep:\na vector of 64", ORANGE),
                ("meshrl/lognormal_pool", "first ready:\na pool, recv 16", BLUE),
            ),
            64 / 0.010,
        ),
        (
            "1 ms a step, always",
            (
                ("meshrl/sleep64_vector", "a vector of 64", ORANGE),
                ("meshrl/sleep64_apart", "a vector of 16\nat each worker", PURPLE),
                ("meshrl/sleep64_halves", "two vectors of 32\nin flight", GREEN),
                ("meshrl/sleep64_pool", "a pool, recv 16", BLUE),
                ("meshrl/threads", "the same threads\nwithout the bus", GREY),
            ),
            64 / 0.001,
        ),
    )
    if not any(values_of(results, turn) for _, rows, _ in panels for turn, _, _ in rows):
        return None
    figure, both = plt.subplots(1, 2, figsize=(10.6, 3.8), gridspec_kw={"wspace": 0.5})
    for axes, (title, rows, most) in zip(both, panels, strict=True):
        for place, (turn, _, colour) in enumerate(rows):
            values = values_of(results, turn)
            if not values:
                continue
            middle = estimates.median(values)
            axes.barh(place, middle, height=0.5, color=colour, alpha=0.35)
            # Spread a little in height, evenly and not at random: rounds that agree are seen all the same.
            axes.plot(values, place + np.linspace(-0.16, 0.16, len(values)), "o", color=colour, markersize=3.5)
            axes.text(middle, place + 0.3, f"{middle:,.0f}", va="bottom", ha="center", fontsize=9.5)
        axes.axvline(most, color="black", lw=1, ls="--")
        axes.text(most, len(rows) - 0.42, "if none ever waited ", ha="right", va="bottom", fontsize=9)
        axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
        axes.set_ylim(-0.5, len(rows) - 0.1)
        axes.set_xlim(0, 1.04 * most)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("env steps per second: median, and a dot a round")
        axes.set_title(title)
    return figure


def _plain(axis: Any) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade, as numbers in place of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
