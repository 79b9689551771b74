from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from meshrl.worker.calls import Calls, is_coroutine
from meshrl.worker.threads import Threads


async def _coroutine(value: Any = None) -> tuple[Any, int]:
    return value, threading.get_ident()


def _function(value: Any = None) -> tuple[Any, int]:
    return value, threading.get_ident()


class _Callable:
    async def __call__(self) -> None:
        """Is awaited."""


def test_coroutine_functions_are_known_whatever_they_are_wrapped_in() -> None:
    assert all(is_coroutine(call) for call in (_coroutine, partial(_coroutine, 1), _Callable()))
    assert not any(is_coroutine(call) for call in (_function, partial(_function, 1), print, None, len))


async def test_coroutines_run_on_the_loop_and_everything_else_on_a_thread() -> None:
    calls, here = Calls(Threads("test")), threading.get_ident()
    assert await calls(_coroutine, 1) == (1, here)
    value, where = await calls(_function, value=2)
    assert value == 2
    assert where != here
    assert await calls(lambda: _coroutine(3)) == (3, here), "what a function gives that can be awaited is awaited here"


@pytest.mark.parametrize("raised", [ValueError("x"), SystemExit(3), StopIteration(1), asyncio.CancelledError()])
async def test_what_a_thread_raises_arrives_and_never_hangs(raised: BaseException) -> None:
    def raises() -> None:
        raise raised

    with pytest.raises(BaseException) as caught:
        await Calls(Threads("test"))(raises)
    assert caught.value is raised or caught.value.__cause__ is raised


async def test_close_waits_for_a_thread_whose_caller_was_cancelled() -> None:
    calls, began, go = Calls(Threads("test")), asyncio.Event(), threading.Event()
    loop, order = asyncio.get_running_loop(), list[str]()

    def slow() -> None:
        loop.call_soon_threadsafe(began.set)
        go.wait(30.0)
        order.append("called")

    calling = asyncio.create_task(calls(slow))
    await began.wait()
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    closing = asyncio.create_task(calls.close(lambda: order.append("closed"), 5.0))
    await asyncio.sleep(0)
    go.set()
    await closing
    assert order == ["called", "closed"]


async def test_a_coroutine_that_does_not_close_in_its_time_is_left() -> None:
    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    calls = Calls(Threads("test"))
    with pytest.raises(TimeoutError):
        await calls.close(never, 0.0)
    with pytest.raises(TimeoutError):
        await calls.close(lambda: never(), 0.0)  # noqa: PLW0108  # a function that gives a coroutine
