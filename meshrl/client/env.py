"""``RemoteEnv``: one leased env, to be used like a local one with ``await`` before each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium

from meshrl.client.actions import Check, checker
from meshrl.client.forking import fork
from meshrl.client.leased import Leased
from meshrl.client.readable import check_spaces
from meshrl.client.resumable import ResumableSession
from meshrl.client.session import RemoteSession, fields_of
from meshrl.client.window import Shows, Window
from meshrl.errors import MalformedMessage, ResetNeeded, SessionLost, StepUnsettled, UsageError
from meshrl.protocol.turn import READING
from meshrl.wire import spaces
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame
from meshrl.wire.kept import whole
from meshrl.wire.messages import SessionState

# What step gives: observation, reward, terminated, truncated, info.
Step = tuple[Any, Any, bool, bool, dict[str, Any]]


class RemoteEnv(Leased):
    """An env that lives on a worker; made by :meth:`meshrl.Mesh.env`.

    Each method is one round trip, one at a time: a second call while one is under way raises ``ConcurrentStep``.
    Cancelling a call stops the waiting only: see :meth:`settle`. Every call may raise ``SessionLost`` (the session
    is gone: open a new env), ``EnvError`` (the env's code raised; the session has ended) and ``SessionClosed``.

    Attributes:
        render_mode: as asked for.
    """

    _freed_by = "`await env.close()` frees its slot"

    def __init__(
        self, session: RemoteSession, *, render_mode: str | None, check_actions: Literal["normal", "strict"]
    ) -> None:
        description = session.grant.description
        super().__init__(description, (session,))
        self.render_mode = render_mode
        self._session = session
        check_spaces(description)
        # Made when somebody looks: a session would cost twice the time and memory with spaces that nobody does.
        self._observation_space: gymnasium.Space[Any] | None = None
        self._action_space: gymnasium.Space[Any] | None = None
        self._check: Check | None = None
        self._check_actions = check_actions
        self._window: Shows | None = Window(description.name) if render_mode == "human" else None
        # The op and the result of a step or a reset whose frame was not to be had, or not waited for.
        self._unshown: tuple[str, Any] | None = None
        self._cut: dict[str, Any] | None = None  # why its episode was ended, and nobody has reset it since

    def __repr__(self) -> str:
        return f"<RemoteEnv {self.name} at {self.worker}: {self._session!r}>"

    @property
    def worker(self) -> str:
        """The id of the worker that holds it."""
        return self._session.grant.worker

    @property
    def session_id(self) -> str:
        """The id of its session."""
        return self._session.grant.session

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Equal to the remote env's, dtypes and bounds included."""
        if self._observation_space is None:
            self._observation_space = spaces.rebuild(self._description.observation_space)
        return self._observation_space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Equal to the remote env's; its generator is this client's own."""
        if self._action_space is None:
            self._action_space = spaces.rebuild(self._description.action_space)
        return self._action_space

    @property
    def unsettled(self) -> str:
        """The op whose result :meth:`settle` gives, such as ``step``; empty if there is none."""
        return self._session.unsettled if self._unshown is None else self._unshown[0]

    def last(self) -> Step:
        """What the last reset or step told, as a step's tuple, of which a reset has its observation and info.

        It costs no round trip. A fork has what its origin told last, so that this is where it goes on from. Of an
        episode that a loss has ended it is the step that said so.

        Raises:
            UsageError: it was leased with ``on_loss="raise"``, which keeps no answer.
            ResetNeeded: before the first ``reset``.
        """
        if not isinstance(self._session, ResumableSession):
            raise UsageError(f"{self.name}: on_loss='raise' keeps no answers; 'resume' and 'truncate' do")
        told = self._session.told
        if not told:
            raise ResetNeeded(f"{self.name}: nothing was told yet; reset it")
        answer = unpack(whole(told))
        if self._cut is not None:
            return answer["obs"], 0.0, False, True, {"session_lost": dict(self._cut)}
        return _step_of({"reward": 0.0, "terminated": False, "truncated": False, **answer})

    # ---------------------------------------------------------------- an env's calls

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: ``gymnasium.Env.reset``. Settles a cancelled step and drops its result.

        Returns:
            observation, with exactly the types that the env returned, and info.
        """
        kept, self._unshown = self._unshown, None
        fields, given_up = fields_of(seed=seed, options=options), self._session.given_up
        try:
            result = _reset_of(await self._request("reset", fields))
        except UsageError:
            self._unshown = kept  # it did not begin
            raise
        except SessionLost as exc:
            if given_up:
                raise
            facts = self._facts_of(exc)  # of an episode that is over anyway; the next begins elsewhere
            result = _reset_of(await self._request("reset", fields))
            result[1]["session_lost"] = facts
        untold = self._session.take_untold()
        if untold is not None:
            result[1]["session_lost"] = self._facts_of(untold)
        self._cut = None
        await self._show_after("reset", result)
        return result

    async def step(self, action: Any) -> Step:
        """Take one step: ``gymnasium.Env.step``.

        Args:
            action: checked against the action space before anything is sent.

        Returns:
            observation, reward, terminated, truncated, info, with exactly the types that the env returned.

        Raises:
            InvalidAction: wrong shape, structure, dtype or discrete range; nothing was sent.
            ResetNeeded: before the first ``reset``.
            ConcurrentStep: another call is under way.
            StepUnsettled: a cancelled step has to be settled first.
        """
        check = self._check
        if check is None:
            check = self._check = checker(self.action_space, self.name, strict=self._check_actions == "strict")
        check(action)
        if self._cut is not None:
            raise ResetNeeded(f"{self.name}: its episode was cut short by the loss of its session; reset it")
        try:
            if self._unshown is None and self._window is None:
                return _step_of(await self._session.request("step", self._said({"action": action})))
            result = _step_of(await self._request("step", self._said({"action": action})))
        except SessionLost as exc:
            return self._cut_short(exc)
        await self._show_after("step", result)
        return result

    def _cut_short(self, exc: SessionLost) -> Step:
        """The step that ends an episode whose session is lost: the last observation again, and why."""
        facts, told = self._facts_of(exc), self._session.told
        if not told:
            raise exc
        self._cut = facts
        return self.last()

    def _facts_of(self, exc: SessionLost) -> dict[str, Any]:
        """What is told of a loss that ends an episode; any other is raised."""
        if "not_resumed" not in exc.details:
            raise exc
        return {"message": exc.message, **exc.details}

    async def _request(self, op: str, fields: Frame) -> Frame:
        """The session's, which does not know of a result that was never handed out."""
        if self._unshown is not None and op != "reset" and op not in READING:
            raise StepUnsettled(
                f"{self.name}: a {self._unshown[0]} ran and its frame was cut off; `await env.settle()` gives its "
                "result, or reset",
                op=self._unshown[0],
            )
        return await self._session.request(op, fields)

    async def _show_after(self, op: str, result: Any) -> None:
        """In human mode, show the frame after ``op``; whatever keeps it away, the result is kept for :meth:`settle`."""
        if self._window is None:
            return
        try:
            self._window.show(await self._frame())
        except SessionLost as exc:
            if "not_resumed" not in exc.details:
                self._unshown = (op, result)
                raise
            # The result is there, and the next step says what has become of the episode.
        except BaseException:
            self._unshown = (op, result)
            raise

    async def settle(self) -> Any:
        """The result of the call whose waiting was cancelled: for a step, its tuple.

        Raises:
            NothingUnsettled: no call was cancelled, and none lost its frame in ``human`` mode.
        """
        if self._unshown is not None:
            (_, result), self._unshown = self._unshown, None
            return result
        try:
            op, reply = await self._session.settle()
        except SessionLost as exc:
            if self._session.last_op != "step":
                raise
            return self._cut_short(exc)
        if op == "step":
            return _step_of(reply)
        if op == "reset":
            return _reset_of(reply)
        return reply.get("value", reply.get("frame", reply.get("state")))

    async def render(self) -> Any:
        """What ``gymnasium.Env.render`` gives in this mode; in ``human`` mode it is shown here, and None."""
        if self.render_mode is None:
            raise UsageError(f"{self.name}: it was leased without a render_mode; pass one to m.env(...)")
        frame = await self._frame()
        if self._window is None:
            return frame
        self._window.show(frame)
        return None

    async def _frame(self) -> Any:
        return (await self._session.request("render", {}))["frame"]

    async def state(self) -> SessionState:
        """Where the session stands: episode, steps, seed, phase."""
        return SessionState.model_validate((await self._session.request("state", {})).get("state"))

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it, or there is none.
        """
        reply = await self._request("call", {"name": name, "args": list(args), "kwargs": kwargs})
        return reply.get("value")

    async def get_attr(self, name: str) -> Any:
        """A public attribute of the remote env, looked for through its wrappers.

        Raises:
            NotAllowed: it is private, or there is none.
            UnencodableValue: its value cannot travel.
        """
        return (await self._session.request("get_attr", {"name": name})).get("value")

    async def set_attr(self, name: str, value: Any) -> None:
        """Set a public attribute of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it.
        """
        await self._request("set_attr", {"name": name, "value": value})

    async def fork(self, n: int = 1) -> list[RemoteEnv]:
        """Lease ``n`` more envs in this one's exact state, for tree search or group rollouts: all of them or none.

        Each is brought there by doing again what this one was asked since its last reset that can be done again, and
        proved equal by the digest of what it tells. From then on they go apart.

        Raises:
            UsageError: this env was leased with another ``on_loss`` than ``resume``, or what it was asked cannot be
                done again; ``details["lacking"]`` says why.
            ConcurrentStep, StepUnsettled: a call is under way, or was cancelled and has not been settled.
            ReplayDiverged: the env does not do the same when asked the same.
            MeshFull: there was no room for all of them within ``wait``.
        """
        return [
            RemoteEnv(session, render_mode=self.render_mode, check_actions=self._check_actions)
            for session in await fork(self._session, n)
        ]

    async def close(self) -> None:
        """Close the env and free its slot. Safe to call twice."""
        if self._window is not None:
            self._window.close()
        await super().close()


def _reset_of(reply: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        return reply["obs"], reply["info"]
    except KeyError as exc:
        raise MalformedMessage(f"a reply to reset has no {exc}") from None


def _step_of(reply: Mapping[str, Any]) -> Step:
    try:
        return reply["obs"], reply["reward"], reply["terminated"], reply["truncated"], reply["info"]
    except KeyError as exc:
        raise MalformedMessage(f"a reply to step has no {exc}") from None
