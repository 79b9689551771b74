"""Forking: live envs in the exact state of another, by doing again what that one was asked (R8)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from meshrl.client.opening import Opening
from meshrl.client.recovery import Recovery, same
from meshrl.client.resumable import ResumableSession
from meshrl.client.shielded import shielded
from meshrl.errors import MeshFull, SessionLost, UsageError

if TYPE_CHECKING:
    from meshrl.client.session import RemoteSession


async def fork(session: RemoteSession, n: int) -> list[ResumableSession]:
    """Lease ``n`` sessions in the state that this one has now: all of them or none.

    Cancelling gives back what was granted.

    Args:
        session: of a single env.
        n: how many, at least 1.

    Raises:
        UsageError: the session keeps no journal, or it cannot be done again; ``details["lacking"]`` says why.
        ConcurrentStep, StepUnsettled: its state is about to be another.
        ReplayDiverged: a copy came to another state.
        MeshError: as of :meth:`meshrl.Mesh.env`.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"fork makes one env or more, not {n!r}")
    session.check_open()
    name = session.grant.description.name
    recovery = session.recovery if isinstance(session, ResumableSession) else None
    if recovery is None or not recovery.resumes:
        raise UsageError(
            f"{name}: only an env that was leased with on_loss='resume' can be forked", lacking="no_journal"
        )
    session.may_begin("fork")
    if recovery.anew or recovery.journal.lacking:
        lacking = recovery.journal.lacking or "state_lost"
        raise UsageError(f"{name}: what it was asked cannot be done again ({lacking}); reset it first", lacking=lacking)
    kept = recovery.copy()  # of this moment, whatever it is asked meanwhile
    copies = [asyncio.create_task(_copied(session, kept.copy())) for _ in range(n)]
    try:
        done, _ = await asyncio.wait(copies, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    except BaseException:
        await shielded(_give_back(copies))
        raise
    return [task.result() for task in copies]


async def _copied(session: RemoteSession, recovery: Recovery) -> ResumableSession:
    """One copy, at a worker whose env is equal."""
    deadline, avoid = time.monotonic() + recovery.wait_s, set[str]()
    while True:
        opening = Opening(
            recovery.context,
            recovery.kind,
            recovery.asked,
            wait=max(0.0, deadline - time.monotonic()),
            where=recovery.where,
            request=recovery.request,
            avoid=avoid,
        )
        copy = await recovery.context.lease(opening, partial(ResumableSession, recovery=replace(recovery)))
        try:
            if same(session.grant.description, copy.grant.description, exactly=True):
                await copy.become(recovery.journal)
                return copy
            avoid.add(copy.grant.worker)
        except SessionLost:
            avoid.add(copy.grant.worker)
        except BaseException:
            await shielded(copy.close())
            raise
        await shielded(copy.close())
        if time.monotonic() >= deadline:
            name = session.grant.description.name
            raise MeshFull(
                f"{name}: of the workers that serve it, none has an equal env and room for a copy", name=name
            )


async def _give_back(copies: list[asyncio.Task[ResumableSession]]) -> None:
    for task in copies:
        task.cancel()
    made = await asyncio.gather(*copies, return_exceptions=True)
    await asyncio.gather(*(one.close() for one in made if isinstance(one, ResumableSession)), return_exceptions=True)
