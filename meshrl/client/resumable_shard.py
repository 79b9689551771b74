"""A vector's shard that outlives its worker (R8).

Where its state cannot be brought back, the step that was under way, or the next one, ends the episodes of all of its
sub-environments: the last observations, rewards of 0, ``truncations`` and the reason in ``infos["session_lost"]``. Then
it goes on as its autoreset mode has it:

    NextStep   the next step begins the next episodes: a reset is sent in its place
    SameStep   the same step begins them: a reset is sent in its place, and what it gives is put together with the end
    Disabled   its user resets them
"""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, Any

import numpy as np

from meshrl.client.recovery import NO_WORKER
from meshrl.client.resumable import ResumableSession
from meshrl.client.shard_recovery import ALL, ShardRecovery
from meshrl.errors import SessionLost
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame
from meshrl.wire.infos import pack_infos, split_infos
from meshrl.wire.kept import whole
from meshrl.wire.messages import AutoresetName, Grant
from meshrl.wire.spaces import rebuild

if TYPE_CHECKING:
    from meshrl.client.context import Context


class ResumableShard(ResumableSession):
    """The session of one shard of a vector."""

    _recovery: ShardRecovery

    def __init__(
        self, context: Context, grant: Grant, recovery: ShardRecovery, *, first_env_id: int, num_envs: int
    ) -> None:
        super().__init__(context, grant, recovery, first_env_id=first_env_id, num_envs=num_envs)
        self._mode: AutoresetName = recovery.request["autoreset_mode"]
        self._cut: SessionLost | None = None  # what ended the episodes, until the next have begun
        self._cut_told = False
        self._last: Any = None  # the observations of before that
        self._in_place = False  # the reset that was sent is a step's

    def launch(self, op: str, body: bytes) -> None:
        """As of any session; after its episodes were ended by a loss, what is sent begins all of the next."""
        self._in_place = False
        if self._cut is not None and op == "step" and self._cut_told and self._mode == "NextStep":
            self._launch_in_place()
            return
        if self._cut is not None and op == "reset":
            body = pack(self._of_all(unpack(body)))
        super().launch(op, body)

    def state_unsure(self) -> None:
        """As of any session."""
        if self._recovery.resumes:
            self._recovery.journal.unsure(ALL, "reset")

    def _of_all(self, given: Frame) -> Frame:
        """A reset of some of them as one of all: a fresh session has no observations of those that are left out.

        Those are reset once more in their turn, and go on by the seeds that they had.
        """
        mask, seeds, roots = given.pop("mask", None), given.get("seeds"), self._recovery.roots
        if not seeds:
            return {**given, **roots}
        if mask is None:
            return given
        others = roots or {"seeds": [None] * self.num_envs, "episodes": [None] * self.num_envs}
        chosen = mask.tolist()
        own = {"seeds": seeds, "episodes": [None] * self.num_envs}
        for name, values in own.items():
            either = zip(chosen, values, others[name], strict=True)
            given[name] = [value if reset else other for reset, value, other in either]
        return given

    def _launch_in_place(self) -> None:
        super().launch("reset", self.encoded(self._recovery.roots))
        self._in_place = True

    async def landing(self) -> Frame:
        """As of any session; where its state is gone, a step tells that the episodes have ended."""
        try:
            frame = await super().landing()
        except SessionLost as exc:
            frame = await self._gone(exc)
        if self._turn.op == "reset" and self._cut is not None:
            return self._begun(frame)
        return frame

    async def _gone(self, exc: SessionLost) -> Frame:
        """The state is gone: the answer to what was under way, or to the reset that is sent in its place."""
        op, masked = self._turn.op, self._turn.op == "reset" and "mask" in unpack(self._body)
        before = self._cut
        if "not_resumed" not in exc.details or not self._recovery.told:
            raise exc
        if before is None:
            self._cut, self._cut_told = exc, False
            self._last = unpack(whole(self._recovery.told))["obs"]
        if op == "step":
            self._cut_told = True
            if self._mode != "SameStep":
                return self._ended_by(self._cut or exc)
            self._launch_in_place()
        elif op == "reset" and before is None and not masked:
            self.launch("reset", self._body)
        elif op == "reset" and not masked and exc.details["not_resumed"] != NO_WORKER:
            in_place = self._in_place
            self.launch("reset", self._body)  # lost once more in between
            self._in_place = in_place
        else:
            raise exc
        return await self._landing_anew()

    async def _landing_anew(self) -> Frame:
        """Wait for the reset that was sent in place of what is lost."""
        try:
            return await super().landing()
        except SessionLost as exc:
            return await self._gone(exc)

    def _begun(self, frame: Frame) -> Frame:
        """The next episodes have begun: the answer to the reset, or to the step that it was sent in place of."""
        cut, told = self._cut, self._cut_told
        assert cut is not None, "they were ended"
        self._cut, self._cut_told = None, False
        if not self._in_place:
            return frame if told else {**frame, "infos": self._infos_of(cut, frame)}
        if self._mode == "NextStep":
            return {**self._flags(ended=False), **frame}
        return {**self._flags(ended=True), **frame, "infos": self._infos_of(cut, frame, final=True)}

    def _ended_by(self, cut: SessionLost) -> Frame:
        return {"obs": self._last, **self._flags(ended=True), "infos": self._infos_of(cut, {})}

    def _flags(self, *, ended: bool) -> Frame:
        count = self.num_envs
        return {
            "rewards": np.zeros(count),
            "terminations": np.zeros(count, np.bool_),
            "truncations": np.full(count, ended),
        }

    def _infos_of(self, cut: SessionLost, frame: Frame, *, final: bool = False) -> Any:
        """The infos of an answer, with what became of the session, and the last observations where there are others."""
        count = self.num_envs
        told = split_infos([(frame["infos"], 0, count)], count) if "infos" in frame else [[]] * count
        lost = {"message": cut.message, **cut.details}
        last = batching(rebuild(self.grant.description.observation_space)).rows(self._last, count) if final else None
        entries: list[tuple[int, dict[str, Any]]] = []
        for i in range(count):
            if last is not None:
                entries.append((i, {"final_obs": next(last), "final_info": {}}))
            entries.append((i, {**dict(ChainMap(*reversed(told[i]))), "session_lost": lost}))
        return unpack(pack(pack_infos(entries, count)))
