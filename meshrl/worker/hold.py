"""A hold: what a worker keeps with a session, and where it may run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from meshrl.protocol.pace import BatchPace, Pace
from meshrl.wire.codec import Codec
from meshrl.wire.frames import Frame
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from meshrl.worker.process_env import ProcessEnv
from meshrl.worker.recording import Recording
from meshrl.worker.strict import Strict
from meshrl.worker.vector_implementations import HostedImplementation

# What a coroutine that closes an env may take; one that takes longer is left behind, and the slot is free. An env in a
# process of its own has as long to finish what nobody waits for any more.
CLOSE_S = 5.0


class Held(Protocol):
    """What a session holds: an env, or a stateful agent."""

    @property
    def pace(self) -> Pace | BatchPace:
        """Whether to step it on the event loop."""
        ...

    @property
    def coroutine(self) -> bool:
        """Whether it must be awaited."""
        ...

    @property
    def draws(self) -> bool:
        """Whether it has to wait for others that draw, so that it must not run on the event loop."""
        ...

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op."""
        ...

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same where it must be awaited."""
        ...

    async def close(self, seconds: float) -> None:
        """Let go of it; a coroutine of its own has ``seconds`` for that."""
        ...


class Hold:
    """What the worker keeps with a session: the env, how its client wants arrays, and the coroutine it runs.

    Attributes:
        envs: of it, one by one; none of an agent, or where a vector implementation has them.
        held: what has one lane; None in a pool.
        pool: what has many; None in any other session.
        op: what it was last asked.
        vector: ``held``, where its sub-environments can be spread over threads.
        processes: the envs of it that are in processes of their own. They block the thread that asks them, so nothing
            is asked on the event loop.
        pack: writes a reply as its client reads it.
        paces: by op: what may run on the event loop, once it has shown itself fast there.
        counts: takes what it told into its digests; to be called when that was given to the socket, and before more is
            asked of it. None where there is nothing to do.
        recording: of the session; None where it is not recorded.
        withhold: keeps an answer back until what it tells is stored, where the session is recorded so strictly.
    """

    __slots__ = (
        "counts",
        "envs",
        "held",
        "op",
        "paces",
        "pack",
        "pool",
        "processes",
        "recording",
        "task",
        "vector",
        "withhold",
    )

    def __init__(self, held: Held | HostedPool, codec: Codec) -> None:
        self.held = None if isinstance(held, HostedPool) else held
        self.pool = held if isinstance(held, HostedPool) else None
        self.vector = held if isinstance(held, HostedVector) else None
        batches = self.vector is not None or isinstance(held, HostedImplementation)
        self.pack = codec.pack_batch if batches or self.pool is not None else codec.pack
        # An env's resets are not as fast as its steps (levels are made, files read), so they earn the loop themselves.
        self.paces: dict[str, Pace | BatchPace] = {"step": held.pace, "reset": Pace()}
        if self.vector is not None:
            self.paces["reset"] = self.vector.reset_pace
        self.envs = _envs_of(held)
        self.processes = [env for env in self.envs if isinstance(env, ProcessEnv)]
        if held.draws or self.processes:
            self.paces = {}
        self.counts = held.counts if isinstance(held, HostedPool | HostedVector) else None
        self.recording: Recording | None = None
        if isinstance(held, HostedPool | HostedVector | HostedEnv | HostedImplementation):
            self.recording = held.recording
        if self.recording is not None and self.recording.transcript.settles:
            self.counts = _both(self.counts, self.recording.transcript.settle)
        self.withhold: Strict | None = None
        self.task: asyncio.Task[None] | None = None
        self.op = ""

    def cancel(self) -> None:
        """Cancel the coroutines of an env whose session is over, and what of it has not begun on any thread."""
        if self.task is not None:
            self.task.cancel()
        running = self.pool or self.held
        if isinstance(running, HostedPool | HostedVector | HostedEnv):
            running.cancel()
        for env in self.processes:
            env.abandon(CLOSE_S)

    async def close(self, seconds: float) -> None:
        """Let go of what is held."""
        held = self.held or self.pool
        assert held is not None, "a hold has one or the other"
        await held.close(seconds)


def _envs_of(held: Held | HostedPool) -> Sequence[Any]:
    if isinstance(held, HostedVector | HostedPool):
        return held.envs
    return [held.env] if isinstance(held, HostedEnv) else []


def _both(counts: Callable[[], None] | None, settle: Callable[[], None]) -> Callable[[], None]:
    if counts is None:
        return settle

    def both() -> None:
        counts()
        settle()

    return both
