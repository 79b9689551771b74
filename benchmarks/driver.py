"""How the benchmark drives the systems it compares: one process a peer, one JSON line a command, one a reply.

Standard library only, because both ends import it: the benchmark (:func:`start`, :class:`PeerProcess`) and every peer's
own Python, which has another set of packages (:func:`obey`, :class:`Server` and the measuring functions). Between
commands a peer's processes wait on a pipe, so that peers can be measured in turn within one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
CLIENTS = 16
MAX_SAMPLES = 2000
WARM_UP_STEPS = 50
START_TIMEOUT_S = 120.0
# A peer's answer may take its measuring time, plus opening and closing up to 64 sessions or starting 16 servers.
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0

Answer = dict[str, Any]
Work = Callable[[Mapping[str, Any]], Answer]


@dataclass(frozen=True)
class Peer:
    """One system, or one way to run it."""

    name: str
    title: str
    directory: str
    """Under peers/: client.py, requirements.txt and whatever it serves with."""
    arguments: tuple[str, ...] = ()
    ours: bool = False
    """It runs in this repository's own environment, that of the benchmark."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("meshrl", "meshrl", "meshrl", ours=True),
        Peer("openenv", "OpenEnv, usual step", "openenv", ("usual",)),
        Peer("openenv_best", "OpenEnv, best case", "openenv", ("best",)),
        Peer("rlmesh", "RLMesh", "rlmesh"),
        Peer("dm_env_rpc", "dm_env_rpc", "dm_env_rpc"),
        Peer("gymnasium_sync", "Gymnasium SyncVectorEnv, local", "gymnasium", ("sync",)),
        Peer("gymnasium_async", "Gymnasium AsyncVectorEnv, local", "gymnasium", ("async",)),
        Peer("gymnasium_vector", "CartPole's vector implementation, local", "gymnasium", ("vector",)),
        Peer("envpool", "EnvPool, local", "envpool"),
        Peer("tcp", "bare TCP echo", "tcp"),
        Peer("sb3", "Stable-Baselines3's PPO", "sb3"),
    )
}


class Unavailable(Exception):
    """A peer cannot be installed, started or asked; the message says why."""


# --- the benchmark's side -----------------------------------------------------------------------------------------


def start(name: str) -> PeerProcess:
    """Starts the peer ``name`` of :data:`PEERS`, first making its environment where it is not there.

    Raises:
        Unavailable: it cannot be installed or started.
    """
    from benchmarks.peers import environments  # noqa: PLC0415  this file alone is what a peer needs

    peer = PEERS[name]
    try:
        python = Path(sys.executable) if peer.ours else environments.ensure(peer.directory)
    except environments.NotInstallable as error:
        raise Unavailable(str(error)) from error
    return PeerProcess(peer, python)


class PeerProcess:
    """A running peer. Blocking: from a coroutine, call :meth:`ask` in a thread."""

    def __init__(self, peer: Peer, python: Path) -> None:
        """Starts ``peer`` with the ``python`` of its environment.

        Raises:
            Unavailable: it did not get ready.
        """
        self.peer = peer
        self._directory = tempfile.TemporaryDirectory(prefix="peer-")
        self._log: IO[bytes] = (Path(self._directory.name) / "stderr").open("w+b")
        self._unread = b""
        self._process = subprocess.Popen(
            [str(python), str(HERE / "peers" / peer.directory / "client.py"), *peer.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=self._directory.name,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"},
        )
        try:
            ready = self._read(START_TIMEOUT_S)
        except Unavailable:
            self.stop()
            raise
        self.versions: dict[str, str] = ready["versions"]
        self.notes: str = ready["notes"]

    def ask(self, work: str, *, timeout: float = ANSWER_TIMEOUT_S, **parameters: Any) -> Answer:
        """One command, such as ``ask("single", seconds=0.5)``; its answer, within ``timeout`` and twice its seconds.

        Raises:
            Unavailable: the peer died or did not answer in time; it is stopped.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"work": work, **parameters}).encode() + b"\n")
            self._process.stdin.flush()
            return self._read(timeout + 2 * parameters.get("seconds", 0.0))
        except OSError as error:
            died = Unavailable(f"it died: {self._last_words()}")
            self.stop()
            raise died from error
        except Unavailable:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the peer and its servers, which die with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # what a peer takes for "stop", whatever it is doing
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        self._directory.cleanup()

    def _read(self, timeout_s: float) -> Answer:
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not readable:
                raise Unavailable(f"no answer within {timeout_s:.0f} s: {self._last_words()}")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise Unavailable(f"it ended: {self._last_words()}")
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        answer: Answer = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        # The first error is the cause: a server's, say, before that of the client that waited for it.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return (errors or lines[-1:] or ["it said nothing"])[0][:500]


# --- a peer's client ----------------------------------------------------------------------------------------------


def obey(works: Mapping[str, Work], *, versions: Mapping[str, str], notes: str) -> None:
    """Says ready, then does what it is asked until told to stop. The process exits with its standard input."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # Not sys.stdin: its lock, held while this thread waits, would be held for ever in a forked worker.
        unread = b""
        while part := os.read(0, 1 << 16):
            *lines, unread = (unread + part).split(b"\n")
            for line in lines:
                commands.put(line)
        os._exit(0)  # the benchmark is gone or has had enough, perhaps in the middle of a work

    threading.Thread(target=listen, daemon=True).start()
    # What was imported is alike in a trainer and here, and none of a work's own: not to be looked through during one.
    gc.collect()
    gc.freeze()
    replies.write(json.dumps({"ready": True, "versions": dict(versions), "notes": notes}) + "\n")
    while True:
        command = json.loads(commands.get())
        gc.collect()  # what the last work left behind is not the next one's either
        name = command["work"]
        if name == "stop":
            os._exit(0)
        if name not in works:
            answer: Answer = {"unsupported": "it has no such thing"}
        else:
            try:
                answer = works[name](command)
            except Exception as error:  # noqa: BLE001  whatever it is, the table shall say so
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(answer) + "\n")


