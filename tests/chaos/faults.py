"""Faults: carries out what the schedule says, and counts what took effect; what did not comes again.

Which of them count:

    KILL          the worker held sessions of learners
    REPLAY_KILL   a journal was being done again there, and the client says that this was lost
    KILL_ALL      all that were awake are gone, three at the least
    LEAVE         it held sessions of learners, and ended as it should
    FREEZE        it lived before and after
    LOSE          an answer to a step was thrown away: it had been executed (each answer counts)
    HANG, EXIT    its user was told so (and so on)
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.flights import Flight
from tests.chaos.fleet import LEASE_S, Fleet
from tests.chaos.learners import Learner
from tests.chaos.proxy import DOWN, Link, Proxy
from tests.chaos.resumes import Resumes
from tests.chaos.saboteurs import sabotage
from tests.chaos.schedule import Fault, Kind

log = logging.getLogger("tests.chaos")
T = TypeVar("T")

# Before a worker is killed or stopped, so many are awake: all of them away at once shows nothing more.
AWAKE = 3
DELAY_S = 0.1
# How long is waited for what makes a fault count.
ANSWER_S = 1.0
REPLAY_S = 8.0
# Of a journal that is long enough to be met by a kill while it is done again: some fifty steps.
LONG_BYTES = 2000
LOST_S = 10.0
LOOK_S = 0.002
# An answer to a request as nats-server sends it; what tells of nobody listening has a header, and is another message.
_ANSWER = re.compile(rb"(?<![A-Z])MSG _INBOX\.\S+\.(\d+) \d+ (\d+)\r\n")
# Of a step that was executed; an error has none.
_REWARD = b"reward"


class Faults:
    """Does them.

    Args:
        server: that everybody is connected to.
        fleet: the workers.
        proxy: between them and the server.
        learners: each with a proxy of its own.
        saboteurs: the mesh that they lease by.
        resumes: what the learners' clients say of their sessions.

    Attributes:
        counted: of each kind, those that took effect.
        tried: of each kind, all.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        fleet: Fleet,
        proxy: Proxy,
        learners: Sequence[Learner],
        saboteurs: Mesh,
        resumes: Resumes,
    ) -> None:
        self.counted: Counter[Kind] = Counter()
        self.tried: Counter[Kind] = Counter()
        self._server = server
        self._fleet = fleet
        self._proxies = [proxy, *(learner.proxy for learner in learners)]
        self._learners = learners
        self._saboteurs = saboteurs
        self._resumes = resumes

    async def carry_out(self, fault: Fault) -> None:
        """One of the schedule, from its pause to its end."""
        await asyncio.sleep(fault.pause_s)
        self.tried[fault.kind] += 1
        log.info("%s begins", fault)
        match fault.kind:
            case Kind.KILL:
                took = await self._kill(fault)
            case Kind.REPLAY_KILL:
                took = await self._kill_in_replay(fault)
            case Kind.KILL_ALL:
                took = await self._kill_all()
            case Kind.LEAVE:
                took = await self._leave(fault)
            case Kind.FREEZE:
                took = await self._freeze(fault)
            case Kind.LOSE:
                took = await self._lose(fault)
            case Kind.CUT:
                took = self._cut(fault)
            case Kind.DELAY | Kind.HOLD:
                took = await self._slow(fault)
            case Kind.RESTART:
                took = await self._restart(fault)
            case _:
                await sabotage(self._saboteurs, fault.kind)
                took = 1
        self.counted[fault.kind] += took
        log.info("%s: counts %d", fault.kind.value, took)

    # ---------------------------------------------------------------- workers

    async def _victim(self, fault: Fault) -> str | None:
        """A worker that holds sessions of learners."""
        await self._fleet.enough(AWAKE)
        holding = {worker for learner in self._learners for worker in learner.workers}
        return _pick(sorted(holding & self._fleet.awake.keys()), fault)

    async def _kill(self, fault: Fault) -> int:
        victim = await self._victim(fault)
        return 0 if victim is None else self._fleet.kill(victim)

    async def _kill_in_replay(self, fault: Fault) -> int:
        """Kill one, so that journals are done again, and then whoever does so."""
        victim = await self._victim(fault)
        if victim is None or not self._fleet.kill(victim):
            return 0
        second = await _soon(self._replaying, REPLAY_S)
        if second is None:
            return 0
        worker, session = second
        if not self._fleet.kill(worker):
            return 0
        return bool(await _soon(lambda: (session, worker) in self._resumes.replays_lost or None, LOST_S))

    async def _kill_all(self) -> int:
        await self._fleet.enough(AWAKE)
        return sum([self._fleet.kill(id_) for id_ in list(self._fleet.awake)]) >= AWAKE

    def _replaying(self) -> tuple[str, str] | None:
        """A worker that is awake and does a long journal again, and of which session."""
        for learner in self._learners:
            for flight in learner.flights():
                long = flight.subject.endswith(".replay") and len(flight.body) > LONG_BYTES
                if long and flight.worker in self._fleet.awake:
                    return flight.worker, flight.entry.session
        return None

    async def _leave(self, fault: Fault) -> int:
        victim = await self._victim(fault)
        return 0 if victim is None else await self._fleet.leave(victim)

    async def _freeze(self, fault: Fault) -> int:
        victim = await self._victim(fault)
        return 0 if victim is None else await self._fleet.freeze(victim, LEASE_S + fault.length_s)

    # ---------------------------------------------------------------- the network

    async def _lose(self, fault: Fault) -> int:
        """Throw away what a learner is told, until an answer to a step is among it; then its connection is cut."""
        awake = self._fleet.awake
        learner = _pick([one for one in self._learners if any(step.worker in awake for step in _steps(one))], fault)
        links = [] if learner is None else learner.proxy.links("meshrl client")
        if learner is None or not links:
            return 0
        link = links[0]
        link.lose(DOWN)
        try:
            await _soon(lambda: _lost_answers(link, learner) or None, ANSWER_S)
            return len(_lost_answers(link, learner))
        finally:
            link.cut()

    def _cut(self, fault: Fault) -> int:
        link = _pick(self._links(), fault)
        if link is not None:
            link.cut()
        return link is not None

    async def _slow(self, fault: Fault) -> int:
        link = _pick(self._links(), fault)
        if link is None:
            return 0
        if fault.kind is Kind.HOLD:
            link.hold()
        else:
            link.flow(delay_s=DELAY_S)
        await asyncio.sleep(fault.length_s)
        link.flow(delay_s=0.0)
        return 1

    def _links(self) -> list[Link]:
        """Of clients and their keepers, of workers and their pulses."""
        return [link for proxy in self._proxies for link in proxy.links()]

    async def _restart(self, fault: Fault) -> int:
        await asyncio.to_thread(self._server.kill)
        await asyncio.sleep(fault.length_s)
        await asyncio.to_thread(self._server.restart)
        return 1


def _pick(some: Sequence[T], fault: Fault) -> T | None:
    return some[int(fault.draw * len(some))] if some else None


def _steps(learner: Learner) -> list[Flight]:
    return [flight for flight in learner.flights() if flight.subject.endswith(".step")]


def _lost_answers(link: Link, learner: Learner) -> set[int]:
    """Of the learner's steps that are under way still, those whose answers were thrown away."""
    return executed(link.lost(DOWN)) & {flight.rid for flight in _steps(learner)}


def executed(said: bytes) -> set[int]:
    """The requests that were steps and were executed, by the answers in what a server said."""
    answers = ((int(found[1]), said[found.end() : found.end() + int(found[2])]) for found in _ANSWER.finditer(said))
    return {rid for rid, body in answers if _REWARD in body}


async def _soon(look: Callable[[], T | None], seconds: float) -> T | None:
    """What that gives, as soon as it is something; None if it is nothing for so long."""
    end = asyncio.get_running_loop().time() + seconds
    while (found := look()) is None and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(LOOK_S)
    return found
