"""The env worker: serves environments by name."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.bus.subscription import Subscription
from meshrl.errors import EnvError, MeshError, UnknownName, UsageError
from meshrl.protocol.names import near
from meshrl.protocol.session import Last, Session
from meshrl.recording.chain import Counts
from meshrl.recording.recorder import Recorder
from meshrl.recording.streams import Retention
from meshrl.wire import spaces
from meshrl.wire.messages import Description, Open, Vectors
from meshrl.wire.record import RecordLevel
from meshrl.worker.children import Children
from meshrl.worker.constructing import construct_all
from meshrl.worker.describe import describe_env, encodable
from meshrl.worker.drawing import alone, draws
from meshrl.worker.enforcing import Enforcing
from meshrl.worker.factories import EnvSource, Factory, as_factory, registered
from meshrl.worker.hold import CLOSE_S, Held
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from meshrl.worker.isolation import Deadlines, Isolation, check_isolation
from meshrl.worker.limits import Limits
from meshrl.worker.process_env import ProcessEnv, picklable
from meshrl.worker.proof import says_digests
from meshrl.worker.pulse import SWEEP_S
from meshrl.worker.raised import EndsSession, described
from meshrl.worker.records import Records
from meshrl.worker.sealing import StateKey
from meshrl.worker.service import Service, valid_names
from meshrl.worker.vector_implementations import HostedImplementation, describe_implementation, make_implementation

log = logging.getLogger("meshrl.worker")

SLOTS = 64
# How long one step may run, or one reset.
STEP_DEADLINE_S = 300.0
RESET_DEADLINE_S = 300.0


class EnvWorker(Service):
    """Serves environments; each session gets envs of its own, each of them in one of ``slots``.

    ::

        async with EnvWorker({"cartpole": "CartPole-v1"}) as worker:
            await worker.serve_forever()

    Args:
        envs: what is served, by name: a Gymnasium id (``CartPole-v1``, ``module:Name-v1``), ``module:Class``, a
            callable that gives an env, or a :class:`~meshrl.worker.factories.Factory` with arguments. An env's
            ``reset`` and ``step`` may be coroutine functions.
        url: of the NATS server; None finds the mesh as :class:`meshrl.Mesh` does.
        namespace: one mesh of several on the same NATS account.
        credentials: a credentials or NKEY file, or a :class:`~meshrl.bus.login.Credentials`.
        slots: how many envs the worker holds at once, over all names: a single env takes one, a vector or pool one for
            each of its sub-environments.
        max_slots_per_user: how many of the slots one user's sessions may take together; an open beyond that waits, and
            keeps nobody else waiting. None for all of them.
        capabilities: facts of this machine that clients may ask for by ``where``.
        allow_kwargs: constructor arguments that clients may pass; ``("*",)`` for any.
        allow: public names of the env that clients may call and set; ``("*",)`` for any. Reading public attributes is
            always allowed.
        on_demand: serve any id in Gymnasium's registry as soon as somebody asks for it.
        import_modules: let a client's ``module:Name-v1`` import that module; only where clients are this user's own.
        isolation: ``inline``, ``thread`` or ``process``; see :mod:`~meshrl.worker.isolation`.
        step_deadline_s: how long a step may take, or anything else that is asked of an env; its session ends then.
        reset_deadline_s: how long a reset may take, or a constructor.
        max_memory_bytes: memory of each env's process, with ``isolation="process"``.
        max_cpu_s: CPU time of each env's process in its life, with ``isolation="process"``.
        lease_s: seconds for which a session lives without a renewal.
        vectors: how vectors are hosted, for all names or by name: ``meshrl`` steps envs one by one and can do
            everything; ``gymnasium`` is the env's own vector entry point and ``envpool`` is EnvPool, which are fast and
            can do less (see :mod:`~meshrl.worker.vector_implementations`). Single envs are not concerned.
        state_key: what workers share that seal envs' states for one another, as a file or the key itself; without one
            no state of ALE's envs is told to clients (see :mod:`~meshrl.worker.sealing`).
        record: how much of a session is recorded whose client does not say: ``off``; ``actions``, the default, which is
            what it takes to run an episode again; ``full``, observations and infos too; or ``strict``, the same, and no
            answer leaves before it is stored. Where it cannot be recorded, that is a warning if anybody has asked.
        retention: of the streams of recordings that this worker makes; one that is there is left as it is.
        last_resort: ends this process; to be given where somebody then starts another one. With it, a worker that holds
            env code which it cannot end (a thread that hangs) condemns itself: it takes no new sessions, and
            ``serve_forever`` raises :class:`~meshrl.errors.WorkerCondemned`. It is called, on a thread, if the process
            still lives some seconds later.
    """

    kind = "env"
    crash = EnvError

    def __init__(
        self,
        envs: Mapping[str, EnvSource | Factory] | None = None,
        url: str | None = None,
        *,
        namespace: str = "default",
        credentials: str | Path | Credentials | None = None,
        slots: int = SLOTS,
        max_slots_per_user: int | None = None,
        capabilities: Mapping[str, Any] | None = None,
        allow_kwargs: Iterable[str] = (),
        allow: Iterable[str] = (),
        on_demand: bool = False,
        import_modules: bool = False,
        isolation: Isolation = "thread",
        step_deadline_s: float = STEP_DEADLINE_S,
        reset_deadline_s: float = RESET_DEADLINE_S,
        max_memory_bytes: int | None = None,
        max_cpu_s: float | None = None,
        lease_s: float = 15.0,
        vectors: str | Mapping[str, str] = "meshrl",
        state_key: str | Path | StateKey | None = None,
        record: RecordLevel | None = None,
        retention: Retention | None = None,
        last_resort: Callable[[], None] | None = None,
    ) -> None:
        if not on_demand:
            valid_names(envs or {})
        super().__init__(
            url=url,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            max_slots_per_user=max_slots_per_user,
            capabilities=capabilities,
            lease_s=lease_s,
            inline=isolation == "inline",
            last_resort=last_resort,
        )
        self._factories = {name: as_factory(source) for name, source in (envs or {}).items()}
        self._allow_kwargs = frozenset(allow_kwargs)
        self._allow = frozenset(allow)
        self._on_demand = on_demand
        self._import_modules = import_modules
        check_isolation(isolation, vectors)
        self._state_key = StateKey.read(state_key) if isinstance(state_key, str | Path) else state_key
        self._deadlines = Deadlines(step_deadline_s, reset_deadline_s)
        self._limits = Limits(max_memory_bytes, max_cpu_s)
        self._limits.check()
        if self._limits and isolation != "process":
            raise UsageError(
                f"max_memory_bytes and max_cpu_s are those of an env's process, which isolation={isolation!r} does not "
                'give it; say isolation="process", or let meshrl serve limit the whole worker process'
            )
        self._children = Children(self._deadlines, self._limits) if isolation == "process" else None
        self._pickled: dict[str, bytes] = {}  # factories, by name
        self._enforcing = None
        if self._children is None:
            self._enforcing = Enforcing(
                self.id,
                self.table,
                self._deadlines,
                SWEEP_S,
                end_late=lambda *late: self._threads.back(self._execution.end_late, *late),
                condemn=None if last_resort is None else self.condemn,
            )
        self._retention = retention or Retention()
        self._records = Records(self.id, record, self._make_recorder, self._state_key)
        self._admission.on_constructed = self._records.begin
        self.table.on_ending = self._session_ends
        self._inline = isolation == "inline"
        self._vectors = vectors
        self._making: dict[str, threading.Lock] = {}  # by name: one that takes its time holds no other up
        self._adding = threading.Lock()

    async def _describe_all(self) -> dict[str, Description]:
        if self._children is not None:
            await self._threads.call(self._children.start)
        described = {}
        for name, factory in self._factories.items():
            described[name] = await self._code_threads.call(partial(self._describe, name, factory))
        return described

    def overdue(self, now: float) -> list[tuple[str, bytes]]:
        """Look for requests over their deadline; on the pulse's thread."""
        return [] if self._enforcing is None else self._enforcing.look(now)

    def _let_all_go(self) -> None:
        self._records.stop()
        if self._children is not None:
            self._children.stop()

    async def _subscribe(self, connection: Connection) -> list[Subscription]:
        if self._credentials is not None:  # others with logins read recordings through workers
            self._records.recorder().start()
        # For clients that keep no directory; what is served on demand has to be asked for first, in the registry.
        on_open = self._admission.on_open
        subjects = [self.subjects.any_open(name, "*") for name in self._factories]
        return [await connection.subscribe(subject, on_open, queue="open", join=False) for subject in subjects]

    def _describe(self, name: str, factory: Factory) -> Description:
        """Make one env to see its spaces; on a thread, since constructors take their time.

        Raises:
            EnvError: its constructor raised, or it has no spaces.
        """
        op = "constructor"
        try:
            vectors = describe_implementation(name, factory, self._implementation(name))
            env = self._make(name, factory, {}, None)
            try:
                op = "description"
                return self._describe_env(name, env, vectors)
            finally:
                self._let_go(name, env)
        except MeshError:
            raise
        except EndsSession as exc:
            raise exc.error from exc
        except (Exception, SystemExit) as exc:
            what = "constructed" if op == "constructor" else "described"
            kind, message, text = described(exc)
            raise EnvError(
                f"{name}: the env cannot be {what}: {kind}: {message}"[:2000] + self._remedy(name, op, kind),
                remote_traceback=text[-20_000:],
                type=kind,
                op=op,
            ) from exc

    def _make(self, name: str, factory: Factory, kwargs: Mapping[str, Any], render_mode: str | None) -> Any:
        """A new env, where the operator wants it; on a thread.

        Raises:
            EndsSession: its process ended, or was ended.
            Exception: whatever its constructor raises.
        """
        if self._children is None:
            return factory.make(kwargs, render_mode)
        pickled = self._pickled.get(name)
        if pickled is None:
            pickled = self._pickled[name] = picklable(name, factory)
        return ProcessEnv.make(self._children, self._limits, name, pickled, dict(kwargs), render_mode)

    def _remedy(self, name: str, op: str, kind: str) -> str:
        if op == "description":
            return "; an env has observation_space and action_space once it is constructed"
        if kind == "TypeError":
            return (
                "; it is constructed without arguments to see its spaces; if it needs some, serve it by name with "
                f"them: meshrl serve {name} --kwargs '{{...}}', or Factory(source, kwargs)"
            )
        return ""

    def _let_go(self, name: str, env: Any) -> None:
        """Close an env that no session had; on a thread."""
        try:
            closing = (alone(env.close) if draws(env) else env.close)()
            if inspect.isawaitable(closing):
                assert self._threads.loop is not None, "a worker that makes envs was started"
                on_loop = asyncio.run_coroutine_threadsafe(_awaited(closing), self._threads.loop)
                if not self._inline:  # where this is a thread of its own, which may wait
                    on_loop.result(CLOSE_S)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # it is not needed any more
            log.warning("worker %s: closing an env of %s raised %r", self.id, name, exc)

    def _implementation(self, name: str) -> str:
        return self._vectors if isinstance(self._vectors, str) else self._vectors.get(name, "meshrl")

    def _describe_env(self, name: str, env: Any, vectors: Vectors | None) -> Description:
        factory = self._factories.get(name)  # one that is served on demand has no arguments, and is not there yet
        fields: dict[str, Any] = {
            "name": name,
            "worker": self.id,
            "capabilities": self.capabilities,
            "allow_kwargs": sorted(self._allow_kwargs),
            "allow": sorted(self._allow),
            "step_deadline_s": self._deadlines.longest_s,
            "state_key_id": None if self._state_key is None else self._state_key.id,
        }
        if isinstance(env, ProcessEnv):
            return env.describe(vectors=vectors, arguments=factory is not None, **fields)
        return describe_env(env, arguments=None if factory is None else factory.kwargs, vectors=vectors, **fields)

    def provide(self, name: str) -> Description | None:
        """The description of ``name``, made now if the worker serves on demand and Gymnasium knows the name.

        As slow as the env's constructor; may be called on several threads.

        Raises:
            UnknownName: Gymnasium does not know it.
            EnvError: it cannot be made.
        """
        known = self._admission.served.get(name)
        if known is not None or not self._on_demand:
            return known
        found = registered(name, import_modules=self._import_modules)
        if found is None:
            close = near(name, [*self._admission.served, *gymnasium.registry])
            hint = f"did you mean {', '.join(close)}?" if close else "gymnasium.pprint_registry() lists its ids"
            raise UnknownName(
                f"no env {name!r} is served, nor is it in Gymnasium's registry: {hint}", name=name, near=close
            )
        with self._making.setdefault(found, threading.Lock()):
            known = self._admission.served.get(found)
            if known is not None:
                return known
            factory = Factory(found)
            described = self._code_threads.wait(partial(self._describe, found, factory))
            with self._adding:
                self._factories[found] = factory
                self._admission.served = {**self._admission.served, found: described}
            return described

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[Held | HostedPool, Description]:
        factory = self._factories.get(open_.name)
        if factory is None:
            raise UnknownName(f"worker {self.id} serves no env {open_.name!r}", name=open_.name)
        implementation = self._implementation(open_.name)
        if open_.form == "vector" and implementation != "meshrl":
            return self._construct_implementation(open_, description, factory, implementation)
        envs = construct_all(
            open_.name,
            open_.num_envs,
            partial(self._make, open_.name, factory, open_.kwargs, open_.render_mode),
            check=check_wanted,
            let_go=partial(self._let_go, open_.name),
            threads=self._code_threads,
        )
        try:
            own = description
            if open_.kwargs or open_.render_mode:
                own = self._describe_env(open_.name, envs[0], description.vectors)
            return self._hosted(open_, envs), own
        except BaseException:
            for env in envs:
                self._let_go(open_.name, env)
            raise

    def _hosted(self, open_: Open, envs: list[Any]) -> HostedEnv | HostedVector | HostedPool:
        hosted = self._host(open_, envs)
        self._records.join(hosted, envs, open_)
        return hosted

    def _host(self, open_: Open, envs: list[Any]) -> HostedEnv | HostedVector | HostedPool:
        if open_.form == "vector":
            return HostedVector(envs, open_, allow=self._allow, threads=self._code_threads, state_key=self._state_key)
        if open_.form == "pool":
            return HostedPool(envs, open_, threads=self._code_threads, state_key=self._state_key)
        return HostedEnv(
            envs[0],
            name=open_.name,
            session=open_.session,
            worker=self.id,
            allow=self._allow,
            threads=self._code_threads,
            digests=says_digests(open_, envs[0].observation_space),
            resumable=open_.digests != "none",
            state_key=self._state_key,
        )

    # ---------------------------------------------------------------- recordings

    @property
    def recorded(self) -> Counts:
        """What became of what its sessions did, as far as it was to be recorded."""
        return self._records.counts

    def _make_recorder(self) -> Recorder:
        return Recorder(self.id, self._address, self.subjects, self._credentials, self._retention)

    def _session_ends(self, session: Session, reason: str, last: Last | None) -> None:
        self.audit.ended(session, reason, last)
        self._records.ends(session, reason)

    def _construct_implementation(
        self, open_: Open, description: Description, factory: Factory, implementation: str
    ) -> tuple[HostedImplementation, Description]:
        def make(seed: int) -> VectorEnv[Any, Any, Any]:
            return make_implementation(
                factory, implementation, open_.num_envs, open_.kwargs, open_.render_mode, seed=seed
            )

        hosted = HostedImplementation(
            make, open_, seeded_at_construction=implementation == "envpool", threads=self._code_threads
        )
        self._records.join_vector(hosted, open_)
        own = description.model_copy(
            update={
                "observation_space": spaces.describe(hosted.vector.single_observation_space),
                "action_space": spaces.describe(hosted.vector.single_action_space),
                "metadata": encodable(getattr(hosted.vector, "metadata", None) or {}),
            }
        )
        return hosted, own


async def _awaited(closing: Awaitable[Any]) -> None:
    await closing
