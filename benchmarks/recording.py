"""What it costs to record, and how fast recordings are made and read.

python benchmarks/recording.py                 all of it, about 15 minutes; written to results/recording/latest.json
python benchmarks/recording.py --pairs 60
python benchmarks/recording.py --only cost     of cost, recorder, reading; the others stay in the file as they are

What it costs is told in pairs, of a session that is recorded and one that is not. Each has a nats-server and a worker
of its own, both new for each pair, and what they and the learner use counts whenever they use it: a chunk is made a
second after its first step. The two take turns of some hundredths of a second, since the machine itself gets slower and
faster within tenths; then they are left alone until all is stored. Nobody polls for answers (``MESHRL_POLL=0``): that
is time that nobody else wanted, and as much as a step takes.

The recorder alone is given frames of an Atari game that were made before (where there is none, pictures that look like
some), by two threads as in a worker: the one that steps notes them, the other makes chunks. Reading is of episodes of
CartPole with their observations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import uvloop
import xxhash
import zstandard
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
from meshrl.protocol.transcript import MAX_NOTED_BYTES, Transcript
from meshrl.recording.writing import Size
from meshrl.wire.batches import batching
from meshrl.wire.compressed import LEVEL

RESULTS = Path(__file__).resolve().parent / "results" / "recording" / "latest.json"
LEVELS = ("actions", "full")
TURN_STEPS = 16
WARM_UP_STEPS = 200
# Until the last chunk is stored.
STORED_S = 1.5
FRAMES = 2048
PICTURES = 4 * FRAMES
READ_STEPS = 200_000


# --------------------------------------------------------------------------- what it costs


async def costs(pairs: int, turns: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for level in LEVELS:
        numbers = track(range(pairs), description=f"{level}, vector of {VECTOR}", console=Console(stderr=True))
        rows = [await pair(level, turns, first=n % 2) for n in numbers]
        told[level] = {
            "us_off": [1e6 * off for off, _ in rows],
            "us": [1e6 * on for _, on in rows],
            "ratio": estimates.ratio([on for _, on in rows], [off for off, _ in rows]).as_dict(),
        }
    return told


async def pair(level: str, turns: int, first: int) -> tuple[float, float]:
    """Processor time of a step of one sub-environment in seconds, without a recording and with one."""
    sides = "off", level
    async with AsyncExitStack() as stack:
        envs, others = [], []
        for side in sides:
            known = children(os.getpid())
            url = stack.enter_context(EmbeddedServer.start()).url
            worker = Worker(url)
            stack.callback(worker.kill)
            mesh = await stack.enter_async_context(Mesh(url))
            envs.append(await mesh.vector("cartpole", VECTOR, shards=1, record=side))  # type: ignore[arg-type]
            others.append((server_of(known), worker.process.pid))
        actions = [np.full(VECTOR, n, np.int64) for n in range(2)]
        for env in envs:
            await env.reset(seed=1)
            for n in range(WARM_UP_STEPS):
                await env.step(actions[n & 1])
        await asyncio.sleep(STORED_S)
        used = [-sum(map(cpu_s, one)) for one in others]
        for turn in range(turns):
            for side in ((first + turn) % 2, (first + turn + 1) % 2):
                began = time.process_time()
                for n in range(TURN_STEPS):
                    await envs[side].step(actions[n & 1])
                used[side] += time.process_time() - began
        await asyncio.sleep(STORED_S)
        off, on = (
            (mine + sum(map(cpu_s, one))) / (turns * TURN_STEPS * VECTOR)
            for mine, one in zip(used, others, strict=True)
        )
        return off, on


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
    """Steps a second of a single env's pictures with ``full``; and what of that is copying, hashing and compressing."""
    shown = frames()
    rates, alone, sizes, bare = [], [], [], []
    for _ in track(range(rounds), description="recorder", console=Console(stderr=True)):
        bare.append(bare_us(shown))
        for told, threads in ((rates, 2), (alone, 1)):
            recorded = Recorded(shown)
            began = time.perf_counter()
            recorded.by(threads)
            told.append(PICTURES / (time.perf_counter() - began))
        sizes.append(recorded.size / PICTURES)
    return {
        "steps_per_s": rates,
        "median": statistics.median(rates),
        "steps_per_s_of_one_thread": alone,
        "median_of_one_thread": statistics.median(alone),
        "us_of_copying_hashing_and_compressing": statistics.median(bare),
        "bytes_a_step": statistics.median(sizes),
    }


