from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from meshrl.errors import EnvError, KwargsNotAllowed
from meshrl.wire.audited import Audited
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Open, parse
from meshrl.worker import audit as rules
from meshrl.worker.audit import MAX_KWARGS_BYTES, MAX_KWARGS_NAMES, Audit
from tests.mesh.conftest import until
from tests.mesh.envs import Breaks, Counter
from tests.unit.worker.conftest import Bare


def told(audit: Audit, now: float | None = None) -> list[Audited]:
    """Each entry, as its reader has it."""
    return [parse(Audited, entry) for entry in audit.taken(time.monotonic() if now is None else now)]


def audited(worker: Bare) -> list[tuple[str, str, str | None, str | None]]:
    return [(entry.event, entry.session, entry.reason, entry.code) for entry in told(worker.audit)]


async def test_what_was_opened_has_ended_once_and_says_how(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=4)
    await worker.opened("s1")
    await worker.opened("s2")
    worker.close("s1")
    session = worker.table.get(("anon", "s2"))
    assert session is not None
    worker.execution.end(session, "session_expired")
    worker.execution.end(session, "closed")
    await worker.emptied()
    assert audited(worker) == [
        ("opened", "s1", None, None),
        ("opened", "s2", None, None),
        ("ended", "s1", "closed", None),
        ("ended", "s2", "session_expired", None),
    ]


async def test_an_end_by_the_envs_exception_names_its_class_and_not_its_words(bare: Any) -> None:
    worker: Bare = bare(lambda: Breaks("step"))
    await worker.opened("s1")
    await worker.replies.to(worker.ask("reset", 1))
    await worker.replies.to(worker.ask("step", 2, action=0))
    await worker.emptied()
    opened, ended = told(worker.audit)
    assert (ended.reason, ended.code, ended.type) == ("ended", "env_error", "RuntimeError")
    assert ended.lasted_s is not None
    assert ended.lasted_s >= 0
    assert (opened.n, ended.n, opened.name, ended.name) == (1, 2, "env", "env")


async def test_a_constructor_that_raises_and_an_open_given_up_meanwhile_end_too(bare: Any) -> None:
    go = threading.Event()

    def make() -> Counter:
        go.wait(30.0)
        raise ValueError("no map")

    worker: Bare = bare(make)
    failed = worker.open("s1")
    worker.open("s2")
    worker.close("s2")
    go.set()
    await worker.replies.to(failed)
    await worker.emptied()
    assert sorted(audited(worker)) == [
        ("ended", "s1", "not_constructed", "env_error"),
        ("ended", "s2", "closed", None),
        ("opened", "s1", None, None),
        ("opened", "s2", None, None),
    ]


async def test_a_refused_open_is_told_with_its_kwargs(bare: Any) -> None:
    worker: Bare = bare(Counter)
    await worker.replies.to(worker.open("s1", kwargs={"shell": "rm -rf"}))
    await worker.replies.to(worker.open("s2", name="nothing"))
    first, second = told(worker.audit)
    assert (first.event, first.code, first.kwargs) == ("refused", "kwargs_not_allowed", {"shell": "rm -rf"})
    assert (second.event, second.code, second.name) == ("refused", "unknown_name", "nothing")


async def test_an_open_of_a_higher_epoch_ends_the_one_before(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    await worker.replies.to(worker.open("s1", epoch=2))
    entries = told(worker.audit)
    assert [(e.event, e.epoch, e.reason) for e in entries] == [
        ("opened", 1, None),
        ("ended", 1, "wrong_epoch"),
        ("opened", 2, None),
    ]


async def test_a_worker_that_stops_ends_what_is_open_once(bare: Any) -> None:
    worker: Bare = bare(Counter)
    await worker.opened("s1")
    worker.audit.stop()
    worker.execution.stop()
    await worker.emptied()
    assert audited(worker) == [("opened", "s1", None, None), ("ended", "s1", "worker_stopped", None)]


def an_open(**fields: Any) -> Open:
    return Open.model_validate({"session": "s1", "name": "env", **fields})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": 5},
        {"bounds": np.arange(3), "nested": {"a": (1, 2)}},
        {},
    ],
)
def test_kwargs_are_told_as_they_were_sent(kwargs: dict[str, Any]) -> None:
    audit = Audit("e1")
    audit.opened("ann", an_open(kwargs=kwargs))
    (entry,) = told(audit)
    assert pack(entry.kwargs) == pack(kwargs)


def test_of_large_kwargs_names_and_sizes_are_told() -> None:
    audit = Audit("e1")
    audit.opened("ann", an_open(kwargs={"map": np.zeros(100_000), "size": 5}))
    audit.refused("ann", an_open(kwargs={f"{n:0100}": 1 for n in range(10_000)}), KwargsNotAllowed("no"))
    large, many = audit.taken(time.monotonic())
    assert len(large) < MAX_KWARGS_BYTES
    assert len(many) < 3 * MAX_KWARGS_BYTES
    assert parse(Audited, large).kwargs["size"] == "(1 bytes)"
    assert parse(Audited, large).kwargs["map"].startswith("(8000")
    assert len(parse(Audited, many).kwargs) <= MAX_KWARGS_NAMES


def test_entries_are_numbered_and_say_how_long_they_waited() -> None:
    audit = Audit("e1")
    audit.opened("ann", an_open())
    audit.opened("ann", an_open(session="s2"))
    entries = told(audit, time.monotonic() + 60.0)
    assert [entry.n for entry in entries] == [1, 2]
    assert all(60.0 <= entry.ago_s < 90.0 for entry in entries)
    assert told(audit) == []


def test_what_does_not_fit_is_missing_by_its_number_and_refusals_push_nothing_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "MAX_HELD", 4)
    monkeypatch.setattr(rules, "MAX_REFUSED", 2)
    audit = Audit("e1")
    audit.opened("ann", an_open())
    for _ in range(10):
        audit.refused("mallory", an_open(), EnvError("no"))
    audit.opened("ann", an_open(session="s2"))
    assert [(entry.n, entry.event) for entry in told(audit)] == [(1, "opened"), (2, "refused"), (12, "opened")]
    for n in range(6):
        audit.opened("ann", an_open(session=f"x{n}"))
    assert [entry.n for entry in told(audit)] == [15, 16, 17, 18]


async def test_noting_and_saying_go_on_at_once_and_nothing_is_lost() -> None:
    """As the worker's two threads do."""
    audit, said = Audit("e1"), list[int]()
    done = threading.Event()

    def say() -> None:
        while not done.is_set():
            said.extend(unpack(entry)["n"] for entry in audit.taken(time.monotonic()))

    thread = threading.Thread(target=say)
    thread.start()
    try:
        for n in range(5000):
            audit.opened("ann", an_open(session=f"s{n}"))
        await until(lambda: len(said) == 5000, "all are said")
    finally:
        done.set()
        thread.join()
    assert said == list(range(1, 5001))
