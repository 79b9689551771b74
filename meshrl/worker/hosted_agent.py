"""A hosted agent: one stateful agent, one session, and the ops that a client may ask of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage
from meshrl.protocol.pace import Pace
from meshrl.protocol.seeds import check_seed
from meshrl.wire.frames import Frame
from meshrl.worker.acts import flag_of, obs_of, offered_by, taken
from meshrl.worker.calls import Calls, is_coroutine
from meshrl.worker.episode import Episode
from meshrl.worker.threads import Threads

# The agent's own call, and what makes the reply of what it gave.
Planned = tuple[Callable[[], Any], Callable[[Any], Frame]]


class HostedAgent:
    """A stateful agent under one session.

    Args:
        agent: an object with ``act``, and maybe ``reset``, ``observe`` and ``close``; each may be a coroutine function.
        name: as served.
        session: its session's id.
        worker: the worker's id.
        threads: where its ``close`` runs, and whatever is no coroutine function of an agent that has some.

    Attributes:
        pace: of no concern here: an agent has no steps.
        coroutine: whether one of ``act``, ``reset`` and ``observe`` must be awaited.
        draws: False.
    """

    draws = False

    def __init__(self, agent: Any, *, name: str, session: str, worker: str, threads: Threads) -> None:
        self.agent = agent
        self.name = name
        self.session = session
        self.worker = worker
        self.pace = Pace()
        self.coroutine = any(is_coroutine(getattr(agent, op, None)) for op in ("act", "reset", "observe"))
        self._calls = Calls(threads)
        self._takes = taken(agent.act)
        self._episode = Episode()

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op; gives the reply's own fields.

        Raises:
            MeshError: the request is refused and the agent untouched.
            Exception: whatever the agent's own code raises; the session is over then.
        """
        call, reply = self._plan(op, body)
        return reply(call())

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same for an agent with coroutine functions: those are awaited, everything else runs on a thread."""
        call, reply = self._plan(op, body)
        return reply(await self._calls(call))

    async def close(self, seconds: float) -> None:
        """Let go of the agent; calls its ``close`` if it has one.

        Raises:
            TimeoutError: its ``close`` is a coroutine function and took longer than ``seconds``.
        """
        await self._calls.close(getattr(self.agent, "close", _nothing), seconds)

    def _plan(self, op: str, body: Frame) -> Planned:
        if op == "act":
            return partial(self.agent.act, obs_of(body), **offered_by(body, self._takes)), self._acted
        if op == "reset":
            return self._plan_reset(body)
        if op == "observe":
            return self._plan_observe(body)
        if op == "state":
            return _nothing, self._state
        raise MalformedMessage(f"an agent session has no op {op!r}")

    def _acted(self, action: Any) -> Frame:
        self._episode.stepped()
        return {"action": action}

    def _plan_reset(self, body: Frame) -> Planned:
        seed = body.get("seed")
        if seed is not None:
            seed = self._episode.seed = check_seed(seed)
        self._episode.began()
        reset = getattr(self.agent, "reset", None)
        if reset is None:
            return _nothing, _empty
        return partial(reset, **({"seed": seed} if "seed" in inspect.signature(reset).parameters else {})), _empty

    def _plan_observe(self, body: Frame) -> Planned:
        reward, terminated, truncated = body.get("reward"), body.get("terminated"), body.get("truncated")
        if reward is None or terminated is None or truncated is None:
            raise MalformedMessage("observe takes reward, terminated and truncated")
        if not isinstance(reward, (int, float, np.integer, np.floating)):
            raise MalformedMessage(f"a reward is a number, not {type(reward).__name__}")
        ended = flag_of(body, "terminated") or flag_of(body, "truncated")
        try:
            float(reward)
        except OverflowError as exc:
            raise MalformedMessage("a reward beyond what a float holds") from exc
        self._episode.rewarded(reward)
        if ended:
            self._episode.ended()
        observe = getattr(self.agent, "observe", None)
        return (_nothing if observe is None else partial(observe, reward, terminated, truncated)), _empty

    def _state(self, _nothing: None) -> Frame:
        return {"state": self._episode.state(session=self.session, worker=self.worker, name=self.name)}


def _nothing() -> None:
    """In place of a method that the agent does not have."""


def _empty(_given: Any) -> Frame:
    return {}
