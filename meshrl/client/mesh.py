"""``Mesh``: a client's view of the mesh, and the way to its environments and agents."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from meshrl.bus.connection import CONNECT_TIMEOUT_S, Connection, dial
from meshrl.bus.locate import locate
from meshrl.bus.login import Credentials
from meshrl.client.agent import RemoteAgent, open_agent
from meshrl.client.env import RemoteEnv
from meshrl.client.evaluate import Report, evaluate
from meshrl.client.flights import Flights
from meshrl.client.keeper import Keeper
from meshrl.client.opening import Opening
from meshrl.client.session import RemoteSession
from meshrl.errors import MalformedMessage, MeshError, SessionClosed, UsageError, from_wire
from meshrl.protocol.directory import Directory, Event
from meshrl.protocol.doubt import FROZEN_S
from meshrl.protocol.names import resolve
from meshrl.protocol.placement import Placement
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Advertisement, Ask, Description, Grant, Kind, Known, check, parse
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.client")

# At the start, workers answer the first ask within a few milliseconds; nobody is waited for longer than this.
FIRST_ASK_S = 0.5
# After the first answer, the others have this long.
OTHERS_S = 0.05
# How long one subscription lasts on the directory's clock between looks for silent workers.
EXPIRE_S = 0.5


class Mesh:
    """A connection to a mesh, used as an async context manager.

    ::

        async with Mesh() as m:
            env = await m.env("cartpole")
            obs, info = await env.reset(seed=1)

    Args:
        url: of the NATS server; None finds the mesh: ``$MESHRL_URL``, what ``meshrl up`` left running here,
            nats://localhost:4222 if a registry answers there, else an embedded mesh of this process's own.
        namespace: one mesh of several on the same NATS account.
        credentials: a credentials or NKEY file, or a :class:`~meshrl.bus.login.Credentials`.
        timeout: seconds of silence after which a request is given up; a bound on silence, not on work.

    Raises:
        MeshUnreachable: no NATS server answers.
        LoginRefused: it refuses the login.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str = "default",
        credentials: str | Path | Credentials | None = None,
        timeout: float = 30.0,
    ) -> None:
        if timeout <= 0:
            raise UsageError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self._url = url
        self._credentials = credentials
        self.timeout = timeout
        self.subjects = Subjects(namespace)
        self.directory = Directory(sweep_s=EXPIRE_S)
        self.placement = Placement()
        self.refusals: dict[tuple[Kind, str], MeshError] = {}
        self.changed = asyncio.Event()
        self._changed_at = 0.0
        self._sessions: dict[str, RemoteSession] = {}
        self._watchers: set[asyncio.Queue[Event | None]] = set()
        self._asked_about: dict[tuple[str, str, str], float] = {}
        self._heard = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._entered = False

    def __repr__(self) -> str:
        if not self._entered:
            return "<Mesh not entered>"
        return f"<Mesh at {self.connection.url}: {len(self.directory)} served, {len(self._sessions)} sessions>"

    # ---------------------------------------------------------------- life

    async def __aenter__(self) -> Self:
        if self._entered:
            raise UsageError("a Mesh is entered once; make another one")
        namespace = self.subjects.namespace
        url = await locate(self._url, credentials=self._credentials, namespace=namespace)
        self._loop = asyncio.get_running_loop()
        connect_s = min(self.timeout, CONNECT_TIMEOUT_S)
        self.connection: Connection = await dial(
            url, name="meshrl client", credentials=self._credentials, timeout=connect_s
        )
        self._entered = True
        try:
            self.flights = Flights(self.connection, self.subjects, min(self.timeout, FROZEN_S))
            self._keeper = Keeper(url, self._credentials, self.subjects, self._lost_on_thread)
            self.connection.on_close.append(lambda _why: self._notify())
            self.connection.on_reconnect.append(lambda: self._ask(Ask()))
            await self.connection.subscribe(self.subjects.advertisements, self._on_advertisement)
            self._timer = self._loop.call_later(EXPIRE_S, self._expire)
            self._ask_id = self.connection.request(self.subjects.ask, Ask().to_wire(), self._on_known)
            await self._first_news()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close every session that is still open, then disconnect."""
        sessions = list(self._sessions.values())
        await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if hasattr(self, "_keeper"):
            await self._keeper.stop()
        if hasattr(self, "flights"):
            self.flights.close()
        await self.connection.close()
        for queue in self._watchers:
            queue.put_nowait(None)

    async def _first_news(self) -> None:
        try:
            async with asyncio.timeout(FIRST_ASK_S):
                await self._heard.wait()
        except TimeoutError:
            return
        if len(self.directory):
            await asyncio.sleep(OTHERS_S)

    def _check_open(self) -> None:
        if not self._entered:
            raise UsageError("use the mesh inside `async with Mesh() as m:`")
        if self.connection.closed:
            raise SessionClosed("this Mesh was closed")

    # ---------------------------------------------------------------- who is there

    async def envs(self) -> list[Advertisement]:
        """What env workers advertise at this moment, by name and worker."""
        self._check_open()
        return [entry.advertisement for entry in self.directory.entries("env")]

    async def agents(self) -> list[Advertisement]:
        """What agent workers advertise at this moment, by name and worker."""
        self._check_open()
        return [entry.advertisement for entry in self.directory.entries("agent")]

    async def describe(self, name: str, kind: Literal["env", "agent"] = "env", *, wait: float = 5.0) -> Description:
        """The description of a served name: spaces, spec, capabilities, versions.

        Raises:
            UnknownName: nobody serves it.
        """
        self._check_open()
        opening = Opening(self, kind, name, wait=wait, where=None, request={})
        entries = await opening.served()
        deadline = time.monotonic() + wait
        while True:
            for entry in entries:
                if entry.description is not None:
                    return entry.description
            if time.monotonic() >= deadline:
                raise UsageError(f"{name}: its worker did not describe it within {wait:g} s", name=name)
            changed = self.changed
            try:
                async with asyncio.timeout(0.5):
                    await changed.wait()
            except TimeoutError:
                self._ask(Ask(kind=kind))
            entries = await opening.served()

    async def watch(self) -> AsyncIterator[Event]:
        """Changes of who is there: first a ``joined`` for everyone who is, then ``joined``, ``updated`` and ``left``.

        Ends when the mesh is closed.
        """
        self._check_open()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        for entry in self.directory.entries():
            queue.put_nowait(Event("joined", entry.key, entry.advertisement))
        self._watchers.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._watchers.discard(queue)

    # ---------------------------------------------------------------- envs and agents

    async def env(
        self,
        name: str,
        kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        wait: float = 30.0,
        check_actions: Literal["normal", "strict"] = "normal",
    ) -> RemoteEnv:
        """Lease an env by name; its slot is yours until ``close``, the end of the mesh, or your process's end.

        Args:
            name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
            kwargs: for the env's constructor, as far as the worker's operator allows.
            render_mode: Gymnasium's; ``human`` opens a window here and renders arrays there.
            where: capabilities that the worker must have, such as ``{"gpu": True}``.
            wait: seconds to wait for a worker and a free slot.
            check_actions: ``strict`` refuses actions outside a Box's bounds too.

        Raises:
            UnknownName: nobody serves the name, or nobody with those capabilities; near matches are listed.
            MeshFull: no slot became free within ``wait``.
            KwargsNotAllowed: the operator does not let clients pass one of ``kwargs``.
            EnvError: the constructor raised.
        """
        self._check_open()
        remote_mode = "rgb_array" if render_mode == "human" else render_mode
        session = await self.open("env", name, kwargs, where, wait, render_mode=remote_mode)
        return RemoteEnv(session, render_mode=render_mode, check_actions=check_actions)

    async def agent(
        self,
        name: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        stateful: bool = False,
        env: RemoteEnv | None = None,
        where: Mapping[str, Any] | None = None,
        wait: float = 30.0,
    ) -> RemoteAgent:
        """An agent by name.

        Args:
            name: as served.
            kwargs: for a stateful agent's constructor, as far as the worker's operator allows.
            stateful: lease an agent that remembers, as an env is leased; ``reset`` begins an episode.
            env: the env that it will act in: its spaces are compared with the agent's now, and told to agents that act
                in any (such as ``random``).
            where: capabilities that the worker must have (stateful agents only).
            wait: seconds to wait for a worker, and a slot.

        Raises:
            UnknownName: nobody serves the name.
            SpacesDiffer: the agent's declared spaces are not the env's.
        """
        self._check_open()
        return await open_agent(self, name, kwargs=kwargs, stateful=stateful, env=env, where=where, wait=wait)

    async def evaluate(
        self,
        env: str,
        agent: str,
        episodes: int = 100,
        seed: int = 0,
        *,
        env_kwargs: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        concurrency: int = 8,
    ) -> Report:
        """Run ``episodes`` of a served agent in a served env, episode i with the seed ``seed + i``.

        Args:
            env: the env's served name.
            agent: the agent's served name.
            episodes: how many.
            seed: of the first.
            env_kwargs: for the env's constructor.
            deterministic: ask the agent for its best action rather than a sample.
            concurrency: how many episodes run at once, each in an env of its own.
        """
        self._check_open()
        return await evaluate(
            self,
            env,
            agent,
            episodes,
            seed,
            env_kwargs=env_kwargs,
            deterministic=deterministic,
            concurrency=concurrency,
        )

    async def open(
        self,
        kind: Kind,
        name: str,
        kwargs: Mapping[str, Any] | None,
        where: Mapping[str, Any] | None,
        wait: float,
        **request: Any,
    ) -> RemoteSession:
        """Lease a session; what :meth:`env` and :meth:`agent` are made of."""
        request["kwargs"] = dict(kwargs or {})
        grant: Grant = await Opening(self, kind, name, wait=wait, where=where, request=request).run()
        self._keeper.hold(grant.worker, grant.session, grant.epoch, grant.lease_s)
        session = RemoteSession(self, grant)
        self._sessions[grant.session] = session
        return session

    def forget(self, session: RemoteSession) -> None:
        """The session is over: it is renewed no more, and its slot counts as free."""
        grant = session.grant
        if self._sessions.pop(grant.session, None) is not None:
            self._keeper.release(grant.worker, grant.session)
            self.placement.released(grant.worker, time.monotonic())

    def _lost_on_thread(self, session: str, reason: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lost, session, reason)
        except RuntimeError:
            return  # the loop has ended, and the session with it

    def _lost(self, session: str, reason: str) -> None:
        lost = self._sessions.get(session)
        if lost is not None:
            lost.lost(reason)

    # ---------------------------------------------------------------- the directory

    def resolve(self, kind: Kind, asked: str) -> str | None:
        """The served name that ``asked`` means now."""
        return resolve(asked, self.directory.names(kind))

    def ask_for(self, kind: Kind, name: str) -> None:
        """Ask every worker for ``name``; one that serves on demand begins to."""
        self.refusals.pop((kind, name), None)
        self._ask(Ask(kind=kind, name=name))

    def gone(self, worker: str) -> None:
        """This client found the worker dead."""
        self.placement.forget(worker)
        self._tell(self.directory.lost(worker, time.monotonic()))

    def changed_since(self, when: float) -> bool:
        """Whether the directory changed after ``when``."""
        return self._changed_at > when

    def _ask(self, ask: Ask) -> None:
        if not self.connection.closed:
            self.connection.again(self._ask_id, self.subjects.ask, ask.to_wire())

    def _on_advertisement(self, subject: str, _reply: str, body: bytes) -> None:
        try:
            said = parse(Advertisement, body)
        except MeshError as exc:
            log.debug("ignored what came on %s: %s", subject, exc)
            return
        # Permissions rest on the subject: a body may not speak for another worker than it was published for.
        if subject == self.subjects.advertisement(said.kind, said.name, said.worker):
            self._take_in(said)

    def _take_in(self, advertisement: Advertisement) -> None:
        now = time.monotonic()
        self._tell(self.directory.heard(advertisement, now))
        for missing in self.directory.missing():
            if now - self._asked_about.get(missing, -10.0) > 1.0:
                self._asked_about[missing] = now
                self._ask(Ask(worker=missing[0], name=missing[1]))

    def _on_known(self, data: bytes | None) -> None:
        self._heard.set()
        if data is None:
            return  # no worker is there yet
        body = unpack(data)
        if isinstance(body, dict) and "error" in body:
            exc = from_wire(body["error"])
            asked = exc.details.get("asked")
            if isinstance(asked, list) and [type(part) for part in asked] == [str, str]:
                self.refusals[asked[0], asked[1]] = exc
                self._notify()
            return
        known = check(Known, body)
        if len(known.advertisements) != len(known.descriptions):
            raise MalformedMessage("a worker described other names than it advertised")
        for advertisement, description in zip(known.advertisements, known.descriptions, strict=True):
            self.directory.described(description, advertisement.description)
            self._take_in(advertisement)
        self._notify()

    def _tell(self, events: list[Event]) -> None:
        if not events:
            return
        for event in events:
            if event.kind == "left" and not any(e.worker == event.key[2] for e in self.directory.entries()):
                self.placement.forget(event.key[2])
            for queue in self._watchers:
                queue.put_nowait(event)
        self._notify()

    def _notify(self) -> None:
        self._changed_at = time.monotonic()
        self.changed.set()
        self.changed = asyncio.Event()

    def _expire(self) -> None:
        self._timer = self._loop.call_later(EXPIRE_S, self._expire)
        self._tell(self.directory.expire(time.monotonic()))
