from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from meshrl.protocol.pace import FAST_S
from meshrl.worker import spread
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


@BOTH
async def test_where_as_many_hang_as_the_width_allows_the_others_run_all_the_same(wide: bool) -> None:
    gate = threading.Event()
    collected = Collected()

    def job(number: int) -> int:
        if number < MAX_WIDTH + 10:
            gate.wait(60.0)
        return number

    collected.start(MAX_WIDTH + 40, job, wide=wide)
    assert sorted(await collected.until(30)) == list(range(MAX_WIDTH + 10, MAX_WIDTH + 40))
    gate.set()
    await collected.until(MAX_WIDTH + 40)


async def test_more_than_there_may_be_threads_wait_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MAX_WIDTH", 4)
    monkeypatch.setattr(spread, "MAX_THREADS", 9)
    gate = threading.Event()
    begun = threading.Semaphore(0)
    collected = Collected()

    def job(number: int) -> int:
        begun.release()
        gate.wait(60.0)
        return number

    collected.start(20, job, wide=True)
    for _ in range(9):
        await asyncio.to_thread(begun.acquire)
    assert collected.threads.count == 9
    assert not begun.acquire(blocking=False)
    assert collected.all == []
    gate.set()
    assert len(await collected.until(20)) == 20


async def test_a_narrow_one_stays_on_one_thread() -> None:
    threads = set()
    collected = Collected()

    def job(number: int) -> int:
        threads.add(threading.get_ident())
        if number == 0:
            looked.wait(60.0)
        return number

    looked = threading.Event()
    Spread(collected.threads, 10, job, collected._collect, wide=True, narrow=True)
    asyncio.get_running_loop().call_later(5 * FAST_S, looked.set)
    await collected.until(10)
    assert len(threads) == 1


@BOTH
async def test_once_it_is_stopped_nothing_begins_and_everything_is_told(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "MAX_WIDTH", 4)
    monkeypatch.setattr(spread, "STUCK_S", 3600.0)
    gate = threading.Event()
    begun = threading.Semaphore(0)
    ran: list[int] = []
    collected = Collected()

    def job(number: int) -> int:
        ran.append(number)
        begun.release()
        gate.wait(60.0)
        return number

    started = collected.start(50, job, wide=wide)
    for _ in range(4):
        await asyncio.to_thread(begun.acquire)
    started.stop()
    gate.set()
    outcomes = await collected.until(50)
    assert len(outcomes) == len(collected.all) == 50
    assert {number for number, outcome in outcomes.items() if outcome == number} == set(ran)
    assert len(ran) <= 5
    assert all(isinstance(outcomes[number], asyncio.CancelledError) for number in set(range(50)) - set(ran))


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


@BOTH
async def test_those_that_belong_together_are_told_once_when_the_last_has_finished(wide: bool) -> None:
    gates = [threading.Event() for _ in range(6)]
    collected = Collected()

    def job(number: int) -> int:
        gates[number].wait(30.0)
        return number

    Spread(collected.threads, 6, job, collected._collect, together=True, wide=wide)
    for gate in (gates[3], gates[0], *gates[1:]):
        assert collected.groups == []
        gate.set()
        await asyncio.sleep(FAST_S)
    assert await collected.until(6) == {number: number for number in range(6)}
    assert len(collected.groups) == 1


async def test_many_spreads_at_once_tell_each_its_own() -> None:
    collected = [Collected() for _ in range(20)]
    for n, one in enumerate(collected):
        one.threads = collected[0].threads
        one.start(30, lambda number, n=n: (n, number), wide=bool(n % 2))  # type: ignore[misc]
    for n, one in enumerate(collected):
        assert await one.until(30) == {number: (n, number) for number in range(30)}
