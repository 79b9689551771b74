"""A remote as a thread holds it: leased over a portal, called by blocking, settled after an interrupt."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from meshrl.adapters.call import Call
from meshrl.adapters.portal import Portal, leased
from meshrl.client.env import RemoteEnv
from meshrl.client.mesh import Mesh
from meshrl.client.session import RemoteSession
from meshrl.client.vector import RemoteVectorEnv
from meshrl.client.window import Latest, Window
from meshrl.errors import (
    ConcurrentStep,
    MeshError,
    MeshUnreachable,
    NothingUnderWay,
    NothingUnsettled,
    ResetNeeded,
    SessionClosed,
    StepUnsettled,
)
from meshrl.protocol.turn import READING


class Remote(Protocol):
    """What can be held: a remote env, or a vector of them."""

    @property
    def unsettled(self) -> str:
        """The op of the call whose waiting was cancelled."""

    async def settle(self) -> Any:
        """The result of it."""

    async def close(self) -> None:
        """Free its slots."""


T = TypeVar("T")
R = TypeVar("R", bound=Remote)


class Held(Generic[R]):
    """One remote, and the call that was interrupted, until it is settled.

    Args:
        name: as served.
        mesh: arguments of :class:`meshrl.Mesh`.
        opened: leases the remote.

    Attributes:
        portal: over which it is leased.
        remote: the env or vector on the portal's loop.
        closed: whether it was closed, by :meth:`close` or as garbage.
    """

    portal: Portal
    remote: R
    _face: ClassVar[str] = "env"  # what it is called in texts

    def __init__(self, name: str, mesh: Mapping[str, Any], opened: Callable[[Mesh], Coroutine[Any, Any, R]]) -> None:
        self.closed = False
        self._name = name
        self._mesh = mesh
        self._opened = opened
        self._begun: Call[Any] | None = None
        self._interrupted: Call[Any] | None = None
        self._op = ""  # of the last interrupted call; where that is a settle, of what it settles
        self._lease()

    def __repr__(self) -> str:
        return "closed" if self.closed else repr(self.remote)

    def _lease(self) -> None:
        self.portal, self.remote = leased(self._mesh, "make", self._opened)

    @property
    def inherited(self) -> bool:
        """Whether this process got it by a fork: then it is the parent's."""
        return self.portal.inherited

    def lease_again(self) -> None:
        """In a forked process: a remote of its own, with nothing of the parent's episodes."""
        self._disown()
        self._lease()
        self._begun, self._interrupted, self._op = None, None, ""

    def _disown(self) -> None:
        """In a forked process: the sessions are the parent's to close, and this copy of them nobody's to warn of."""
        for session in self._sessions():
            session.closed = True

    # ---------------------------------------------------------------- what differs between remotes

    def _sessions(self) -> Sequence[RemoteSession]:
        """Of the remote."""
        raise NotImplementedError

    def _show(self) -> None:
        """Show what a call left to be shown on this thread."""

    # ---------------------------------------------------------------- calls

    def do(self, op: str, made: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run one call of the remote and wait for it; in human mode, show its frame.

        An exception of a signal handler ends the waiting; the call is then to be settled, as it is when it ran and its
        frame cannot be shown.

        Raises:
            SessionClosed: it was closed.
            ConcurrentStep: a call was begun and not finished.
            StepUnsettled: an interrupted call ran, and comes first.
            ResetNeeded: it is the parent process's.
            MeshError: what the call raised.
        """
        self._check_turn(op)
        call = Call(op, made, *args)
        try:
            value = self.portal.run(call)
            self._show()
            return value  # noqa: TRY300  # in here, so that no signal comes between
        except BaseException as exc:
            self._raised(call, exc)
            raise

    def begin(self, op: str, made: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Send one call of the remote; :meth:`finish` waits for it, a reset leaves it to its fate.

        Raises:
            MeshError: as :meth:`do` before anything is sent.
        """
        self._check_turn(op)
        call = Call(op, made, *args)
        try:
            self._begun = call
            self.portal.send(call)
        except BaseException as exc:
            self._begun = None
            self._raised(call, exc)
            raise

    def finish(self) -> Any:
        """Wait for the call that was begun; as :meth:`do` from there on.

        Raises:
            NothingUnderWay: none was.
            MeshError: what the call raised.
        """
        if self.closed:
            raise SessionClosed(f"{self._name}: it was closed by this client; make a new one")
        call = self._begun
        if call is None:
            raise NothingUnderWay(f"{self._name}: nothing to wait for: no call was begun")
        if self.inherited:
            raise ResetNeeded(f"{self._name}: {call.op} is under way in the parent process; reset leases one here")
        try:
            value = self.portal.wait(call)
            self._show()
            self._begun = None
            return value  # noqa: TRY300  # in here, so that no signal comes between
        except BaseException as exc:
            self._begun = None
            self._raised(call, exc)
            raise

    def _check_turn(self, op: str) -> None:
        if self.closed:
            raise SessionClosed(f"{self._name}: it was closed by this client; make a new one")
        if self.inherited:
            raise ResetNeeded(
                f"{self._name}: {op} in a forked process, whose parent has this env; reset leases one for this process",
                op=op,
            )
        if self._begun is not None:
            if op != "reset":
                raise ConcurrentStep(
                    f"{self._name}: {op} was called while a {self._begun.op} is under way; wait for its result first",
                    op=op,
                    under_way=self._begun.op,
                )
            self._leave(self._begun)
            self._begun = None
        if self._interrupted is not None:
            self._after_interrupt(op)

    def _raised(self, call: Call[Any], exc: BaseException) -> None:
        """Keep ``call`` if it was not itself that raised ``exc``."""
        if exc is call.error:
            self._reword(exc)
        unseen = call.ran and call.op not in READING
        if exc is not call.error and (unseen or not isinstance(exc, MeshError)):
            self._leave(call)

    def _reword(self, exc: BaseException) -> None:
        """Say it in the words of code that does not await; the error is this caller's alone."""
        op = exc.details.get("op") if isinstance(exc, MeshError) else None
        if isinstance(exc, StepUnsettled):
            text = (
                f"a {op or 'call'} was interrupted and may have run; `{self._face}.settle()` gives its result, or reset"
            )
        elif isinstance(exc, ConcurrentStep) and op:
            text = f"{op} was called while {exc.details.get('under_way')} is under way; wait for its result first"
        elif isinstance(exc, NothingUnsettled):
            text = "nothing to settle: no step, reset, call or set_attr was interrupted"
        else:
            return
        exc.message = f"{self._name}: {text}"
        exc.args = (exc.message,)

    def _leave(self, call: Call[Any]) -> None:
        """Nobody waits for ``call`` any more."""
        self._interrupted = call
        if call.op != "settle":
            self._op = call.op
        self.portal.abandon(call)

    def _after_interrupt(self, op: str) -> None:
        """Whether ``op`` may follow the interrupted call: the lane knows what was cancelled, not what was over."""
        call = self._interrupted
        assert call is not None
        call.wait()
        if call.ran and op != "reset" and call.op not in READING:
            raise StepUnsettled(
                f"{self._name}: a {call.op} was interrupted, and it ran; `{self._face}.settle()` gives its result, or "
                "reset",
                op=call.op,
            )
        self._interrupted = None

    def settle(self) -> tuple[str, Any]:
        """The op and the result of the call that was interrupted, or begun and not finished.

        Raises:
            NothingUnsettled: none was, or it was before anything was sent.
        """
        if self.inherited and not self.closed:
            raise NothingUnsettled(f"{self._name}: nothing to settle: its episode belongs to the parent process")
        if self._begun is not None:
            return self._begun.op, self.finish()
        call = self._interrupted
        if call is not None and not self.closed:
            call.wait()
            if not call.cancelled and not isinstance(call.error, MeshUnreachable):
                value = call.result()
                self._interrupted = None
                return self._op, value
        op = self._op = self.remote.unsettled
        return op, self.do("settle", self.remote.settle)

    def may_settle(self, op: str) -> bool:
        """Whether the last call was ``op``, and ran although it raised."""
        return op == (self.remote.unsettled if self._interrupted is None else self._op)

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Close the remote and free its slots. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self.inherited:
            self._disown()
        elif self.portal.is_here:  # garbage, collected there of all places: waiting would be for ever
            self.portal.drop(self.remote)
        elif not self.portal.over:
            if self._begun is not None:
                self.portal.abandon(self._begun)
            try:
                self.portal.run(Call("close", self.remote.close))
            finally:
                self.portal.release()

    def drop(self) -> None:
        """The remote is garbage. From any thread and at any moment: nothing here may wait."""
        if self.closed:
            return
        self.closed = True
        if self.inherited:
            self._disown()
        else:
            self.portal.drop(self.remote)


class HeldEnv(Held[RemoteEnv]):
    """One remote env; in ``human`` mode its frames are shown on the thread that calls.

    Args:
        name: as served.
        render_mode: Gymnasium's.
        mesh: arguments of :class:`meshrl.Mesh`.
        opened: leases the remote.
    """

    def __init__(
        self,
        name: str,
        mesh: Mapping[str, Any],
        opened: Callable[[Mesh], Coroutine[Any, Any, RemoteEnv]],
        *,
        render_mode: str | None,
    ) -> None:
        self._frames = Latest()
        self._window = Window(name) if render_mode == "human" else None
        super().__init__(name, mesh, opened)

    def _lease(self) -> None:
        super()._lease()
        if self._window is not None:
            self.remote._window = self._frames  # noqa: SLF001  # fetched on the loop, shown on the caller's thread

    def _sessions(self) -> Sequence[RemoteSession]:
        return [self.remote._session]  # noqa: SLF001  # there is no other use for a half-dead RemoteEnv

    def _show(self) -> None:
        frame = self._frames.take()
        if frame is not None and self._window is not None:
            self._window.show(frame)

    def close(self) -> None:
        """Close the env, its window with it."""
        if self._window is not None:
            self._window.close()
        super().close()


class HeldVector(Held[RemoteVectorEnv]):
    """One remote vector, of however many shards."""

    _face = "envs"

    def __repr__(self) -> str:
        if self.closed:
            return "closed"
        return self.remote.whereabouts

    def forgotten(self, face: object, closing: str, warn: Callable[..., None]) -> None:
        """``face`` is garbage: drop the remote, and say so where it should have been closed.

        Args:
            face: the holder.
            closing: the call that was left out.
            warn: ``warnings.warn``, held by the face until the interpreter's end.
        """
        if self.closed:
            return
        # After the portal's end, at the interpreter's exit, they are closed already.
        left = "" if self.inherited or self.portal.over else f"unclosed {face!r}: {closing} frees its slots"
        self.drop()
        if left:
            warn(left, ResourceWarning, source=face)

    def _sessions(self) -> Sequence[RemoteSession]:
        return self.remote._sessions  # noqa: SLF001  # there is no other use for a half-dead RemoteVectorEnv
