"""What it costs to record, and how fast recordings are made and read.

python benchmarks/recording.py                 all of it, about eight minutes; written to results/recording/latest.json
python benchmarks/recording.py --pairs 60
python benchmarks/recording.py --only cost     of cost, recorder, reading

Each level has a nats-server and a worker of its own, both new for each round; what they use counts whenever they use
it: a chunk is made a second after its first step. In a round the levels take turns of some hundredths of a second,
since the machine itself gets slower and faster within tenths; then they are left alone until all is stored.

The recorder alone is given frames of an Atari game that were made before (where there is none, pictures that look like
some), and reading is of episodes of CartPole with their observations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import uvloop
from gymnasium import spaces
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import estimates, measuring
from benchmarks.losses import VECTOR, Worker, children, cpu_s
from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.protocol.chunking import Chunker
from meshrl.protocol.chunks import pack_chunk
from meshrl.protocol.transcript import Transcript
from meshrl.recording.writing import Size
from meshrl.wire.batches import batching

RESULTS = Path(__file__).resolve().parent / "results" / "recording" / "latest.json"
LEVELS = ("off", "actions", "full")
TURN_STEPS = 16
WARM_UP_STEPS = 200
# Until the last chunk is stored.
STORED_S = 2.0
FRAMES = 2048
READ_STEPS = 200_000


# --------------------------------------------------------------------------- what it costs


async def costs(pairs: int, turns: int) -> dict[str, Any]:
    rows = [
        await one_round(turns, n)
        for n in track(range(pairs), description=f"vector of {VECTOR}", console=Console(stderr=True))
    ]
    told: dict[str, Any] = {f"us_{level}": [1e6 * row[level] for row in rows] for level in LEVELS}
    for level in LEVELS[1:]:
        told[level] = estimates.ratio([row[level] for row in rows], [row["off"] for row in rows]).as_dict()
    return told


async def one_round(turns: int, number: int) -> dict[str, float]:
    """Processor time of a step of one sub-environment in seconds, by level."""
    with ExitStack() as stack:
        meshes, others = {}, {}
        for level in LEVELS:
            known = children(os.getpid())
            url = stack.enter_context(EmbeddedServer.start()).url
            server = server_of(known)
            worker = Worker(url)
            stack.callback(worker.kill)
            meshes[level], others[level] = Mesh(url), (server, worker.process.pid)
        try:
            for mesh in meshes.values():
                await mesh.__aenter__()
            return await measured(meshes, others, turns, number)
        finally:
            for mesh in meshes.values():
                await mesh.__aexit__(None, None, None)


async def measured(
    meshes: dict[str, Mesh], others: dict[str, tuple[int, int]], turns: int, number: int
) -> dict[str, float]:
    envs = {
        level: await mesh.vector("cartpole", VECTOR, shards=1, record=level)  # type: ignore[arg-type]
        for level, mesh in meshes.items()
    }
    actions = [np.full(VECTOR, n, np.int64) for n in range(2)]
    for level in LEVELS:
        await envs[level].reset(seed=1)
        for n in range(WARM_UP_STEPS):
            await envs[level].step(actions[n & 1])
    await asyncio.sleep(STORED_S)
    before = {level: sum(map(cpu_s, others[level])) for level in LEVELS}
    client = dict.fromkeys(LEVELS, 0.0)
    for turn in range(turns):
        shift = (turn + number) % len(LEVELS)
        for level in LEVELS[shift:] + LEVELS[:shift]:
            began = time.process_time()
            for n in range(TURN_STEPS):
                await envs[level].step(actions[n & 1])
            client[level] += time.process_time() - began
    await asyncio.sleep(STORED_S)
    after = {level: sum(map(cpu_s, others[level])) for level in LEVELS}
    count = turns * TURN_STEPS * VECTOR
    return {level: (client[level] + after[level] - before[level]) / count for level in LEVELS}


def server_of(known: Sequence[int]) -> int:
    """The process id of the nats-server that was started since those were all."""
    new = [pid for pid in children(os.getpid()) if pid not in known]
    return next(pid for pid in new if b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])


# --------------------------------------------------------------------------- the recorder alone


def frames() -> np.ndarray[Any, Any]:
    """Stacks of four frames of 84 by 84, each with three of the one before."""
    try:
        import ale_py  # noqa: PLC0415  # an extra

        gymnasium.register_envs(ale_py)
        env = gymnasium.make("ALE/Breakout-v5", frameskip=1)
        env = gymnasium.wrappers.AtariPreprocessing(env)
        single = [env.reset(seed=1)[0]]
        env.action_space.seed(1)
        while len(single) < FRAMES + 3:
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            single.append(obs if not (terminated or truncated) else env.reset()[0])
    except (ImportError, gymnasium.error.Error):
        rng = np.random.default_rng(1)
        single = [np.zeros((84, 84), np.uint8) for _ in range(FRAMES + 3)]
        for n, frame in enumerate(single):
            frame[10:20] = 142
            frame[70:73, (3 * n) % 80 : (3 * n) % 80 + 8] = 200
            frame[rng.integers(20, 70), rng.integers(0, 84)] = 200
    return np.stack([np.stack(single[n : n + 4], axis=-1) for n in range(FRAMES)])


def recorder(rounds: int) -> dict[str, Any]:
    """Steps a second that one thread notes, packs and compresses, of a single env's pictures with ``full``."""
    shown = frames()
    space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    rates, sizes = [], []
    for _ in track(range(rounds), description="recorder", console=Console(stderr=True)):
        transcript = Transcript(
            1, batching(space), batching(spaces.Discrete(4)), "full", hashes_at_once=True, row_bytes=28_300
        )
        chunker, chunks = Chunker(transcript), Size()
        transcript.began(0, 1, None, None)
        transcript.note_one(0.0, None, shown[0], 0.0, False, False, {}, reset=True)
        began, size = time.perf_counter(), 0
        for n, obs in enumerate(shown):
            transcript.note_one(n / 60, n & 3, obs, 0.0, False, False, {}, reset=False)
            transcript.settle()
            if transcript.nbytes > chunks.limit:
                size += drained(transcript, chunker, chunks)
        size += drained(transcript, chunker, chunks)
        rates.append(len(shown) / (time.perf_counter() - began))
        sizes.append(size / len(shown))
    return {"steps_per_s": rates, "median": statistics.median(rates), "bytes_a_step": statistics.median(sizes)}


