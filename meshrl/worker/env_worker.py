"""The env worker: serves environments by name."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.errors import EnvError, MeshError, UnknownName
from meshrl.protocol.names import near
from meshrl.wire.messages import Description, Open
from meshrl.worker.describe import describe_env
from meshrl.worker.factories import EnvSource, Factory, as_factory, registered
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.service import Service, valid_names

SLOTS = 64
# How long one request of a session may run before its client gives the session up.
STEP_DEADLINE_S = 300.0


class EnvWorker(Service):
    """Serves environments; each session gets an env of its own, in one of ``slots``.

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
        slots: how many sessions the worker holds at once, over all names.
        capabilities: facts of this machine that clients may ask for by ``where``.
        allow_kwargs: constructor arguments that clients may pass; ``("*",)`` for any.
        allow: public names of the env that clients may call and set; ``("*",)`` for any. Reading public attributes is
            always allowed.
        on_demand: serve any id in Gymnasium's registry as soon as somebody asks for it.
        import_modules: let a client's ``module:Name-v1`` import that module; only where clients are this user's own.
        step_deadline_s: how long one request may run before its client gives the session up.
        lease_s: seconds for which a session lives without a renewal.
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
        capabilities: Mapping[str, Any] | None = None,
        allow_kwargs: Iterable[str] = (),
        allow: Iterable[str] = (),
        on_demand: bool = False,
        import_modules: bool = False,
        step_deadline_s: float = STEP_DEADLINE_S,
        lease_s: float = 15.0,
    ) -> None:
        if not on_demand:
            valid_names(envs or {})
        super().__init__(
            url=url,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            capabilities=capabilities,
            lease_s=lease_s,
        )
        self._factories = {name: as_factory(source) for name, source in (envs or {}).items()}
        self._allow_kwargs = frozenset(allow_kwargs)
        self._allow = frozenset(allow)
        self._on_demand = on_demand
        self._import_modules = import_modules
        self._step_deadline_s = step_deadline_s
        self._providing = threading.Lock()

    async def _describe_all(self) -> dict[str, Description]:
        described = {}
        for name in self._factories:
            described[name] = await asyncio.to_thread(self._describe, name)
        return described

    async def _subscribe(self, connection: Connection) -> None:
        # For clients that keep no directory; what is served on demand has to be asked for first, in the registry.
        for name in self._factories:
            subject = self.subjects.any_open(name, "*")
            await connection.subscribe(subject, self._admission.on_open, queue="open", join=False)

    def _describe(self, name: str) -> Description:
        """Make one env to see its spaces; on a thread, since constructors take their time."""
        try:
            env = self._factories[name].make({}, None)
        except MeshError:
            raise
        except Exception as exc:
            raise EnvError(
                f"{name}: the env cannot be constructed: {type(exc).__name__}: {exc}",
                remote_traceback="".join(traceback.format_exception(exc)),
                type=type(exc).__name__,
                op="constructor",
            ) from exc
        try:
            return self._describe_env(name, env)
        finally:
            env.close()

    def _describe_env(self, name: str, env: Any) -> Description:
        return describe_env(
            env,
            name=name,
            worker=self.id,
            capabilities=self.capabilities,
            allow_kwargs=self._allow_kwargs,
            allow=self._allow,
            step_deadline_s=self._step_deadline_s,
        )

    def provide(self, name: str) -> Description | None:
        """The description of ``name``, made now if the worker serves on demand and Gymnasium knows the name."""
        with self._providing:
            served = self._admission.served
            known = served.get(name)
            if known is not None or not self._on_demand:
                return known
            found = registered(name, import_modules=self._import_modules)
            if found is None:
                close = near(name, [*served, *gymnasium.registry])
                hint = f"did you mean {', '.join(close)}?" if close else "gymnasium.pprint_registry() lists its ids"
                raise UnknownName(
                    f"no env {name!r} is served, nor is it in Gymnasium's registry: {hint}", name=name, near=close
                )
            if found in served:
                return served[found]
            self._factories[found] = Factory(found)
            try:
                described = self._describe(found)
            except MeshError:
                del self._factories[found]
                raise
            self._admission.served = {**served, found: described}
            return described

    def _construct(self, open_: Open, description: Description) -> tuple[HostedEnv, Description]:
        factory = self._factories.get(open_.name)
        if factory is None:
            raise UnknownName(f"worker {self.id} serves no env {open_.name!r}", name=open_.name)
        env = factory.make(open_.kwargs, open_.render_mode)
        try:
            own = self._describe_env(open_.name, env) if open_.kwargs or open_.render_mode else description
            hosted = HostedEnv(env, name=open_.name, session=open_.session, worker=self.id, allow=self._allow)
        except BaseException:
            env.close()
            raise
        return hosted, own
