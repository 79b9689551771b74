from __future__ import annotations

import asyncio
from typing import Literal

import pytest

from meshrl.client.watcher import Watcher
from meshrl.errors import BusClosed
from meshrl.protocol.directory import Event
from meshrl.wire.messages import Advertisement

Kind = Literal["joined", "updated", "left"]


def event(kind: Kind, worker: str = "w1", free: int = 4) -> Event:
    said = Advertisement(kind="env", name="e", worker=worker, slots=4, free=free, description="h")
    return Event(kind, ("env", "e", worker), said)


async def seen(watcher: Watcher) -> list[tuple[str, str, int]]:
    """All that it has to say, in short; it is ended."""
    watcher.end()
    said: list[tuple[str, str, int]] = []
    while (event := await watcher.next()) is not None:
        said.append((event.kind, event.key[2], event.advertisement.free))
    return said


@pytest.mark.parametrize(
    ("unseen", "then", "left"),
    [
        ([], "joined", [("joined", 1)]),
        ([], "updated", [("updated", 1)]),
        ([], "left", [("left", 1)]),
        (["joined"], "updated", [("joined", 1)]),
        (["joined"], "left", []),
        (["updated"], "updated", [("updated", 1)]),
        (["updated"], "left", [("left", 1)]),
        (["left"], "joined", [("left", 4), ("joined", 1)]),
        (["left", "joined"], "updated", [("left", 4), ("joined", 1)]),
        (["left", "joined"], "left", [("left", 1)]),
    ],
)
async def test_what_is_not_seen_yet_becomes(unseen: list[Kind], then: Kind, left: list[tuple[str, int]]) -> None:
    watcher = Watcher([])
    for kind in unseen:
        watcher.tell(event(kind))
    watcher.tell(event(then, free=1))
    assert await seen(watcher) == [(kind, "w1", free) for kind, free in left]


async def test_who_looks_seldom_is_told_of_the_newest_update_of_each_alone() -> None:
    watcher = Watcher([event("joined", "w1"), event("joined", "w2")])
    assert await watcher.next() == event("joined", "w1")
    assert await watcher.next() == event("joined", "w2")
    for free in range(1000):
        watcher.tell(event("updated", "w1", free))
        watcher.tell(event("updated", "w2", free))
        watcher.tell(event("joined", f"visitor-{free}"))
        watcher.tell(event("left", f"visitor-{free}"))
    assert len(watcher) == 2
    assert await seen(watcher) == [("updated", "w1", 999), ("updated", "w2", 999)]


async def test_who_waits_is_told_at_once() -> None:
    watcher = Watcher([])
    waiting = asyncio.create_task(watcher.next())
    await asyncio.sleep(0)
    watcher.tell(event("joined"))
    assert await waiting == event("joined")


async def test_an_end_with_a_reason_is_raised_after_what_was_unseen_a_new_error_each_time() -> None:
    watcher = Watcher([event("joined")])
    why = BusClosed("the server went")
    watcher.end(why)
    assert await watcher.next() == event("joined")
    for _ in range(2):
        with pytest.raises(BusClosed, match="the server went") as raised:
            await watcher.next()
        assert raised.value is not why
    assert why.__traceback__ is None
