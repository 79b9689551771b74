"""``meshrl.make``: a ``gymnasium.Env`` whose env lives on a worker, for synchronous code.

What a local env gives, this gives: the same spaces, values, types and errors, and nothing of ours in ``info``. What
cannot be the same is said here: the env's random generator is the worker's (:attr:`MeshEnv.np_random`), and its
attributes are read and set by name (:meth:`MeshEnv.get_attr`).
"""

from __future__ import annotations

import functools
import operator
import secrets
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from meshrl.adapters.portal import Call, Portal, lease
from meshrl.adapters.spec import own_metadata, own_spec
from meshrl.client.env import RemoteEnv, Step
from meshrl.client.window import Window
from meshrl.errors import (
    MeshError,
    NotAllowed,
    NothingUnsettled,
    ResetNeeded,
    SessionClosed,
    StepUnsettled,
    UnencodableValue,
    UsageError,
)
from meshrl.protocol.turn import READING
from meshrl.wire.messages import SessionState

T = TypeVar("T")

ENTRY_POINT = "meshrl:make"
# A drawn seed has the bits of those that workers draw (R7).
SEED_BITS = 31
# Wrappers at the client draw from a stream of their own: with the env's own seed alone they would draw the very
# numbers that the env draws.
CLIENT_STREAM = 1


