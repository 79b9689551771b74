"""A hosted vector: sub-environments in lockstep, as one lane (R6, R7)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage, UnencodableValue
from meshrl.protocol.pace import BatchPace
from meshrl.protocol.values import own
from meshrl.wire.batches import batching, form_of
from meshrl.wire.frames import Frame
from meshrl.wire.infos import pack_infos
from meshrl.wire.messages import Open
from meshrl.worker.attributes import Attributes, is_wrapped
from meshrl.worker.calls import Calls
from meshrl.worker.gathered import Gathered, Told
from meshrl.worker.outcomes import Outcome, Outcomes, flags_of, rewards_of
from meshrl.worker.process_env import ProcessEnv
from meshrl.worker.recording import Recording
from meshrl.worker.redoing import Deed, Done, Redoing, Replay
from meshrl.worker.sealing import StateKey
from meshrl.worker.several import close_all, has_coroutines, together
from meshrl.worker.sub_envs import FEW_IDS, SubEnvs
from meshrl.worker.threads import Threads

# What can be spread over threads, a sub-environment each.
SPREAD = frozenset({"reset", "step", "replay"})
# Where methods that are coroutine functions leave what is to be awaited.
AWAITABLE = frozenset({"frames", "values"})
# Where an info stands that could not be packed; see pack_infos.
_IN_ENTRY = re.compile(r"infos\.entries\[(\d+)\]")
# Of one sub-environment's reset: its seed, the options, and how many episodes a root has had that is not new.
ResetArguments = tuple[int | None, dict[str, Any] | None, int | None]


class HostedVector:
    """The sub-environments of one shard under one session.

    Args:
        envs: local envs with equal spaces.
        open_: what was asked for.
        allow: public names that clients may call and set; ``"*"`` in it for all.
        threads: where what takes its time runs.
        state_key: with which the worker seals what only workers may have written.

    Attributes:
        envs: as given.
        pace: where to step them.
        reset_pace: where to reset them.
        coroutine: whether their ``reset`` or ``step`` must be awaited.
        draws: whether they run alone; see :mod:`~meshrl.worker.drawing`.
    """

    def __init__(
        self,
        envs: Sequence[Any],
        open_: Open,
        *,
        allow: Collection[str],
        threads: Threads,
        state_key: StateKey | None = None,
    ) -> None:
        self.name = open_.name
        self.pace = BatchPace(len(envs))
        self.reset_pace = BatchPace(len(envs))
        self.coroutine = has_coroutines(envs[0])
        self._subs = SubEnvs(envs, open_, state_key)
        self.envs = self._subs.envs
        self.counts = self._subs.counts
        self.draws = self._subs.draws
        space = envs[0].action_space
        self._batches = batching(space)
        # The rows of an array of numbers are no views of it, so that no env writes there.
        self._acts_in_numbers = form_of(space) == "array" and space.shape == ()
        self._attributes = Attributes(open_.name, allow)
        self._threads = threads
        self._calls = Calls(threads)
        self._obs: list[Any] = []  # the last of each sub-environment
        self._acted: Any = None  # what was asked for last, where it is recorded
        self._gathered: Gathered | None = None  # the last on threads
        self._over = False
        self._redoing = Redoing(self._subs, self._change, lambda: not self._over)
        self._ops: dict[str, Callable[[Frame], Frame]] = {
            "reset": self._op_reset,
            "step": self._op_step,
            "render": self._op_render,
            "call": self._op_call,
            "get_attr": self._op_get_attr,
            "set_attr": self._op_set_attr,
            "is_wrapped": self._op_is_wrapped,
        }

    def __repr__(self) -> str:
        return f"<HostedVector of {len(self._subs)} {self.name}>"

    @property
    def recording(self) -> Recording | None:
        """Of what is done; None where nobody records it."""
        return self._subs.recording

    def record(self, recording: Recording) -> None:
        """Tell it whatever is done from now on."""
        self._subs.recording = recording

    # ---------------------------------------------------------------- how it runs

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op, the sub-environments one after another; gives the reply's own fields.

        Raises:
            MeshError: the request is refused and nothing was touched.
            Exception: whatever a sub-environment's own code raises; the session is over then.
        """
        known = self._ops.get(op)
        if known is None:
            raise MalformedMessage(f"a vector session has no op {op!r}")
        return known(body)

    def spread(self, op: str, body: Frame, told: Told) -> None:
        """The same for one of :data:`SPREAD`, on threads; ``told`` gets what comes of it, on the event loop.

        Raises:
            MeshError: the request is refused and nothing was touched.
        """
        if op == "step":
            actions = self._actions(body)
            ids: Sequence[int] = range(len(self._subs))

            def step(k: int) -> Outcome:
                return self._subs.step_one(k, actions[k])

            self._gather(self.pace, ids, step, lambda out: self._stepped(Outcomes.of(out)), told)
        elif op == "replay":
            replay, count = self._replay(body), len(self._subs)

            def redo(k: int) -> Done:
                return self._redoing.one(k, replay)

            self._gather(BatchPace(count), range(count), redo, self._replayed, told)
        else:
            ids, arguments = self._reset_arguments(body)
            if not ids:  # nothing to do for this shard, but to say what its observations are
                told(self._was_reset(ids, Outcomes()))
                return

            def reset(k: int) -> Outcome:
                return self._subs.reset_one(ids[k], *arguments(ids[k]))

            self._gather(self.reset_pace, ids, reset, lambda out: self._was_reset(ids, Outcomes.of(out)), told)

    def _gather(
        self,
        pace: BatchPace,
        ids: Sequence[int],
        job: Callable[[int], Any],
        frame: Callable[[list[Any]], Frame],
        told: Told,
    ) -> None:
        self._gathered = Gathered(pace, ids, job, frame, told, self._threads, narrow=self.draws)

    def cancel(self) -> None:
        """The session is over: no sub-environment begins on a thread any more."""
        self._over = True
        if self._gathered is not None:
            self._gathered.stop()

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same for envs with coroutine functions, which run concurrently."""
        subs = self._subs
        if op == "step":
            actions = self._actions(body)
            outcomes = await together(subs.step_one_async(i, action) for i, action in enumerate(actions))
            return self._stepped(Outcomes.of(outcomes))
        if op == "reset":
            ids, arguments = self._reset_arguments(body)
            outcomes = await together(subs.reset_one_async(i, *arguments(i)) for i in ids)
            return self._was_reset(ids, Outcomes.of(outcomes))
        if op == "replay":
            replay = self._replay(body)
            return self._replayed(await together(self._redoing.one_async(i, replay) for i in range(len(subs))))
        frame: Frame = await self._calls(self.run, op, body)
        for field in AWAITABLE & frame.keys():
            told = zip(self._chosen(body), frame[field], strict=True)
            frame[field] = await together(subs.awaited(i, lambda value=value: value) for i, value in told)
        return frame

    async def close(self, seconds: float) -> None:
        """Close every sub-environment; what the first of them raises is the caller's to report, after the others.

        Raises:
            TimeoutError: a coroutine function took longer than ``seconds``.
        """
        await close_all(self._calls, self._subs.envs, seconds)

    def whose(self, exc: UnencodableValue, frame: Frame) -> UnencodableValue:
        """The error of a frame that cannot travel, with the ``env_id`` of the sub-environment whose info it is in."""
        found = _IN_ENTRY.match(str(exc.details.get("path")))
        if found is None:
            return exc
        env_id = self._subs.first + frame["infos"]["entries"][int(found[1])][0]
        return UnencodableValue(exc.message, **{**exc.details, "env_id": env_id})

    # ---------------------------------------------------------------- ops

    def _op_step(self, body: Frame) -> Frame:
        return self._stepped(self._subs.step_all(range(len(self._subs)), self._actions(body)))

    def _actions(self, body: Frame) -> list[Any]:
        count = len(self._subs)
        self._subs.check_step(range(count))
        actions = body.get("actions")
        self._batches.check(actions, count, "actions", exact=False)
        if self._subs.recording is not None:
            self._acted = actions if self._acts_in_numbers else own(actions)
            if "policy" in body:  # which few steps say
                self._subs.recording.acted(body)
        return list(self._batches.rows(actions, count))

    def _stepped(self, out: Outcomes) -> Frame:
        self._obs = out.obs
        frame = {
            "obs": self._subs.rows_or_stack(out.obs),
            "rewards": rewards_of(out.rewards),
            "terminations": flags_of(out.terminated),
            "truncations": flags_of(out.truncated),
        }
        if out.infos:
            frame["infos"] = pack_infos(out.infos, len(out.obs))
        if self._subs.recording is not None:
            self._subs.recording.told(None, self._acted, frame, out.infos)
        if self._subs.proof is not None:
            self._subs.proof.add(frame)
        return frame

    def _op_reset(self, body: Frame) -> Frame:
        ids, arguments = self._reset_arguments(body)
        return self._was_reset(ids, Outcomes.of(self._subs.reset_one(i, *arguments(i)) for i in ids))

    def _reset_arguments(self, body: Frame) -> tuple[Sequence[int], Callable[[int], ResetArguments]]:
        """Which sub-environments are reset, and what each of them is given."""
        count = len(self._subs)
        mask, options = body.get("mask"), body.get("options")
        ids: Sequence[int] = range(count)
        if mask is not None:
            if not isinstance(mask, np.ndarray) or mask.shape != (count,) or mask.dtype != np.bool_:
                raise MalformedMessage(f"a reset mask of {count} sub-environments is an array of as many bools")
            ids = np.flatnonzero(mask).tolist()
            self._subs.check_all_reset(ids)
        if options is not None and not isinstance(options, dict):
            raise MalformedMessage(f"reset options are a map or nothing, not {type(options).__name__}")
        seeds = self._subs.check_seeds(body.get("seeds"))
        episodes = self._subs.check_episodes(body.get("episodes"), count)
        return ids, lambda i: (seeds[i], options, episodes[i])

    def _was_reset(self, ids: Sequence[int], out: Outcomes) -> Frame:
        obs = list(self._obs) if len(ids) < len(self._subs) and self._obs else [None] * len(self._subs)
        for i, one in zip(ids, out.obs, strict=True):
            obs[i] = one
        self._obs = obs
        frame: Frame = {"obs": self._subs.rows_or_stack(obs)}
        if out.infos:
            frame["infos"] = pack_infos([(ids[k], info) for k, info in out.infos], len(obs))
        if self._subs.proof is not None or self._subs.recording is not None:
            own = self._subs.stack(out.obs) if 0 < len(ids) < len(obs) else frame["obs"]
            if self._subs.proof is not None:
                self._subs.proof.add_to_reset(frame, np.array(ids, np.int64), own)
            if self._subs.recording is not None and ids:
                self._subs.recording.was_reset(np.array(ids, np.int64), own, out.infos)
        return frame

    def _replay(self, body: Frame) -> Replay:
        replay = Replay(body, len(self._subs), self._batches)
        began = any(map(self._subs.was_reset, range(len(self._subs))))
        if began or (self._subs.proof is None and not replay.only_sets):
            raise MalformedMessage("a replay is the first request of a session that was opened with digests")
        return replay

    def _replayed(self, done: list[Done]) -> Frame:
        if all(one.last is not None for one in done):
            self._obs = [one.last.obs for one in done if one.last is not None]
        return {}

    def _change(self, i: int, deed: Deed) -> Any:
        """Set an attribute or call a method of sub-environment ``i``, as it was asked for once."""
        body = deed.given
        if deed.op == "call":
            value = self._subs.asked(i, self._attributes.call_or_get, body)
            self._called()
            return value
        name = self._attributes.public(body)
        self._attributes.check_allowed("set", name)
        put = setattr if body.get("outermost") is True else self._attributes.set
        return self._subs.asked(i, put, name, body.get("value"))

    def _called(self) -> None:
        if self._subs.proof is not None:
            self._subs.proof.called = True

    def _op_render(self, _body: Frame) -> Frame:
        self._subs.check_began("render", range(len(self._subs)))
        return {"frames": [self._subs.asked(i, methodcaller("render")) for i in range(len(self._subs))]}

    def _op_call(self, body: Frame) -> Frame:
        chosen = self._chosen(body)
        values = [self._subs.asked(i, self._attributes.call_or_get, body) for i in chosen]
        self._called()  # one that was refused is in no journal
        if self._subs.recording is not None:
            self._subs.recording.asked(chosen, "call", [_asked(body)] * len(chosen))
        return {"values": values}

    def _op_get_attr(self, body: Frame) -> Frame:
        name = self._attributes.public(body)
        chosen = self._chosen(body)
        return {"values": [self._subs.asked(i, self._attributes.get, name) for i in chosen]}

    def _op_set_attr(self, body: Frame) -> Frame:
        name = self._attributes.public(body)
        self._attributes.check_allowed("set", name)
        chosen, values = self._chosen(body), body.get("values")
        if not isinstance(values, list) or len(values) != len(chosen):
            raise MalformedMessage(f"set_attr of {len(chosen)} sub-environments needs a list of as many values")
        put = setattr if body.get("outermost") is True else self._attributes.set
        for i, value in zip(chosen, values, strict=True):
            self._subs.asked(i, put, name, value)
        if self._subs.recording is not None:
            self._subs.recording.asked(chosen, "set_attr", [{**_asked(body), "value": value} for value in values])
        return {}

    def _op_is_wrapped(self, body: Frame) -> Frame:
        wrapper = body.get("wrapper")
        if not isinstance(wrapper, str):
            raise MalformedMessage("is_wrapped needs a wrapper's class, as module:Class")
        chosen = (self._subs.envs[i] for i in self._chosen(body))
        asked = (env.is_wrapped if isinstance(env, ProcessEnv) else partial(is_wrapped, env) for env in chosen)
        return {"values": [ask(wrapper) for ask in asked]}

    def _chosen(self, body: Frame) -> Sequence[int]:
        """The sub-environments that a request means: those it lists under ``ids``, or all."""
        ids: Any = body.get("ids")
        count = len(self._subs)
        if ids is None:
            return range(count)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < count for i in ids):
            raise MalformedMessage(f"ids are a list of indices below {count}")
        most = max(count, FEW_IDS)
        if len(ids) > most:  # each may be asked for more than once, but a small request must not make a huge answer
            raise MalformedMessage(
                f"{len(ids)} ids of {count} sub-environments are too many; ask for no more than {most} at once"
            )
        return ids


def _asked(body: Frame) -> Frame:
    """What a request asks of one sub-environment, without what makes it a request."""
    return {name: body[name] for name in ("name", "args", "kwargs", "outermost") if name in body}
