"""``meshrl.make_vec``: a ``gymnasium.vector.VectorEnv`` whose envs live on workers, for synchronous code.

What Gymnasium's ``SyncVectorEnv`` gives, this gives, bit for bit: the same spaces, batches, infos and errors. What
cannot be the same is said here: the generators are the workers' (:attr:`MeshVectorEnv.np_random`), frames are not shown
by themselves (``gymnasium.wrappers.vector.HumanRendering`` shows them), ``get_attr`` of a method is an error (``call``
calls it), and ``envs`` there is none.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from meshrl.adapters.arguments import (
    OF_A_VECTOR,
    WAIT_S,
    check_vectors_kwargs,
    count_of,
    kwargs_for,
    mesh_arguments,
    served_name,
)
from meshrl.adapters.held import HeldVector
from meshrl.adapters.seeded import Seeded
from meshrl.adapters.spec import ENTRY_POINT, own_metadata, own_spec
from meshrl.client.mesh import Mesh
from meshrl.client.vector import RemoteVectorEnv, VectorStep
from meshrl.errors import MeshError, NotAllowed
from meshrl.wire.messages import Seeding


class MeshVectorEnv(Seeded, VectorEnv[Any, Any, Any]):
    """Envs that live on workers, stepped together; made by :func:`make_vec`.

    Each call is one round trip to every shard, made from one thread at a time. Ctrl-C during a call leaves the envs
    usable: the call may have run, so the next step raises ``StepUnsettled`` until :meth:`settle` gives its result or
    :meth:`reset` discards it. Every call may raise ``SessionLost`` (a shard is gone: make a new vector), ``EnvError``
    (a sub-environment's code raised; its shard's session has ended) and ``SessionClosed`` (after ``close``).

    Pickled, copied or made again by its ``spec``, it leases another vector in its initial state; after a fork the
    child's copy does so at its first ``reset``, and until then refuses everything else with ``ResetNeeded``.

    Attributes:
        num_envs: how many sub-environments there are.
        single_observation_space: equal to the remote envs'.
        single_action_space: equal to the remote envs'.
        observation_space: of all: ``batch_space(single_observation_space, num_envs)``.
        action_space: of all; its generator is this client's own.
        metadata: the remote envs', and ``autoreset_mode``; ``human`` is not among the render modes.
        autoreset_mode: what becomes of a sub-environment whose episode has ended.
        render_mode: as asked for.
        spec: makes the same remotes again by ``gymnasium.make_vec(spec)``, and one of them by ``gymnasium.make(spec)``.
        closed: whether it was closed.
    """

    _held: HeldVector

    def __init__(
        self,
        name: str,
        num_envs: SupportsIndex = 1,
        *,
        render_mode: str | None = None,
        mesh: Mapping[str, Any] | str | None = None,
        where: Mapping[str, Any] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        seeding: Seeding = "gymnasium",
        shards: int | None = None,
        wait: float = WAIT_S,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = served_name("make_vec", name)
        num_envs = count_of(num_envs)
        mode = AutoresetMode(autoreset_mode)
        arguments, kwargs = mesh_arguments(mesh), dict(env_kwargs or {})
        where = None if where is None else dict(where)
        self._seeding = seeding
        self._num_seeds = num_envs
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = mode
        # What __init__ takes: that of which it is made again.
        self._made_of: dict[str, Any] = {
            "num_envs": num_envs,
            "render_mode": render_mode,
            "mesh": arguments,
            "where": where,
            "autoreset_mode": mode.value,
            "seeding": seeding,
            "shards": shards,
            "wait": wait,
            "env_kwargs": kwargs,
        }
        asked: dict[str, Any] = {"autoreset_mode": mode, "seeding": seeding, "shards": shards, "wait": wait}

        async def opened(mesh: Mesh) -> RemoteVectorEnv:
            fit = await kwargs_for(mesh, name, kwargs)
            return await mesh.vector(name, num_envs, fit, render_mode, where, **asked)

        self._held = HeldVector(name, arguments, opened)
        remote = self._held.remote
        self.single_observation_space = remote.single_observation_space
        self.single_action_space = remote.single_action_space
        self.observation_space = remote.observation_space
        self.action_space = remote.action_space
        self.metadata = own_metadata(remote.metadata, vector=True)
        self.spec = own_spec(name, ENTRY_POINT, self._spec_kwargs(remote.remote_spec), remote.remote_spec, vector=True)

    def _spec_kwargs(self, remote: EnvSpec | None) -> dict[str, Any]:
        """In the form of those that ``gymnasium.make_vec`` gives a vector: without what is so by default."""
        default = {"num_envs": 1, "autoreset_mode": AutoresetMode.NEXT_STEP.value, "seeding": "gymnasium"}
        said = {key: value for key, value in self._made_of.items() if value and value != default.get(key)}
        if said.pop("wait", 0.0) != WAIT_S:
            said["wait"] = self._made_of["wait"]
        env_kwargs = said.pop("env_kwargs", {})
        if remote is not None and remote.max_episode_steps is not None:
            env_kwargs = {**env_kwargs, "max_episode_steps": remote.max_episode_steps}
        return {**env_kwargs, **said, **OF_A_VECTOR}

    def __repr__(self) -> str:
        return f"<MeshVectorEnv of {self.num_envs} {self._name}: {self._held!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # The spec goes along, since gymnasium.make_vec gives the vector one of its own.
        return _again, (self._name, self._made_of), {"spec": self.spec}

    def __del__(self, _warn: Any = warnings.warn) -> None:
        held = getattr(self, "_held", None)
        if held is not None:
            held.forgotten(self, "envs.close()", _warn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---------------------------------------------------------------- facts

    @property
    def remote_spec(self) -> EnvSpec | None:
        """The workers' own ``EnvSpec`` of a sub-environment; None where it has none that can be written down."""
        return self._held.remote.remote_spec

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The worker and the number of sub-environments of each shard, in the order of env_ids."""
        return self._held.remote.shards

    # ---------------------------------------------------------------- a vector env's calls

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes. Discards the result of an interrupted call.

        Args:
            seed: sub-environment i gets ``seed + i``; a list has one for each. Without one their generators go on,
                and at the first reset one is drawn. With ``seeding="derived"``, the root of all seeds to come.
            options: for the sub-environments' ``reset``. Under ``"reset_mask"`` it may hold a bool array of shape
                (num_envs,): only those are reset. The dict is left as it is.

        Returns:
            observations, batched as in ``observation_space``, and infos.

        Raises:
            InvalidSeed: seeds of another kind or number.
            ValueError, TypeError: a mask of another kind, shape or dtype, as in Gymnasium.
            ResetNeeded: the first reset leaves some out.
        """
        if self._held.inherited and not self._held.closed:
            self._lease_again()
        seed = self._seed_of(seed)
        self._sent_seed = self._of_masked(seed, options)
        try:
            result: tuple[Any, dict[str, Any]] = self._held.do(
                "reset", functools.partial(self._held.remote.reset, seed=seed, options=options)
            )
        except Exception:
            if not self._held.may_settle("reset"):
                self._sent_seed = None
            raise
        self._reset_ran()
        return result

    def step(self, actions: Any) -> VectorStep:
        """Take one step in each sub-environment.

        Args:
            actions: a batch, checked against the action space before anything is sent.

        Returns:
            observations, batched as in ``observation_space``; rewards, float64 of shape (num_envs,); terminations and
            truncations, bool of shape (num_envs,); infos. The arrays are the caller's own.

        Raises:
            InvalidAction: the action of one is of a wrong shape, structure, dtype or discrete range; the error names
                its index, and nothing was sent.
            ResetNeeded: before the first ``reset``, or, where autoreset is disabled, after the end of an episode.
            StepUnsettled: a call was interrupted and may have run; ``settle`` or ``reset`` comes first.
            ConcurrentStep: another thread's call, or a ``step_async``, is under way.
        """
        return self._held.do("step", self._held.remote.step, actions)

    def step_async(self, actions: Any) -> None:
        """Begin a step, so that several vectors step at once; :meth:`step_wait` gives its result, ``reset`` drops it.

        Args:
            actions: as for :meth:`step`; they are copied, and checked by then.

        Raises:
            ConcurrentStep: another ``step_async`` is under way.
        """
        self._held.begin("step", self._held.remote.step, copy.deepcopy(actions))

    def step_wait(self) -> VectorStep:
        """The result of the step that was begun: as :meth:`step` returns and raises.

        Raises:
            NothingUnderWay: none was.
        """
        result: VectorStep = self._held.finish()
        return result

    def render(self) -> tuple[Any, ...] | None:
        """What each sub-environment renders in this mode, in the order of env_ids.

        Without a mode it is None for each, and a warning, as Gymnasium's own envs have it.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(f"{self._name}: render was called on envs made without a render_mode")
            return (None,) * self.num_envs
        return self._held.do("render", self._held.remote.render)

    def close_extras(self, **_kwargs: Any) -> None:
        """Close all sub-environments and free their slots: what ``close`` does. Safe to call twice."""
        self._held.close()

    # ---------------------------------------------------------------- the sub-environments by name

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a public method of each sub-environment; what is no method is read, as in Gymnasium.

        Raises:
            NotAllowed: the workers' operator does not allow it, or there is none.
        """
        try:
            return self.call_some(None, name, *args, **kwargs)
        except NotAllowed as refused:
            try:
                return self.get_attr(name)
            except MeshError:
                raise refused from None

    def call_some(
        self, env_ids: Sequence[SupportsIndex] | None, name: str, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Call a public method of ``env_ids`` alone; gives what they give, in their order.

        Raises:
            NotAllowed: the workers' operator does not allow it, or there is none.
        """
        return self._held.do("call", functools.partial(self._held.remote.call_some, env_ids, name, *args, **kwargs))

    def get_attr(self, name: str, env_ids: Sequence[SupportsIndex] | None = None) -> tuple[Any, ...]:
        """A public attribute of each sub-environment (or of ``env_ids``), looked for through its wrappers.

        Raises:
            NotAllowed: it is private, or there is none.
            UnencodableValue: its value cannot travel (a method, say).
        """
        return self._held.do("get_attr", self._held.remote.get_attr, name, env_ids)

    def set_attr(self, name: str, values: Any, env_ids: Sequence[SupportsIndex] | None = None) -> None:
        """Set a public attribute of each sub-environment (or of ``env_ids``) that the workers' operator allows.

        Args:
            name: of the attribute.
            values: a list or tuple has one for each; anything else is set on all.
            env_ids: which; None for all.

        Raises:
            NotAllowed: the operator does not allow it.
            ValueError: another number of values.
        """
        self._held.do("set_attr", self._held.remote.set_attr, name, values, env_ids)

    def is_wrapped(
        self, wrapper: type[gymnasium.Wrapper[Any, Any, Any, Any]], env_ids: Sequence[SupportsIndex] | None = None
    ) -> tuple[bool, ...]:
        """Whether each sub-environment (or each of ``env_ids``) has that wrapper on its worker."""
        return self._held.do("is_wrapped", self._held.remote.is_wrapped, wrapper, env_ids)

    # ---------------------------------------------------------------- the remote

    def _lease_again(self) -> None:
        self._held.lease_again()
        remote = self._held.remote
        for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
            # Equal ones are kept: their generators may have been seeded.
            if getattr(self, name) != getattr(remote, name):
                setattr(self, name, getattr(remote, name))
        self._begin_anew()

    def _of_masked(self, seed: Any, options: Mapping[str, Any] | None) -> Any:
        """The seeds of those alone that are reset; what is no seed or no mask is refused before anything is sent."""
        mask = None if options is None else options.get("reset_mask")
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or self._seeding == "derived":
            return seed
        if isinstance(seed, (int, np.integer)):
            seed = [seed + i for i in range(self.num_envs)]
        if not isinstance(seed, (list, tuple, np.ndarray)):
            return seed
        return [one if chosen else None for one, chosen in zip(seed, mask, strict=False)]


def make_vec(
    name: str,
    num_envs: SupportsIndex = 1,
    *,
    render_mode: str | None = None,
    mesh: Mapping[str, Any] | str | None = None,
    where: Mapping[str, Any] | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    seeding: Seeding = "gymnasium",
    shards: int | None = None,
    wait: float = WAIT_S,
    **env_kwargs: Any,
) -> MeshVectorEnv:
    """Lease envs by name that are stepped together, as a ``gymnasium.vector.VectorEnv`` for synchronous code.

    ::

        with meshrl.make_vec("CartPole-v1", num_envs=8) as envs:
            observations, infos = envs.reset(seed=1)  # float32 of shape (8, 4)
            observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())

    It works in a notebook's running loop too. ``gymnasium.make_vec`` makes it of a spec, and of an id registered with
    ``vector_entry_point="meshrl:make_vec"`` and ``kwargs={"name": ...}``.

    Args:
        name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
        num_envs: how many sub-environments, at least 1.
        render_mode: Gymnasium's, except ``human``.
        mesh: arguments of :class:`meshrl.Mesh`: ``url``, ``namespace``, ``credentials``, ``timeout`` (seconds); or
            the url alone. Envs and vectors with equal ones share a connection.
        where: capabilities that each worker must have, such as ``{"gpu": True}``.
        autoreset_mode: what becomes of a sub-environment whose episode has ended: ``NextStep`` resets it by the next
            step (whose action it ignores, with reward 0), ``SameStep`` at once (its last observation and info are
            ``infos["final_obs"]`` and ``infos["final_info"]``), ``Disabled`` leaves that to the caller.
        seeding: ``gymnasium``: sub-environment i is reset with ``seed + i``, and resets without a seed go on.
            ``derived``: every episode's seed is derived from the reset's, so that each can be reproduced alone.
            ``implementation``: whatever a hosted vector implementation does with the seed.
        shards: over how many workers' sessions they are spread; None leaves it to placement.
        wait: seconds to wait for workers and free slots.
        env_kwargs: for the envs' constructor, as far as the workers' operator allows.

    Raises:
        MeshUnreachable: no NATS server answers.
        UnknownName: nobody serves the name, or nobody with those capabilities.
        UsageError: nobody who serves it has vectors of that mode or seeding; or an argument is of another kind, or
            belongs to another library's call.
        MeshFull: there were not enough free slots within ``wait``, or the workers have not so many.
        KwargsNotAllowed: the operator does not let clients pass one of ``env_kwargs``.
        EnvError: a constructor raised.
    """
    check_vectors_kwargs(served_name("make_vec", name), env_kwargs)
    return MeshVectorEnv(
        name,
        num_envs,
        render_mode=render_mode,
        mesh=mesh,
        where=where,
        autoreset_mode=autoreset_mode,
        seeding=seeding,
        shards=shards,
        wait=wait,
        env_kwargs=env_kwargs,
    )


def _again(name: str, made_of: Mapping[str, Any]) -> MeshVectorEnv:
    return MeshVectorEnv(name, **made_of)
