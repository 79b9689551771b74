"""``meshrl demo``: a whole mesh on this machine, with learners that share it, from nothing to a solved env.

Every part is a process of its own: nats-server, the env workers, the agent worker and the learners.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meshrl.bus.embedded import EmbeddedServer
from meshrl.cli.demo_pictures import colour_of, draw_curves, film
from meshrl.cli.demo_processes import Child, Run
from meshrl.cli.demo_show import Show
from meshrl.cli.learner import EVALUATION_SEEDS, Episode, Generation, Result, Settings
from meshrl.client.evaluate import Report
from meshrl.client.mesh import Mesh
from meshrl.errors import UsageError, WorkerError

ENV = "CartPole-v1"
TARGET, QUICK_TARGET = 475.0, 100.0
EPISODES = 20
# The seeds of the demo's own episodes: neither trained on nor used by a learner's evaluation.
DEMO_SEEDS = EVALUATION_SEEDS + 1_000_000_000
# Python and its imports, seven processes at once on two cores.
START_S = 60.0
# A learner reports each episode, of 500 steps at most; sixteen of them, with eight envs each, take seconds for one on
# two cores. One that says nothing for this long is stuck.
SILENCE_S = 60.0
# How often the logs are read; the bars move that often.
LOOK_S = 0.1
# The extra "demo": the import and the package that has it.
NEEDED = {"matplotlib": "matplotlib", "PIL": "pillow", "pygame": "pygame"}


# --------------------------------------------------------------------------- the course of it


class Demo:
    """The demo from the first process to the last picture.

    Args:
        out: the directory for pictures and logs.
        settings: of the learners, but for their seeds.
        learners: how many.
        workers: how many env workers.
        console: to write to.
    """

    def __init__(self, out: Path, settings: Settings, learners: int, workers: int, console: Console) -> None:
        self._out = out
        self._settings = settings
        self._learners = learners
        self._workers = workers
        self._console = console
        self._show = Show(console, learners, settings.target)
        self._stack = contextlib.ExitStack()
        self._best = out / "best-policy.json"

    def run(self) -> list[Run]:
        """Run it; gives the learners as they ended.

        Raises:
            MeshError: the server or a worker does not start, or went away.
        """
        self._best.unlink(missing_ok=True)
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        with self._stack:
            server = self._stack.enter_context(EmbeddedServer.start())
            return asyncio.run(self._run(server))

    def _start(self, label: str, url: str, *arguments: str) -> Child:
        log = self._out / "logs" / f"{label.replace(' ', '-')}.log"
        child = Child(label, log, arguments, url)
        self._stack.enter_context(child.guarded)
        return child

    async def _run(self, server: EmbeddedServer) -> list[Run]:
        began = time.monotonic()
        url, show = server.url, self._show
        workers = [self._start(f"env worker {n + 1}", url, "envs", ENV) for n in range(self._workers)]
        agents = self._start("agent worker", url, "agents", ENV, str(self._best))
        show.say(f"nats-server with JetStream on 127.0.0.1:{server.port}, pid {server.pid}")
        names = {await self._serving(child): child.label.removeprefix("env worker ") for child in workers}
        await self._serving(agents)
        show.say(f"{self._workers} env workers and 1 agent worker serve; {self._learners} learners start")

        async with Mesh(url) as mesh:
            learned_from = time.monotonic()
            runs = [self._start_learner(number, url) for number in range(1, self._learners + 1)]
            chance = await mesh.evaluate(ENV, "random", EPISODES, DEMO_SEEDS)
            with show:
                await self._follow(runs, [*workers, agents])
            seconds = time.monotonic() - learned_from
            show.table(ENV, runs, names)
            results = [run.result for run in runs if run.result is not None]
            steps = sum(result.steps for result in results)
            show.say(f"{steps:,} env steps in {seconds:.1f} s: {steps / seconds:,.0f} steps/s in all")
            if results:
                await self._best_episodes(mesh, runs, chance)
        draw_curves(
            self._out / "learning-curves.png",
            [run.curve for run in runs],
            env=ENV,
            target=self._settings.target,
            random_return=chance.mean_return,
        )
        show.say(f"{self._out / 'learning-curves.png'}: the returns on the way")
        show.say(f"all of it took {time.monotonic() - began:.1f} s")
        return runs

    def _start_learner(self, number: int, url: str) -> Run:
        seed = self._settings.seed * self._learners + number - 1
        settings = Settings(**{**vars(self._settings), "seed": seed})
        child = self._start(f"learner {number}", url, "learner", *settings.command_line())
        return Run(number, child)

    async def _serving(self, child: Child) -> str:
        """Wait until a worker serves; gives its id."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for event in child.events():
                if event["event"] == "serving":
                    return str(event["worker"])
            child.check_running()
            await asyncio.sleep(LOOK_S / 2)
        raise WorkerError(f"{child.label} did not serve within {START_S:g} s; its log is {child.log}")

    async def _follow(self, runs: Sequence[Run], workers: Sequence[Child]) -> None:
        """Read what the learners report until all are over."""
        while not all(run.over for run in runs):
            for child in workers:
                child.check_running()
            for run in runs:
                if not run.over:
                    # Asked before the log is read: what it wrote before its end is in there then.
                    ended = run.child.guarded.poll() is not None
                    self._take_in(run)
                    if run.result is not None:
                        continue
                    if ended:
                        run.failed = True
                        self._show.failure(run, f"failed; {run.child.log} ends with:\n{run.child.last_lines()}")
                    elif time.monotonic() - run.heard_at > SILENCE_S:
                        run.failed = True
                        # On a thread, since it may have to be killed: the bars of the others go on.
                        await asyncio.to_thread(run.child.guarded.stop)
                        self._show.failure(run, f"said nothing for {SILENCE_S:g} s and was ended; see {run.child.log}")
            await asyncio.sleep(LOOK_S)

    def _take_in(self, run: Run) -> None:
        for event in run.child.events():
            run.heard_at = time.monotonic()
            match event["event"]:
                case "episode":
                    episode = run.latest = Episode.model_validate(event)
                    if not episode.evaluation:
                        run.curve.steps.append(episode.steps)
                        run.curve.returns.append(episode.episode_return)
                    self._show.episode(run, episode)
                case "generation":
                    generation = Generation.model_validate(event)
                    run.generation = generation.number
                    self._show.generation(run, generation)
                case "result":
                    result = run.result = Result.model_validate(event)
                    run.curve.final = (result.steps, result.mean_return)
                    self._show.result(run, result)

    async def _best_episodes(self, mesh: Mesh, runs: Sequence[Run], chance: Report) -> None:
        """Hand the best policy to the agent worker, evaluate it there, and film an episode."""
        ended = [(run, run.result) for run in runs if run.result is not None]
        best, result = max(ended, key=lambda pair: (pair[1].mean_return, -pair[1].steps))
        # Written beside and moved: the agent worker reads it whole or not at all.
        written = self._best.with_suffix(".tmp")
        written.write_text(json.dumps({"learner": best.number, "weights": result.weights}) + "\n", encoding="utf-8")
        written.replace(self._best)
        report = await mesh.evaluate(ENV, "best", EPISODES, DEMO_SEEDS, concurrency=EPISODES)
        self._show.say(
            f"agent best (learner {best.number}'s policy): mean return {report.mean_return:.1f} of {EPISODES} episodes "
            f"that nobody has seen; agent random: {chance.mean_return:.1f}"
        )
        gif = self._out / "episode.gif"
        total = await film(
            mesh,
            gif,
            env=ENV,
            agent="best",
            seed=DEMO_SEEDS,
            caption=f"{ENV}, learner {best.number}'s policy",
            colour=colour_of(best.number),
        )
        self._show.say(f"{gif}: one of these episodes, return {total:.0f}")


