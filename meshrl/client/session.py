"""A session at the client: its lane's turn, its requests, and its end (R1, R2)."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshrl.client.flights import Entry, Flight
from meshrl.client.shielded import shielded
from meshrl.errors import (
    AgentError,
    EnvError,
    MeshError,
    MeshUnreachable,
    SessionClosed,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    SubjectNotPermitted,
    TransportError,
    WrongEpoch,
)
from meshrl.protocol.doubt import GRACE_S
from meshrl.protocol.turn import Begin, Phase, Turn
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, check_reply
from meshrl.wire.messages import Close, Grant

if TYPE_CHECKING:
    from meshrl.client.context import Context

GONE_ERRORS = (SessionUnknown, SessionExpired, WrongEpoch)


def _nobody() -> None:
    return None


class RemoteSession:
    """A granted session; what a remote env or agent is made of.

    Attributes:
        first_env_id: global index of its first sub-environment.
        num_envs: how many it has.
        grant: what the worker granted.
        closed: whether this client has closed it.
        told: the last answer to a reset or a step, as it arrived, where a loss may end its episode by it.
        given_up: whether its state is gone, so that the next reset begins with nothing.
        grace_s: for how long its worker may be away before it counts as lost.
    """

    told = b""
    grace_s = GRACE_S
    given_up = False

    def __init__(self, context: Context, grant: Grant, *, first_env_id: int = 0, num_envs: int = 1) -> None:
        self.first_env_id = first_env_id
        self.num_envs = num_envs
        self.grant = grant
        self.closed = False
        self._context = context
        self._connection = context.connection
        self._flights = context.flights
        self._turn = Turn(f"{grant.description.kind} {grant.description.name}")
        self._subject = context.subjects.session(grant.worker, context.connection.user, grant.session, "")
        self._flight: Flight | None = None
        self._body = b""  # of the last request
        self._lost: SessionLost | None = None
        self._held = True  # at its worker, as far as is known
        self._waiting_for: Callable[[], Callable[[RemoteSession], bool] | None] = _nobody
        self._told: Callable[[], Callable[[MeshError], None] | None] = _nobody

    def __repr__(self) -> str:
        state = "closed" if self.closed else "lost" if self._lost else self._turn.phase.value
        return f"<session {self.grant.session} at {self.grant.worker}: {state}>"

    @property
    def subject(self) -> str:
        """Of its requests, up to the op."""
        return self._subject

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._lost is None and not self.closed

    def check_open(self) -> None:
        """Whether it can still be used.

        Raises:
            SessionLost: the session is gone.
            SessionClosed: this client closed it.
        """
        if not self.is_open:
            raise self._ended()

    @property
    def abandoned(self) -> bool:
        """Whether nobody closed it although its slot is still held."""
        return not self.closed and self._held and not self._connection.closed

    async def request(self, op: str, fields: Frame) -> Frame:
        """Send one request of the lane and wait for its reply.

        Cancelling stops the waiting, not the request: see :meth:`settle`.

        Raises:
            ConcurrentStep: another request is under way.
            StepUnsettled: a cancelled one has not been settled.
            SessionLost: the session is gone.
            SessionClosed: this client closed it.
            MeshUnreachable: the server was away for too long; when it is back, settle or reset.
            MeshError: what the worker answered.
        """
        if self.may_begin(op) is Begin.AFTER_LAST:
            await self.discard()
            self.may_begin(op)  # closed while it waited
        self.launch(op, self.encoded(fields))
        return await self.landing()

    def may_begin(self, op: str) -> Begin:
        """Whether ``op`` may be requested now; AFTER_LAST wants :meth:`discard` first.

        Raises:
            MeshError: as :meth:`request`, for what is known before anything is sent.
        """
        self.check_open()
        return self._turn.may_begin(op)

    @property
    def unsettled(self) -> str:
        """The op whose result :meth:`settle` gives; empty if there is none."""
        return self._turn.unsettled

    @property
    def last_op(self) -> str:
        """Of the last request."""
        return self._turn.op

    @property
    def under_way(self) -> bool:
        """Whether somebody waits for a request."""
        return self._turn.phase is Phase.WAITING

    def encoded(self, fields: Frame) -> bytes:
        """The next request's body; made before the turn is taken, since what cannot be encoded has not begun.

        Raises:
            UnencodableValue: something in it has no form on the wire.
        """
        return pack({"epoch": self.grant.epoch, "lane": 0, "seq": self._turn.seq + 1, **fields})

    def launch(self, op: str, body: bytes) -> None:
        """Send the request that may begin; :meth:`landing` waits for its reply."""
        grant, turn = self.grant, self._turn
        seq = turn.begin(op)
        self._body = body
        entry = Entry(grant.session, grant.epoch, 0, seq)
        try:
            flight = self._flights.launch(grant.worker, entry, self._subject + op, body, grant.step_deadline_s)
        except BaseException:
            turn.seq -= 1
            turn.answered()
            raise
        self._flight = flight

    def judge(self, exc: MeshError) -> MeshError:
        """What an error that the worker answered means for the session; gives what its user is to be told."""
        if isinstance(exc, GONE_ERRORS):
            return self._lose_as(str(exc.details.get("reason", exc.code)))
        if isinstance(exc, (EnvError, AgentError)):
            self._lose_as("ended", str(exc))
        elif isinstance(exc, SessionLost):
            self._lose(exc)
        return exc

    def take_untold(self) -> SessionLost | None:
        """A loss that ended an episode and was told nobody; once."""
        return None

    def leave(self) -> None:
        """Stop waiting for a request that was launched: it is to be settled, like one whose waiting was cancelled."""
        self._turn.cancelled()

    async def settle(self) -> tuple[str, Frame]:
        """Wait for the request whose waiting was cancelled; gives its op and reply.

        Raises:
            NothingUnsettled: there is none.
            MeshError: what the worker answered to it.
        """
        self.check_open()
        op = self._turn.settling()
        return op, await self._landing_again()

    async def landing(self) -> Frame:
        """Wait for the reply to the request that was launched; see :meth:`request`."""
        try:
            return await self._landing()
        except SessionLost:
            self._turn.answered()
            raise

    async def _landing(self) -> Frame:
        """The same, but that the turn stays taken where the session is lost."""
        flight = self._flight
        assert flight is not None, "launch comes first"
        try:
            data = await flight.future
        except asyncio.CancelledError:
            # The answer is still wanted, by settle; also when it is there and only its way to the caller was cut short.
            flight.rearm()
            self._turn.cancelled()
            raise
        except MeshUnreachable:
            # Without a connection for too long: it may have run, so it is to be settled like a cancelled one.
            self._turn.cancelled()
            raise
        except MeshError as exc:
            if isinstance(exc, SubjectNotPermitted) and flight.attempt == 0:
                self._turn.seq -= 1  # it never left this user's side of the server
            if isinstance(exc, SessionLost):
                if flight is self._flight:  # else its next incarnation is there already
                    self._lose(exc)
                raise
            self._turn.answered()
            raise
        try:
            frame = check_reply(unpack(data), flight.entry.seq)
        except MeshError as exc:
            told = self.judge(exc)
            if not isinstance(told, SessionLost):
                self._turn.answered()
            if told is exc:
                raise
            raise told from exc
        self._turn.answered()
        return frame

    async def _landing_again(self) -> Frame:
        assert self._flight is not None
        self._flight.rearm()
        return await self.landing()

    async def discard(self) -> None:
        """Wait for a cancelled request and drop its answer, whatever it is."""
        self._turn.discarding()
        try:
            await self._landing_again()
        except (SessionLost, MeshUnreachable):
            raise
        except MeshError:
            return

    def lost(self, reason: str) -> None:
        """The keeper was told that the worker does not hold the session any more.

        A request under way is left to find out by itself: its own answer (an exception of the env, say) tells more,
        and may be on its way.
        """
        if self._lost is None and not self.closed and not self._is_waiting():
            self._was_lost(self._lose_as(reason))

    def worker_drains(self, seconds: float) -> None:
        """Its worker leaves in so many seconds; it says so again and again. One that cannot move is told at the end."""

    def watched_by(self, waiting_for: Callable[[RemoteSession], bool], told: Callable[[MeshError], None]) -> None:
        """Where requests are not its own: say who sends them, whether some are under way, and who is told of its loss.

        Both are methods of one that holds this session. It is not held in turn: the mesh holds its sessions, so that
        it could never be found abandoned.
        """
        self._waiting_for = weakref.WeakMethod(waiting_for)
        self._told = weakref.WeakMethod(told)

    def _is_waiting(self) -> bool:
        """Whether an answer is under way that will tell more."""
        waiting_for = self._waiting_for()
        if waiting_for is not None:
            return waiting_for(self)
        return self._flight is not None and not self._flight.landed

    def _lose_as(self, reason: str, cause: str = "") -> SessionLost:
        why = {
            "session_expired": "its lease ran out and the slot was freed",
            "ended": "its env raised an exception"
            if not cause
            else f"its env raised an exception: {cause.splitlines()[0]}",
            "worker_stopped": "its worker was stopped",
        }.get(reason, f"its worker does not hold it any more ({reason})")
        grant = self.grant
        lost = SessionLost(
            f"{grant.description.name}: session {grant.session} at worker {grant.worker} is lost: {why}; open another",
            reason=reason,
            session=grant.session,
            worker=grant.worker,
        )
        self._lose(lost)
        return lost

    def _lose(self, exc: SessionLost) -> None:
        if self._lost is None:
            self._lost = exc
            self._release()

    def _release(self) -> None:
        self._held = False
        self._context.forget(self)

    def _was_lost(self, exc: SessionLost) -> None:
        """Tell who sends its requests, if that is another."""
        self._was_told(exc)

    def _was_told(self, exc: MeshError) -> None:
        told = self._told()
        if told is not None:
            told(exc)

    def _ended(self) -> MeshError:
        if self.closed:
            return SessionClosed(f"{self.grant.description.name}: it was closed by this client; open a new one")
        assert self._lost is not None
        return SessionLost(self._lost.message, **self._lost.details)

    async def close(self) -> None:
        """End the session and free its slot. Safe to call twice; never waits longer than 2 s for the worker."""
        if self.closed:
            return
        self.closed = True
        held = self._held
        self._release()
        flight = self._flight
        if flight is not None and not flight.landed:
            flight.failed(SessionClosed(f"{self.grant.description.name}: it was closed while a request was under way"))
        if held and not self._connection.closed:
            await self._say_close()

    async def _say_close(self, *, moved: bool = False) -> None:
        body = Close(epoch=self.grant.epoch, moved=moved).to_wire()
        try:
            await self._connection.ask(self._subject + "close", body, 2.0)
        except TransportError:
            return  # nobody renews it any more: its lease ends it

    def let_go(self) -> None:
        """What held it is garbage: free its slot, on the loop, whenever that comes to it.

        From any thread and at any moment, as ``__del__`` is called; nothing here may wait.
        """
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its connection with it
            self._context.loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        if self.abandoned:
            held, self.closed = self._held, True
            self._release()
            if held:
                self._connection.publish(self._subject + "close", Close(epoch=self.grant.epoch).to_wire())


async def close_all(sessions: Sequence[RemoteSession], begun: Callable[[], None] | None = None) -> None:
    """Close sessions, all at once; cancelled, it does so all the same.

    Args:
        sessions: which.
        begun: is called once all count as closed, while the workers are told.
    """
    if len(sessions) == 1 and begun is None:
        await shielded(sessions[0].close())
    else:
        await shielded(_close_all(sessions, begun))


async def _close_all(sessions: Sequence[RemoteSession], begun: Callable[[], None] | None) -> None:
    loop = asyncio.get_running_loop()
    closing = [loop.create_task(session.close()) for session in sessions]
    if begun is not None:
        loop.call_soon(begun)  # after each task's first turn, in which its session is closed
    for outcome in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def fields_of(**values: Any) -> Frame:
    """A request's own fields, without those that are None."""
    return {name: value for name, value in values.items() if value is not None}
