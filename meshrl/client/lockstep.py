"""Lockstep: one request to every shard of a vector, all under way at once, and none forgotten that was cancelled (R2).

A call is over when all shards have answered, whatever they answered. One whose waiting was cut short is kept, with the
answers that were there, until the others are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from meshrl.client.session import RemoteSession
from meshrl.errors import ConcurrentStep, MeshError, MeshUnreachable, NothingUnsettled, StepUnsettled
from meshrl.protocol.turn import READING, Begin
from meshrl.wire.frames import Frame, Indices


class Round(NamedTuple):
    """A call under way, unsettled, or one whose answers nobody got.

    Attributes:
        op: of the request.
        answers: what each shard answered, None for those still to come.
        ids: the sub-environments that it is about, in the order that was asked for; None for all.
    """

    op: str
    answers: list[Frame | MeshError | None]
    ids: Indices | None


class Lockstep:
    """The calls of one vector.

    Args:
        sessions: of its shards, in the order of env_ids.
        name: the env's, for errors.

    Attributes:
        began: whether a reset was sent to all shards.
        untold: steps and resets whose results were not given to anybody, since they were discarded or a shard answered
            with an error; the oldest first, to be taken away by who needs to know.
    """

    def __init__(self, sessions: Sequence[RemoteSession], name: str) -> None:
        self.began = False
        self.untold: list[Round] = []
        self._sessions = sessions
        self._name = name
        self._round: Round | None = None

    async def call(
        self,
        op: str,
        fields: Sequence[Frame],
        ids: Indices | None = None,
        sent: Callable[[], None] | None = None,
    ) -> list[Frame]:
        """One request a shard, with its own fields; gives their replies in the order of env_ids.

        Args:
            op: of the request.
            fields: of each shard.
            ids: the sub-environments that it is about; :meth:`settle` gives them back.
            sent: is called when the requests have left.

        Raises:
            ConcurrentStep: another call is under way.
            StepUnsettled: a cancelled one has to be settled first.
            MeshUnreachable: the server was away for too long; it is to be settled, like a cancelled one.
            MeshError: nothing was sent; or, when all have answered, the first error among the answers.
        """
        sessions = self._sessions
        begins = [session.may_begin(op) for session in sessions]
        unsettled = self._unsettled()
        if unsettled is not None and op != "reset" and op not in READING:
            raise StepUnsettled(
                f"{self._name}: a {unsettled.op} was cancelled and may have run; `await envs.settle()` gives its "
                "result, or reset",
                op=unsettled.op,
            )
        if Begin.AFTER_LAST in begins:
            await self._discard(begins)
            for session in sessions:  # closed or lost while it waited
                session.may_begin(op)
        # All are encoded before the first is sent: what cannot be encoded has not begun anywhere.
        bodies = [session.encoded(own) for session, own in zip(sessions, fields, strict=True)]
        answers: list[Frame | MeshError | None] = [None] * len(sessions)
        self._round = Round(op, answers, ids)
        launched = 0
        try:
            for session, body in zip(sessions, bodies, strict=True):
                session.launch(op, body)
                launched += 1
            self.began = self.began or op == "reset"
            if sent is not None:
                sent()
            for i, session in enumerate(sessions):
                answers[i] = await _landed(session.landing())
        except BaseException:
            for i in range(launched):
                if answers[i] is None:
                    sessions[i].leave()
            if not launched:
                self._round = None
            raise
        return self._over(self._round)

    @property
    def unsettled(self) -> str:
        """The op whose result :meth:`settle` gives, if no call is under way; empty if there is none."""
        unsettled = self._unsettled()
        return "" if unsettled is None else unsettled.op

    async def settle(self) -> Round:
        """Wait for the call whose waiting was cancelled; each of its answers is a frame. It may be cancelled, too.

        Raises:
            NothingUnsettled: there is none, or only one that changed nothing.
            ConcurrentStep: a call is under way that nobody cancelled.
            MeshError: as :meth:`call`.
        """
        if any(session.under_way for session in self._sessions):
            raise ConcurrentStep(f"{self._name}: settle was called while another call is under way")
        unsettled = self._unsettled()
        if unsettled is None:
            raise NothingUnsettled(f"{self._name}: nothing to settle: no step, reset, call or set_attr was cancelled")
        await self._settle(unsettled.answers)
        self._over(unsettled)
        return unsettled

    def _unsettled(self) -> Round | None:
        return None if self._round is None or self._round.op in READING else self._round

    async def _settle(self, answers: list[Frame | MeshError | None]) -> None:
        """Wait for what the shards still have to answer; those that did are kept, should this be cancelled."""
        for i, session in enumerate(self._sessions):
            if answers[i] is None:
                answers[i] = await _landed(_frame_of(session.settle()))

    def _over(self, ended: Round) -> list[Frame]:
        """All have answered: their answers, if none of them is an error.

        Raises:
            MeshError: the first that is.
        """
        self._round = None
        try:
            return all_frames(ended.answers)
        except MeshError:
            self._was_untold(ended)
            raise

    def _was_untold(self, ended: Round) -> None:
        if ended.op in {"step", "reset"}:  # nothing else moves episodes
            self.untold.append(ended)

    async def _discard(self, begins: Sequence[Begin]) -> None:
        """Wait for a cancelled call and drop its result."""
        unsettled = self._unsettled()
        if unsettled is not None:
            await self._settle(unsettled.answers)  # it can be settled until all have answered
            self._round = None
            self._was_untold(unsettled)
            return
        for session, begin in zip(self._sessions, begins, strict=True):
            if begin is Begin.AFTER_LAST:
                await session.discard()
        self._round = None


async def _landed(landing: Awaitable[Frame]) -> Frame | MeshError:
    """One shard's answer, or its error, so that the others' are waited for all the same.

    Raises:
        MeshUnreachable: it may have run.
    """
    try:
        return await landing
    except MeshUnreachable:
        raise
    except MeshError as exc:
        return exc


async def _frame_of(settling: Awaitable[tuple[str, Frame]]) -> Frame:
    return (await settling)[1]


def all_frames(answers: Sequence[Frame | MeshError | None]) -> list[Frame]:
    """The answers, if none of them is an error.

    Raises:
        MeshError: the first that is.
    """
    frames: list[Frame] = []
    for answer in answers:
        if isinstance(answer, MeshError):
            raise answer
        assert answer is not None, "every shard has answered"
        frames.append(answer)
    return frames