# --------------------------------------------------------------------------- the command


def missing() -> list[str]:
    """The packages of the extra ``demo`` that are not installed."""
    return [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures and logs.")] = Path("demo-out"),
    seed: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Of the learners; the same seed learns the same.")
    ] = 0,
    learners: Annotated[int, typer.Option(min=1, max=16, help="Learner processes.")] = 4,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Env worker processes.")] = 2,
    target: Annotated[
        float | None,
        typer.Option(help="Mean return of 20 evaluation episodes to reach.", show_default="475; 100 with --quick"),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Env steps after which a learner gives up.")] = 200_000,
    quick: Annotated[bool, typer.Option("--quick", help="A small run, to an easier target.")] = False,
) -> None:
    """Run a mesh here, with learners that share one pool of CartPole until they have solved it."""
    absent = missing()
    if absent:
        raise UsageError(f"the demo needs {', '.join(absent)}: pip install 'meshrl[demo]'", missing=absent)
    wanted = target if target is not None else QUICK_TARGET if quick else TARGET
    settings = Settings(env=ENV, seed=seed, target=wanted, episodes=EPISODES, max_steps=max_steps)
    runs = Demo(out, settings, learners, workers, Console()).run()
    short = [f"learner {run.number}" for run in runs if run.result is None or not run.result.reached]
    if short:
        raise WorkerError(f"{', '.join(short)} did not reach {wanted:g}; their logs are in {out / 'logs'}")
