"""``MeshVecEnv``: a Stable-Baselines3 ``VecEnv`` whose envs live on workers. Needs the extra ``meshrl[sb3]``.

What SB3's ``DummyVecEnv`` over local envs gives, this gives: the same observations, rewards, dones and infos, with the
same types. What cannot be the same is said here:

    - an error of an env's own code is an ``EnvError`` with the worker's traceback;
    - ``info["TimeLimit.truncated"]`` is a bool also where an env says ``np.bool_``;
    - options that differ between sub-environments, at the very first reset, have some of them reset twice.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

try:
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f"meshrl.adapters.sb3 needs Stable-Baselines3 ({exc}): pip install 'meshrl[sb3]'", name=exc.name
    ) from exc

from meshrl.adapters.arguments import WAIT_S, count_of, mesh_arguments, served_name
from meshrl.adapters.held import HeldVector
from meshrl.adapters.sb3_vector import Resets, ended, groups_of, lease, only, reset_groups
from meshrl.client.mesh import Mesh
from meshrl.client.vector import RemoteVectorEnv
from meshrl.errors import InvalidAction, NotAllowed, UnencodableValue
from meshrl.wire.batches import batching, form_of

# As the types of stable_baselines3.common.vec_env.base_vec_env say.
Indices = None | int | Iterable[int]
Observations = NDArray[Any] | dict[str, NDArray[Any]] | tuple[NDArray[Any], ...]
StepReturn = tuple[Observations, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]
# Types of what get_attr finds and does not send, but which can be called from here.
_METHODS = frozenset({"builtins.method", "builtins.function", "builtins.builtin_function_or_method"})


class MeshVecEnv(VecEnv):
    """Envs that live on workers, as SB3's algorithms, wrappers and callbacks take them.

    ::

        venv = MeshVecEnv("CartPole-v1", 8)
        model = PPO("MlpPolicy", venv).learn(100_000)
        venv.close()

    Each call is one round trip to every shard, made from one thread at a time. Ctrl-C during a step leaves the envs
    usable: the step may have run, so the next one raises ``StepUnsettled`` until :meth:`settle` gives its result or
    :meth:`reset` discards it. Every call may raise ``SessionLost`` (a shard is gone: make a new one), ``EnvError`` (a
    sub-environment's code raised; its shard's session has ended) and ``SessionClosed`` (after :meth:`close`).

    Pickled or copied it leases other envs in their initial state; after a fork the child's copy does so at its first
    :meth:`reset`, and until then refuses everything else with ``ResetNeeded``.

    Args:
        name: as served; ``cartpole`` finds the newest ``CartPole-vN``.
        num_envs: how many sub-environments, at least 1.
        mesh: arguments of :class:`meshrl.Mesh`: ``url``, ``namespace``, ``credentials``, ``timeout`` (seconds); or
            the url alone. Envs with equal ones share a connection.
        render_mode: Gymnasium's, except ``human``; with ``rgb_array``, SB3's ``render("human")`` shows all of them.
        where: capabilities that each worker must have, such as ``{"gpu": True}``.
        shards: over how many workers' sessions they are spread; None leaves it to placement.
        wait: seconds to wait for workers and free slots.
        env_kwargs: for the envs' constructor, as far as the workers' operator allows.

    Attributes:
        num_envs: how many sub-environments there are.
        observation_space: of one sub-environment.
        action_space: of one; its generator is this client's own.
        metadata: the remote envs'.
        render_mode: the remote envs'.
        reset_infos: the info of each one's last reset, autoresets included.

    Raises:
        MeshUnreachable: no NATS server answers.
        UnknownName: nobody serves the name, or nobody with those capabilities.
        UsageError: nobody who serves it resets at once, as SB3 has it; or an argument is of another kind.
        MeshFull: there were not enough free slots within ``wait``, or the workers have not so many.
        KwargsNotAllowed: the operator does not let clients pass one of ``env_kwargs``.
        EnvError: a constructor raised.
        NotImplementedError: Dicts or Tuples within one another, which SB3 does not take.
        UnsupportedSpace: observations that are no arrays.
    """

    def __init__(
        self,
        name: str,
        num_envs: SupportsIndex = 1,
        *,
        mesh: Mapping[str, Any] | str | None = None,
        render_mode: str | None = None,
        where: Mapping[str, Any] | None = None,
        shards: int | None = None,
        wait: float = WAIT_S,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = served_name("MeshVecEnv", name)
        # What __init__ takes: that of which it is made again.
        self._made_of: dict[str, Any] = {
            "num_envs": count_of(num_envs),
            "mesh": mesh_arguments(mesh),
            "render_mode": render_mode,
            "where": None if where is None else dict(where),
            "shards": shards,
            "wait": wait,
            "env_kwargs": dict(env_kwargs or {}),
        }
        self._held = HeldVector(name, self._made_of["mesh"], functools.partial(_lease, name, dict(self._made_of)))
        try:
            remote = self._held.remote
            self._ever_reset = False
            self._actions = batching(remote.single_action_space)
            self._action_form = form_of(remote.single_action_space)
            super().__init__(remote.num_envs, remote.single_observation_space, remote.single_action_space)
        except BaseException:
            self._held.close()
            raise
        self.metadata = {key: value for key, value in remote.metadata.items() if key != "autoreset_mode"}

    def __repr__(self) -> str:
        return f"<MeshVecEnv of {self._made_of['num_envs']} {self._name}: {self._held!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._name, self._made_of)

    def __del__(self, _warn: Any = warnings.warn) -> None:
        held = getattr(self, "_held", None)
        if held is not None:
            held.forgotten(self, "venv.close()", _warn)

    # ---------------------------------------------------------------- facts

    @property
    def remote_spec(self) -> EnvSpec | None:
        """The workers' own ``EnvSpec`` of a sub-environment; None where it has none that can be written down."""
        return self._held.remote.remote_spec

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The worker and the number of sub-environments of each shard, in order."""
        return self._held.remote.shards

    # ---------------------------------------------------------------- a VecEnv's calls

    def reset(self) -> Observations:
        """Begin episodes, with the seeds and options that were set since the last reset. Drops a pending step.

        Returns:
            observations of all sub-environments; the infos are in ``reset_infos``.

        Raises:
            InvalidSeed: one is no whole number from 0.
        """
        if self._held.inherited and not self._held.closed:
            self._held.lease_again()
            self._ever_reset = False
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        groups = groups_of(self._options[: self.num_envs])
        reset = functools.partial(reset_groups, self._held.remote, seeds, groups, first=not self._ever_reset)
        return self._was_reset(self._held.do("reset", reset))

    def step_async(self, actions: Any) -> None:
        """Begin a step; :meth:`step_wait` gives its result.

        Args:
            actions: an array whose first axis is ``num_envs`` long, or a list of as many actions; they are copied.

        Raises:
            InvalidAction: they cannot be put together to a batch.
            StepUnsettled: a call was interrupted and may have run; ``settle`` or ``reset`` comes first.
            ConcurrentStep: a step is under way.
        """
        self._held.begin("step", self._held.remote.step, self._batch(actions))

    def step_wait(self) -> StepReturn:
        """The result of the step that was begun.

        Returns:
            observations, rewards (float32 of shape (num_envs,)), dones (bool), infos (a dict for each). Where an
            episode has ended, the observation is the next one's first, and the info has the last under
            ``terminal_observation``. The arrays are the caller's own.

        Raises:
            InvalidAction: the action of one is of a wrong shape, dtype or discrete range; the error names its index,
                and nothing was sent.
            ResetNeeded: before the first ``reset``.
            NothingUnderWay: no step was begun.
        """
        return self._stepped(self._held.finish())

    def settle(self) -> Any:
        """The result of the step or reset that was interrupted, as the call itself would have given it.

        Raises:
            NothingUnsettled: none was, or it was before anything was sent.
        """
        op, value = self._held.settle()
        if op == "step":
            return self._stepped(value)
        if op != "reset":
            return value
        if isinstance(value, list):
            return self._was_reset(value)
        if len(groups_of(self._options)) > 1:
            return self.reset()  # some of several, one after another, were never sent
        return self._was_reset([(None, value)])

    def close(self) -> None:
        """Close all sub-environments and free their slots. Safe to call twice."""
        self._held.close()

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """A frame of each sub-environment; of other render modes than ``rgb_array``, None and a warning."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode}, but this method assumes it is `rgb_array` to obtain images.",
                stacklevel=2,
            )
            return [None] * self.num_envs
        return list(self._rendered())

    # ---------------------------------------------------------------- the sub-environments by name

    def has_attr(self, attr_name: str) -> bool:
        """Whether each sub-environment has that attribute or method, and it is public."""
        try:
            self.get_attr(attr_name)
        except AttributeError:
            return False
        except UnencodableValue:
            return True
        return True

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """A public attribute of each sub-environment (or of ``indices``), looked for through its wrappers.

        A method is given as a function that calls it there. Spaces and the spec are those that are known here.

        Raises:
            AttributeError: there is none, or it is private.
            UnencodableValue: its value cannot travel.
            IndexError: there is no such sub-environment.
        """
        ids = self._ids(indices)
        try:
            return list(self._held.do("get_attr", self._held.remote.get_attr, attr_name, ids))
        except NotAllowed as exc:
            raise AttributeError(str(exc)) from exc
        except UnencodableValue as exc:
            if attr_name in _KNOWN_HERE:
                return [copy.deepcopy(_KNOWN_HERE[attr_name](self)) for _ in ids]
            if exc.details.get("type") in _METHODS:
                return [functools.partial(self._call_one, i, attr_name) for i in ids]
            raise

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set a public attribute of each sub-environment (or of ``indices``) to the same value.

        As ``DummyVecEnv`` does, on the outermost wrapper: an env that is wrapped does not see it. To set something
        where the env has it, let the env have a method for that and call :meth:`env_method`.

        Raises:
            NotAllowed: the workers' operator does not allow it.
            IndexError: there is no such sub-environment.
        """
        ids = self._ids(indices)
        set_attr = functools.partial(self._held.remote.set_attr, outermost=True)
        self._held.do("set_attr", set_attr, attr_name, [value] * len(ids), ids)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a public method of each sub-environment (or of ``indices``).

        Returns:
            what they gave, in the order of ``indices``.

        Raises:
            NotAllowed: the workers' operator does not allow it.
            AttributeError: there is no such method.
            IndexError: there is no such sub-environment.
        """
        ids = self._ids(indices)
        if method_name == "render" and not (method_args or method_kwargs) and self.render_mode is not None:
            frames = self._rendered()  # what needs no operator's leave
            return [frames[i] for i in ids]
        remote = self._held.remote
        call = functools.partial(remote.call_some, ids, method_name, *method_args, **method_kwargs)
        try:
            return list(self._held.do("call", call))
        except NotAllowed as exc:
            if "allowed" in exc.details:  # it may be there: its operator says no
                raise
            raise AttributeError(str(exc)) from exc

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """Whether each sub-environment (or each of ``indices``) has that wrapper on its worker."""
        return list(self._held.do("is_wrapped", self._held.remote.is_wrapped, wrapper_class, self._ids(indices)))

    def _call_one(self, i: int, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.env_method(name, *args, indices=i, **kwargs)[0]

    def _rendered(self) -> tuple[Any, ...]:
        frames = self._held.do("render", self._held.remote.render)
        assert frames is not None, "there is a render mode"
        return frames

    def _ids(self, indices: Indices) -> list[int]:
        """As a list indexes them: from the end where negative."""
        every = range(self.num_envs)
        try:
            return [every[i] for i in self._get_indices(indices)]
        except IndexError:
            raise IndexError(f"{self._name}: there are {self.num_envs} sub-environments; no index {indices}") from None

    # ---------------------------------------------------------------- what they carry

    def _was_reset(self, resets: Resets) -> Observations:
        for mask, (_, told) in resets:
            for i in range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist():
                self.reset_infos[i] = only(told[i])
        self._ever_reset = True
        self._reset_seeds()
        self._reset_options()
        return _observations(resets[-1][1][0])

    def _batch(self, actions: Any) -> Any:
        """A batch of its own, as Gymnasium has it, of what can be indexed by sub-environment."""
        try:
            if self._action_form == "array":
                return np.array(actions)
            return self._actions.stack([actions[i] for i in range(self.num_envs)])
        except (ValueError, TypeError, KeyError, IndexError) as exc:
            raise InvalidAction(
                f"{self._name}: these are no actions for {self.num_envs} sub-environments: {type(exc).__name__}: {exc}",
                action=repr(actions)[:200],
            ) from exc

    def _stepped(self, result: Any) -> StepReturn:
        observations, rewards, terminations, truncations, told = result
        dones = terminations | truncations
        cut_off = truncations & ~terminations
        infos: list[dict[str, Any]] = []
        for i, (done, late) in enumerate(zip(dones.tolist(), cut_off.tolist(), strict=True)):
            if not done:
                info = only(told[i])
                info["TimeLimit.truncated"] = False
            else:
                info, observation, self.reset_infos[i] = ended(told[i])
                info["TimeLimit.truncated"] = late
                info["terminal_observation"] = observation
            infos.append(info)
        return _observations(observations), rewards.astype(np.float32), dones, infos


def _observations(batch: Any) -> Observations:
    return OrderedDict(batch) if isinstance(batch, dict) else batch  # the type that DummyVecEnv has


async def _lease(name: str, made_of: Mapping[str, Any], mesh: Mesh) -> RemoteVectorEnv:
    request = {"kwargs" if key == "env_kwargs" else key: value for key, value in made_of.items() if key != "mesh"}
    return await lease(mesh, name, **request)


# What get_attr cannot fetch, and a client knows.
_KNOWN_HERE: dict[str, Callable[[MeshVecEnv], Any]] = {
    "observation_space": lambda venv: venv.observation_space,
    "action_space": lambda venv: venv.action_space,
    "spec": lambda venv: venv.remote_spec,
}


def _again(name: str, made_of: Mapping[str, Any]) -> MeshVecEnv:
    return MeshVecEnv(name, **made_of)
