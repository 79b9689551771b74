"""The agent worker: serves policies by name."""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.errors import AgentError, InvalidName, MalformedMessage, MeshError, NotAllowed, UnencodableValue
from meshrl.protocol.pace import Pace
from meshrl.protocol.seeds import check_seed
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import Frame, error_reply
from meshrl.wire.messages import Description, Open, SessionState
from meshrl.worker.describe import versions
from meshrl.worker.factories import load
from meshrl.worker.service import Service, valid_names

STEP_DEADLINE_S = 300.0
# Keyword arguments that a policy may take beside the observation; it gets those that its signature names.
OFFERED = ("info", "deterministic", "seed", "env_id", "step", "action_space")
# Requests that one batch may hold; the rest makes the next.
MAX_BATCH = 256


@dataclass
class _Request:
    """One stateless act, until it is answered."""

    reply: str
    obs: Any
    offered: dict[str, Any]


@dataclass
class _Policy:
    """A stateless policy and the queue before it."""

    name: str
    act: Callable[..., Any]
    takes: frozenset[str]
    act_batch: Callable[..., Any] | None
    pace: Pace = field(default_factory=Pace)
    waiting: list[_Request] = field(default_factory=list)
    busy: bool = False


class HostedAgent:
    """A stateful agent under one session."""

    coroutine = False

    def __init__(self, agent: Any, *, name: str, session: str, worker: str) -> None:
        self.agent = agent
        self.name = name
        self.session = session
        self.worker = worker
        self.pace = Pace()
        self._takes = _taken(agent.act)
        self._episode = 0
        self._steps = 0
        self._total = 0
        self._return = 0.0
        self._seed: int | None = None
        self._phase = "new"

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op; gives the reply's own fields."""
        if op == "act":
            obs, offered = _obs(body), _offered(body, self._takes)
            self._steps += 1
            self._total += 1
            return {"action": self.agent.act(obs, **offered)}
        if op == "reset":
            return self._reset(body)
        if op == "observe":
            return self._observe(body)
        if op == "state":
            return {"state": self._state()}
        raise MalformedMessage(f"an agent session has no op {op!r}")

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same."""
        return self.run(op, body)

    def close(self) -> None:
        """Let go of the agent; calls its ``close`` if it has one."""
        close = getattr(self.agent, "close", None)
        if close is not None:
            close()

    def _reset(self, body: Frame) -> Frame:
        if body.get("seed") is not None:
            self._seed = check_seed(body["seed"])
        self._episode += 1
        self._steps = 0
        self._return = 0.0
        self._phase = "running"
        reset = getattr(self.agent, "reset", None)
        if reset is not None:
            takes_seed = "seed" in inspect.signature(reset).parameters
            reset(**({"seed": body.get("seed")} if takes_seed else {}))
        return {}

    def _observe(self, body: Frame) -> Frame:
        reward, terminated, truncated = body.get("reward"), body.get("terminated"), body.get("truncated")
        if reward is None or terminated is None or truncated is None:
            raise MalformedMessage("observe takes reward, terminated and truncated")
        if not isinstance(reward, (int, float, np.integer, np.floating)):
            raise MalformedMessage(f"a reward is a number, not {type(reward).__name__}")
        ended = _flag(body, "terminated") or _flag(body, "truncated")
        try:
            self._return += float(reward)
        except OverflowError as exc:
            raise MalformedMessage("a reward beyond what a float holds") from exc
        if ended:
            self._phase = "ended"
        observe = getattr(self.agent, "observe", None)
        if observe is not None:
            observe(reward, terminated, truncated)
        return {}

    def _state(self) -> dict[str, Any]:
        return SessionState.model_validate(
            {
                "session": self.session,
                "worker": self.worker,
                "name": self.name,
                "phase": self._phase,
                "episode": self._episode,
                "steps": self._steps,
                "total_steps": self._total,
                "seed": self._seed,
                "episode_return": self._return,
            }
        ).model_dump()


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

            Attributes ``observation_space`` and ``action_space`` declare what it acts in; without them, anything.
        url: of the NATS server; None finds the mesh as :class:`meshrl.Mesh` does.
        namespace: one mesh of several on the same NATS account.
        credentials: a credentials or NKEY file, or a :class:`~meshrl.bus.login.Credentials`.
        slots: how many stateful sessions the worker holds at once.
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
            capabilities=capabilities,
            lease_s=lease_s,
        )
        self._allow_kwargs = sorted(allow_kwargs)
        self._policies: dict[str, _Policy] = {}
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
            self._policies[name] = _Policy(name, act, _taken(act), getattr(agent, "act_batch", None))

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

    def _construct(self, open_: Open, description: Description) -> tuple[HostedAgent, Description]:
        made = self._classes.get(open_.name)
        if made is None:
            raise NotAllowed(f"agent {open_.name} is stateless: it is not leased; ask for it with stateful=False")
        agent = made(**open_.kwargs)
        return HostedAgent(agent, name=open_.name, session=open_.session, worker=self.id), description

    # ---------------------------------------------------------------- stateless

    async def _subscribe(self, connection: Connection) -> None:
        for name, policy in self._policies.items():
            handler = self._taking(policy)
            await connection.subscribe(self.subjects.any_act(name, "*"), handler, queue="act", join=False)
        await connection.subscribe(self.subjects.at_worker(self.id, "act"), self._on_directed)

    def _taking(self, policy: _Policy) -> Callable[[str, str, bytes], None]:
        def deliver(_subject: str, reply: str, data: bytes) -> None:
            self._take_act(policy, reply, data)

        return deliver

    def _on_directed(self, _subject: str, reply: str, data: bytes) -> None:
        try:
            body = unpack(data)
            if not isinstance(body, dict):
                raise MalformedMessage(f"an act is a map, not {type(body).__name__}")
            name = body.get("name")
            policy = self._policies.get(name) if isinstance(name, str) else None
            if policy is None and name is None and len(self._policies) == 1:
                policy = next(iter(self._policies.values()))
            if policy is None:
                raise MalformedMessage(f"worker {self.id}: an act sent to a worker says which agent (name)")
        except MeshError as exc:
            self._replies.refuse(reply, exc)
            return
        self._take_act(policy, reply, data)

    def _take_act(self, policy: _Policy, reply: str, data: bytes) -> None:
        try:
            body = unpack(data)
            if not isinstance(body, dict):
                raise MalformedMessage(f"an act is a map, not {type(body).__name__}")
            policy.waiting.append(_Request(reply, _obs(body), _offered(body, frozenset(OFFERED))))
        except MeshError as exc:
            self._replies.refuse(reply, exc)
            return
        if len(policy.waiting) == 1 and not policy.busy:
            # At the end of this turn of the loop: what arrived in the same read is answered as one batch.
            asyncio.get_running_loop().call_soon(self._turn, policy)

    def _turn(self, policy: _Policy) -> None:
        if policy.busy or not policy.waiting:
            return
        batch, policy.waiting = policy.waiting[:MAX_BATCH], policy.waiting[MAX_BATCH:]
        if policy.pace.inline:
            self._answer_acts(policy, batch, self._run_batch(policy, batch))
            return
        policy.busy = True

        def run() -> None:
            answers = self._run_batch(policy, batch)
            self._threads.back(self._answer_acts, policy, batch, answers)

        self._threads.submit(run)

    def _run_batch(self, policy: _Policy, batch: list[_Request]) -> list[Frame]:
        began = time.monotonic()
        answers: list[Frame] = []
        if policy.act_batch is not None:
            try:
                actions = list(policy.act_batch([r.obs for r in batch], [r.offered for r in batch]))
                if len(actions) != len(batch):
                    raise ValueError(f"act_batch gave {len(actions)} actions for {len(batch)} observations")
                answers = [{"action": action} for action in actions]
            except (Exception, SystemExit) as exc:  # noqa: BLE001  # agent code may raise anything
                answers = [error_reply(self._act_error(policy, exc)) for _ in batch]
        else:
            for request in batch:
                offered = {name: value for name, value in request.offered.items() if name in policy.takes}
                try:
                    answers.append({"action": policy.act(request.obs, **offered)})
                except MeshError as exc:
                    answers.append(error_reply(exc))
                except (Exception, SystemExit) as exc:  # noqa: BLE001  # as above
                    answers.append(error_reply(self._act_error(policy, exc)))
        policy.pace.took(time.monotonic() - began)
        return answers

    def _act_error(self, policy: _Policy, exc: BaseException) -> AgentError:
        return AgentError(
            f"agent {policy.name}: act raised {type(exc).__name__}: {exc}"[:2000],
            remote_traceback="".join(traceback.format_exception(exc))[-20_000:],
            type=type(exc).__name__,
            worker=self.id,
        )

    def _answer_acts(self, policy: _Policy, batch: list[_Request], answers: list[Frame]) -> None:
        policy.busy = False
        for request, answer in zip(batch, answers, strict=True):
            try:
                packed = pack(answer)
            except UnencodableValue as exc:
                packed = pack(error_reply(exc))
            self._replies.send(request.reply, packed)
        if policy.waiting:
            asyncio.get_running_loop().call_soon(self._turn, policy)


def _declared(agent: Any, which: str) -> dict[str, Any] | None:
    space = getattr(agent, which, None)
    return spaces.describe(space) if isinstance(space, gymnasium.Space) else None


def _taken(act: Callable[..., Any]) -> frozenset[str]:
    try:
        parameters = inspect.signature(act).parameters
    except (TypeError, ValueError):
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return frozenset(OFFERED)
    return frozenset(OFFERED) & set(parameters)


def _obs(body: Frame) -> Any:
    if "obs" not in body:
        raise MalformedMessage("an act needs an observation (obs)")
    return body["obs"]


def _flag(body: Frame, name: str, *, default: bool | None = None) -> bool:
    value = body.get(name, default)
    if not isinstance(value, (bool, np.bool_)):
        raise MalformedMessage(f"{name} is true or false, not {type(value).__name__}")
    return bool(value)


def _offered(body: Frame, takes: frozenset[str]) -> dict[str, Any]:
    """What the policy's signature names, of what the request says."""
    offered: dict[str, Any] = {
        "info": body.get("info"),
        "deterministic": _flag(body, "deterministic", default=False),
        "seed": body.get("seed"),
        "env_id": body.get("env_id", 0),
        "step": body.get("step", 0),
    }
    if "action_space" in takes:
        described = body.get("action_space")
        offered["action_space"] = None if described is None else _space(pack(described))
    return {name: value for name, value in offered.items() if name in takes}


@lru_cache(maxsize=256)
def _space(packed: bytes) -> gymnasium.Space[Any]:
    return spaces.rebuild(unpack(packed))
