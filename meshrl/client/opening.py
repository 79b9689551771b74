"""Opening: ask the least loaded of those who serve a name, wait in turn where all are full (R4, R5)."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from meshrl.client.finding import ASK_AGAIN_S, UNKNOWN_S, Finding
from meshrl.client.flights import Entry, Flight
from meshrl.errors import MeshError, MeshFull, SessionLost, UnknownName, WorkerDraining, from_wire
from meshrl.protocol.placement import Choice, Shard
from meshrl.protocol.shares import Share, shares_in_words
from meshrl.wire.grants import check_grant, parse_answer
from meshrl.wire.messages import Close, Full, Grant, Kind, Open, check

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from meshrl.client.context import Context
    from meshrl.protocol.directory import Entry as Served

# While parked, a change is a reason to look whether another worker has room. One that was full and is not any more may
# have advertised the same all along.
LOOK_AGAIN_S = 2.0
# An open under way is looked after this often: whether it is parked, and whether its time is over.
LOOK_S = 0.25
# Ever more rarely, up to this: thousands may be under way.
LOOK_MAX_S = 1.0
# Workers answer full at the deadline; this is for their answer's way.
LATE_S = 1.0
# How often a worker that is busier than believed may send one open on. Four clients with stale directories that open
# four sessions each at once end at 4 ± 1 a worker in all of 4,000 simulated runs with three, in 94 % with one.
MAX_BOUNCES = 3
# A constructor may take minutes (a simulator that loads its maps).
CONSTRUCT_S = 600.0
# What errors say of room.
MORE_SLOTS = "more --slots (meshrl up --slots, meshrl serve --slots)"


class Divided(Exception):
    """No worker has room for all of an open, and several together have: it is to be several opens.

    Attributes:
        plan: the shards instead of it, in the order of their sub-environments.
    """

    def __init__(self, plan: list[Shard]) -> None:
        super().__init__(plan)
        self.plan = plan


class Opening(Finding):
    """One open, from the wish to the grant.

    Args:
        context: of the mesh.
        kind: ``env`` or ``agent``.
        asked: the name as the user wrote it.
        wait: seconds to wait for a worker and a slot; a constructor that is running is waited for beyond it.
        where: capabilities that the worker must have.
        request: the open's own fields.
        aim: the worker that is asked first if it has room, and at which it is parked where none has.
        divisible: rather than wait for one worker, raise :class:`Divided` where several have room.
        session: the id; None for a new one.
        epoch: which incarnation of it.
        avoid: workers that are not asked.
    """

    def __init__(
        self,
        context: Context,
        kind: Kind,
        asked: str,
        *,
        wait: float,
        where: Mapping[str, Any] | None,
        request: dict[str, Any],
        aim: str | None = None,
        divisible: bool = False,
        session: str | None = None,
        epoch: int = 1,
        avoid: Collection[str] = (),
    ) -> None:
        super().__init__(context, kind, asked, wait=wait, where=where, request=request)
        self._aim = aim
        self._aimed = False
        self._divisible = divisible
        self._session = session or secrets.token_hex(8)
        self._epoch = epoch
        self._is_known = epoch > 1
        self._avoid = frozenset(avoid)
        self._workers: set[str] = set()  # asked so far; those that do not serve in the end are told so
        self._bounces: Counter[str] = Counter()
        self._excluded: set[str] = set()
        self._tickets: dict[str, str] = {}
        self._shares: dict[str, Share] = {}  # of workers that had no more for this user
        self._refused = False

    @property
    def num_envs(self) -> int:
        """Sub-environments, and so slots, that are asked for."""
        return int(self._request.get("num_envs", 1))

    async def run(self) -> Grant:
        """Open.

        Raises:
            UnknownName: nobody serves the name, or nobody with those capabilities.
            MeshFull: no worker had room for all of ``wait``.
            MeshUnreachable: the server is away.
            UsageError: nobody who serves the name offers such vectors.
            KwargsNotAllowed, EnvError: the worker's answer.
            Divided: see ``divisible``.
        """
        served = ""
        try:
            while True:
                entries = await self.served()
                left_out = self._excluded | self._avoid
                choice = self._choice([entry for entry in entries if entry.worker not in left_out])
                if choice is None:
                    if time.monotonic() >= self._deadline:
                        raise self.full()
                    self._excluded.clear()
                    await self.changed(min(ASK_AGAIN_S, self._deadline - time.monotonic()))
                    continue
                grant = await self._ask(choice, entries[0].name, alone=len(entries) == 1)
                if grant is not None:
                    served = grant.worker
                    return grant
                if self._refused:  # full, and no room in its queue either: not at once again
                    self._refused = False
                    await self.changed(ASK_AGAIN_S)
        finally:
            self._say_close(self._workers - {served})

    def _choice(self, entries: list[Served]) -> Choice | None:
        """The worker to ask now.

        Raises:
            Divided: none has room for it, and several have.
        """
        placement, num_envs = self._registry.placement, self.num_envs
        aim = next((entry for entry in entries if entry.worker == self._aim), None) if self._aim else None
        if aim is not None and not self._aimed:
            self._aimed = True
            if placement.believed_free(aim) >= num_envs:
                # A plan has looked at the load already: the worker need not have more room than it asks for.
                return Choice(aim.worker, num_envs)
        choice = placement.choose(entries, draw=random.random(), num_envs=num_envs)  # noqa: S311
        if choice is None or not choice.believed_free:
            self._divide(entries, within_room=choice is not None)
        if aim is not None and choice is not None and not choice.believed_free:
            # Parked elsewhere, it might wait for slots that other shards of its own vector hold.
            return Choice(aim.worker, 0)
        return choice

    def _divide(self, entries: list[Served], *, within_room: bool = True, parked_at: str | None = None) -> None:
        """Give it up for several shards, if there can be."""
        if self._divisible and self.num_envs > 1:
            spread, draw = self._registry.placement.spread, random.random()  # noqa: S311
            plan = spread(entries, self.num_envs, draw=draw, within_room=within_room, parked_at=parked_at)
            if len(plan) > 1:
                raise Divided(plan)

    # ---------------------------------------------------------------- ask

    def _launch(self, worker: str, name: str, *, believed: int | None, park_s: float) -> Flight:
        context = self._context
        open_ = Open(
            session=self._session,
            epoch=self._epoch,
            kind=self._kind,
            name=name,
            believed_free=believed,
            park_s=min(park_s, 3600.0),
            ticket=self._tickets.pop(worker, None),
            **self._request,
        )
        self._workers.add(worker)
        subject = context.subjects.worker(worker, "open", context.connection.user)
        entry = Entry(self._session, open_.epoch, 0, 0)
        flight = context.flights.launch(worker, entry, subject, open_.to_wire(), CONSTRUCT_S)
        self._registry.placement.asked(worker, time.monotonic(), self.num_envs)
        return flight

    async def _ask(self, choice: Choice, name: str, *, alone: bool) -> Grant | None:
        """Ask one worker, and while parked there another that has room; None when another choice has to be made.

        ``alone``: there is no other worker, so it makes no difference how busy this one is.
        """
        began = time.monotonic()
        if began >= self._deadline:
            raise self.full()
        unsure = not alone and choice.believed_free > 0 and self._bounces[choice.worker] < MAX_BOUNCES
        believed = choice.believed_free if unsure else None
        flight = self._launch(choice.worker, name, believed=believed, park_s=self._deadline - began)
        trial: Flight | None = None
        under_way = [flight]
        looked_at, look_s = began, LOOK_S
        try:
            while True:
                await self._landing(under_way, min(look_s, max(LOOK_S, self._deadline + LATE_S - time.monotonic())))
                look_s = min(2 * look_s, LOOK_MAX_S)
                for landed in [each for each in under_way if each.future.done()]:
                    # The other one goes on: a worker that has room may be at the env's constructor at the deadline.
                    under_way.remove(landed)
                    grant = self._landed(landed)
                    if grant is not None:
                        return grant
                    if landed is trial:
                        self._refused = False  # it did not ask for a place in that queue
                if not under_way:
                    return None
                now = time.monotonic()
                look = now - looked_at > LOOK_AGAIN_S or self._registry.changed_since(looked_at)
                if look and under_way == [flight] and flight.state == "parked":
                    looked_at = now
                    trial = self._elsewhere(choice.worker, name)
                    if trial is not None:
                        under_way.append(trial)
                running = any(each.state == "running" for each in under_way)
                if time.monotonic() >= self._deadline + LATE_S and not running:
                    raise self.full()
        finally:
            for left in under_way:
                self._context.flights.landed(left)
                left.future.cancel()
                self._registry.placement.withdrawn(left.worker, self.num_envs)

    async def _landing(self, under_way: list[Flight], look_s: float) -> None:
        """Wait until one of them has landed, or ``look_s`` have passed; while parked, also until the directory changes.

        Thousands of openings wait at once, so none of them has a task for it, and those that are not parked (nearly
        all of them, nearly always) are not woken by what concerns only who is.
        """
        loop = self._context.loop
        woken: asyncio.Future[None] = loop.create_future()

        def wake(_: object = None) -> None:
            if not woken.done():
                woken.set_result(None)

        timer = loop.call_later(look_s, wake)
        for flight in under_way:
            flight.future.add_done_callback(wake)
        parked = any(flight.state == "parked" for flight in under_way)
        if parked:
            self._registry.on_change.add(wake)
        try:
            await woken
        finally:
            timer.cancel()
            for flight in under_way:
                flight.future.remove_done_callback(wake)
            if parked:
                self._registry.on_change.discard(wake)

    def _elsewhere(self, parked_at: str, name: str) -> Flight | None:
        """While parked: ask a worker that has room, as many of the waiters as there is room for.

        Raises:
            Divided: no other worker has room for it, and several have.
        """
        able = self._able(self._registry.directory.candidates(self._kind, name, self._where))
        entries = [entry for entry in able if entry.worker not in self._avoid]
        worker = self._registry.placement.should_move(entries, parked_at, random.random(), self.num_envs)  # noqa: S311
        if worker is None:
            self._divide(entries, parked_at=parked_at)
            return None
        return self._launch(worker, name, believed=None, park_s=0.0)

    def _landed(self, flight: Flight) -> Grant | None:
        placement, worker, now, slots = self._registry.placement, flight.worker, time.monotonic(), self.num_envs
        try:
            body = parse_answer(flight.future.result())
            if isinstance(body, dict) and "error" in body:
                raise from_wire(body["error"])
            if not isinstance(body, dict) or "load" not in body or "worker" in body:
                grant = check_grant(body, self._session, self._epoch, worker)
                placement.granted(worker, now, grant.load, slots)
                return grant
            full = check(Full, body)
        except SessionLost:
            placement.withdrawn(worker, slots)
            self._registry.gone(worker)
            return None
        except (WorkerDraining, UnknownName):
            placement.withdrawn(worker, slots)
            self._excluded.add(worker)
            return None
        except MeshError:
            placement.withdrawn(worker, slots)
            raise
        placement.busier(worker, full.load, now, slots)
        if full.share is not None:
            self._shares[worker] = Share(full.share, full.held or 0)
        if full.bounced:
            self._bounces[worker] += 1
        elif full.ticket is not None:
            self._tickets[worker] = full.ticket
        else:
            self._refused = True
        return None

    def check_slots(self, shards: int | None) -> None:
        """Where the workers could not hold what is asked for if they were empty: whether others are waited for.

        They may be starting, or replace one that drains.

        Args:
            shards: in how many it was to be cut; None for any number.

        Raises:
            MeshFull: they were waited for as long as a name that nobody serves is.
        """
        waited_s = time.monotonic() - (self._deadline - self._wait)
        serving = self._serving()
        if waited_s < UNKNOWN_S or any(entry.advertisement.draining for entry in serving):
            return
        slots = self._slots_in_all(serving)
        if slots < self.num_envs:
            raise self.full()
        if shards is not None:
            raise MeshFull(
                f"no room for {self.num_envs} sub-environments in {shards} shards: the workers that serve "
                f"{self._asked!r} have {slots} slots in all, and too few each for shards of "
                f"{-(-self.num_envs // shards)}; give more shards, or start workers with {MORE_SLOTS}",
                name=self._asked,
                num_envs=self.num_envs,
                shards=shards,
                workers={entry.worker: {"slots": entry.advertisement.slots} for entry in serving},
            )

    def _serving(self) -> list[Served]:
        name = self._registry.resolve(self._kind, self._asked)
        return [entry for entry in self._registry.directory.entries(self._kind) if entry.name == name]

    def _slots_in_all(self, serving: list[Served]) -> int:
        """Of those of these that could ever take what is asked for; one that drains may be replaced by its like."""
        name = serving[0].name if serving else self._asked
        able = {e.worker for e in self._able(self._registry.directory.candidates(self._kind, name, self._where))}
        return sum(e.advertisement.slots for e in serving if e.worker in able or e.advertisement.draining)

    def full(self) -> MeshError:
        """The error of this moment where there is no room: what was asked for, and how full each worker is."""
        away = self._away()
        if away is not None:
            return away
        serving = self._serving()
        loads = {
            e.worker: {
                "slots": e.advertisement.slots,
                "free": self._registry.placement.believed_free(e),
                "waiting": e.advertisement.waiting,
            }
            for e in serving
        }
        shown = ", ".join(
            f"{worker}: {load['free']} of {load['slots']} free, {load['waiting']} waiting"
            for worker, load in loads.items()
        )
        num_envs, slots = self.num_envs, self._slots_in_all(serving)
        what = "no slot" if num_envs == 1 else f"no room for {num_envs} sub-environments"
        if self._shares:
            text = f"{what} for {self._asked!r} within {self._wait:g} s: {shares_in_words(self._shares)} ({shown})"
        elif slots < num_envs:
            text = (
                f"{what}: the workers that serve {self._asked!r} have {slots} slots in all ({shown}); start workers "
                f"with {MORE_SLOTS}"
            )
        else:
            text = (
                f"{what} for {self._asked!r} became free within {self._wait:g} s ({shown}); wait, close sessions, or "
                f"start more workers, or some with {MORE_SLOTS}"
            )
        return MeshFull(
            text,
            name=self._asked,
            num_envs=num_envs,
            wait_s=self._wait,
            workers=loads,
            shares={worker: share._asdict() for worker, share in self._shares.items()},
        )

    def _say_close(self, workers: set[str]) -> None:
        """Tell those that do not serve: a grant on its way, or a place in a queue, is not wanted any more (R4)."""
        context = self._context
        if context.connection.closed:
            return
        for worker in workers:
            subject = context.subjects.session(worker, context.connection.user, self._session, "close")
            context.connection.publish(subject, Close(epoch=self._epoch).to_wire())
