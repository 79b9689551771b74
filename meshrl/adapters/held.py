"""A remote env as a thread holds it: leased over a portal, called by blocking, settled after an interrupt."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from meshrl.adapters.portal import Call, Portal, lease
from meshrl.client.env import RemoteEnv
from meshrl.client.window import Latest, Window
from meshrl.errors import MeshError, NothingUnsettled, ResetNeeded, SessionClosed, StepUnsettled
from meshrl.protocol.turn import READING

T = TypeVar("T")


class Held:
    """One remote env, and the call that was interrupted, until it is settled.

    Args:
        name: as served.
        render_mode: Gymnasium's; in ``human`` mode frames are shown on the thread that calls.
        mesh: arguments of :class:`meshrl.Mesh`.
        where: capabilities that the worker must have.
        env_kwargs: for the env's constructor.

    Attributes:
        portal: over which it is leased.
        remote: the env on the portal's loop.
        closed: whether it was closed, by :meth:`close` or as garbage.
    """

    portal: Portal
    remote: RemoteEnv

    def __init__(
        self,
        name: str,
        *,
        render_mode: str | None,
        mesh: Mapping[str, Any],
        where: Mapping[str, Any] | None,
        env_kwargs: Mapping[str, Any],
    ) -> None:
        self.closed = False
        self._name = name
        self._render_mode = render_mode
        self._mesh = mesh
        self._where = where
        self._env_kwargs = env_kwargs
        self._frames = Latest()
        self._window = Window(name) if render_mode == "human" else None
        self._interrupted: Call[Any] | None = None
        self._op = ""  # of the last interrupted call, beside a settle
        self._lease()

    def __repr__(self) -> str:
        return "closed" if self.closed else repr(self.remote)

    def _lease(self) -> None:
        portal = lease(self._mesh)
        opening = Call("make", portal.env, self._name, self._env_kwargs, self._render_mode, self._where)
        try:
            self.remote = portal.run(opening)
        except BaseException as exc:
            if exc is opening.error:
                portal.release()
            else:
                portal.abandon_env(opening)
            raise
        self.portal = portal
        if self._window is not None:
            self.remote._window = self._frames  # noqa: SLF001  # fetched on the loop, shown on the caller's thread

    @property
    def inherited(self) -> bool:
        """Whether this process got it by a fork: then it is the parent's."""
        return self.portal.inherited

    def lease_again(self) -> None:
        """In a forked process: an env of its own, with nothing of the parent's episode."""
        self._disown()
        self._lease()
        self._interrupted, self._op = None, ""

    def _disown(self) -> None:
        """In a forked process: the session is the parent's to close, and this copy of it nobody's to warn of."""
        self.remote._session.closed = True  # noqa: SLF001  # there is no other use for a half-dead RemoteEnv

    # ---------------------------------------------------------------- calls

    def do(self, op: str, made: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run one call of the remote and wait for it; in human mode, show its frame.

        An exception of a signal handler ends the waiting; the call is then to be settled, as it is when it ran and its
        frame cannot be shown.

        Raises:
            SessionClosed: it was closed.
            StepUnsettled: an interrupted call ran, and comes first.
            ResetNeeded: it is the parent process's.
            MeshError: what the call raised.
        """
        if self.closed:
            raise SessionClosed(f"{self._name}: it was closed by this client; make a new one")
        if self._interrupted is not None:
            self._after_interrupt(op)
        if self.inherited:
            raise ResetNeeded(
                f"{self._name}: {op} in a forked process, whose parent has this env; reset leases one for this process",
                op=op,
            )
        call = Call(op, made, *args)
        try:
            value = self.portal.run(call)
            self._show()
            return value  # noqa: TRY300  # in here, so that no signal comes between
        except BaseException as exc:
            unseen = call.ran and op not in READING
            if exc is not call.error and (unseen or not isinstance(exc, MeshError)):
                self._interrupted = call
                if op != "settle":
                    self._op = op
                self.portal.abandon(call)
            raise

    def _show(self) -> None:
        frame = self._frames.take()
        if frame is not None and self._window is not None:
            self._window.show(frame)

    def _after_interrupt(self, op: str) -> None:
        """Whether ``op`` may follow the interrupted call: the lane knows what was cancelled, not what was over."""
        call = self._interrupted
        assert call is not None
        call.wait()
        if call.ran and op != "reset" and call.op not in READING:
            raise StepUnsettled(
                f"env {self._name}: {call.op} was interrupted, and it ran; call env.settle() for its result, or reset",
                op=call.op,
            )
        self._interrupted = None

    def settle(self) -> tuple[str, Any]:
        """The op and the result of the call that was interrupted.

        Raises:
            NothingUnsettled: none was, or it was before anything was sent.
        """
        if self.inherited and not self.closed:
            raise NothingUnsettled(f"env {self._name}: nothing to settle: its episode belongs to the parent process")
        op, call = self._unshown or self._op, self._interrupted
        if call is None or self.closed:
            return op, self.do("settle", self.remote.settle)
        call.wait()
        value = self.do("settle", self.remote.settle) if call.cancelled else call.result()
        self._interrupted = None
        return op, value

    def may_settle(self, op: str) -> bool:
        """Whether the last call was ``op``, and ran although it raised."""
        return op == (self._unshown or (self._op if self._interrupted is not None else ""))

    @property
    def _unshown(self) -> str:
        """The op whose frame the remote could not fetch."""
        unshown = self.remote._unshown  # noqa: SLF001  # one keeping of results for both faces
        return "" if unshown is None else unshown[0]

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Close the env and free its slot. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self._window is not None:
            self._window.close()
        if self.inherited:
            self._disown()
        elif not self.portal.over:
            try:
                self.portal.run(Call("close", self.remote.close))
            finally:
                self.portal.release()

    def drop(self) -> None:
        """The env is garbage. From any thread and at any moment: nothing here may wait."""
        if self.closed:
            return
        self.closed = True
        if self.inherited:
            self._disown()
        else:
            self.portal.drop(self.remote)
