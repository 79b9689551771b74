"""``RemoteAgent``: a policy that answers ``act``, served by any of its workers, or leased where it remembers."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import gymnasium

from meshrl.client.opening import Opening
from meshrl.client.session import RemoteSession, fields_of
from meshrl.client.shielded import shielded
from meshrl.errors import (
    MalformedMessage,
    MeshError,
    RequestTimeout,
    SessionClosed,
    SpacesDiffer,
    UnknownName,
    UsageError,
    from_wire,
)
from meshrl.protocol.doubt import GRACE_AFTER_RECONNECT_S, GRACE_S
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Description, SessionState

if TYPE_CHECKING:
    from meshrl.client.context import Context
    from meshrl.client.env import RemoteEnv

# A stateless act is at least once (R12): with no answer for this long it is sent again, to whichever worker NATS
# picks then. Each time it is twice as long: workers that are slow because they are busy get no busier.
ACT_AGAIN_S = 2.0
AGAIN_IN_GRACE_S = 0.1


class RemoteAgent:
    """An agent on the mesh; made by :meth:`meshrl.Mesh.agent`.

    A stateless one has no worker of its own: each ``act`` goes to any worker that serves the name, several may be
    under way at once, and one that is lost is sent again. A stateful one is leased like an env: one call at a time,
    ``reset`` at the beginning of each episode.
    """

    def __init__(
        self, context: Context, description: Description, session: RemoteSession | None, env: RemoteEnv | None
    ) -> None:
        self._context = context
        self._description = description
        self._session = session
        self._closed = False
        self._subject = context.subjects.any_act(description.name, context.connection.user)
        # An agent that acts in any space is told which.
        self._space = None
        if description.action_space is None and env is not None:
            self._space = spaces.describe(env.action_space)

    def __repr__(self) -> str:
        kind = "stateful" if self.stateful else "stateless"
        return f"<RemoteAgent {self.name}, {kind}{f' at {self._session!r}' if self._session else ''}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        session = getattr(self, "_session", None)
        if session is not None and session.abandoned:
            session.let_go()
            _warn(f"unclosed {self!r}: `await agent.close()` frees its slot", ResourceWarning, source=self)

    @property
    def name(self) -> str:
        """As served."""
        return self._description.name

    @property
    def stateful(self) -> bool:
        """Whether it remembers, and is leased."""
        return self._session is not None

    @cached_property
    def observation_space(self) -> gymnasium.Space[Any] | None:
        """What it declares; None when it takes any."""
        declared = self._description.observation_space
        return None if declared is None else spaces.rebuild(declared)

    @cached_property
    def action_space(self) -> gymnasium.Space[Any] | None:
        """What it declares; None when it acts in any."""
        declared = self._description.action_space
        return None if declared is None else spaces.rebuild(declared)

    def check(self, env: RemoteEnv) -> None:
        """Compare its declared spaces with the env's.

        Raises:
            SpacesDiffer: they are not equal.
        """
        check_spaces(self._description, env)

    async def act(
        self,
        obs: Any,
        info: Mapping[str, Any] | None = None,
        deterministic: bool = False,
        seed: int | None = None,
        env_id: int = 0,
        step: int = 0,
    ) -> Any:
        """An action for one observation.

        Args:
            obs: of the env.
            info: of the env; legal actions travel as ``info["action_mask"]``.
            deterministic: the best action rather than a sample.
            seed: with ``env_id`` and ``step`` it makes a random policy's answer the same each time.
            env_id: index of the sub-environment.
            step: number of the step in its episode.

        Raises:
            AgentError: the agent's code raised.
            RequestTimeout: no worker answered a stateless one within the ``timeout`` of the :class:`meshrl.Mesh`, in
                all of which it was sent again after 2, 4, 8 s and so on.
            UnknownName: no worker serves it any more.
        """
        fields = fields_of(
            obs=obs,
            info=dict(info) if info is not None else None,
            deterministic=deterministic or None,
            seed=seed,
            env_id=env_id or None,
            step=step or None,
            action_space=self._space,
        )
        if obs is None:
            fields["obs"] = None
        if self._session is not None:
            return (await self._session.request("act", fields)).get("action")
        if self._closed:
            raise SessionClosed(f"agent {self.name}: it was closed by this client")
        return await self._act_anywhere(fields)

    async def _act_anywhere(self, fields: Frame) -> Any:
        connection, timeout = self._context.connection, self._context.timeout
        answers: asyncio.Queue[bytes | MeshError | None] = asyncio.Queue()
        began = time.monotonic()
        body = pack(fields)
        # What must be split goes to one worker: the parts of a message on a queue group would be dealt out.
        asked: list[str] | None = None
        if len(body) > connection.max_payload:
            asked = []
            body = pack({"name": self.name, **fields})  # there, the subject does not say which agent is meant
        rid = connection.request(self._to(asked), body, answers.put_nowait, mark=(0, 0, 0), on_fail=answers.put_nowait)
        attempt, again_s = 0, min(ACT_AGAIN_S, timeout / 3)
        try:
            while True:
                left = began + timeout - time.monotonic()
                try:
                    async with asyncio.timeout(max(min(again_s, left), 0.0)):
                        answer = await answers.get()
                except TimeoutError:
                    if left <= again_s:
                        raise RequestTimeout(
                            f"agent {self.name} did not answer within {timeout:g} s", timeout_s=timeout
                        ) from None
                    again_s *= 2
                else:
                    if isinstance(answer, MeshError):
                        raise answer
                    if answer is not None:
                        return _action_of(answer)
                    now = time.monotonic()
                    grace = GRACE_S if connection.up_for(began) > GRACE_AFTER_RECONNECT_S else GRACE_AFTER_RECONNECT_S
                    if now - began > min(grace, timeout / 2):
                        raise self._unknown()
                    await asyncio.sleep(AGAIN_IN_GRACE_S)
                attempt += 1
                # To the same reply subject: by it, a worker knows the request again.
                connection.again(rid, self._to(asked), body, mark=(0, 0, attempt))
        finally:
            connection.forget(rid)

    def _to(self, asked: list[str] | None) -> str:
        """The subject of the next sending; of a large one, that of the freest worker not yet ``asked``."""
        if asked is None:
            return self._subject
        entries = self._context.registry.directory.candidates("agent", self.name)
        others = [entry for entry in entries if entry.worker not in asked] or entries
        if others:
            asked.append(max(others, key=lambda entry: entry.advertisement.free).worker)
        elif not asked:
            raise self._unknown()
        return self._context.subjects.worker(asked[-1], "act", self._context.connection.user)

    def _unknown(self) -> UnknownName:
        return UnknownName(f"no worker serves agent {self.name!r} any more", name=self.name)

    def _leased(self, op: str) -> RemoteSession:
        if self._session is None:
            raise UsageError(f"agent {self.name} is stateless: it has no {op}; lease it with stateful=True")
        return self._session

    async def reset(self, *, seed: int | None = None) -> None:
        """Begin an episode (stateful agents)."""
        await self._leased("reset").request("reset", fields_of(seed=seed))

    async def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
        """Tell the outcome of the last action (stateful agents)."""
        fields = {"reward": reward, "terminated": terminated, "truncated": truncated}
        await self._leased("observe").request("observe", fields)

    async def settle(self) -> Any:
        """The result of the call whose waiting was cancelled (stateful agents).

        Raises:
            NothingUnsettled: no call was cancelled.
        """
        _, reply = await self._leased("settle").settle()
        return reply.get("action")

    async def state(self) -> SessionState:
        """Where its session stands (stateful agents)."""
        return SessionState.model_validate((await self._leased("state").request("state", {})).get("state"))

    async def close(self) -> None:
        """End its lease, if it has one. Safe to call twice."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


