from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from meshrl.errors import from_wire
from meshrl.protocol import session as session_module
from tests.mesh.envs import Counter
from tests.unit.worker.conftest import Bare


def code(answer: Any) -> str:
    return from_wire(answer["error"]).code


async def test_a_name_that_is_not_served_is_refused_with_one_that_is_meant(bare: Any) -> None:
    worker: Bare = bare(Counter)
    answer = await worker.replies.to(worker.open(name="envs"))
    assert code(answer) == "unknown_name"
    assert "did you mean env?" in answer["error"]["message"]
    answer = await worker.replies.to(worker.open(name="something"))
    assert "it serves env" in answer["error"]["message"]
    assert code(await worker.replies.to(worker.open(kind="agent"))) == "unknown_name"
    assert code(await worker.replies.to(worker.open(kwargs={"b": 1}))) == "kwargs_not_allowed"
    assert len(worker.table) == 0


async def test_a_worker_busier_than_believed_says_so_once_and_parks_then(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    answer = await worker.replies.to(worker.open("s2", believed_free=1, park_s=60.0))
    assert answer["bounced"] is True
    waits = worker.open("s2", park_s=60.0)
    assert worker.admission.waiting_count() == 1
    assert worker.admission.is_parked(("anon", "s2"))
    worker.close("s1")
    assert (await worker.replies.to(waits))["session"] == "s2"
    worker.admission.stop()


async def test_a_constructor_that_raises_frees_its_slot_for_the_next_who_waits(bare: Any) -> None:
    go, made = threading.Event(), list[int]()

    def make() -> Counter:
        made.append(1)
        if len(made) == 1:
            go.wait(30.0)
            raise SystemExit(3)
        return Counter()

    worker: Bare = bare(make, slots=1)
    first, second = worker.open("s1"), worker.open("s2", park_s=60.0)
    go.set()
    answer = await worker.replies.to(first)
    assert code(answer) == "env_error"
    assert answer["error"]["details"]["type"] == "SystemExit"
    assert (await worker.replies.to(second))["session"] == "s2"
    worker.admission.stop()


async def test_an_open_closed_during_its_construction_leaves_nothing(bare: Any) -> None:
    go = threading.Event()

    def make() -> Counter:
        go.wait(30.0)
        return Counter()

    worker: Bare = bare(make)
    opened = worker.open()
    answer = await worker.replies.to(worker.close())
    assert answer["existed"] is True
    go.set()
    await worker.emptied()
    assert [to for to, _ in worker.replies.sent if to == opened] == []


async def test_an_open_given_up_while_the_epoch_before_ends_is_not_granted(bare: Any) -> None:
    go = threading.Event()

    class Closes(Counter):
        def close(self) -> None:
            go.wait(30.0)

    worker: Bare = bare(Closes)
    await worker.opened(epoch=1)
    again = worker.open(epoch=2)
    assert (await worker.replies.to(worker.close(epoch=2)))["existed"] is True
    assert (await worker.replies.to(worker.close(epoch=2)))["existed"] is False
    go.set()
    await worker.emptied()
    assert [to for to, _ in worker.replies.sent if to == again] == []


async def test_an_open_of_a_higher_epoch_is_granted_once_the_one_before_has_ended(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened(epoch=1)
    assert (await worker.replies.to(worker.open(epoch=2)))["epoch"] == 2
    assert code(await worker.replies.to(worker.open(epoch=1))) == "wrong_epoch"


async def test_parked_opens_are_granted_when_the_kept_answers_shrink(
    bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_CACHED_BYTES", 1000)
    worker: Bare = bare(Counter)
    session = await worker.opened("s1")
    session.lanes[0].receive(1, "", time.monotonic())
    worker.table.answered(session.lanes[0], b"x" * 1000)
    waits = worker.open("s2", park_s=60.0)
    await asyncio.sleep(0)
    assert worker.admission.waiting_count() == 1
    session.lanes[0].receive(2, "", time.monotonic())
    worker.table.answered(session.lanes[0], b"x")
    assert (await worker.replies.to(waits))["session"] == "s2"
    assert worker.admission.waiting_count() == 0
    worker.admission.stop()


async def test_a_parking_time_that_is_over_is_answered_full_with_a_ticket(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    answer = await worker.replies.to(worker.open("s2", park_s=0.001))
    assert answer["ticket"]
    assert "bounced" not in answer
    answer = await worker.replies.to(worker.open("s3"))
    assert "ticket" not in answer
    worker.admission.stop()


async def test_a_drain_sends_those_who_wait_elsewhere(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    waits = worker.open("s2", park_s=60.0)
    worker.admission.drain(time.monotonic() + 5.0)
    assert code(await worker.replies.to(waits)) == "worker_draining"
    assert code(await worker.replies.to(worker.open("s3"))) == "worker_draining"
    assert (await worker.replies.to(worker.open("s1")))["session"] == "s1", "who has a session keeps it"
    worker.admission.stop()
