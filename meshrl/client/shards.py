"""Shards: one vector opened as several sessions, all of them or none (R5).

The plan is :meth:`meshrl.protocol.placement.Placement.spread`'s; each shard then has an opening of its own, aimed at
the worker that the plan meant. Who is busier than the plan believed sends it elsewhere; where no one worker has room
for it and several together have, it is cut again rather than parked.

A client may hold some shards while it waits for others, and two clients may each hold what the other needs. Neither
takes anything from the other; the one whose ``wait`` is over first gives back what it holds, and the other goes on.
"""

from __future__ import annotations

import asyncio
import operator
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from meshrl.client.finding import ASK_AGAIN_S
from meshrl.client.opening import Divided, Opening
from meshrl.client.pool_shard import PoolShard
from meshrl.client.recovery import OnLoss
from meshrl.client.resumable_shard import ResumableShard
from meshrl.client.session import RemoteSession, close_all
from meshrl.client.shard_recovery import ShardRecovery
from meshrl.client.shielded import shielded
from meshrl.errors import MeshFull, SpacesDiffer, UsageError
from meshrl.protocol.journals import Journals
from meshrl.protocol.placement import Shard
from meshrl.wire import spaces
from meshrl.wire.batches import batching
from meshrl.wire.messages import Description, Form, Grant, Vectors

if TYPE_CHECKING:
    from meshrl.client.context import Context


_REMEDY = "choose workers by where=..., take one by shards=1, or have the same served under the name"


async def open_shards(
    context: Context,
    name: str,
    kwargs: Mapping[str, Any] | None,
    where: Mapping[str, Any] | None,
    wait: float,
    *,
    num_envs: int,
    shards: int | None,
    on_loss: OnLoss,
    **request: Any,
) -> list[RemoteSession]:
    """Lease the sessions of a vector of envs: all of them or none.

    Cancelling gives back what was granted.

    Args:
        context: of the mesh.
        name: as the user wrote it.
        kwargs: for the envs' constructor.
        where: capabilities that each worker must have.
        wait: seconds to wait for workers and room; constructors that are running are waited for beyond it.
        num_envs: sub-environments of all shards together, at least 1.
        shards: how many there are to be; None leaves it to placement.
        on_loss: what becomes of them when they are lost.
        request: more fields of each :class:`~meshrl.wire.messages.Open`: form, autoreset_mode, seeding, render_mode.

    Returns:
        the sessions, in the order of their sub-environments.

    Raises:
        UsageError: ``num_envs`` or ``shards`` is no such number, or nobody who serves the name offers such vectors,
            or two shards of a vector have different implementations.
        UnknownName: nobody serves the name, or nobody with those capabilities.
        SpacesDiffer: two of them have different spaces; all were closed.
        MeshFull: there was no room for all of them within ``wait``.
        MeshUnreachable: the server is away.
        KwargsNotAllowed, EnvError: a worker's answer.
    """
    request["kwargs"] = dict(kwargs or {})
    num_envs = _whole("num_envs", num_envs)
    shards = None if shards is None else _whole("shards", shards)
    # Derived seeds go on where they were, also after a loss that cuts episodes short; where is told with the digests.
    told = on_loss == "resume" or (on_loss == "truncate" and request["seeding"] == "derived")
    request["digests"] = "large" if told else "none"
    vector = _Vector(context, name, where, wait, request, num_envs=num_envs, shards=shards, on_loss=on_loss)
    sessions = await vector.open()
    try:
        _check_alike(sessions, request["form"])
    except BaseException:
        await close_all(sessions)
        raise
    return sessions


def _whole(what: str, given: object) -> int:
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        return operator.index(given)  # type: ignore[arg-type]  # or it raises
    except TypeError:
        raise UsageError(f"{what} is a whole number, not {given!r}") from None


def _check_alike(sessions: Sequence[RemoteSession], form: Form) -> None:
    """Whether these can be shards of one vector: anybody may serve anything under a name.

    Raises:
        SpacesDiffer: the spaces of two of them differ.
        UsageError: two of a vector have different implementations.
    """
    first = sessions[0].grant
    told = first.description
    for other in (session.grant for session in sessions[1:]):
        said = other.description
        who = f"{told.name}: the envs of worker {first.worker} and those of worker {other.worker} differ"
        for what in ("observation_space", "action_space"):
            one, two = getattr(told, what), getattr(said, what)
            if _equal(one, two):
                continue
            one, two = spaces.rebuild(one), spaces.rebuild(two)  # what is described differently may be equal
            if one != two:
                raise SpacesDiffer(
                    f"{who} in their {what.replace('_', ' ')}: {str(one)[:200]} and {str(two)[:200]}; {_REMEDY}",
                    workers=[first.worker, other.worker],
                )
        if form == "vector" and _implementation(told) != _implementation(said):
            raise UsageError(
                f"{who} in their vectors' implementation: {_implementation(told)} and {_implementation(said)}; "
                f"{_REMEDY}",
                workers=[first.worker, other.worker],
            )