class Server:
    """A server process of a peer's, told by its closing standard input that its client is gone."""

    def __init__(self, script: Path, *arguments: str) -> None:
        """Starts ``script`` and waits until it announces where it listens."""
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{script.name} {' '.join(arguments)} ended before it listened")
        self.address: str = json.loads(line)["address"]
        """What it announced: a port, or the path of a socket."""


def announce(address: str | int) -> None:
    """In a server: says where it listens, and makes this process end when its client does."""

    def listen() -> None:
        while os.read(0, 1 << 10):
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    os.write(1, json.dumps({"address": str(address)}).encode() + b"\n")
    os.dup2(2, 1)


# --- measuring ----------------------------------------------------------------------------------------------------


def action(step: int) -> int:
    """The action of a CartPole's ``step``-th step: the same for every system, and it keeps the pole up for a while."""
    return step & 1


def thinned(samples: Sequence[float]) -> list[float]:
    """At most :data:`MAX_SAMPLES` of ``samples`` (seconds), evenly spread over time, in microseconds."""
    stride = max(1, -(-len(samples) // MAX_SAMPLES))
    return [round(one * 1e6, 2) for one in samples[::stride]]


def timed(step: Callable[[], bool], reset: Callable[[], object], seconds: float) -> Answer:
    """Steps one env as fast as it goes; ``step`` says whether the episode ended. Resets cost time, and do not count."""
    clock, samples = time.perf_counter, []
    for _ in range(WARM_UP_STEPS):
        if step():
            reset()
    began = now = clock()
    end = began + seconds
    while now < end:
        ended = step()
        done = clock()
        samples.append(done - now)
        if ended:
            reset()
        now = clock()
    return {"count": len(samples), "seconds": now - began, "samples_us": thinned(samples)}


async def timed_async(
    step: Callable[[], Awaitable[bool]], reset: Callable[[], Awaitable[object]], seconds: float
) -> Answer:
    """As :func:`timed`, for coroutines."""
    clock, samples = time.perf_counter, []
    for _ in range(WARM_UP_STEPS):
        if await step():
            await reset()
    began = now = clock()
    end = began + seconds
    while now < end:
        ended = await step()
        done = clock()
        samples.append(done - now)
        if ended:
            await reset()
        now = clock()
    return {"count": len(samples), "seconds": now - began, "samples_us": thinned(samples)}


async def counted_async(
    clients: Sequence[tuple[Callable[[], Awaitable[bool]], Callable[[], Awaitable[object]]]], seconds: float
) -> Answer:
    """Each client, a step and a reset, steps on its own as fast as it goes: a task each."""
    clock = time.perf_counter

    async def repeat(step: Callable[[], Awaitable[bool]], reset: Callable[[], Awaitable[object]], until: float) -> int:
        count = 0
        while clock() < until:
            if await step():
                await reset()
            count += 1
        return count

    await asyncio.gather(*(repeat(*client, clock() + 0.05) for client in clients))
    began = clock()
    counts = await asyncio.gather(*(repeat(*client, began + seconds) for client in clients))
    return {"count": sum(counts), "seconds": clock() - began}


def counted(clients: Sequence[tuple[Callable[[], bool], Callable[[], object]]], seconds: float) -> Answer:
    """As :func:`counted_async`, a thread each."""
    clock, counts = time.perf_counter, [0] * len(clients)
    errors: list[BaseException] = []
    line = threading.Barrier(len(clients) + 1)

    def repeat(index: int, step: Callable[[], bool], reset: Callable[[], object]) -> None:
        try:
            for _ in range(WARM_UP_STEPS):
                if step():
                    reset()
            line.wait()
            until, count = clock() + seconds, 0
            while clock() < until:
                if step():
                    reset()
                count += 1
            counts[index] = count
        except BaseException as error:  # noqa: BLE001  raised below, in the thread that was asked
            errors.append(error)
            line.abort()

    threads = [threading.Thread(target=repeat, args=(i, *client), daemon=True) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # by an error, raised below
        line.wait()
    began = clock()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {"count": sum(counts), "seconds": clock() - began}


def counted_batches(step: Callable[[int], object], size: int, seconds: float) -> Answer:
    """Steps a vector of ``size`` as fast as it goes; ``step`` gets the step's number. Counts env steps."""
    clock, count = time.perf_counter, 0
    for number in range(10):
        step(number)
    began = clock()
    end = began + seconds
    while clock() < end:
        step(count)
        count += 1
    return {"count": count * size, "seconds": clock() - began}


def versions_of(*packages: str) -> dict[str, str]:
    """What is installed, and the Python it is installed in."""
    from importlib.metadata import version  # noqa: PLC0415  only peers ask

    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in packages}}
