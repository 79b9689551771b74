from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from meshrl.worker.spread import MAX_WIDTH, Finished, Spread
from meshrl.worker.threads import Threads


class Collected:
    """What a spread gave so far, in the groups in which it came."""

    def __init__(self) -> None:
        self.groups: list[list[Finished]] = []
        self.threads = Threads("spread")
        self.threads.loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self._home = threading.get_ident()

    def start(self, count: int, job: Callable[[int], Any], *, wide: bool) -> Spread:
        return Spread(self.threads, count, job, self._collect, wide=wide)

    def _collect(self, finished: list[Finished]) -> None:
        assert threading.get_ident() == self._home, "on the event loop"
        assert finished
        self.groups.append(finished)
        self._more.set()

    @property
    def all(self) -> list[Finished]:
        return [one for group in self.groups for one in group]

    async def until(self, count: int) -> dict[int, Any]:
        async with asyncio.timeout(30.0):
            while len(self.all) < count:
                self._more.clear()
                await self._more.wait()
        return {one.number: one.outcome for one in self.all}


BOTH = pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])


@BOTH
@pytest.mark.parametrize("count", [1, 2, 16, MAX_WIDTH + 50])
async def test_each_job_runs_once_and_is_told_once(wide: bool, count: int) -> None:
    ran: list[int] = []
    collected = Collected()

    def job(number: int) -> int:
        ran.append(number)
        return number * 10

    collected.start(count, job, wide=wide)
    assert await collected.until(count) == {number: number * 10 for number in range(count)}
    await asyncio.sleep(0)
    assert sorted(ran) == list(range(count))
    assert len(collected.all) == count
    assert all(one.seconds >= 0.0 for one in collected.all)


@BOTH
@pytest.mark.parametrize("blocks", [0, 5, 15])
async def test_one_that_blocks_holds_no_other_up(wide: bool, blocks: int) -> None:
    gate = threading.Event()
    collected = Collected()

    def job(number: int) -> int:
        if number == blocks:
            gate.wait(60.0)
        return number

    collected.start(16, job, wide=wide)
    assert sorted(await collected.until(15)) == [number for number in range(16) if number != blocks]
    gate.set()
    await collected.until(16)
    assert collected.groups[-1][0].number == blocks


@BOTH
async def test_all_run_at_once_where_they_wait_for_each_other(wide: bool) -> None:
    barrier = threading.Barrier(MAX_WIDTH)
    collected = Collected()
    collected.start(MAX_WIDTH, lambda _: barrier.wait(30.0), wide=wide)
    assert sorted((await collected.until(MAX_WIDTH)).values()) == list(range(MAX_WIDTH))


async def test_more_than_there_may_be_threads_wait_for_those_before_them() -> None:
    gate = threading.Event()
    begun = threading.Semaphore(0)
    collected = Collected()

    def job(number: int) -> int:
        begun.release()
        gate.wait(60.0)
        return number

    collected.start(MAX_WIDTH + 3, job, wide=True)
    for _ in range(MAX_WIDTH):
        await asyncio.to_thread(begun.acquire)
    assert not begun.acquire(blocking=False)
    assert collected.all == []
    gate.set()
    assert len(await collected.until(MAX_WIDTH + 3)) == MAX_WIDTH + 3


@BOTH
@pytest.mark.parametrize("raised", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopIteration()], ids=repr)
async def test_what_is_raised_is_an_outcome_and_the_others_go_on(wide: bool, raised: BaseException) -> None:
    collected = Collected()

    def job(number: int) -> int:
        if number == 1:
            raise raised
        return number

    collected.start(4, job, wide=wide)
    assert await collected.until(4) == {0: 0, 1: raised, 2: 2, 3: 3}


async def test_those_that_finish_while_the_loop_is_busy_come_together() -> None:
    finished = threading.Semaphore(0)
    collected = Collected()

    def job(number: int) -> int:
        finished.release()
        return number

    collected.start(8, job, wide=False)
    for _ in range(8):
        finished.acquire()  # on the event loop, which cannot look meanwhile
    await collected.until(8)
    assert len(collected.groups) <= 2, "the last may have been about to be told"


async def test_many_spreads_at_once_tell_each_its_own() -> None:
    collected = [Collected() for _ in range(20)]
    for n, one in enumerate(collected):
        one.threads = collected[0].threads
        one.start(30, lambda number, n=n: (n, number), wide=bool(n % 2))  # type: ignore[misc]
    for n, one in enumerate(collected):
        assert await one.until(30) == {number: (n, number) for number in range(30)}