class MeshEnv(gymnasium.Env[Any, Any]):
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
        spec: makes the same remote again by ``spec.make()``.
    """

    def __init__(
        self,
        name: str,
        *,
        render_mode: str | None = None,
        mesh: Mapping[str, Any] | None = None,
        where: Mapping[str, Any] | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._closed = False
        self._name = name
        self._mesh = dict(mesh or {})
        self._where = None if where is None else dict(where)
        self._env_kwargs = dict(env_kwargs or {})
        self._interrupted: Call[Any] | None = None
        self._interrupted_op = ""
        self._was_reset = False
        self._sent_seed: int | None = None
        self.render_mode = render_mode
        self._open()
        remote = self._remote
        self.metadata = own_metadata(remote.metadata)
        self._window = Window(remote.name) if render_mode == "human" else None
        given = {"render_mode": render_mode, "mesh": self._mesh, "where": self._where}
        kwargs = {**self._env_kwargs, **{key: value for key, value in given.items() if value}}
        self.spec = own_spec(name, ENTRY_POINT, kwargs, remote.remote_spec)

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self._remote)
        return f"<MeshEnv {self._name}: {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # The spec goes along, since gymnasium.make gives the env one of its own.
        return _again, (self._name, self.render_mode, self._mesh, self._where, self._env_kwargs), {"spec": self.spec}

    def __del__(self) -> None:
        # From any thread and at any moment: nothing here may wait.
        if not getattr(self, "_closed", True) and hasattr(self, "_remote"):
            self._closed = True
            if self._portal.inherited:
                self._disown()
            else:
                self._portal.drop(self._remote)

    # ---------------------------------------------------------------- facts

    @property
    def remote_spec(self) -> EnvSpec | None:
        """The worker's own ``EnvSpec`` of the env; None where it has none that can be written down."""
        return self._remote.remote_spec

    @property
    def np_random_seed(self) -> int:
        """The seed that the remote env's generator was last started from.

        Before the first reset it is drawn here, and a first reset without a seed uses it: as in a local env.
        """
        if self._np_random_seed is None:
            self._start_from(secrets.randbits(SEED_BITS))
            assert self._np_random_seed is not None
        return self._np_random_seed

    @property
    def np_random(self) -> np.random.Generator:
        """A generator at the client, for wrappers here; each seeded reset starts it anew.

        It depends on :attr:`np_random_seed` alone, and shares no number with the env's own generator, which lives
        on the worker and cannot be read or set from here.
        """
        if self._np_random is None:
            self._start_from(self.np_random_seed)
            assert self._np_random is not None
        return self._np_random

    @np_random.setter
    def np_random(self, _value: np.random.Generator) -> None:
        raise UsageError(f"{self._name}: the env's generator lives on its worker; seed it by reset(seed=...)")

    def _start_from(self, seed: int) -> None:
        self._np_random_seed = seed
        sequence = np.random.SeedSequence(seed, spawn_key=(CLIENT_STREAM,))
        self._np_random = np.random.Generator(np.random.PCG64(sequence))

    # ---------------------------------------------------------------- an env's calls

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. Discards the result of an interrupted call.

        Args:
            seed: starts the env's generator; without one it goes on, and at the first reset one is drawn.
            options: the env's own.

        Returns:
            observation, with exactly the types that the env returned, and info.
        """
        if not self._closed and self._portal.inherited:
            self._open_again()
        if seed is None:
            seed = self._sent_seed  # of an interrupted reset: it may not have arrived, and is sent again
        if seed is None and not self._was_reset:
            seed = self.np_random_seed
        self._sent_seed = seed
        try:
            result: tuple[Any, dict[str, Any]] = self._do(
                "reset", functools.partial(self._remote.reset, seed=seed, options=options)
            )
        except MeshError:
            self._sent_seed = None
            raise
        self._reset_ran()
        if self._window is not None:
            self._show("reset", result)
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
        result: Step = self._do("step", self._remote.step, action)
        if self._window is not None:
            self._show("step", result)
        return result

    def settle(self) -> Any:
        """The result of the call that was interrupted: for a step, its tuple.

        Raises:
            NothingUnsettled: none was, or it was before anything was sent.
        """
        if self._portal.inherited and not self._closed:
            raise NothingUnsettled(f"env {self._name}: nothing to settle: its episode belongs to the parent process")
        call = self._interrupted
        if call is None or self._closed:
            value = self._do("settle", self._remote.settle)
        else:
            call.wait()
            value = self._do("settle", self._remote.settle) if call.cancelled else call.result()
            self._interrupted = None
        if self._interrupted_op == "reset":
            self._reset_ran()
        return value

    def render(self) -> Any:
        """What the env renders in this mode; in ``human`` mode it is shown here, and the result is None."""
        if self.render_mode is None:
            raise UsageError(f"{self._name}: it was made without a render_mode; give one to meshrl.make")
        frame = self._do("render", self._remote.render)
        if self._window is None:
            return frame
        self._window.show(frame)
        return None

    def close(self) -> None:
        """Close the env and free its slot. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._window is not None:
            self._window.close()
        portal = self._portal
        if portal.inherited:
            self._disown()
        elif not portal.over:
            try:
                portal.run(Call("close", self._remote.close))
            finally:
                portal.release()

    def _show(self, op: str, result: Any) -> None:
        """Show the frame after ``op``; interrupted meanwhile, its result is kept for :meth:`settle`."""
        assert self._window is not None
        try:
            self._window.show(self._do("render", self._remote.render))
        except MeshError:
            raise
        except BaseException:
            kept: Call[Any] = Call(op, self._remote.render)
            kept.value, kept.over = result, True
            self._interrupted, self._interrupted_op = kept, op
            raise

    # ---------------------------------------------------------------- beyond Gymnasium's Env

    def state(self) -> SessionState:
        """Where the session stands: episode, steps, seed, phase."""
        return self._do("state", self._remote.state)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it, or there is none.
        """
        return self._do("call", functools.partial(self._remote.call, name, *args, **kwargs))

    def get_attr(self, name: str) -> Any:
        """A public attribute of the remote env, looked for through its wrappers.

        Raises:
            NotAllowed: it is private, or there is none.
            UnencodableValue: its value cannot travel (a method, say).
        """
        return self._do("get_attr", self._remote.get_attr, name)

    def set_attr(self, name: str, value: Any) -> None:
        """Set a public attribute of the remote env that the worker's operator allows.

        Raises:
            NotAllowed: the operator does not allow it.
        """
        self._do("set_attr", self._remote.set_attr, name, value)

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

    def _open(self) -> None:
        mode = "rgb_array" if self.render_mode == "human" else self.render_mode
        portal = lease(self._mesh)
        opening = Call("make", portal.env, self._name, self._env_kwargs, mode, self._where)
        try:
            remote = portal.run(opening)
        except BaseException as exc:
            if exc is opening.error:
                portal.release()
            else:
                portal.abandon_env(opening)
            raise
        self._portal: Portal = portal
        self._remote: RemoteEnv = remote
        # Equal ones are kept: their generators may have been seeded.
        if getattr(self, "action_space", None) != remote.action_space:
            self.action_space = remote.action_space
        if getattr(self, "observation_space", None) != remote.observation_space:
            self.observation_space = remote.observation_space

    def _open_again(self) -> None:
        """In a forked process: an env of its own, with nothing of the parent's episode."""
        self._disown()
        self._open()
        self._interrupted = None
        self._was_reset = False
        self._sent_seed = None
        self._np_random = self._np_random_seed = None

    def _disown(self) -> None:
        """In a forked process: the session is the parent's to close, and this copy of it nobody's to warn of."""
        self._remote._session.closed = True  # noqa: SLF001  # there is no other use for a half-dead RemoteEnv

    def _do(self, op: str, made: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        if self._closed:
            raise SessionClosed(f"{self._name}: it was closed by this client; make a new one")
        if self._interrupted is not None:
            self._after_interrupt(op)
        portal = self._portal
        if portal.inherited:
            raise ResetNeeded(
                f"{self._name}: {op} in a forked process, whose parent has this env; reset leases one for this process",
                op=op,
            )
        call = Call(op, made, *args)
        try:
            return portal.run(call)
        except BaseException as exc:
            if exc is not call.error and not isinstance(exc, MeshError):  # Ctrl-C, or another signal handler's
                self._interrupted = call
                if op != "settle":
                    self._interrupted_op = op
                portal.abandon(call)
            raise

    def _after_interrupt(self, op: str) -> None:
        """Whether ``op`` may follow the interrupted call: the lane knows what was cancelled, not what was over."""
        call = self._interrupted
        assert call is not None
        call.wait()
        if not (call.cancelled or call.error is not None or op == "reset" or call.op in READING):
            raise StepUnsettled(
                f"env {self._name}: {call.op} was interrupted, and it ran; call env.settle() for its result, or reset",
                op=call.op,
            )
        self._interrupted = None

    def _reset_ran(self) -> None:
        """A reset's seed is the env's now."""
        if self._sent_seed is not None:
            self._was_reset = True
            self._start_from(operator.index(self._sent_seed))
            self._sent_seed = None


def make(
    name: str,
    *,
    render_mode: str | None = None,
    mesh: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
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
        mesh: arguments of :class:`meshrl.Mesh`: ``url``, ``namespace``, ``credentials``, ``timeout`` (seconds). Envs
            with equal ones share a connection.
        where: capabilities that the worker must have, such as ``{"gpu": True}``.
        env_kwargs: for the env's constructor, as far as the worker's operator allows.

    Raises:
        MeshUnreachable: no NATS server answers.
        UnknownName: nobody serves the name, or nobody with those capabilities.
        MeshFull: no slot became free within 30 s.
        KwargsNotAllowed: the operator does not let clients pass one of ``env_kwargs``.
        EnvError: the env's constructor raised.
    """
    return MeshEnv(name, render_mode=render_mode, mesh=mesh, where=where, env_kwargs=env_kwargs)


def _again(
    name: str,
    render_mode: str | None,
    mesh: Mapping[str, Any],
    where: Mapping[str, Any] | None,
    env_kwargs: Mapping[str, Any],
) -> MeshEnv:
    return MeshEnv(name, render_mode=render_mode, mesh=mesh, where=where, env_kwargs=env_kwargs)
