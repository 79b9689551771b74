"""Opening: find who serves a name, ask the least loaded, wait in turn where all are full (R4, R5)."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from meshrl.client.flights import Entry, Flight
from meshrl.errors import MeshError, MeshFull, SessionLost, UnknownName, WorkerDraining, from_wire
from meshrl.protocol.names import near
from meshrl.protocol.placement import Choice
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Close, Full, Grant, Kind, Open, check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.client.mesh import Mesh
    from meshrl.protocol.directory import Entry as Served

# A name that nobody serves is an error after this long when other workers are there; a mesh without any worker is
# waited for (it may be starting).
UNKNOWN_S = 3.0
ASK_AGAIN_S = 1.0
# How often a worker that is busier than believed may send one open on. Four clients with stale directories that open
# four sessions each at once end at 4 ± 1 a worker in all of 10,000 simulated runs with three, in 94 % with one.
MAX_BOUNCES = 3
# A constructor may take minutes (a simulator that loads its maps).
CONSTRUCT_S = 600.0


class Opening:
    """One open, from the wish to the grant.

    Args:
        mesh: whose directory and placement it uses.
        kind: ``env`` or ``agent``.
        asked: the name as the user wrote it.
        wait: seconds to wait for a worker and a slot; a constructor that is running is waited for beyond it.
        where: capabilities that the worker must have.
        request: the open's own fields.
    """

    def __init__(
        self,
        mesh: Mesh,
        kind: Kind,
        asked: str,
        *,
        wait: float,
        where: Mapping[str, Any] | None,
        request: dict[str, Any],
    ) -> None:
        self._mesh = mesh
        self._kind: Kind = kind
        self._asked = asked
        self._wait = wait
        self._where = dict(where or {})
        self._request = request
        self._session = secrets.token_hex(8)
        self._deadline = time.monotonic() + wait
        self._workers: set[str] = set()  # asked so far; those that do not serve in the end are told so
        self._bounces: Counter[str] = Counter()
        self._excluded: set[str] = set()
        self._tickets: dict[str, str] = {}
        self._refused = False

    async def run(self) -> Grant:
        """Open.

        Raises:
            UnknownName: nobody serves the name, or nobody with those capabilities.
            MeshFull: no slot was free for all of ``wait``.
            KwargsNotAllowed, EnvError: the worker's answer.
        """
        served = ""
        try:
            while True:
                entries = await self.served()
                choice = self._mesh.placement.choose(entries, exclude=self._excluded, draw=random.random())  # noqa: S311
                if choice is None:
                    self._excluded.clear()
                    await self._change(ASK_AGAIN_S)
                    continue
                grant = await self._ask(choice, entries[0].name)
                if grant is not None:
                    served = grant.worker
                    return grant
                if self._refused:  # full, and no room in its queue either: not at once again
                    self._refused = False
                    await self._change(ASK_AGAIN_S)
        finally:
            self._say_close(self._workers - {served})

    # ---------------------------------------------------------------- who

    async def served(self) -> list[Served]:
        """Who serves the name and could take the session; waits until somebody does."""
        mesh, began, asked_at = self._mesh, time.monotonic(), -ASK_AGAIN_S
        while True:
            now = time.monotonic()
            name = mesh.resolve(self._kind, self._asked)
            if name is not None:
                entries = mesh.directory.candidates(self._kind, name, self._where)
                if entries:
                    return entries
            refusal = mesh.refusals.get((self._kind, self._asked))
            if name is None and refusal is not None:
                raise refusal
            known = mesh.directory.names(self._kind)
            if now >= self._deadline or (name is None and known and now - began > UNKNOWN_S):
                raise self._unknown(name, known)
            if now - asked_at >= ASK_AGAIN_S:
                asked_at = now
                mesh.ask_for(self._kind, self._asked if name is None else name)
            await self._change(min(ASK_AGAIN_S, self._deadline - now))

    def _unknown(self, name: str | None, known: list[str]) -> MeshError:
        if name is not None:
            able = [
                f"{e.worker}: {dict(e.description.capabilities) if e.description else 'not yet described'}"
                for e in self._mesh.directory.entries(self._kind)
                if e.name == name
            ]
            return UnknownName(
                f"no worker that serves {name} can take the session where={self._where} ({'; '.join(able)}); change "
                "where, or start a worker with those capabilities",
                name=name,
                where=self._where,
            )
        close = near(self._asked, known)
        if not known:
            text = "no worker is on the mesh; start one (meshrl serve, meshrl up)"
        elif close:
            text = f"did you mean {', '.join(close)}?"
        else:
            text = f"served are: {', '.join(known[:20])}; list them with `meshrl ls`"
        return UnknownName(
            f"no {self._kind} {self._asked!r} is served at {self._mesh.connection.url}: {text}",
            name=self._asked,
            near=close,
        )

    async def _change(self, timeout: float) -> None:
        """Wait until the directory changes, or for ``timeout`` seconds."""
        changed = self._mesh.changed
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await changed.wait()
        except TimeoutError:
            return

    # ---------------------------------------------------------------- ask

    def _launch(self, worker: str, name: str, *, believed: int | None, park_s: float) -> Flight:
        mesh = self._mesh
        open_ = Open(
            session=self._session,
            kind=self._kind,
            name=name,
            believed_free=believed,
            park_s=min(park_s, 3600.0),
            ticket=self._tickets.pop(worker, None),
            **self._request,
        )
        self._workers.add(worker)
        mesh.placement.asked(worker, time.monotonic())
        subject = mesh.subjects.worker(worker, "open", mesh.connection.user)
        return mesh.flights.launch(
            worker, Entry(self._session, open_.epoch, 0, 0), subject, open_.to_wire(), CONSTRUCT_S
        )

    async def _ask(self, choice: Choice, name: str) -> Grant | None:
        """Ask one worker; None when another choice has to be made."""
        now = time.monotonic()
        if now >= self._deadline:
            raise self._full()
        unsure = choice.believed_free > 0 and self._bounces[choice.worker] < MAX_BOUNCES
        believed = choice.believed_free if unsure else None
        flight = self._launch(choice.worker, name, believed=believed, park_s=self._deadline - now)
        trial: Flight | None = None
        try:
            while True:
                pending: set[asyncio.Future[Any]] = {f.future for f in (flight, trial) if f is not None}
                changed: asyncio.Future[Any] = asyncio.ensure_future(self._mesh.changed.wait())
                try:
                    await asyncio.wait({*pending, changed}, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if flight.future.done():
                    return self._landed(flight)
                if trial is not None and trial.future.done():
                    grant = self._landed(trial)
                    if grant is not None:
                        return grant
                    trial = None
                elif trial is None and flight.state == "parked" and self._mesh.changed_since(now):
                    now = time.monotonic()
                    trial = self._try_elsewhere(choice.worker, name)
                if time.monotonic() >= self._deadline + 1.0 and flight.state != "running":
                    raise self._full()
        finally:
            for left in (flight, trial):
                if left is not None and not left.future.done():
                    self._mesh.flights.landed(left)
                    left.future.cancel()
                    self._mesh.placement.withdrawn(left.worker)

    def _try_elsewhere(self, parked_at: str, name: str) -> Flight | None:
        """While parked: ask a worker that has room, as many of the waiters as there is room for."""
        entries = self._mesh.directory.candidates(self._kind, name, self._where)
        worker = self._mesh.placement.should_move(entries, parked_at, random.random())  # noqa: S311
        return None if worker is None else self._launch(worker, name, believed=None, park_s=0.0)

    def _landed(self, flight: Flight) -> Grant | None:
        mesh, worker, now = self._mesh, flight.worker, time.monotonic()
        try:
            body = unpack(flight.future.result())
            if isinstance(body, dict) and "error" in body:
                raise from_wire(body["error"])
            if not isinstance(body, dict) or "load" not in body or "worker" in body:
                grant = check(Grant, body)
                mesh.placement.granted(worker, now, grant.load)
                return grant
            full = check(Full, body)
        except SessionLost:
            mesh.placement.withdrawn(worker)
            mesh.gone(worker)
            return None
        except (WorkerDraining, UnknownName):
            mesh.placement.withdrawn(worker)
            self._excluded.add(worker)
            return None
        except MeshError:
            mesh.placement.withdrawn(worker)
            raise
        mesh.placement.busier(worker, full.load, now)
        if full.bounced:
            self._bounces[worker] += 1
        elif full.ticket is not None:
            self._tickets[worker] = full.ticket
        else:
            self._refused = True
        return None

    def _full(self) -> MeshFull:
        mesh, name = self._mesh, self._mesh.resolve(self._kind, self._asked)
        loads = {
            e.worker: {
                "slots": e.advertisement.slots,
                "free": mesh.placement.believed_free(e),
                "waiting": e.advertisement.waiting,
            }
            for e in mesh.directory.entries(self._kind)
            if e.name == name
        }
        shown = ", ".join(
            f"{worker}: {load['free']} of {load['slots']} free, {load['waiting']} waiting"
            for worker, load in loads.items()
        )
        return MeshFull(
            f"no slot for {self._asked!r} became free within {self._wait:g} s ({shown}); wait, close sessions or "
            "start more workers",
            name=self._asked,
            wait_s=self._wait,
            workers=loads,
        )

    def _say_close(self, workers: set[str]) -> None:
        """Tell those that do not serve: a grant on its way, or a place in a queue, is not wanted any more (R4)."""
        mesh = self._mesh
        if mesh.connection.closed:
            return
        for worker in workers:
            subject = mesh.subjects.session(worker, mesh.connection.user, self._session, "close")
            mesh.connection.publish(subject, Close(epoch=1).to_wire())
