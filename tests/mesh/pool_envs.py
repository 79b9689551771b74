"""Envs whose steps wait at gates that a test opens, and workers that lose what it tells them to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import gymnasium
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh
from meshrl.client.pool import RemotePool
from meshrl.client.ready import PoolBatch
from meshrl.wire.codec import pack, unpack
from tests.mesh.envs import Nested

RAISES, ENDS = 13, 14


class Gates:
    """Which actions wait, and until when; all are open at first.

    Attributes:
        at: how often each action has been begun.
    """

    def __init__(self) -> None:
        self.at: dict[int, int] = {}
        self._shut: dict[int, threading.Event] = {}
        self._awaited: dict[int, asyncio.Event] = {}
        self._lock = threading.Lock()

    def shut(self, *actions: int) -> None:
        for action in actions:
            self._shut[action] = threading.Event()
            self._awaited[action] = asyncio.Event()

    def open(self, *actions: int) -> None:
        """These; none named means all. On the event loop."""
        for action in actions or tuple(self._shut):
            self._awaited.pop(action, asyncio.Event()).set()
            self._shut.pop(action, threading.Event()).set()

    def begun(self, action: int) -> threading.Event | None:
        with self._lock:
            self.at[action] = self.at.get(action, 0) + 1
        return self._shut.get(action)

    def awaited(self, action: int) -> asyncio.Event | None:
        self.begun(action)
        return self._awaited.get(action)


@contextmanager
def gates() -> Iterator[Gates]:
    made = Gates()
    try:
        yield made
    finally:
        made.open()


class Gated(gymnasium.Env[Any, Any]):
    """Observes how many steps it took; the reward is the action. It raises at 13, and its episode ends at 14."""

    observation_space = spaces.Discrete(1 << 40)
    action_space = spaces.Discrete(10_000)

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.count = 0
        return 0, {} if options is None else dict(options)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        gate = self.gates.begun(int(action))
        if gate is not None:
            gate.wait(60.0)
        return self._stepped(int(action))

    def _stepped(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if action == RAISES:
            raise RuntimeError("the simulator diverged")
        self.count += 1
        return self.count, float(action), action == ENDS, False, {}


class GatedCoroutine:
    """The same, with coroutine functions."""

    observation_space = Gated.observation_space
    action_space = Gated.action_space
    metadata: dict[str, Any] = {}

    def __init__(self, gates: Gates) -> None:
        self._env = Gated(gates)

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        return self._env.reset(seed=seed, options=options)

    async def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        gate = self._env.gates.awaited(int(action))
        if gate is not None:
            await gate.wait()
        return self._env._stepped(int(action))

    def close(self) -> None:
        self._env.close()


class Lossy(EnvWorker):
    """A worker that does not hear what it is told to miss, and loses or alters answers.

    Attributes:
        heard: the lanes of each pool request that arrived, missed ones too.
        misses: how many of the next pool requests it does not hear.
        loses: how many of the next answers to pools are lost.
        alters: makes another answer of each of a pool's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[list[int]] = []
        self.misses = self.loses = 0
        self.alters: Callable[[dict[str, Any]], bytes] | None = None
        self._take, self._give = self._execution.on_session, self._replies.send
        self._execution.on_session = self._on_session  # type: ignore[method-assign]
        self._replies.send = self._send  # type: ignore[method-assign]

    def _on_session(self, subject: str, reply: str, data: bytes) -> None:
        body = unpack(data)
        if "lanes" in body:
            self.heard.append(body["lanes"].tolist())
            if self.misses:
                self.misses -= 1
                return
        self._take(subject, reply, data)

    def _send(self, to: str, packed: bytes, lane: int = 0, seq: int = 0) -> None:
        body = unpack(packed)
        if "lanes" in body:
            if self.loses:
                self.loses -= 1
                return
            if self.alters is not None:
                packed = self.alters(body)
        self._give(to, packed, lane, seq)


def altered(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    """Answers with other fields; None leaves one out, and a function makes it of the answer's own."""

    def alter(body: dict[str, Any]) -> bytes:
        new = {name: value(body) if callable(value) else value for name, value in fields.items()}
        return pack({name: value for name, value in {**body, **new}.items() if value is not None})

    return alter


@asynccontextmanager
async def pooled(
    url: str, make: Callable[[Gates], Any], num_envs: int, *, slots: int = 64, **options: Any
) -> AsyncIterator[tuple[RemotePool, Gates, Lossy, Mesh]]:
    """A pool on one worker of the test's own process, its first results received."""
    with gates() as made:
        async with Lossy({"gated": lambda: make(made)}, url, slots=slots) as worker, Mesh(url) as m:
            pool = await m.pool("gated", num_envs, **options)
            await pool.reset(seed=0)
            first = await pool.recv(min=num_envs)
            assert first.first.all()
            try:
                yield pool, made, worker, m
            finally:
                made.open()
                await pool.close()


LOCAL: dict[str, Callable[[], gymnasium.Env[Any, Any]]] = {
    "cartpole": lambda: gymnasium.make("CartPole-v1"),
    "lake": lambda: gymnasium.make("FrozenLake-v1"),
    "nested": Nested,
}


@asynccontextmanager
async def workers(url: str, count: int, **options: Any) -> AsyncIterator[list[EnvWorker]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(EnvWorker(LOCAL, url, **options)) for _ in range(count)]


async def soon(receiving: Any) -> PoolBatch:
    """A batch that comes, or the test has failed."""
    async with asyncio.timeout(30.0):
        batch = await receiving
    assert isinstance(batch, PoolBatch)
    return batch


def ids(batch: PoolBatch) -> list[int]:
    return sorted(batch.env_ids.tolist())


BOTH = pytest.mark.parametrize("make", [Gated, GatedCoroutine], ids=["threads", "coroutines"])
