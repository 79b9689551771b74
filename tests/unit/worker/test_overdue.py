"""What is over its deadline: by kind of request, and only if somebody was looking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from meshrl.protocol.session import Session, SessionTable
from meshrl.worker.isolation import Deadlines
from meshrl.worker.overdue import STUCK_S, Overdue

DEADLINES = Deadlines(step_s=2.0, reset_s=5.0)
LOOK_S = 0.25


def opened(op: str = "", *, vector: bool = False, pool: int = 0) -> tuple[SessionTable, Session]:
    """A session that runs ``op`` since 0; of a pool, on lane 1."""
    table = SessionTable(8)
    _, session = table.open("u", "s", 1, "opener", 0.0, num_envs=max(1, pool), pool=pool > 0)
    assert session is not None
    if not op:
        return table, session
    session.held = SimpleNamespace(op=op, vector=object() if vector else None, withhold=None)
    table.granted(session, b"grant", 0.0)
    if session.lanes is not None:
        session.lanes.receive(np.array([1]), np.array([1]), "asker", 0.0)
    else:
        assert session.lane is not None
        session.lane.receive(1, "asker", 0.0)
    return table, session


def found_at(table: SessionTable, until: float = 20.0) -> tuple[float, Any] | None:
    """When the first is late, and what."""
    overdue = Overdue(DEADLINES, LOOK_S)
    now = 0.0
    while now < until:
        late = overdue.look(table, now)
        if late:
            assert overdue.look(table, now + LOOK_S) == [], "each is told once"
            return now, late[0]
        now += LOOK_S
    return None


@pytest.mark.parametrize(
    ("op", "vector", "pool", "at", "which"),
    [
        ("", False, 0, 5.0, "reset"),
        ("reset", False, 0, 5.0, "reset"),
        ("step", False, 0, 2.0, "step"),
        ("render", False, 0, 2.0, "step"),
        ("call", True, 0, 2.0, "step"),
        ("step", True, 0, 5.0, "step"),
        ("reset", True, 0, 5.0, "reset"),
        ("step", False, 3, 5.0, "step"),
    ],
)
def test_each_request_has_its_deadline(op: str, vector: bool, pool: int, at: float, which: str) -> None:
    table, session = opened(op, vector=vector, pool=pool)
    found = found_at(table)
    assert found is not None
    when, late = found
    assert (when, late.which, late.session, late.op) == (at, which, session, op or "constructor")
    assert (late.lanes is None) if not pool else late.lanes.tolist() == [1]


def test_a_replay_has_none() -> None:
    table, _ = opened("replay")
    assert found_at(table) is None


@pytest.mark.parametrize("pool", [0, 3])
def test_what_was_answered_in_time_is_not_late(pool: int) -> None:
    table, session = opened("step", pool=pool)
    overdue = Overdue(DEADLINES, LOOK_S)
    for n in range(80):
        now = n * LOOK_S
        assert overdue.look(table, now) == []
        if n % 6 == 5:  # every second and a half
            if session.lanes is not None:
                session.lanes.answer(np.array([1]), b"x")
                session.lanes.receive(np.array([1]), session.lanes.seqs[[1]] + 1, "asker", now)
            else:
                assert session.lane is not None
                session.lane.answer(b"x")
                session.lane.receive(session.lane.seq + 1, "asker", now)


@pytest.mark.parametrize(("op", "pool"), [("step", 0), ("step", 3), ("", 0)])
def test_a_process_that_was_stopped_gives_everybody_the_whole_time_again(op: str, pool: int) -> None:
    table, _ = opened(op, pool=pool)
    overdue = Overdue(DEADLINES, LOOK_S)
    assert overdue.look(table, 0.0) == []
    assert overdue.look(table, 1000.0) == [], "it slept"
    whole = 5.0 if pool or not op else 2.0
    for n in range(1, int(whole / LOOK_S)):
        assert overdue.look(table, 1000.0 + n * LOOK_S) == []
    assert len(overdue.look(table, 1000.0 + whole)) == 1


def test_what_still_holds_its_slot_after_it_was_told_is_stuck() -> None:
    table, session = opened("step")
    overdue = Overdue(DEADLINES, LOOK_S)
    now = 0.0
    while not overdue.look(table, now):
        now += LOOK_S
    assert overdue.stuck(now) is None
    overdue.look(table, now + LOOK_S)
    assert overdue.stuck(now + STUCK_S) is session
    table.ended(session)
    overdue.look(table, now + STUCK_S)
    assert overdue.stuck(now + 2 * STUCK_S) is None


def test_another_session_of_the_same_name_is_looked_at_anew() -> None:
    table, session = opened("")
    overdue = Overdue(DEADLINES, LOOK_S)
    now = 0.0
    while not overdue.look(table, now):
        now += LOOK_S
    table.ended(session)
    _, again = table.open("u", "s", 2, "opener", now)
    later = now
    while not (late := overdue.look(table, later)):
        later += LOOK_S
    assert late[0].session is again
    assert later - now == DEADLINES.reset_s


@pytest.mark.parametrize("pool", [0, 3])
def test_an_answer_that_is_withheld_is_not_late_since_its_env_has_done_what_it_was_asked(pool: int) -> None:
    table, session = opened("step", pool=pool)
    session.held.withhold = SimpleNamespace(withheld=1)
    assert found_at(table) is None
    session.held.withhold.withheld = 0
    assert found_at(table) is not None
