from __future__ import annotations

import asyncio
import threading

import pytest

from meshrl.worker import threads as threads_module
from meshrl.worker.threads import Threads
from tests.mesh.conftest import until


async def test_jobs_run_at_once_and_their_results_come_back_to_the_loop() -> None:
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    barrier = threading.Barrier(20)
    back: list[int] = []
    came = asyncio.Event()

    def take(number: int) -> None:
        back.append(number)
        if len(back) == 20:
            came.set()

    def job(number: int) -> None:
        barrier.wait(10.0)  # passes only if all twenty are running
        threads.back(take, number)

    for number in range(20):
        threads.submit(lambda n=number: job(n))  # type: ignore[misc]
    await came.wait()
    assert sorted(back) == list(range(20))
    assert threads.count == 20


async def test_one_thread_serves_jobs_that_come_one_after_another() -> None:
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    names: list[str] = []
    for number in range(1, 51):
        threads.submit(lambda: names.append(threading.current_thread().name))
        # a thread is idle some time after its job has ended, and not in the same moment
        await until(lambda n=number: len(names) == n and len(threads._idle) == threads.count, "the thread is idle")  # type: ignore[misc]
    assert set(names) == {"test-1"}, "an idle thread is used again"


async def test_threads_without_a_job_end_and_jobs_that_come_at_that_moment_are_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads_module, "IDLE_S", 0.001)
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    ran: list[int] = []
    for number in range(300):
        came = asyncio.Event()
        for one in range(3):
            threads.submit(lambda n=3 * number + one: ran.append(n))  # type: ignore[misc]
        threads.submit(lambda came=came: threads.back(came.set))  # type: ignore[misc]
        await asyncio.wait_for(came.wait(), 30.0)
        await asyncio.sleep(0.0005 * (number % 4))  # less than a thread waits, as much, and more

    def ended() -> bool:
        # Python's queue may forget a timeout that is over in the very moment in which somebody else gets the job: such
        # a thread waits on, and ends after the next one.
        if threads.count:
            threads.submit(lambda: None)
        return not threads.count and len(ran) == 900

    await until(ended, "every job was run, and every thread has ended")
    assert sorted(ran) == list(range(900))


async def test_job_for_which_no_thread_can_be_started_is_run_by_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    start = threading.Thread.start
    refused = 0

    def refusing(self: threading.Thread) -> None:
        nonlocal refused
        if self.name.startswith("test-") and threads.count > 1:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    gate = threading.Event()
    ran: list[int] = []

    def wait() -> None:
        gate.wait(30.0)

    threads.submit(wait)
    for number in range(5):
        threads.submit(lambda n=number: ran.append(n))  # type: ignore[misc]
    assert (refused, threads.count) == (5, 1)
    gate.set()
    await until(lambda: len(ran) == 5, "all were run")
    monkeypatch.undo()
    barrier = threading.Barrier(2)
    came = asyncio.Event()

    def meet() -> None:
        barrier.wait(30.0)
        threads.back(came.set)

    threads.submit(meet)
    threads.submit(meet)  # which is promised to no thread that is not there
    await asyncio.wait_for(came.wait(), 30.0)


async def test_last_thread_does_not_end_while_a_job_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "IDLE_S", 0.001)
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    ending, go = threading.Event(), threading.Event()

    class Gate:
        """The lock, before which a thread that ends waits."""

        def __init__(self, lock: threading.Lock) -> None:
            self._lock = lock

        def __enter__(self) -> None:
            if threading.current_thread().name == "test-1":
                ending.set()
                go.wait(30.0)
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    def refusing(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ran: list[int] = []
    threads._lock = Gate(threads._lock)  # type: ignore[assignment]
    threads.submit(lambda: ran.append(1))
    assert await asyncio.to_thread(ending.wait, 30.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refusing)
        threads.submit(lambda: ran.append(2))
    go.set()
    await until(lambda: ran == [1, 2], "the job was run")
    await until(lambda: not threads.count, "and then the thread ended")


async def test_threads_do_not_keep_the_process_alive() -> None:
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    began = asyncio.Event()
    release = threading.Event()

    def job() -> None:
        threads.back(began.set)
        release.wait(30.0)

    threads.submit(job)
    await began.wait()
    hung = [thread for thread in threading.enumerate() if thread.name.startswith("test-")]
    assert hung
    assert all(thread.daemon for thread in hung)
    release.set()


async def test_results_come_back_in_the_order_in_which_they_were_brought_and_one_that_fails_holds_up_no_other() -> None:
    threads = Threads("test")
    threads.loop = asyncio.get_running_loop()
    told: list[str] = []
    threads.loop.set_exception_handler(lambda _loop, context: told.append(repr(context["exception"])))
    came = asyncio.Event()
    back: list[int] = []

    def job() -> None:
        for number in range(100):
            threads.back(back.append, number)
        threads.back(int, "no number")
        threads.back(came.set)

    threads.submit(job)
    await came.wait()
    assert back == list(range(100))
    assert len(told) == 1
    assert "ValueError" in told[0]