class Recorded:
    """A session of one env that shows pictures, and what makes chunks of it."""

    def __init__(self, shown: np.ndarray[Any, Any]) -> None:
        self.size = 0
        self._shown = shown
        self._transcript = Transcript(
            1,
            batching(spaces.Box(0, 255, (84, 84, 4), np.uint8)),
            batching(spaces.Discrete(4)),
            "full",
            hashes_at_once=True,
            row_bytes=28_300,
        )
        self._chunker, self._chunks = Chunker(self._transcript), Size()
        self._full = threading.Event()

    def by(self, threads: int) -> None:
        """Record it by one thread, or as a worker does: one notes what the env shows, the other makes chunks."""
        transcript, full = self._transcript, self._full
        picture = np.empty_like(self._shown[0])
        over = threading.Event()
        writer = threading.Thread(target=self._write_until, args=(over,))
        transcript.when_full(self._chunks.limit, full.set)
        if threads == 2:
            writer.start()
        for n in range(PICTURES):
            picture[:] = self._shown[n % FRAMES]  # by the env, which goes on writing to the same memory
            if n:
                transcript.note_one(n / 60, n & 3, picture, 0.0, False, False, {}, reset=False)
            else:
                transcript.began(0, 1, None, None)
                transcript.note_one(0.0, None, picture, 0.0, False, False, {}, reset=True)
            transcript.settle()
            if threads == 1 and full.is_set():
                self._write()
            while transcript.nbytes > MAX_NOTED_BYTES // 2:  # no env is as fast
                time.sleep(0.0005)
        over.set()
        full.set()
        if threads == 2:
            writer.join()
        self._write(all_of_it=True)
        assert not transcript.missed, "what is not recorded takes no time"

    def _write_until(self, over: threading.Event) -> None:
        while self._full.wait() and not over.is_set():
            self._write()

    def _write(self, *, all_of_it: bool = False) -> None:
        """What is full, or all of it, as chunks."""
        self._full.clear()
        transcript, chunks = self._transcript, self._chunks
        while (all_of_it or transcript.nbytes >= chunks.limit) and (noted := transcript.taken(chunks.limit)):
            made = self._chunker.chunk(noted)
            assert made is not None
            stored = len(pack_chunk(made[0]))
            chunks.seen(sum(one.nbytes for one in noted), stored)
            self.size += stored
        transcript.when_full(chunks.limit, self._full.set)


def bare_us(shown: np.ndarray[Any, Any]) -> float:
    """Microseconds a picture takes that is written by an env, copied, hashed, and compressed with all others."""
    picture, kept = np.empty_like(shown[0]), np.empty((FRAMES // 4, *shown[0].shape), np.uint8)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    began = time.perf_counter()
    for n, obs in enumerate(shown):
        picture[:] = obs
        row = kept[n % len(kept)]
        row[:] = picture
        xxhash.xxh3_64_intdigest(row)
        if (n + 1) % len(kept) == 0:
            compressor.compress(kept)
    return 1e6 * (time.perf_counter() - began) / len(shown)


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
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--turns", type=int, default=200, help="of each side of a pair")
    parser.add_argument("--rounds", type=int, default=10, help="of the recorder alone, and of reading")
    parser.add_argument("--only", nargs="+", choices=("cost", "recorder", "reading"), default=[])
    parser.add_argument("--json", type=Path, default=RESULTS)
    settings = parser.parse_args()
    begun = {"begun": measuring.now(), "machine": measuring.machine(), "load": measuring.load()}
    os.environ["MESHRL_POLL"] = "0"
    os.chdir(tempfile.gettempdir())
    wanted: Sequence[str] = settings.only or ("cost", "recorder", "reading")
    told: dict[str, Any] = {}
    console = Console()
    if "cost" in wanted:
        told["cost"] = uvloop.run(costs(settings.pairs, settings.turns))
        for level in LEVELS:
            cost = told["cost"][level]
            ratio, off, on = cost["ratio"], statistics.median(cost["us_off"]), statistics.median(cost["us"])
            console.print(
                f"{level}: {on:.1f} µs a step, {off:.1f} without: {ratio['value']:.3f} times "
                f"({ratio['low']:.3f} to {ratio['high']:.3f})"
            )
    if "recorder" in wanted:
        told["recorder"] = recorder(settings.rounds)
        figures = told["recorder"]
        console.print(
            f"recorder alone: {figures['median']:,.0f} pictures a second, "
            f"{figures['median_of_one_thread']:,.0f} by one thread; "
            f"to copy, hash and compress one takes {figures['us_of_copying_hashing_and_compressing']:.1f} µs"
        )
    if "reading" in wanted:
        told["reading"] = uvloop.run(reading(settings.rounds))
        console.print(f"reading: {told['reading']['median']:,.0f} steps a second")
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(settings.json.read_text()) if settings.only and settings.json.exists() else {}
    kept |= {what: begun | figures for what, figures in told.items()}
    settings.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
