"""``RemoteVectorEnv``: many leased envs in lockstep, as Gymnasium's vector envs are, with ``await`` before each call.

Sub-environments are spread over workers in shards, contiguous by env_id. Each call is one request a shard, all of them
under way at once; what they answer is put together in the order of env_ids, so that no result tells how many shards
there were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from meshrl.client.leased_envs import LeasedEnvs
from meshrl.client.lockstep import Lockstep, all_frames
from meshrl.client.session import RemoteSession
from meshrl.errors import (
    MalformedMessage,
    NotAllowed,
    ResetNeeded,
    UsageError,
)
from meshrl.wire.batches import batching
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.infos import merge_infos
from meshrl.wire.messages import Seeding

# What step gives: observations, rewards, terminations, truncations, infos.
VectorStep = tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class RemoteVectorEnv(LeasedEnvs):
    """Envs that live on workers, stepped together; made by :meth:`meshrl.Mesh.vector`.

    Each method is one round trip to every shard, one at a time: a second call while one is under way raises
    ``ConcurrentStep``. Cancelling a call stops the waiting only: see :meth:`settle`. Every call may raise
    ``SessionLost`` (a shard is gone: open a new vector), ``EnvError`` (a sub-environment's code raised; its shard's
    session has ended) and ``SessionClosed``.

    Attributes:
        num_envs: how many sub-environments there are.
        autoreset_mode: what becomes of one whose episode has ended.
        seeding: ``gymnasium`` (seed + env_id, and resets without a seed go on) or ``derived`` (every episode can be
            reproduced alone, see :func:`meshrl.protocol.seeds.derive`).
        render_mode: as asked for.
    """

    _freed_by = "`await envs.close()` frees its slots"

    def __init__(
        self,
        sessions: Sequence[RemoteSession],
        *,
        autoreset_mode: AutoresetMode,
        seeding: Seeding,
        render_mode: str | None,
        check_actions: Literal["normal", "strict"],
    ) -> None:
        super().__init__(sessions, seeding=seeding, check_actions=check_actions)
        self.autoreset_mode = autoreset_mode
        self.render_mode = render_mode
        self._sizes = [session.num_envs for session in sessions]
        self._observation_batches = batching(self._single_observation_space)
        self._ended: NDArray[np.bool_] = np.zeros(self.num_envs, np.bool_)  # where nobody but the caller resets them
        self._lockstep = Lockstep(self._sessions, self.name)
        self._masked = all(vectors.reset_mask for vectors in self._vectors)
        self._optioned = all(vectors.options for vectors in self._vectors)
        self._reached = all(vectors.attributes for vectors in self._vectors)
        # What is made of the shards' infos; faces other than Gymnasium's take those of each sub-environment instead.
        self._infos_of: Callable[[Sequence[tuple[Any, int, int]], int], Any] = merge_infos

    def __repr__(self) -> str:
        return f"<RemoteVectorEnv of {self.num_envs} {self.name}: {self.whereabouts}>"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The remote envs', without what cannot travel, and ``autoreset_mode``."""
        return {**self._description.metadata, "autoreset_mode": self.autoreset_mode}

    # ---------------------------------------------------------------- a vector env's calls

    async def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes: ``gymnasium.vector.VectorEnv.reset``. Settles a cancelled call and drops its result.

        Args:
            seed: sub-environment i gets ``seed + i``; a list has one for each. With ``seeding="derived"``, the root of
                all seeds to come; under a mask, of those of the sub-environments that are reset.
            options: for the sub-environments' ``reset``. Under ``"reset_mask"`` it may hold a bool array of shape
                (num_envs,): only those are reset. The dict is left as it is.

        Returns:
            observations of all sub-environments, batched, and infos.

        Raises:
            InvalidSeed: seeds of another kind or number, or a list that the vectors' implementation cannot follow;
                nothing was sent.
            ValueError, TypeError: a mask of another kind, shape or dtype, as in Gymnasium.
            ResetNeeded: the first reset leaves some out.
            UsageError: a mask, and the vectors' implementation resets all or none; or options, and it takes none.
                Nothing was sent.
        """
        mask, rest = self._options(options)
        return await self._reset(seed, rest, mask)

    async def _reset(
        self, seed: int | Sequence[int | None] | None, options: dict[str, Any] | None, mask: NDArray[np.bool_] | None
    ) -> tuple[Any, dict[str, Any]]:
        if mask is not None and not self._masked:
            raise UsageError(
                f"{self.name}: the vectors' implementation {self._implementation} resets all of its sub-environments "
                "or none; reset without a reset_mask"
            )
        if options and not self._optioned:
            raise UsageError(
                f"{self.name}: the vectors' implementation {self._implementation} takes no reset options, and was "
                f"given {', '.join(map(repr, options))}; reset without them"
            )
        if mask is not None and not self._lockstep.began and not mask.all():
            left_out = np.flatnonzero(~mask).tolist()
            raise ResetNeeded(
                f"{self.name}: a first reset leaves out sub-environments {left_out}; reset all of them first",
                env_ids=left_out,
            )
        self._take_untold()
        seeds = self._seeds.of_reset(seed)
        fields = self._reset_fields(seeds, options, mask)
        ids = None if mask is None else np.flatnonzero(mask)

        def sent() -> None:
            self._seeds.sent(seeds, range(self.num_envs) if ids is None else ids.tolist())

        return self._was_reset(await self._lockstep.call("reset", fields, ids, sent), ids)

    async def step(self, actions: Any) -> VectorStep:
        """Take one step in each: ``gymnasium.vector.VectorEnv.step``.

        Args:
            actions: a batch, checked against the action space before anything is sent.

        Returns:
            observations, rewards (float64, or of the dtype that a vector implementation gives), terminations,
            truncations (bool), infos. The arrays are the caller's own.

        Raises:
            InvalidAction: the action of one is of a wrong shape, structure, dtype or discrete range; the error names
                its index, and nothing was sent.
            ResetNeeded: before the first ``reset``, or, where autoreset is disabled, after the end of an episode.
            ConcurrentStep: another call is under way.
            StepUnsettled: a cancelled call has to be settled first.
        """
        actions = self._check(actions)
        self._take_untold()
        if self._ended.any():
            ended = np.flatnonzero(self._ended).tolist()
            raise ResetNeeded(
                f"{self.name}: the episodes of sub-environments {ended} have ended, and autoreset is disabled; reset "
                'them with options={"reset_mask": ...}',
                env_ids=ended,
            )
        if len(self._sessions) == 1:
            fields = [self._said({"actions": actions})]
        else:
            fields = [self._said({"actions": self._action_batches.cut(actions, *at)}) for at in self._bounds]
        return self._stepped(await self._lockstep.call("step", fields))

    @property
    def unsettled(self) -> str:
        """The op whose result :meth:`settle` gives, such as ``step``; empty if there is none."""
        return self._lockstep.unsettled

    async def settle(self) -> Any:
        """The result of the call whose waiting was cancelled: for a step, its tuple.

        Raises:
            NothingUnsettled: no call was cancelled.
            ConcurrentStep: a call is under way that nobody cancelled.
        """
        op, answers, ids = await self._lockstep.settle()
        frames = all_frames(answers)
        if op == "step":
            return self._stepped(frames)
        if op == "reset":
            return self._was_reset(frames, ids)
        return () if op == "set_attr" else self._values(op, frames, ids)

    async def render(self) -> tuple[Any, ...] | None:
        """A frame of each sub-environment, in the order of env_ids: ``gymnasium.vector.VectorEnv.render``."""
        if self.render_mode is None:
            raise UsageError(f"{self.name}: it was leased without a render_mode; pass one to m.vector(...)")
        frames = await self._lockstep.call("render", [{}] * len(self._sessions))
        return tuple(chain.from_iterable(self._lists("render", frames, "frames", self._sizes)))

    async def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a public method of each sub-environment that the workers' operator allows.

        Raises:
            NotAllowed: the operator does not allow it, there is none, or the vectors' implementation does not let its
                sub-environments be reached; the same goes for the attributes below.
        """
        return await self.call_some(None, name, *args, **kwargs)

    async def call_some(
        self, env_ids: Sequence[SupportsIndex] | None, name: str, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """:meth:`call` of ``env_ids`` alone; gives what they give, in their order."""
        return await self._of_some("call", env_ids, {"name": name, "args": list(args), "kwargs": kwargs})

    async def get_attr(self, name: str, env_ids: Sequence[SupportsIndex] | None = None) -> tuple[Any, ...]:
        """A public attribute of each sub-environment (or of ``env_ids``), looked for through its wrappers.

        Raises:
            NotAllowed: it is private, or there is none.
            UnencodableValue: its value cannot travel.
        """
        return await self._of_some("get_attr", env_ids, {"name": name})

    async def set_attr(
        self, name: str, values: Any, env_ids: Sequence[SupportsIndex] | None = None, *, outermost: bool = False
    ) -> None:
        """Set a public attribute of each sub-environment (or of ``env_ids``) that the workers' operator allows.

        Args:
            name: of the attribute.
            values: a list or tuple has one for each; anything else is set on all.
            env_ids: which; None for all.
            outermost: set it on the outermost wrapper, where a wrapped env does not see it: what SB3's envs do.

        Raises:
            NotAllowed: the operator does not allow it.
            ValueError: another number of values.
        """
        self._check_reached("set_attr")
        ids = self._ids(env_ids).tolist()
        each = list(values) if isinstance(values, (list, tuple)) else [values] * len(ids)
        if len(each) != len(ids):
            raise ValueError(
                "Values must be a list or tuple with length equal to the number of environments. "
                f"Got `{len(each)}` values for {len(ids)} environments."
            )
        fields: list[Frame] = []
        for start, stop in self._bounds:
            mine = [k for k, i in enumerate(ids) if start <= i < stop]
            own: Frame = {"name": name, "ids": [ids[k] - start for k in mine], "values": [each[k] for k in mine]}
            fields.append({**own, "outermost": True} if outermost else own)
        await self._lockstep.call("set_attr", fields)

    async def is_wrapped(
        self, wrapper: type[gymnasium.Wrapper[Any, Any, Any, Any]], env_ids: Sequence[SupportsIndex] | None = None
    ) -> tuple[bool, ...]:
        """Whether each sub-environment (or each of ``env_ids``) has that wrapper on its worker."""
        return await self._of_some("is_wrapped", env_ids, {"wrapper": f"{wrapper.__module__}:{wrapper.__qualname__}"})

    # ---------------------------------------------------------------- requests

    async def _of_some(self, op: str, env_ids: Sequence[SupportsIndex] | None, fields: Frame) -> tuple[Any, ...]:
        """Values of some sub-environments, in the order asked for."""
        self._check_reached(op)
        if env_ids is None:
            return self._values(op, await self._lockstep.call(op, [fields] * len(self._sessions)), None)
        ids = self._ids(env_ids)
        listed = ids.tolist()
        own = [{**fields, "ids": [i - start for i in listed if start <= i < stop]} for start, stop in self._bounds]
        return self._values(op, await self._lockstep.call(op, own, ids), ids)

    def _values(self, op: str, frames: Sequence[Frame], ids: Indices | None) -> tuple[Any, ...]:
        """What the shards gave for ``ids``, in the order of these; None for all.

        Raises:
            MalformedMessage: it is another number of values than were asked for.
        """
        if ids is None:
            return tuple(chain.from_iterable(self._lists(op, frames, "values", self._sizes)))
        of = np.searchsorted([session.first_env_id for session in self._sessions], ids, "right") - 1
        sizes = np.bincount(of, minlength=len(frames)).tolist()
        by_shard = [iter(values) for values in self._lists(op, frames, "values", sizes)]
        return tuple(next(by_shard[shard]) for shard in of.tolist())  # each has as many as there are turns

    def _lists(self, op: str, frames: Sequence[Frame], field: str, sizes: Sequence[int]) -> list[list[Any]]:
        lists: list[list[Any]] = []
        for session, frame, size in zip(self._sessions, frames, sizes, strict=True):
            values = frame.get(field)
            if not isinstance(values, list) or len(values) != size:
                got = len(values) if isinstance(values, list) else type(values).__name__
                raise MalformedMessage(
                    f"{self.name}: the {field} that worker {session.grant.worker} answered to {op} are not a list of "
                    f"{size}, but {got}",
                    worker=session.grant.worker,
                    field=field,
                )
            lists.append(values)
        return lists

    def _check_reached(self, op: str) -> None:
        if not self._reached:
            raise NotAllowed(
                f"{self.name}: the vectors' implementation {self._implementation} has no {op}; its sub-environments "
                "cannot be reached"
            )

    # ---------------------------------------------------------------- what they carry

    def _options(self, options: Mapping[str, Any] | None) -> tuple[NDArray[np.bool_] | None, dict[str, Any] | None]:
        """The mask among the options, with Gymnasium's checks of it, and the others."""
        if options is None or "reset_mask" not in options:
            return None, None if options is None else dict(options)
        rest = dict(options)
        mask = rest.pop("reset_mask")
        if not isinstance(mask, np.ndarray):
            raise TypeError(f"`options['reset_mask']` must be a numpy array, got {type(mask)}")
        if mask.shape != (self.num_envs,):
            raise ValueError(f"`options['reset_mask']` must have shape `({self.num_envs},)`, got {mask.shape}")
        if mask.dtype != np.bool_:
            raise TypeError(f"`options['reset_mask']` must have `dtype=np.bool_`, got {mask.dtype}")
        if not mask.any():
            raise ValueError(
                f"`options['reset_mask']` must contain a boolean array with at least one True value, got {mask}"
            )
        return mask, rest

    def _reset_fields(
        self, seeds: list[int | None] | None, options: dict[str, Any] | None, mask: NDArray[np.bool_] | None
    ) -> list[Frame]:
        common = {} if options is None else {"options": options}
        of_each = {name: of for name, of in (("seeds", seeds), ("mask", mask)) if of is not None}
        return [{**common, **{name: of[i:j] for name, of in of_each.items()}} for i, j in self._bounds]

    def _was_reset(self, frames: list[Frame], ids: Indices | None) -> tuple[Any, dict[str, Any]]:
        self._take_untold()
        self._ended[slice(None) if ids is None else ids] = False
        return self._observations(frames), self._infos(frames)

    def _take_untold(self) -> None:
        """Note what became of episodes in calls whose results nobody got, as far as their shards told of it."""
        untold, self._lockstep.untold = self._lockstep.untold, []
        for op, answers, ids in untold:
            for session, answer in zip(self._sessions, answers, strict=True):
                own = np.arange(session.first_env_id, session.first_env_id + session.num_envs)
                if op == "reset" and ids is not None:
                    own = own[np.isin(own, ids)]
                if op == "reset" and isinstance(answer, dict):
                    self._ended[own] = False
                elif op == "reset":
                    self._seeds.refused(own.tolist())
                elif isinstance(answer, dict) and self.autoreset_mode is AutoresetMode.DISABLED:
                    with contextlib.suppress(ValueError, TypeError, KeyError):  # it is no answer, and tells nothing
                        self._ended[own] = answer["terminations"] | answer["truncations"]

    def _stepped(self, frames: list[Frame]) -> VectorStep:
        terminations = self._column(frames, "terminations")
        truncations = self._column(frames, "truncations")
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._ended = terminations | truncations
        return (
            self._observations(frames),
            self._column(frames, "rewards"),
            terminations,
            truncations,
            self._infos(frames),
        )

    def _observations(self, frames: list[Frame]) -> Any:
        # Where there are several shards, one copy more than those that meshrl.wire.large counts: into the array of all.
        return self._observation_batches.join([_field(frame, "obs") for frame in frames], self._sizes, "obs")

    def _column(self, frames: list[Frame], field: str) -> NDArray[Any]:
        """One number or flag a sub-environment."""
        columns = [_field(frame, field) for frame in frames]
        for column, size in zip(columns, self._sizes, strict=True):
            kinds = "fiub" if field == "rewards" else "b"
            if not isinstance(column, np.ndarray) or column.shape != (size,) or column.dtype.kind not in kinds:
                raise MalformedMessage(f"a reply's {field} are not one number for each of {size} sub-environments")
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def _infos(self, frames: list[Frame]) -> Any:
        parts = [
            (frame.get("infos"), session.first_env_id, session.num_envs)
            for frame, session in zip(frames, self._sessions, strict=True)
            if "infos" in frame
        ]
        return self._infos_of(parts, self.num_envs)


def _field(frame: Frame, field: str) -> Any:
    try:
        return frame[field]
    except KeyError:
        raise MalformedMessage(f"a reply has no {field}") from None
