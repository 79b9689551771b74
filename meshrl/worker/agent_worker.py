"""The agent worker: serves policies by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.bus.subscription import Subscription
from meshrl.errors import AgentError, InvalidName, MalformedMessage, MeshError, NotAllowed
from meshrl.wire import spaces
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Description, Open
from meshrl.worker.acts import Acts
from meshrl.worker.describe import versions
from meshrl.worker.factories import load
from meshrl.worker.hosted_agent import HostedAgent
from meshrl.worker.service import Service, valid_names

STEP_DEADLINE_S = 300.0


class AgentWorker(Service):
    """Serves agents.

    ::

        async with AgentWorker({"random": random_policy}) as worker:
            await worker.serve_forever()

    Args:
        agents: what is served, by name:

            - a callable ``policy(obs) -> action``, or an object with ``act(obs) -> action``: stateless. It gets what
              it names of ``info, deterministic, seed, env_id, step, action_space`` in its signature. With
              ``act_batch(observations, offered) -> actions`` as well, requests that arrive together are answered by one
              call of it: lists of the same length, ``offered`` one dict a request.
            - a class with ``act``: stateful. Each lease gets an instance of its own; ``reset(seed)`` and
              ``observe(reward, terminated, truncated)`` are called if it has them.
            - ``module:name`` of one of these.

            Each of these methods may be a coroutine function: it is awaited on the worker's event loop, requests of a
            stateless ``act`` each in a task of its own.

            Attributes ``observation_space`` and ``action_space`` declare what it acts in; without them, anything.
        url: of the NATS server; None finds the mesh as :class:`meshrl.Mesh` does.
        namespace: one mesh of several on the same NATS account.
        credentials: a credentials or NKEY file, or a :class:`~meshrl.bus.login.Credentials`.
        slots: how many stateful sessions the worker holds at once.
        max_slots_per_user: how many of the slots one user's sessions may take together; an open beyond that waits, and
            keeps nobody else waiting. None for all of them.
        capabilities: facts of this machine that clients may ask for by ``where``.
        allow_kwargs: constructor arguments of stateful agents that clients may pass.
        lease_s: seconds for which a session lives without a renewal.
    """

    kind = "agent"
    crash = AgentError

    def __init__(
        self,
        agents: Mapping[str, Any],
        url: str | None = None,
        *,
        namespace: str = "default",
        credentials: str | Path | Credentials | None = None,
        slots: int = 64,
        max_slots_per_user: int | None = None,
        capabilities: Mapping[str, Any] | None = None,
        allow_kwargs: Iterable[str] = (),
        lease_s: float = 15.0,
    ) -> None:
        valid_names(agents)
        super().__init__(
            url=url,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            max_slots_per_user=max_slots_per_user,
            capabilities=capabilities,
            lease_s=lease_s,
        )
        self._allow_kwargs = sorted(allow_kwargs)
        self._policies: dict[str, Acts] = {}
        self._classes: dict[str, Any] = {}
        self._sources: dict[str, Any] = {}
        for name, source in agents.items():
            agent = load(source) if isinstance(source, str) else source
            self._sources[name] = agent
            if inspect.isclass(agent):
                if not callable(getattr(agent, "act", None)):
                    raise InvalidName(f"{name}: class {agent.__name__} has no method act")
                self._classes[name] = agent
                continue
            act = getattr(agent, "act", agent)
            if not callable(act):
                raise InvalidName(
                    f"{name}: an agent is a callable, an object with act or a class with act, not {agent!r}"
                )
            self._policies[name] = Acts(name, agent, worker=self.id, threads=self._threads, send=self._replies.send)

    async def _describe_all(self) -> dict[str, Description]:
        described = {}
        for name, agent in self._sources.items():
            described[name] = Description(
                kind="agent",
                name=name,
                worker=self.id,
                observation_space=_declared(agent, "observation_space"),
                action_space=_declared(agent, "action_space"),
                capabilities=self.capabilities,
                allow_kwargs=self._allow_kwargs,
                step_deadline_s=STEP_DEADLINE_S,
                stateful=name in self._classes,
                versions=versions(agent),
            )
        return described

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[HostedAgent, Description]:
        check_wanted()
        made = self._classes.get(open_.name)
        if made is None:
            raise NotAllowed(f"agent {open_.name} is stateless: it is not leased; ask for it with stateful=False")
        agent = made(**open_.kwargs)
        hosted = HostedAgent(agent, name=open_.name, session=open_.session, worker=self.id, threads=self._threads)
        return hosted, description

    def _is_idle(self) -> bool:
        return super()._is_idle() and not any(map(len, self._policies.values()))

    def _stop(self) -> None:
        for policy in self._policies.values():
            policy.stop()

    # ---------------------------------------------------------------- stateless

    async def _subscribe(self, connection: Connection) -> list[Subscription]:
        shared = []
        for name, policy in self._policies.items():
            subject, handler = self.subjects.any_act(name, "*"), self._taking(policy)
            shared.append(await connection.subscribe(subject, handler, queue="act", join=False))
        await connection.subscribe(self.subjects.at_worker(self.id, "act"), self._on_directed)
        return shared

    def _taking(self, policy: Acts) -> Callable[[str, str, bytes], None]:
        def deliver(_subject: str, reply: str, data: bytes) -> None:
            try:
                policy.take(reply, _act(data))
            except MeshError as exc:
                self._replies.refuse(reply, exc)

        return deliver

    def _on_directed(self, _subject: str, reply: str, data: bytes) -> None:
        """An act for this very worker: over the payload limit, most often."""
        try:
            body = _act(data)
            name = body.get("name")
            policy = self._policies.get(name) if isinstance(name, str) else None
            if policy is None and name is None and len(self._policies) == 1:
                policy = next(iter(self._policies.values()))
            if policy is None:
                raise MalformedMessage(
                    f"worker {self.id}: an act sent to a worker says which agent (name); it serves "
                    f"{', '.join(self._policies) or 'no stateless ones'}"
                )
            policy.take(reply, body)
        except MeshError as exc:
            self._replies.refuse(reply, exc)


def _act(data: bytes) -> Frame:
    body = unpack(data)
    if not isinstance(body, dict):
        raise MalformedMessage(f"an act is a map, not {type(body).__name__}")
    return body


def _declared(agent: Any, which: str) -> dict[str, Any] | None:
    space = getattr(agent, which, None)
    return spaces.describe(space) if isinstance(space, gymnasium.Space) else None
