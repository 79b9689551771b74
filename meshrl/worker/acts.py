"""Acts: the queue before one stateless policy, and how its requests are answered (R12).

    the policy has          runs                                  answered
    act                     on a thread; inline once it is fast   each as it finishes
    act_batch               on a thread; inline once it is fast   together
    async act               each request a task of its own        each as it finishes
    async act_batch         a task a batch                        together

A client sends an act again that was not answered in time, with the same reply subject: while the first is waiting or
under way, the second is the same request and is dropped. An exception in a batch says nothing about whose fault it was,
so each of its requests is then run alone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np

from meshrl.errors import AgentError, MalformedMessage, MeshError, MeshFull, MessageTooLarge
from meshrl.protocol.pace import Pace
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, error_reply
from meshrl.wire.parts import MAX_MESSAGE_BYTES
from meshrl.worker.calls import is_coroutine
from meshrl.worker.threads import Threads

log = logging.getLogger("meshrl.worker")

# Keyword arguments that a policy may take beside the observation; it gets those that its signature names.
OFFERED = ("info", "deterministic", "seed", "env_id", "step", "action_space")
# Requests that one batch may hold; the rest makes the next.
MAX_BATCH = 256
# Requests that may wait for one policy or be under way; more are refused, or a slow policy would fill the memory.
MAX_WAITING = 10_000
# What of an exception travels: its message, and the end of its traceback.
MAX_MESSAGE_CHARS = 2000
MAX_TRACEBACK_CHARS = 20_000


@dataclass(frozen=True)
class Act:
    """One request, until it is answered."""

    reply: str
    obs: Any
    offered: dict[str, Any]


Answer = Callable[[Act, Frame], None]


class Acts:
    """Answers the acts of one stateless policy; used on the worker's event loop.

    Args:
        name: as served.
        agent: a callable, or an object with ``act`` and maybe ``act_batch``.
        worker: the worker's id.
        threads: where a policy runs that may take its time.
        send: sends packed bytes to a reply subject.
    """

    def __init__(
        self, name: str, agent: Any, *, worker: str, threads: Threads, send: Callable[[str, bytes], None]
    ) -> None:
        self.name = name
        self.pace = Pace()
        self._act: Callable[..., Any] = getattr(agent, "act", agent)
        self._takes = taken(self._act)
        self._act_batch: Callable[..., Any] | None = getattr(agent, "act_batch", None)
        self._coroutine = is_coroutine(self._act if self._act_batch is None else self._act_batch)
        self._worker = worker
        self._threads = threads
        self._send = send
        self._waiting: deque[Act] = deque()
        self._known: set[str] = set()  # reply subjects of what waits or is under way
        self._busy = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Acts of {self.name}: {len(self)} not yet answered>"

    def __len__(self) -> int:
        return len(self._known)

    def take(self, reply: str, body: Frame) -> None:
        """One request; its answer goes to ``reply``.

        Raises:
            MalformedMessage: it is no act.
            MeshFull: too many wait already.
        """
        if not reply or reply in self._known:
            return
        if len(self._known) >= MAX_WAITING:
            raise MeshFull(
                f"agent {self.name} at worker {self._worker}: {len(self._known)} acts wait already; ask less at once, "
                "or serve it on more workers",
                name=self.name,
                worker=self._worker,
                waiting=len(self._known),
            )
        act = Act(reply, obs_of(body), offered_by(body, frozenset(OFFERED)))
        self._known.add(reply)
        if self._coroutine and self._act_batch is None:
            self._begin([act])
            return
        self._waiting.append(act)
        if len(self._waiting) == 1 and not self._busy:
            # At the end of this turn of the loop: what arrived in the same read is answered as one batch.
            asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        """Answer nothing any more: what waits is forgotten, tasks are cancelled, threads end by themselves."""
        self._waiting.clear()
        self._known.clear()
        for task in self._tasks:
            task.cancel()

    # ---------------------------------------------------------------- one batch after another

    def _turn(self) -> None:
        if self._busy or not self._waiting:
            return
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        self._busy = True
        if self._coroutine:
            self._begin(batch)
        elif self.pace.inline:
            self._run(batch, self._answer, self._over)
        else:
            back = self._threads.back
            self._threads.submit(
                lambda: self._run(batch, lambda act, frame: back(self._answer, act, frame), lambda: back(self._over))
            )

    def _over(self) -> None:
        self._busy = False
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)

    def _run(self, batch: list[Act], answer: Answer, over: Callable[[], None]) -> None:
        """Answer every request of ``batch`` whatever the policy raises; inline or on a thread."""
        began = time.monotonic()
        try:
            if self._act_batch is None:
                for act in batch:
                    answer(act, self._outcome(lambda a=act: self._act(a.obs, **self._given(a))))  # type: ignore[misc]
                return
            frames = self._together(batch)
            if frames is None:
                for act in batch:
                    answer(act, self._outcome(lambda a=act: self._alone(a)))  # type: ignore[misc]
                return
            for act, frame in zip(batch, frames, strict=True):
                answer(act, frame)
        finally:
            self.pace.took(time.monotonic() - began)
            over()

    def _outcome(self, call: Callable[[], Any]) -> Frame:
        try:
            return {"action": call()}
        except BaseException as exc:  # noqa: BLE001  # agent code may raise anything; it is told to the one who asked
            return self._failed(exc)

    def _together(self, batch: list[Act]) -> list[Frame] | None:
        """The answers of one call for all; None when it raised and nobody knows by whose fault."""
        try:
            return self._frames(batch, self._call_batch(batch))
        except BaseException as exc:  # noqa: BLE001  # as above
            return [self._failed(exc)] if len(batch) == 1 else None

    def _alone(self, act: Act) -> Any:
        return self._frames([act], self._call_batch([act]))[0]["action"]

    def _call_batch(self, batch: list[Act]) -> Any:
        assert self._act_batch is not None
        return self._act_batch([act.obs for act in batch], [act.offered for act in batch])

    @staticmethod
    def _frames(batch: list[Act], given: Any) -> list[Frame]:
        actions = list(given)
        if len(actions) != len(batch):
            raise ValueError(f"act_batch gave {len(actions)} actions for {len(batch)} observations")
        return [{"action": action} for action in actions]

    def _given(self, act: Act) -> dict[str, Any]:
        return {name: value for name, value in act.offered.items() if name in self._takes}

    # ---------------------------------------------------------------- coroutines

    def _begin(self, acts: list[Act]) -> None:
        task = asyncio.get_running_loop().create_task(self._run_coroutine(acts))
        self._tasks.add(task)

        def ran(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            why = asyncio.CancelledError() if task.cancelled() else task.exception()
            if why is not None:  # it was cancelled, perhaps before its first turn: what it left gets an answer, too
                for act in acts:
                    self._answer(act, self._failed(why))
            if self._act_batch is not None:
                self._over()

        task.add_done_callback(ran)

    async def _run_coroutine(self, acts: list[Act]) -> None:
        if self._act_batch is None:
            [act] = acts
            self._answer(act, await self._awaited(lambda: self._act(act.obs, **self._given(act))))
            return
        frame = await self._awaited(lambda: self._call_batch(acts))
        try:
            frames = self._frames(acts, frame["action"]) if "action" in frame else None
        except Exception as exc:  # noqa: BLE001  # no list, or too short a one
            frames, frame = None, self._failed(exc)
        if frames is not None:
            for act, each in zip(acts, frames, strict=True):
                self._answer(act, each)
        elif len(acts) == 1:
            self._answer(acts[0], frame)
        else:
            for act in acts:
                await self._run_coroutine([act])

    async def _awaited(self, call: Callable[[], Any]) -> Frame:
        try:
            return {"action": await call()}
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # as above; SystemExit would end the loop
            return self._failed(exc)

    # ---------------------------------------------------------------- answers

    def _failed(self, exc: BaseException) -> Frame:
        if isinstance(exc, MeshError):
            return error_reply(exc)
        return error_reply(
            AgentError(
                f"agent {self.name}: act raised {type(exc).__name__}: {exc}"[:MAX_MESSAGE_CHARS]
                + "; the remote traceback says where, mend it there",
                remote_traceback="".join(traceback.format_exception(exc))[-MAX_TRACEBACK_CHARS:],
                type=type(exc).__name__,
                worker=self._worker,
            )
        )

    def _answer(self, act: Act, frame: Frame) -> None:
        if act.reply not in self._known:
            return  # it was answered, or the worker has stopped
        self._known.discard(act.reply)
        try:
            packed = pack(frame)
            if len(packed) > MAX_MESSAGE_BYTES:
                raise MessageTooLarge(
                    f"agent {self.name}: an action of {len(packed)} bytes is over the limit of {MAX_MESSAGE_BYTES}; "
                    "answer with a smaller one",
                    size_bytes=len(packed),
                )
        except Exception as exc:  # noqa: BLE001  # an action may be anything
            packed = pack(self._failed(exc))
        try:
            self._send(act.reply, packed)
        except Exception:  # its client asks again
            log.exception("worker %s: an answer of agent %s could not be sent", self._worker, self.name)


# --------------------------------------------------------------------------- what a request says


def taken(act: Callable[..., Any]) -> frozenset[str]:
    """Which of ``OFFERED`` the signature of ``act`` names."""
    try:
        parameters = inspect.signature(act).parameters
    except (TypeError, ValueError):
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return frozenset(OFFERED)
    return frozenset(OFFERED) & set(parameters)


def obs_of(body: Frame) -> Any:
    """The observation of an act.

    Raises:
        MalformedMessage: it has none.
    """
    if "obs" not in body:
        raise MalformedMessage("an act needs an observation (obs)")
    return body["obs"]


def offered_by(body: Frame, takes: frozenset[str]) -> dict[str, Any]:
    """What the policy's signature names, of what the request says.

    Raises:
        MalformedMessage: ``deterministic`` is no bool, or ``action_space`` no space.
    """
    offered: dict[str, Any] = {
        "info": body.get("info"),
        "deterministic": flag_of(body, "deterministic", default=False),
        "seed": body.get("seed"),
        "env_id": body.get("env_id", 0),
        "step": body.get("step", 0),
    }
    if "action_space" in takes:
        described = body.get("action_space")
        offered["action_space"] = None if described is None else _space(pack(described))
    return {name: value for name, value in offered.items() if name in takes}


def flag_of(body: Frame, name: str, *, default: bool | None = None) -> bool:
    """A field that is true or false.

    Raises:
        MalformedMessage: it is neither.
    """
    value = body.get(name, default)
    if not isinstance(value, (bool, np.bool_)):
        raise MalformedMessage(f"{name} is true or false, not {type(value).__name__}")
    return bool(value)


@lru_cache(maxsize=256)
def _space(packed: bytes) -> gymnasium.Space[Any]:
    return spaces.rebuild(unpack(packed))
