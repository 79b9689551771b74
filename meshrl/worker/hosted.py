"""A hosted env: one env, one session, and the ops that a client may ask of it."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Collection
from typing import Any

from meshrl.errors import MalformedMessage, ResetNeeded
from meshrl.protocol.pace import Pace
from meshrl.protocol.seeds import check_seed
from meshrl.wire.frames import Frame
from meshrl.worker.attributes import Attributes
from meshrl.worker.calls import Calls, is_coroutine
from meshrl.worker.drawing import alone, draws
from meshrl.worker.episode import Episode
from meshrl.worker.threads import Threads

# A drawn seed has the bits of a derived one (R7), so that either can be given back to reset.
SEED_BITS = 31


class HostedEnv:
    """An env under one session.

    Args:
        env: a ``gymnasium.Env``, or an object like one whose ``reset`` and ``step`` are coroutine functions.
        name: as served.
        session: its session's id.
        worker: the worker's id.
        allow: public names that clients may call and set; ``"*"`` in it for all.
        threads: where its ``close`` runs, and whatever is no coroutine function of an env that has some.

    Attributes:
        pace: whether to step it on the event loop.
        coroutine: whether its ``reset`` or ``step`` must be awaited.
        draws: whether it runs alone; see :mod:`~meshrl.worker.drawing`.
    """

    def __init__(
        self, env: Any, *, name: str, session: str, worker: str, allow: Collection[str], threads: Threads
    ) -> None:
        self.env = env
        self.name = name
        self.session = session
        self.worker = worker
        self.pace = Pace()
        bare = getattr(env, "unwrapped", env)
        self.coroutine = any(is_coroutine(getattr(of, op, None)) for of in (env, bare) for op in ("reset", "step"))
        self._attributes = Attributes(name, allow)
        self._calls = Calls(threads)
        self._step = env.step
        self.draws = draws(env)
        self._episode = Episode()
        self._ops: dict[str, Callable[[Frame], Frame]] = {
            "reset": self._op_reset,
            "step": self._op_step,
            "render": self._op_render,
            "state": self._op_state,
            "call": self._op_call,
            "get_attr": self._op_get_attr,
            "set_attr": self._op_set_attr,
        }
        if self.draws:
            self._step = alone(self._step)
            self._ops = {op: alone(call) for op, call in self._ops.items()}

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op; gives the reply's own fields.

        Raises:
            MeshError: the request is refused and the env untouched.
            Exception: whatever the env's own code raises; the session is over then.
        """
        known = self._ops.get(op)
        if known is None:
            raise MalformedMessage(f"an env session has no op {op!r}")
        return known(body)

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same for an env with coroutine functions: those are awaited, everything else of it runs on a thread."""
        if op == "reset":
            seed, options = self._reset_arguments(body)
            reset = alone(self.env.reset) if self.draws else self.env.reset
            return self._was_reset(await self._calls(reset, seed=seed, options=options))
        if op == "step":
            self._need_reset("step")
            return self._stepped(await self._calls(self._step, _action(body)))
        if op == "state":
            return self._op_state(body)
        frame = await self._calls(self.run, op, body)
        return {key: await value if inspect.isawaitable(value) else value for key, value in frame.items()}

    async def close(self, seconds: float) -> None:
        """Close the env; what it raises is the caller's to report.

        Raises:
            TimeoutError: its ``close`` is a coroutine function and took longer than ``seconds``.
        """
        await self._calls.close(alone(self.env.close) if self.draws else self.env.close, seconds)

    # ---------------------------------------------------------------- ops

    def _op_reset(self, body: Frame) -> Frame:
        seed, options = self._reset_arguments(body)
        return self._was_reset(self.env.reset(seed=seed, options=options))

    def _reset_arguments(self, body: Frame) -> tuple[int | None, Any]:
        seed, options = body.get("seed"), body.get("options")
        if seed is not None:
            seed = check_seed(seed)
        elif self._episode.seed is None:
            seed = secrets.randbits(SEED_BITS)  # drawn and kept (R7); later unseeded resets go on with the generator
        if options is not None and not isinstance(options, dict):
            raise MalformedMessage(f"reset options are a map or nothing, not {type(options).__name__}")
        if seed is not None:
            self._episode.seed = seed
        return seed, options

    def _was_reset(self, outcome: Any) -> Frame:
        obs, info = outcome
        self._episode.began()
        return {"obs": obs, "info": info}

    def _op_step(self, body: Frame) -> Frame:
        self._need_reset("step")
        return self._stepped(self._step(_action(body)))

    def _stepped(self, outcome: Any) -> Frame:
        obs, reward, terminated, truncated, info = outcome
        self._episode.stepped()
        self._episode.rewarded(reward)
        if terminated or truncated:
            self._episode.ended()
        return {"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated, "info": info}

    def _op_render(self, _body: Frame) -> Frame:
        self._need_reset("render")
        return {"frame": self.env.render()}

    def _op_state(self, _body: Frame) -> Frame:
        return {"state": self._episode.state(session=self.session, worker=self.worker, name=self.name)}

    def _op_call(self, body: Frame) -> Frame:
        return {"value": self._attributes.call(self.env, body)}

    def _op_get_attr(self, body: Frame) -> Frame:
        return {"value": self._attributes.get(self.env, self._attributes.public(body))}

    def _op_set_attr(self, body: Frame) -> Frame:
        name = self._attributes.public(body)
        self._attributes.check_allowed("set", name)
        if "value" not in body:
            raise MalformedMessage("set_attr needs a value")
        self._attributes.set(self.env, name, body["value"])
        return {}

    # ---------------------------------------------------------------- checks

    def _need_reset(self, op: str) -> None:
        if self._episode.phase == "new":
            raise ResetNeeded(f"{self.name}: {op} before the first reset; call reset once", session=self.session)


def _action(body: Frame) -> Any:
    if "action" not in body:
        raise MalformedMessage("a step needs an action")
    return body["action"]