async def open_agent(
    context: Context,
    name: str,
    *,
    kwargs: Mapping[str, Any] | None,
    stateful: bool,
    env: RemoteEnv | None,
    where: Mapping[str, Any] | None,
    wait: float,
) -> RemoteAgent:
    """Find an agent, compare its spaces with the env's, and lease it if it is stateful."""
    description = await Opening(context, "agent", name, wait=wait, where=None, request={}).described()
    if description.stateful != stateful:
        is_, other = ("stateful", "True") if description.stateful else ("stateless", "False")
        raise UsageError(f"agent {description.name} is {is_}; ask for it with stateful={other}", name=description.name)
    if env is not None:
        check_spaces(description, env)
    if not stateful:
        if kwargs:
            raise UsageError(f"agent {description.name} is stateless and shared: it takes no kwargs")
        return RemoteAgent(context, description, None, env)
    session = await context.open("agent", name, kwargs, where, wait)
    try:
        return RemoteAgent(context, session.grant.description, session, env)
    except BaseException:
        await shielded(session.close())
        raise


def check_spaces(description: Description, env: RemoteEnv) -> None:
    """Compare what an agent declares with an env's spaces.

    Raises:
        SpacesDiffer: they are not equal.
    """
    pairs = (
        ("observation", description.observation_space, env.observation_space),
        ("action", description.action_space, env.action_space),
    )
    for which, declared, actual in pairs:
        if declared is not None and spaces.rebuild(declared) != actual:
            raise SpacesDiffer(
                f"agent {description.name} declares the {which} space {spaces.rebuild(declared)}, env {env.name} has "
                f"{actual}; choose another agent, or wrap the env",
                agent=description.name,
                env=env.name,
                which=which,
            )


def _action_of(answer: bytes) -> Any:
    body = unpack(answer)
    if not isinstance(body, dict):
        raise MalformedMessage(f"an answer to act is a map, not {type(body).__name__}")
    if "error" in body:
        raise from_wire(body["error"])
    if "action" not in body:
        raise MalformedMessage("an answer to act has no action")
    return body["action"]