def drained(transcript: Transcript, chunker: Chunker, chunks: Size) -> int:
    size = 0
    while noted := transcript.taken(chunks.limit):
        made = chunker.chunk(noted)
        assert made is not None
        stored = len(pack_chunk(made[0]))
        chunks.seen(sum(one.nbytes for one in noted), stored)
        size += stored
    return size


# --------------------------------------------------------------------------- reading


async def reading(rounds: int) -> dict[str, Any]:
    """Steps a second of a feed of experience, of episodes of CartPole with observations."""
    with EmbeddedServer.start() as server:
        worker = Worker(server.url)
        try:
            async with Mesh(server.url) as m:
                async with await m.vector("cartpole", VECTOR, shards=1, record="full") as envs:
                    await envs.reset(seed=1)
                    actions = [np.full(VECTOR, n, np.int64) for n in range(2)]
                    for n in range(READ_STEPS // VECTOR):
                        await envs.step(actions[n & 1])
                await asyncio.sleep(STORED_S)
            rates = []
            for _ in track(range(rounds), description="reading", console=Console(stderr=True)):
                async with Mesh(server.url) as m:
                    began, count = time.perf_counter(), 0
                    async for batch in m.experience("CartPole-v1", follow=False, batch_size=4096):
                        count += len(batch)
                    rates.append(count / (time.perf_counter() - began))
        finally:
            worker.kill()
    return {"steps_per_s": rates, "median": statistics.median(rates), "steps": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--turns", type=int, default=60, help="of each level in a round")
    parser.add_argument("--rounds", type=int, default=10, help="of the recorder alone, and of reading")
    parser.add_argument("--only", nargs="+", choices=("cost", "recorder", "reading"), default=[])
    parser.add_argument("--json", type=Path, default=RESULTS)
    settings = parser.parse_args()
    begun, load = measuring.now(), measuring.load()
    os.chdir(tempfile.gettempdir())
    wanted: Sequence[str] = settings.only or ("cost", "recorder", "reading")
    told: dict[str, Any] = {"begun": begun, "machine": measuring.machine(), "load": load}
    console = Console()
    if "cost" in wanted:
        told["cost"] = uvloop.run(costs(settings.pairs, settings.turns))
        for level in LEVELS[1:]:
            ratio = told["cost"][level]
            off, on = (statistics.median(told["cost"][f"us_{one}"]) for one in ("off", level))
            console.print(
                f"{level}: {on:.1f} µs a step, {off:.1f} without: {ratio['value']:.3f} times "
                f"({ratio['low']:.3f} to {ratio['high']:.3f})"
            )
    if "recorder" in wanted:
        told["recorder"] = recorder(settings.rounds)
        console.print(f"recorder alone: {told['recorder']['median']:,.0f} pictures a second")
    if "reading" in wanted:
        told["reading"] = uvloop.run(reading(settings.rounds))
        console.print(f"reading: {told['reading']['median']:,.0f} steps a second")
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