def _equal(one: object, two: object) -> bool:
    try:
        return bool(one == two)
    except ValueError:  # arrays in them
        return False


def _implementation(description: Description) -> str:
    return (description.vectors or Vectors()).implementation


class _Vector:
    """One vector, from the wish to its sessions."""

    def __init__(
        self,
        context: Context,
        name: str,
        where: Mapping[str, Any] | None,
        wait: float,
        request: dict[str, Any],
        *,
        num_envs: int,
        shards: int | None,
        on_loss: OnLoss,
    ) -> None:
        self._context = context
        self._on_loss = on_loss
        self._wait = wait
        self._name = name
        self._where = where
        self._request = request
        self._num_envs = num_envs
        self._shards = shards
        self._deadline = time.monotonic() + wait
        # It never runs: it knows who serves the name, and what to say when they are full.
        whole = {**request, "num_envs": num_envs}
        self._whole = Opening(context, "env", name, wait=wait, where=where, request=whole)

    async def open(self) -> list[RemoteSession]:
        plan = await self._planned()
        try:
            return await self._open_all(plan, 0)
        except MeshFull as exc:
            raise self._whole.full() from exc  # of the whole vector; what it held is free again

    async def _planned(self) -> list[Shard]:
        """The plan, as soon as the workers have so many slots at all."""
        placement = self._context.registry.placement
        while True:
            entries = await self._whole.served()
            plan = placement.spread(entries, self._num_envs, self._shards, draw=random.random())  # noqa: S311
            if plan:
                return plan
            self._whole.check_slots(self._shards)
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._whole.full()
            await self._whole.changed(min(ASK_AGAIN_S, left))

    async def _open_all(self, plan: Sequence[Shard], first_env_id: int) -> list[RemoteSession]:
        tasks = []
        for shard in plan:
            tasks.append(asyncio.create_task(self._open_one(shard, first_env_id)))
            first_env_id += shard.num_envs
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        except BaseException:
            await shielded(_give_back(tasks))
            raise
        return [session for task in tasks for session in task.result()]

    async def _open_one(self, shard: Shard, first_env_id: int) -> list[RemoteSession]:
        """Open one shard: in one session, or in several where it had to be cut again."""
        request = {**self._request, "first_env_id": first_env_id, "num_envs": shard.num_envs}
        opening = Opening(
            self._context,
            "env",
            self._name,
            wait=max(0.0, self._deadline - time.monotonic()),
            where=self._where,
            request=request,
            aim=shard.worker,
            divisible=self._shards is None,
        )
        try:
            return [await self._context.lease(opening, self._made_of(request))]
        except Divided as divided:
            plan = divided.plan
        return await self._open_all(plan, first_env_id)

    def _made_of(self, request: dict[str, Any]) -> Callable[[Context, Grant], RemoteSession]:
        """What makes the session of a shard."""
        place = {"first_env_id": request["first_env_id"], "num_envs": request["num_envs"]}
        if self._on_loss == "raise":
            return partial(RemoteSession, **place)
        made = PoolShard if request["form"] == "pool" else ResumableShard

        def make(context: Context, grant: Grant) -> RemoteSession:
            observations = batching(spaces.rebuild(grant.description.observation_space))
            recovery = ShardRecovery(
                context,
                "env",
                self._name,
                self._where,
                request,
                self._wait,
                self._on_loss == "resume",
                journal=Journals(request["num_envs"], observations),
            )
            return made(context, grant, recovery, **place)

        return make


async def _give_back(tasks: Sequence[asyncio.Task[list[RemoteSession]]]) -> None:
    """End openings that are under way, and close what they or others opened."""
    for task in tasks:
        task.cancel()
    opened = await asyncio.gather(*tasks, return_exceptions=True)
    sessions = [session for sessions in opened if not isinstance(sessions, BaseException) for session in sessions]
    await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)
