"""One run: the server, the fleet, the learners and the faults, until all quotas are reached or something is broken."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet, fleet
from tests.chaos.learners import LEARNERS, Learner
from tests.chaos.model import Mismatch, Twin
from tests.chaos.proxy import Proxy
from tests.chaos.quotas import Quotas
from tests.chaos.report import Report
from tests.chaos.resumes import Resumes
from tests.chaos.schedule import TRACKS, faults

LOOK_S = 0.2
TELL_S = 15.0
# Learners, proxies and keepers are threads of one process, and each step passes from one to the other.
SWITCH_S = 0.0005
# Between learners, so that no env of one has the seed of another's.
SEEDS = 100


async def run(seed: int, quotas: Quotas, say: Callable[[str], None]) -> Report:
    """Carry one out; it raises nothing that the report could tell.

    Args:
        seed: of the schedule, the envs and the actions.
        quotas: that it is to reach.
        say: is told how far it is.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer.start())
        stack.enter_context(_switching_often())
        among: list[Twin] = []
        learners: list[Learner] = []
        for i, (name, form) in enumerate(LEARNERS):
            proxy = stack.enter_context(Proxy(server.port))
            learners.append(form(name, 1000 * seed + SEEDS * i, proxy, proxy.url(server.url), among))
        resumes = Resumes(lambda session: any(one.stepping and one.holds(session) for one in learners))
        stack.enter_context(resumes.heard())
        proxy = stack.enter_context(Proxy(server.port))
        async with fleet(proxy.url(server.url)) as workers, Mesh(server.url) as saboteurs:
            report = Report(seed, quotas, learners, resumes)
            doing = Faults(server, workers, proxy, learners, saboteurs, resumes)
            report.counted, report.tried = doing.counted, doing.tried
            going = _Run(report, doing, workers, say, began)
            await going.until_over()
        report.workers, report.seconds = workers.started, time.monotonic() - began
        return report


class _Run:
    """What goes on at once."""

    def __init__(
        self, report: Report, faults_: Faults, workers: Fleet, say: Callable[[str], None], began: float
    ) -> None:
        self._report = report
        self._faults = faults_
        self._workers = workers
        self._say = say
        self._began = began
        self._over = False

    async def until_over(self) -> None:
        report = self._report
        try:
            async with asyncio.timeout(report.quotas.limit_s), asyncio.TaskGroup() as group:
                for learner in report.learners:
                    group.create_task(learner.run(self._is_over))
                for track in TRACKS:
                    group.create_task(self._follow(track))
                group.create_task(self._watch())
        except TimeoutError:
            at = ", ".join(f"{learner!r}" for learner in report.learners)
            report.errors.append(f"it was not over after {report.quotas.limit_s:g} s: {report.unmet()}; {at}")
        except ExceptionGroup as failed:
            self._note(failed)

    def _is_over(self) -> bool:
        return self._over

    async def _follow(self, track: str) -> None:
        for fault in faults(self._report.seed, track, self._report.quotas.faults):
            if self._over:
                return
            await self._faults.carry_out(fault)

    async def _watch(self) -> None:
        """End it when all quotas are reached; tell how far it is."""
        report, told_at = self._report, self._began
        while not self._over:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            report.seconds = now - self._began
            self._over = not report.unmet()
            if self._over or now - told_at >= TELL_S:
                told_at = now
                self._say(report.progress())

    def _note(self, failed: ExceptionGroup) -> None:
        for exc in failed.exceptions:
            if isinstance(exc, ExceptionGroup):
                self._note(exc)
                continue
            if isinstance(exc, Mismatch):
                self._report.broken[exc.broken] += 1
            text = str(exc) if isinstance(exc, Mismatch) else "".join(traceback.format_exception(exc))
            self._report.errors.append(text)


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
