from __future__ import annotations

import asyncio
import threading

import pytest

from meshrl.adapters.call import Call
from meshrl.adapters.portal import Portal
from meshrl.errors import SessionClosed

DEADLINE_S = 30.0


def test_a_call_that_comes_while_the_portal_ends_ends_with_it() -> None:
    portal = Portal({})
    portal.run(Call("first", asyncio.sleep, 0))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(DEADLINE_S)

    portal._loop.call_soon_threadsafe(hold)
    assert held.wait(DEADLINE_S)
    portal._later(portal._shut())
    raised: list[BaseException] = []
    calls = [Call(f"late {n}", asyncio.sleep, 3600) for n in range(4)]

    def late(call: Call[None]) -> None:
        try:
            portal.run(call)  # the portal was open a moment ago
        except SessionClosed as exc:
            raised.append(exc)

    threads = [threading.Thread(target=late, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    while not portal._calls >= set(calls):
        pass
    go.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(raised) == 4
    portal._thread.join(DEADLINE_S)
    assert not portal.running


def test_a_call_after_the_end_is_refused() -> None:
    portal = Portal({})
    portal.end()
    with pytest.raises(SessionClosed):
        portal.run(Call("late", asyncio.sleep, 0))


def test_a_call_that_the_ended_loop_never_came_to_is_ended_by_its_thread() -> None:
    portal = Portal({})
    call = Call("late", asyncio.sleep, 0)
    portal._calls.add(call)  # as far as a thread came that is held up just there
    portal.end()
    assert call.over
    assert call.cancelled


def test_calls_that_are_over_or_were_abandoned_are_forgotten() -> None:
    portal = Portal({})
    portal.run(Call("first", asyncio.sleep, 0))
    abandoned = Call("abandoned", asyncio.sleep, 3600)
    portal._calls.add(abandoned)
    portal._loop.call_soon_threadsafe(portal._start, abandoned)
    portal.abandon(abandoned)
    abandoned.wait()
    while portal._calls:
        portal.run(Call("another turn", asyncio.sleep, 0))
    portal.end()
