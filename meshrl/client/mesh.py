"""``Mesh``: a client's view of the mesh, and the way to its environments and agents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from gymnasium.vector import AutoresetMode

from meshrl.bus.connect import CONNECT_TIMEOUT_S, dial
from meshrl.bus.locate import locate
from meshrl.bus.login import Credentials
from meshrl.client.agent import RemoteAgent, open_agent
from meshrl.client.context import Context
from meshrl.client.env import RemoteEnv
from meshrl.client.evaluate import Report, evaluate
from meshrl.client.manifest import Experiment
from meshrl.client.opening import Opening
from meshrl.client.pool import RemotePool
from meshrl.client.recordings import Recordings, RecordWish, record_of
from meshrl.client.recovery import ON_LOSS, OnLoss
from meshrl.client.session import close_all
from meshrl.client.shards import open_shards
from meshrl.client.shielded import shielded
from meshrl.client.vector import RemoteVectorEnv
from meshrl.errors import UsageError
from meshrl.protocol.directory import Event
from meshrl.wire.messages import Advertisement, Description, Seeding
from meshrl.wire.subjects import Subjects


class Mesh(Recordings):
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
        timeout: seconds; a bound on silence, not on work. A session whose worker cannot be heard at all is lost after
            a third of it, though not before 10 s (or before ``timeout``, where that is shorter): so after 10 s by
            default, and after 40 s with 120. A stateless ``act`` is given up after all of it, answers being all that
            there is to hear of one.
        experiment: for which it records, whatever is opened; None for the one whose script this process runs, if it
            is one of `meshrl experiment`.

    Attributes:
        experiment: the same.

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
        experiment: Experiment | None = None,
    ) -> None:
        if timeout <= 0:
            raise UsageError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self._url = url
        self._credentials = credentials
        self._timeout = timeout
        self._subjects = Subjects(namespace)
        self._context: Context | None = None
        self.experiment = Experiment.from_environment() if experiment is None else experiment

    def __repr__(self) -> str:
        context = self._context
        if context is None:
            return "<Mesh not entered>"
        return f"<Mesh at {context.connection.url}: {len(context.registry.directory)} served, {len(context)} sessions>"

    # ---------------------------------------------------------------- life

    async def __aenter__(self) -> Self:
        if self._context is not None:
            raise UsageError("a Mesh is entered once; make another one")
        url = await locate(self._url, credentials=self._credentials, namespace=self._subjects.namespace)
        connect_s = min(self._timeout, CONNECT_TIMEOUT_S)
        connection = await dial(
            url, name="meshrl client", credentials=self._credentials, timeout=connect_s, confirm=False, polls=True
        )
        self._context = Context(connection, url, self._credentials, self._subjects, self._timeout)
        try:
            await self._context.begin()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close every session that is still open, then disconnect. Cancelled, it does so all the same."""
        if self._context is not None:
            self._context.end()
            await shielded(self._context.close())

    def _entered(self) -> Context:
        if self._context is None:
            raise UsageError("use the mesh inside `async with Mesh() as m:`")
        return self._context

    def _open(self) -> Context:
        context = self._entered()
        context.check_open()
        return context

    # ---------------------------------------------------------------- who is there

    async def envs(self) -> list[Advertisement]:
        """What env workers advertise at this moment, by name and worker."""
        directory = self._open().registry.directory
        return [entry.advertisement for entry in directory.entries("env")]

    async def agents(self) -> list[Advertisement]:
        """What agent workers advertise at this moment, by name and worker."""
        directory = self._open().registry.directory
        return [entry.advertisement for entry in directory.entries("agent")]

    async def describe(self, name: str, kind: Literal["env", "agent"] = "env", *, wait: float = 5.0) -> Description:
        """The description of a served name: spaces, spec, capabilities, versions.

        Raises:
            UnknownName: nobody serves it.
            RequestTimeout: its workers advertise it, and did not describe it within ``wait`` seconds.
        """
        return await Opening(self._open(), kind, name, wait=wait, where=None, request={}).described()

    def watch(self) -> AsyncIterator[Event]:
        """Changes of who is there: first a ``joined`` for everyone who is, then ``joined``, ``updated`` and ``left``.

        Who looks seldom is told of the newest ``updated`` alone. Ends when the mesh is closed.

        Raises:
            MeshError: the connection was ended otherwise.
        """
        context = self._open()
        return context.registry.watch(context.hearing)

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
        on_loss: OnLoss = "resume",
        record: RecordWish | None = None,
        record_every: int = 1,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
    ) -> RemoteEnv:
        """Lease an env by name; its slot is yours until ``close``, the end of the mesh, or your process's end.

        Args:
            name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
            kwargs: for the env's constructor, as far as the worker's operator allows.
            render_mode: Gymnasium's; ``human`` opens a window here and renders arrays there.
            where: capabilities that the worker must have, such as ``{"gpu": True}``.
            wait: seconds to wait for a worker and a free slot.
            check_actions: ``strict`` refuses actions outside a Box's bounds too.
            on_loss: what becomes of an episode whose worker or session is lost. ``resume``: it goes on at another
                worker in the same state, or, where that cannot be, is truncated. ``truncate``: its next step gives the
                last observation again, reward 0, ``truncated`` and ``info["session_lost"]``, and ``reset`` begins the
                next elsewhere. ``raise``: ``SessionLost``.
            record: how much of it is recorded: ``off``; ``actions``, from which all else can be made again; ``full``,
                observations and infos too. None leaves it to the worker's operator.
            record_every: record every so many episodes.
            labels: what its episodes can be found by later, at most 32 texts by name.
            policy: the name of whoever chooses the actions.

        Raises:
            UnknownName: nobody serves the name, or nobody with those capabilities; near matches are listed.
            MeshFull: no slot became free within ``wait``.
            MeshUnreachable: the server was away at the end of ``wait``.
            KwargsNotAllowed: the operator does not let clients pass one of ``kwargs``.
            EnvError: the constructor raised.
        """
        remote_mode = "rgb_array" if render_mode == "human" else render_mode
        on_loss = _on_loss(on_loss)
        asked = record_of(record, record_every, labels, policy, self.experiment)
        session = await self._open().open(
            "env", name, kwargs, where, wait, on_loss=on_loss, render_mode=remote_mode, record=asked
        )
        try:
            return RemoteEnv(session, render_mode=render_mode, check_actions=check_actions)
        except BaseException:
            await shielded(session.close())
            raise

    async def vector(
        self,
        name: str,
        num_envs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        seeding: Seeding = "gymnasium",
        shards: int | None = None,
        wait: float = 30.0,
        check_actions: Literal["normal", "strict"] = "normal",
        on_loss: OnLoss = "resume",
        record: RecordWish | None = None,
        record_every: int = 1,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
    ) -> RemoteVectorEnv:
        """Lease ``num_envs`` envs that are stepped together, spread over workers.

        Args:
            name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
            num_envs: how many sub-environments.
            kwargs: for the envs' constructor, as far as the workers' operator allows.
            render_mode: Gymnasium's, except ``human``.
            where: capabilities that each worker must have, such as ``{"gpu": True}``.
            autoreset_mode: what becomes of a sub-environment whose episode has ended.
            seeding: ``gymnasium``: sub-environment i is reset with ``seed + i``, and resets without a seed go on.
                ``derived``: every episode's seed is derived from the reset's, so that each can be reproduced alone.
                ``implementation``: whatever a hosted vector implementation does with the seed.
            shards: over how many workers' sessions they are spread; None leaves it to placement.
            wait: seconds to wait for workers and free slots.
            check_actions: ``strict`` refuses actions outside a Box's bounds too.
            on_loss: what becomes of the episodes whose worker or session is lost; see :meth:`env`. With ``resume`` it
                costs one slow step; where that cannot be, and with ``truncate``, the episodes of that worker's
                sub-environments end with ``infos["session_lost"]``.
            record: how much of it is recorded, as for :meth:`env`.
            record_every: of each sub-environment, record every so many episodes.
            labels: as for :meth:`env`.
            policy: as for :meth:`env`.

        Raises:
            UnknownName: nobody serves the name, or nobody with those capabilities.
            UsageError: nobody who serves it has vectors of that mode or seeding, there is no such mode, or the workers
                that got shards have vectors of different implementations.
            SpacesDiffer: the workers that got shards serve envs of different spaces.
            MeshFull: there were not enough free slots within ``wait``.
            MeshUnreachable: the server was away at the end of ``wait``.
            KwargsNotAllowed: the operator does not let clients pass one of ``kwargs``.
            EnvError: a constructor raised.
        """
        if render_mode == "human":
            raise UsageError("a vector is rendered as arrays: render_mode='rgb_array', one frame a sub-environment")
        mode = _mode_of(autoreset_mode)
        sessions = await open_shards(
            self._open(),
            name,
            kwargs,
            where,
            wait,
            num_envs=num_envs,
            shards=shards,
            on_loss=_on_loss(on_loss),
            form="vector",
            autoreset_mode=mode.value,
            seeding=seeding,
            render_mode=render_mode,
            record=record_of(record, record_every, labels, policy, self.experiment),
        )
        try:
            return RemoteVectorEnv(
                sessions, autoreset_mode=mode, seeding=seeding, render_mode=render_mode, check_actions=check_actions
            )
        except BaseException:
            await close_all(sessions)
            raise

    async def pool(
        self,
        name: str,
        num_envs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
        where: Mapping[str, Any] | None = None,
        *,
        fair: bool = False,
        seeding: Literal["gymnasium", "derived"] = "gymnasium",
        shards: int | None = None,
        wait: float = 30.0,
        check_actions: Literal["normal", "strict"] = "normal",
        on_loss: OnLoss = "resume",
        record: RecordWish | None = None,
        record_every: int = 1,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
    ) -> RemotePool:
        """Lease ``num_envs`` envs that are each stepped as soon as they have an action; first ready, first served.

        Args:
            name: as served.
            num_envs: how many sub-environments.
            kwargs: for the envs' constructor, as far as the workers' operator allows.
            where: capabilities that each worker must have.
            fair: where more results are ready than ``recv`` takes, hand out first what belongs to the sub-environments
                that were handed out least, so that fast ones do not crowd out slow ones. Otherwise in the order in
                which they became ready.
            seeding: as for :meth:`vector`.
            shards: over how many workers' sessions they are spread; None leaves it to placement.
            wait: seconds to wait for workers and free slots.
            check_actions: ``strict`` refuses actions outside a Box's bounds too.
            on_loss: what becomes of the episodes whose worker or session is lost; see :meth:`vector`. What the other
                workers have goes on meanwhile.
            record: how much of it is recorded, as for :meth:`env`.
            record_every: of each sub-environment, record every so many episodes.
            labels: as for :meth:`env`.
            policy: as for :meth:`env`.

        Raises:
            MeshError: as :meth:`vector`.
        """
        context = self._open()
        sessions = await open_shards(
            context,
            name,
            kwargs,
            where,
            wait,
            num_envs=num_envs,
            shards=shards,
            on_loss=_on_loss(on_loss),
            form="pool",
            seeding=seeding,
            record=record_of(record, record_every, labels, policy, self.experiment),
        )
        try:
            return RemotePool(sessions, context.flights, seeding=seeding, fair=fair, check_actions=check_actions)
        except BaseException:
            await close_all(sessions)
            raise

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
        return await open_agent(self._open(), name, kwargs=kwargs, stateful=stateful, env=env, where=where, wait=wait)

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
        wait: float = 30.0,
    ) -> Report:
        """Run ``episodes`` of a served agent in a served env, episode i with the seed ``seed + i``.

        Args:
            env: the env's served name.
            agent: the agent's served name.
            episodes: how many.
            seed: of the first.
            env_kwargs: for the env's constructor.
            deterministic: ask the agent for its best action rather than a sample.
            concurrency: how many episodes run at once, each in an env of its own; fewer where the mesh has no more
                slots.
            wait: seconds to wait for a slot.

        Raises:
            UnknownName: nobody serves the env, or the agent.
            MeshFull: there was no slot for even one episode.
        """
        self._open()
        return await evaluate(
            self,
            env,
            agent,
            episodes,
            seed,
            env_kwargs=env_kwargs,
            deterministic=deterministic,
            concurrency=concurrency,
            wait=wait,
        )


def _on_loss(given: OnLoss) -> OnLoss:
    if given not in ON_LOSS:
        raise UsageError(f"on_loss is one of {', '.join(ON_LOSS)}, not {given!r}")
    return given


def _mode_of(given: object) -> AutoresetMode:
    try:
        return AutoresetMode(given)
    except ValueError:
        raise UsageError(
            f"autoreset_mode is NextStep, SameStep or Disabled (or gymnasium.vector.AutoresetMode), not {given!r}"
        ) from None
