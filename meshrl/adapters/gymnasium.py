"""``meshrl.make``: a ``gymnasium.Env`` whose env lives on a worker, for synchronous code.

What a local env gives, this gives: the same spaces, values, types and errors, and nothing of ours in ``info``. What
cannot be the same is said here: the env's random generator is the worker's (:attr:`MeshEnv.np_random`), and its
attributes are read and set by name (:meth:`MeshEnv.get_attr`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from meshrl.adapters.arguments import WAIT_S, kwargs_for, kwargs_of_one, mesh_arguments, served_name
from meshrl.adapters.held import HeldEnv
from meshrl.adapters.seeded import Seeded
from meshrl.adapters.spec import ENTRY_POINT, own_metadata, own_spec
from meshrl.client.env import RemoteEnv, Step
from meshrl.client.mesh import Mesh
from meshrl.errors import MeshError, NotAllowed, UnencodableValue
from meshrl.wire.messages import SessionState


class MeshEnv(Seeded, gymnasium.Env[Any, Any]):
    """An env that lives on a worker; made by :func:`make`.

    Each call is one round trip, made from one thread at a time. Ctrl-C during a call leaves the env usable: the call
    may have run, so the next step raises ``StepUnsettled`` until :meth:`settle` gives its result or :meth:`reset`
    discards it. Every call may raise ``SessionLost`` (the session is gone: make a new env), ``EnvError`` (the env's
    code raised; the session has ended) and ``SessionClosed`` (after :meth:`close`).

    Pickled, copied or made again by its ``spec``, it leases another env in its initial state; after a fork the
    child's copy does so at its first ``reset``, and until then refuses everything else with ``ResetNeeded``.

    Attributes:
        observation_space: equal to the remote env's.
        action_space: equal to the remote env's; its generator is this client's own.
        metadata: the remote env's; ``human`` is among the render modes when frames can be shown here.
        render_mode: as asked for.
        spec: makes the same remote again by ``spec.make()``, and vectors of it by ``gymnasium.make_vec(spec, ...)``.
    """

    _held: HeldEnv

    def __init__(
        self,
        name: str,
        *,
        render_mode: str | None = None,
        mesh: Mapping[str, Any] | str | None = None,
        where: Mapping[str, Any] | None = None,
        wait: float = WAIT_S,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = served_name("make", name)
        self._mesh = mesh_arguments(mesh)
        self._where = None if where is None else dict(where)
        self._wait = wait
        self._env_kwargs = dict(env_kwargs or {})
        self.render_mode = render_mode
        kwargs, where = self._env_kwargs, self._where  # not self: garbage is to be found at once, without a cycle

        async def opened(mesh: Mesh) -> RemoteEnv:
            return await mesh.env(name, await kwargs_for(mesh, name, kwargs), render_mode, where, wait=wait)

        self._held = HeldEnv(name, self._mesh, opened, render_mode=render_mode)
        remote = self._held.remote
        self.action_space = remote.action_space
        self.observation_space = remote.observation_space
        self.metadata = own_metadata(remote.metadata)
        given: dict[str, Any] = {"render_mode": render_mode, "mesh": self._mesh, "where": self._where}
        if wait != WAIT_S:
            given["wait"] = wait
        said = {**self._env_kwargs, **{key: value for key, value in given.items() if value or key == "wait"}}
        self.spec = own_spec(name, ENTRY_POINT, said, remote.remote_spec)

    def __repr__(self) -> str:
        return f"<MeshEnv {self._name}: {self._held!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # The spec goes along, since gymnasium.make gives the env one of its own.
        return (
            _again,
            (self._name, self.render_mode, self._mesh, self._where, self._wait, self._env_kwargs),
            {"spec": self.spec},
        )

    def __del__(self) -> None:
        held = getattr(self, "_held", None)
        if held is not None:
            held.drop()

    # ---------------------------------------------------------------- facts

    @property
    def remote_spec(self) -> EnvSpec | None:
        """The worker's own ``EnvSpec`` of the env; None where it has none that can be written down."""
        return self._held.remote.remote_spec

    # ---------------------------------------------------------------- an env's calls

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. Discards the result of an interrupted call.

        Args:
            seed: starts the env's generator; without one it goes on, and at the first reset one is drawn.
            options: the env's own.

        Returns:
            observation, with exactly the types that the env returned, and info.
        """
        if self._held.inherited and not self._held.closed:
            self._lease_again()
        seed = self._seed_of(seed)
        self._sent_seed = seed
        try:
            result: tuple[Any, dict[str, Any]] = self._held.do(
                "reset", functools.partial(self._held.remote.reset, seed=seed, options=options)
            )
        except MeshError:
            if not self._held.may_settle("reset"):
                self._sent_seed = None
            raise
        self._reset_ran()
        return result

    def step(self, action: Any) -> Step:
        """Take one step.

        Args:
            action: checked against the action space before anything is sent.

        Returns:
            observation, reward, terminated, truncated, info, with exactly the types that the env returned.

        Raises:
            InvalidAction: wrong shape, structure, dtype or discrete range; nothing was sent.
            ResetNeeded: before the first ``reset``.
            StepUnsettled: a call was interrupted and may have run; ``settle`` or ``reset`` comes first.
            ConcurrentStep: another thread's call is under way.
        """
        return self._held.do("step", self._held.remote.step, action)

    def render(self) -> Any:
        """What the env renders in this mode; in ``human`` mode it is shown here, and the result is None.

        Without a mode it is None and a warning, as Gymnasium's own envs have it.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(f"{self._name}: render was called on an env made without a render_mode")
            return None
        return self._held.do("render", self._held.remote.render)

    def close(self) -> None:
        """Close the env and free its slot. Safe to call twice."""
        self._held.close()

    # ---------------------------------------------------------------- beyond Gymnasium's Env

    def state(self) -> SessionState:
        """Where the session stands: episode, steps, seed, phase."""
        return self._held.do("state", self._held.remote.state)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it, or there is none.
        """
        return self._held.do("call", functools.partial(self._held.remote.call, name, *args, **kwargs))

    def get_attr(self, name: str) -> Any:
        """A public attribute of the remote env, looked for through its wrappers.

        Raises:
            NotAllowed: it is private, or there is none.
            UnencodableValue: its value cannot travel (a method, say).
        """
        return self._held.do("get_attr", self._held.remote.get_attr, name)

    def set_attr(self, name: str, value: Any) -> None:
        """Set a public attribute of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it.
        """
        self._held.do("set_attr", self._held.remote.set_attr, name, value)

    def has_wrapper_attr(self, name: str) -> bool:
        """Whether this env, or the remote one, has the attribute."""
        try:
            self.get_wrapper_attr(name)
        except AttributeError:
            return False
        except UnencodableValue:
            return True
        return True

    def get_wrapper_attr(self, name: str) -> Any:
        """This env's attribute, else the remote one's: ``gymnasium.Env.get_wrapper_attr``."""
        if hasattr(self, name):
            return getattr(self, name)
        if name.startswith("_"):
            raise AttributeError(f"{self._name} has no attribute {name!r} here, and private ones stay on the worker")
        try:
            return self.get_attr(name)
        except NotAllowed as exc:
            raise AttributeError(f"neither the client of {self._name} nor the remote env has {name!r}") from exc

    def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool:
        """Set it where it is: here if this env has the attribute, else on the remote env (if the operator allows)."""
        if hasattr(self, name):
            setattr(self, name, value)
            return True
        if not force and not self.has_wrapper_attr(name):
            return False
        self.set_attr(name, value)
        return True

    # ---------------------------------------------------------------- the remote

    def _lease_again(self) -> None:
        self._held.lease_again()
        remote = self._held.remote
        # Equal ones are kept: their generators may have been seeded.
        if self.action_space != remote.action_space:
            self.action_space = remote.action_space
        if self.observation_space != remote.observation_space:
            self.observation_space = remote.observation_space
        self._begin_anew()


def make(
    name: str,
    *,
    render_mode: str | None = None,
    mesh: Mapping[str, Any] | str | None = None,
    where: Mapping[str, Any] | None = None,
    wait: float = WAIT_S,
    **env_kwargs: Any,
) -> MeshEnv:
    """Lease an env by name, as a ``gymnasium.Env`` for synchronous code; it works in a notebook's running loop too.

    ::

        with meshrl.make("CartPole-v1") as env:
            obs, info = env.reset(seed=1)
            obs, reward, terminated, truncated, info = env.step(0)

    Args:
        name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
        render_mode: Gymnasium's; ``human`` opens a window here and renders arrays there.
        mesh: arguments of :class:`meshrl.Mesh`: ``url``, ``namespace``, ``credentials``, ``timeout`` (seconds); or
            the url alone. Envs with equal ones share a connection.
        where: capabilities that the worker must have, such as ``{"gpu": True}``.
        wait: seconds to wait for a worker and a free slot.
        env_kwargs: for the env's constructor, as far as the worker's operator allows.

    Raises:
        MeshUnreachable: no NATS server answers.
        UnknownName: nobody serves the name, or nobody with those capabilities.
        UsageError: an argument is of another kind, or belongs to another library's call.
        MeshFull: no slot became free within ``wait``.
        KwargsNotAllowed: the operator does not let clients pass one of ``env_kwargs``.
        EnvError: the env's constructor raised.
    """
    kwargs = kwargs_of_one(served_name("make", name), env_kwargs)
    return MeshEnv(name, render_mode=render_mode, mesh=mesh, where=where, wait=wait, env_kwargs=kwargs)


def _again(
    name: str,
    render_mode: str | None,
    mesh: Mapping[str, Any],
    where: Mapping[str, Any] | None,
    wait: float,
    env_kwargs: Mapping[str, Any],
) -> MeshEnv:
    return MeshEnv(name, render_mode=render_mode, mesh=mesh, where=where, wait=wait, env_kwargs=env_kwargs)
