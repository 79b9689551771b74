"""A hosted env: one env, one session, and the ops that a client may ask of it."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from meshrl.errors import MalformedMessage, MeshError, ReplayDiverged, ResetNeeded, SessionUnknown
from meshrl.protocol.digest import Digest
from meshrl.protocol.pace import Pace
from meshrl.protocol.seeds import check_seed
from meshrl.protocol.values import own
from meshrl.wire.frames import Frame
from meshrl.worker.attributes import Attributes
from meshrl.worker.calls import Calls, is_coroutine
from meshrl.worker.drawing import alone, draws
from meshrl.worker.episode import Episode
from meshrl.worker.origins import outliving
from meshrl.worker.origins import resumable as may_be_resumed
from meshrl.worker.recording import Recording
from meshrl.worker.redoing import read_entry
from meshrl.worker.rerun import Rerun
from meshrl.worker.sealing import StateKey
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
        resumable: whether its client keeps a journal, and is told what outlives resets.
        digests: whether answers carry the running digest, too.
        state_key: with which the worker seals what only workers may have written.

    Attributes:
        pace: whether to step it on the event loop.
        coroutine: whether its ``reset`` or ``step`` must be awaited.
        draws: whether it runs alone; see :mod:`~meshrl.worker.drawing`.
    """

    def __init__(
        self,
        env: Any,
        *,
        name: str,
        session: str,
        worker: str,
        allow: Collection[str],
        threads: Threads,
        resumable: bool = False,
        digests: bool = False,
        state_key: StateKey | None = None,
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
        self._resumable = resumable and may_be_resumed(env)
        self._says_digests = digests and self._resumable
        self._digest = Digest() if self._says_digests else None  # where it is not said, one of a replay only
        self._outliving = outliving(env, state_key) if self._resumable else None
        self._outlived: Any = None  # the last reset, where that is known and it had no seed
        self._redoing = False
        self._over = False
        self.recording: Recording | None = None
        self._acted: Any = None  # what was asked for last, where it is recorded
        self._number = 0  # of its episode in the recording
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
        self._ops["replay"] = self._op_replay
        self._ops["rerun"] = self._op_rerun

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op; gives the reply's own fields.

        Raises:
            MeshError: the request is refused and the env untouched.
            Exception: whatever the env's own code raises; the session is over then.
        """
        known = self._ops.get(op)
        if known is None:
            raise MalformedMessage(f"an env session has no op {op!r}")
        frame = known(body)
        if op == "call" and not inspect.isawaitable(frame["value"]):
            self._count(frame)
        return frame

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same for an env with coroutine functions: those are awaited, everything else of it runs on a thread."""
        if op == "reset":
            seed, options = self._reset_arguments(body)
            self._about_to_reset(body, seed)
            reset = alone(self.env.reset) if self.draws else self.env.reset
            return self._was_reset(await self._calls(reset, seed=seed, options=options), seed)
        if op == "step":
            self._need_reset("step")
            return self._stepped(await self._calls(self._step, self._action(body)))
        if op == "state":
            return self._op_state(body)
        if op == "replay":
            for n, (entry_op, entry) in enumerate(self._entries(body)):
                with _told_of(n, entry_op):
                    await self.run_async(entry_op, entry)
                await asyncio.sleep(0)  # others of this worker have their turns
            return self._replayed(body)
        if op == "rerun":
            rerun = Rerun(body, self.env.action_space)
            for entry_op, entry in self._deeds(rerun):
                rerun.took(entry_op, await self.run_async(entry_op, entry))
                if rerun.renders:
                    rerun.showed(await self.run_async("render", {}))
                await asyncio.sleep(0)
            return rerun.frame
        frame = await self._calls(self.run, op, body)
        counted = not any(map(inspect.isawaitable, frame.values()))
        told = {key: await value if inspect.isawaitable(value) else value for key, value in frame.items()}
        if op == "call" and not counted:
            self._count(told)
        return told

    def record(self, recording: Recording) -> None:
        """Tell it whatever is done from now on."""
        self.recording = recording

    def cancel(self) -> None:
        """The session is over: a replay does not go on."""
        self._over = True

    async def close(self, seconds: float) -> None:
        """Close the env; what it raises is the caller's to report.

        Raises:
            TimeoutError: its ``close`` is a coroutine function and took longer than ``seconds``.
        """
        await self._calls.close(alone(self.env.close) if self.draws else self.env.close, seconds)

    # ---------------------------------------------------------------- ops

    def _op_reset(self, body: Frame) -> Frame:
        seed, options = self._reset_arguments(body)
        self._about_to_reset(body, seed)
        return self._was_reset(self.env.reset(seed=seed, options=options), seed)

    def _reset_arguments(self, body: Frame) -> tuple[int | None, Any]:
        seed, options = body.get("seed"), body.get("options")
        if seed is not None:
            seed = check_seed(seed)
        elif self._episode.seed is None:
            if self._redoing and "state" in body:
                self._episode.seed = check_seed(body.get("last_seed"))
            else:
                seed = secrets.randbits(SEED_BITS)  # drawn and kept (R7); later unseeded resets go on
        if options is not None and not isinstance(options, dict):
            raise MalformedMessage(f"reset options are a map or nothing, not {type(options).__name__}")
        if seed is not None:
            self._episode.seed = seed
        return seed, options

    def _about_to_reset(self, body: Frame, seed: int | None) -> None:
        """Keep what outlives the reset, or put it there where that is done again."""
        self._outlived = None
        if seed is None and self._redoing and "state" in body:
            if self._outliving is None or type(body["state"]) is not bytes:
                raise MalformedMessage("what outlives a reset is packed, and for envs of which that is known here")
            self._outliving.put(body["state"])
        if seed is None and self._outliving is not None:
            self._outlived = self._outliving.get()
        if self.recording is not None:
            if self._redoing:
                self.recording.begins_from(0, body)
            self._number = self.recording.began(0, seed, body.get("options"))

    def _was_reset(self, outcome: Any, seed: int | None) -> Frame:
        obs, info = outcome
        self._episode.began()
        frame: Frame = {"obs": obs, "info": info}
        if self.recording is not None:
            self._tell(None, frame, reset=True)
        if self._resumable:
            if seed is not None:
                frame["seed"] = seed  # it may have been drawn
            elif self._outlived is not None:
                frame["state"] = self._outlived
            if len(frame) > 2 and self.recording is not None:
                frame["nth"] = self._number
            if self._digest is not None and len(frame) > 2:
                self._digest = Digest()  # as the client's journal begins here
            self._count(frame)
        return frame

    def _op_step(self, body: Frame) -> Frame:
        self._need_reset("step")
        return self._stepped(self._step(self._action(body)))

    def _action(self, body: Frame) -> Any:
        if "action" not in body:
            raise MalformedMessage("a step needs an action")
        action = body["action"]
        if self.recording is not None:
            self._acted = own(action)
            self.recording.acted(body)
        return action

    def _stepped(self, outcome: Any) -> Frame:
        obs, reward, terminated, truncated, info = outcome
        self._episode.stepped()
        self._episode.rewarded(reward)
        if terminated or truncated:
            self._episode.ended()
        frame = {"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated, "info": info}
        if self._digest is not None:
            self._count(frame)
        if self.recording is not None:
            self._tell(self._acted, frame, reset=False)
        return frame

    def _tell(self, action: Any, frame: Frame, *, reset: bool) -> None:
        assert self.recording is not None
        self.recording.told_one(action, frame, reset=reset)
        if self._redoing:  # and goes on at once
            self.recording.transcript.redone = True
            self.recording.transcript.settle()

    def _count(self, frame: Frame) -> None:
        """Count an answer, and say what all of them have come to, if that is wanted."""
        if self._digest is not None:
            digest = self._digest.add(frame)
            if self._says_digests:
                frame["digest"] = digest

    def _op_render(self, _body: Frame) -> Frame:
        self._need_reset("render")
        return {"frame": self.env.render()}

    def _op_state(self, _body: Frame) -> Frame:
        return {"state": self._episode.state(session=self.session, worker=self.worker, name=self.name)}

    def _op_call(self, body: Frame) -> Frame:
        value = self._attributes.call(self.env, body)
        self._asked("call", body)
        return {"value": value}

    def _asked(self, op: str, body: Frame) -> None:
        if self.recording is not None:
            given: Frame = {name: body[name] for name in ("name", "args", "kwargs", "value") if name in body}
            self.recording.asked((0,), op, (given,))

    def _op_get_attr(self, body: Frame) -> Frame:
        return {"value": self._attributes.get(self.env, self._attributes.public(body))}

    def _op_set_attr(self, body: Frame) -> Frame:
        name = self._attributes.public(body)
        self._attributes.check_allowed("set", name)
        if "value" not in body:
            raise MalformedMessage("set_attr needs a value")
        self._attributes.set(self.env, name, body["value"])
        self._asked("set_attr", body)
        return {}

    # ---------------------------------------------------------------- replay

    def _op_replay(self, body: Frame) -> Frame:
        """Do a journal again, of an env that nothing was asked of yet."""
        for n, (op, entry) in enumerate(self._entries(body)):
            with _told_of(n, op):
                self.run(op, entry)
        return self._replayed(body)

    def _entries(self, body: Frame) -> Iterator[tuple[str, Frame]]:
        """The requests of a journal, each read when its turn comes.

        Raises:
            MalformedMessage: it is none, or something was asked before.
            SessionUnknown: the session has ended meanwhile.
        """
        journal = body.get("journal")
        if not isinstance(journal, list) or self._episode.phase != "new":
            raise MalformedMessage("a replay needs a journal, a list of requests, and is a session's first request")
        self._redoing = True
        if self._resumable:
            self._digest = Digest()
        try:
            for entry in journal:
                if self._over:
                    raise SessionUnknown(f"session {self.session} ended during its replay", reason="closed")
                yield read_entry(entry)
        finally:
            self._redoing = False

    def _replayed(self, body: Frame) -> Frame:
        """Whether it has led where the client was told that it was.

        Raises:
            ReplayDiverged: it has not.
        """
        told, digest = body.get("digest"), self._digest
        if not self._says_digests:
            self._digest = None
        if told is not None and (digest is None or told != digest.value):
            raise ReplayDiverged(
                f"{self.name}: {len(body['journal'])} requests were done again at worker {self.worker} and led to "
                "another state: the env does not do the same when asked the same, or is another one; close it and "
                "open a new one",
                session=self.session,
                worker=self.worker,
            )
        return {}

    def _op_rerun(self, body: Frame) -> Frame:
        """A part of a recorded episode once more: several requests as one, and what each told."""
        rerun = Rerun(body, self.env.action_space)
        for op, entry in self._deeds(rerun):
            rerun.took(op, self.run(op, entry))
            if rerun.renders:
                rerun.showed(self.run("render", {}))
        return rerun.frame

    def _deeds(self, rerun: Rerun) -> Iterator[tuple[str, Frame]]:
        self._redoing = True
        try:
            for deed in rerun.deeds():
                if self._over:
                    raise SessionUnknown(f"session {self.session} ended during a rerun", reason="closed")
                yield deed
        finally:
            self._redoing = False

    # ---------------------------------------------------------------- checks

    def _need_reset(self, op: str) -> None:
        if self._episode.phase == "new":
            raise ResetNeeded(f"{self.name}: {op} before the first reset; call reset once", session=self.session)


@contextmanager
def _told_of(number: int, op: str) -> Iterator[None]:
    """What is refused in a replay was not when it was asked first."""
    try:
        yield
    except (MalformedMessage, SessionUnknown):
        raise
    except MeshError as exc:
        raise ReplayDiverged(f"request {number} of the journal, a {op}, was refused: {exc.message}", op=op) from exc
