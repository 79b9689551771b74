"""What a hosted session tells its recording: each reset as it begins, and each answer as it is made."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from meshrl.protocol.noted import ROW_BYTES, Info
from meshrl.protocol.transcript import Level, Transcript
from meshrl.protocol.values import own
from meshrl.wire.batches import batching
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.messages import Description, Open
from meshrl.wire.record import Record
from meshrl.wire.recorded import Recorded
from meshrl.worker.drawing import alone, draws
from meshrl.worker.origins import outliving
from meshrl.worker.proof import HASHED_BYTES, bytes_of
from meshrl.worker.sealing import StateKey


class Recording:
    """The recording of one session, as those who host it see it.

    Args:
        spaces: of one observation, and of one action.
        states: of each sub-environment, what gives what outlives its resets; None where that is not known.
        level: how much of each step is recorded.

    Attributes:
        transcript: what was noted so far.
        forgets: whether all that outlives resets of its envs is known.
    """

    def __init__(
        self,
        spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]],
        states: Sequence[Callable[[], bytes] | None],
        level: Level,
    ) -> None:
        observations, actions = map(batching, spaces)
        shown = bytes_of(observations.space)
        row_bytes = ROW_BYTES + bytes_of(actions.space) + (shown if level == "full" else 0)
        self.transcript = Transcript(len(states), observations, actions, level, shown >= HASHED_BYTES, row_bytes, shown)
        self._states = states
        self.forgets = None not in states

    @classmethod
    def of_envs(cls, envs: Sequence[Any], level: Level, state_key: StateKey | None) -> Recording:
        """That of sub-environments one by one.

        Args:
            envs: of the session.
            level: how much of each step is recorded.
            state_key: with which the worker seals what only workers may have written.
        """
        states: list[Callable[[], bytes] | None] = []
        for env in envs:
            kept = outliving(env, state_key)
            get = None if kept is None else kept.get
            states.append(alone(get) if get is not None and draws(env) else get)
        return cls((envs[0].observation_space, envs[0].action_space), states, level)

    def recorded(self, open_: Open, user: str, worker: str, description: Description) -> Recorded:
        """What the recording says of itself.

        Args:
            open_: what its session was asked to be.
            user: who asked.
            worker: that holds it.
            description: of its envs, as they were constructed.
        """
        wanted = open_.record or Record()
        return Recorded(
            session=open_.session,
            worker=worker,
            user=user,
            name=open_.name,
            form=open_.form,
            num_envs=open_.num_envs,
            first_env_id=open_.first_env_id,
            autoreset_mode="SameStep" if open_.form == "pool" else open_.autoreset_mode,
            seeding=open_.seeding,
            kwargs=open_.kwargs,
            render_mode=open_.render_mode,
            level=self.transcript.level,
            every=wanted.every,
            labels=wanted.labels,
            policy=wanted.policy,
            manifest=wanted.manifest,
            forgets=self.forgets,
            platform=platform.platform()[:256],
            description=description,
        )

    def began(self, i: int, seed: int | None, options: Info | None) -> int:
        """Sub-environment ``i`` is about to be reset, on the thread that does it; gives what a replay says of that."""
        state = self._states[i] if seed is None else None
        given = None if options is None else own(options)  # its env may take things out of them
        return self.transcript.began(i, seed, None if state is None else state(), given)

    def begins_from(self, i: int, origin: Info) -> None:
        """The next reset of sub-environment ``i`` is that with which a journal begins."""
        number = origin.get("nth")
        if type(number) is int and 0 <= number < 1 << 62:
            self.transcript.numbered(i, number)

    def redone(self, i: int, action: Any, outcome: tuple[Any, Any, Any, Any, Sequence[Info]]) -> None:
        """What one told as it was done again; on any thread."""
        self.transcript.redone = True
        obs, reward, terminated, truncated, infos = outcome
        self.transcript.note_redone(time.monotonic(), i, action, obs, reward, (terminated, truncated), infos)

    def acted(self, body: Frame) -> int | None:
        """A step is about to be taken; gives the version of its policy, if this or an earlier one says."""
        version = body.get("policy")
        if type(version) is int and abs(version) < 1 << 62:
            self.transcript.policy = version
        return self.transcript.policy

    def told(
        self,
        lanes: Indices | None,
        actions: Any,
        frame: Frame,
        infos: Sequence[tuple[int, Info]],
        policies: list[int | None] | None = None,
    ) -> None:
        """A step of sub-environments is about to be answered; ``actions`` are None of an explicit reset."""
        self.transcript.note(
            time.monotonic(),
            lanes,
            actions,
            frame["obs"],
            frame["rewards"],
            frame["terminations"],
            frame["truncations"],
            infos,
            policies,
        )

    def was_reset(self, lanes: Indices, obs: Any, infos: Sequence[tuple[int, Info]]) -> None:
        """An explicit reset of some of a vector is about to be answered."""
        zeros = np.zeros(len(lanes))
        flags = zeros.astype(np.bool_)
        self.transcript.note(time.monotonic(), lanes, None, obs, zeros, flags, flags, infos)

    def told_one(self, action: Any, frame: Frame, *, reset: bool) -> None:
        """The only env of a session has answered."""
        reward = 0.0 if reset else frame["reward"]
        terminated, truncated = (False, False) if reset else (frame["terminated"], frame["truncated"])
        self.transcript.note_one(
            time.monotonic(), action, frame["obs"], reward, terminated, truncated, frame["info"], reset=reset
        )

    def asked(self, lanes: Sequence[int], op: str, given: Sequence[Info]) -> None:
        """Something else was asked of some, which changes them."""
        for lane, one in zip(lanes, given, strict=True):
            self.transcript.asked(time.monotonic(), lane, op, one)
