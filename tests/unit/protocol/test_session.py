from __future__ import annotations

import pytest

from meshrl.protocol import session as rules
from meshrl.protocol.session import GRANT_S, LATE_SWEEPS, LEASE_S, Opening, Session, SessionTable, State

KEY = ("ann", "s1")
EPOCH = 5
SWEEP_S = 0.25


def table_with(state: State | None, *, slots: int = 4, confirmed: bool = False) -> tuple[SessionTable, Session]:
    """A table whose session s1 is in that state, in epoch 5; None for one that was never there."""
    table = SessionTable(slots)
    if state is None:
        return table, Session(*KEY, EPOCH, "nowhere")
    opening, session = table.open(*KEY, EPOCH, "inbox.open", 0.0)
    assert opening is Opening.NEW
    assert session is not None
    if state is not State.OPENING:
        table.granted(session, b"grant", 0.0)
    if confirmed:
        table.renew(KEY, EPOCH, 0.0)
    if state is State.ENDING:
        assert table.ending(session, "closed")
    return table, session


def swept(table: SessionTable, until: float, since: float = 0.0) -> list[Session]:
    """The first sessions that regular sweeps find."""
    now = since
    while now < until:
        now += SWEEP_S
        expired = table.sweep(now, SWEEP_S, connected=True)
        if expired:
            return expired
    return []


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("state", "epoch", "opening"),
    [
        (State.OPENING, EPOCH, Opening.JOIN),
        (State.OPENING, EPOCH + 1, Opening.RAISED),
        (State.OPENING, EPOCH - 1, Opening.WRONG_EPOCH),
        (State.OPEN, EPOCH, Opening.REPEAT),
        (State.OPEN, EPOCH + 1, Opening.RAISED),
        (State.OPEN, EPOCH - 1, Opening.WRONG_EPOCH),
        (State.ENDING, EPOCH, Opening.WAIT),
        (State.ENDING, EPOCH + 1, Opening.WAIT),
        (State.ENDING, EPOCH - 1, Opening.WRONG_EPOCH),
        (None, EPOCH, Opening.NEW),
        (None, EPOCH + 1, Opening.NEW),
        (None, EPOCH - 1, Opening.NEW),
    ],
)
def test_an_open_gets_the_answer_of_its_cell(state: State | None, epoch: int, opening: Opening) -> None:
    table, before = table_with(state)
    what, session = table.open(*KEY, epoch, "inbox.again", 1.0)
    assert what is opening
    assert session is not None
    assert (session is before) is (state is not None)
    assert session.epoch == (epoch if opening is Opening.NEW else EPOCH)
    assert table.free == 3


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH, EPOCH + 1])
def test_an_open_that_finds_no_free_slot_is_full(epoch: int) -> None:
    table = SessionTable(1)
    assert table.open("bob", "other", 1, "inbox", 0.0)[0] is Opening.NEW
    assert table.open(*KEY, epoch, "inbox", 0.0) == (Opening.FULL, None)
    assert table.get(KEY) is None


@pytest.mark.parametrize("how", ["confirmed", "closed"])
@pytest.mark.parametrize(
    ("epoch", "opening"),
    [(EPOCH - 1, Opening.WRONG_EPOCH), (EPOCH, Opening.WRONG_EPOCH), (EPOCH + 1, Opening.NEW)],
)
def test_a_late_open_does_not_bring_back_what_its_client_had(how: str, epoch: int, opening: Opening) -> None:
    table, session = table_with(State.OPEN, confirmed=how == "confirmed")
    table.ending(session, "closed" if how == "closed" else "session_expired")
    table.ended(session)
    what, other = table.open(*KEY, epoch, "inbox", 1.0)
    assert what is opening
    assert other is not None
    assert (table.get(KEY) is other) is (opening is Opening.NEW)
    assert table.free == (3 if opening is Opening.NEW else 4)
    if opening is Opening.WRONG_EPOCH:
        assert (other.epoch, other.state) == (EPOCH, State.ENDING)
        table.ended(other)  # who takes the stand-in for a session does no harm
        assert table.free == 4


@pytest.mark.parametrize("reason", ["session_expired", "not_constructed"])
def test_a_grant_that_its_client_never_had_may_be_asked_for_again(reason: str) -> None:
    table, session = table_with(State.OPEN)
    table.ending(session, reason)
    table.ended(session)
    assert table.open(*KEY, EPOCH - 1, "inbox", 1.0)[0] is Opening.WRONG_EPOCH
    assert table.open(*KEY, EPOCH, "inbox", 1.0)[0] is Opening.NEW
    assert table.why_gone(KEY) == "session_unknown"


@pytest.mark.parametrize(
    ("state", "why"),
    [(State.OPENING, None), (State.OPEN, None), (State.ENDING, "closed"), (None, "session_unknown")],
)
def test_a_renewal_gets_the_answer_of_its_cell(state: State | None, why: str | None) -> None:
    assert table_with(state)[0].renew(KEY, EPOCH, 1.0) == why


@pytest.mark.parametrize("state", [State.OPENING, State.OPEN])
@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
def test_a_renewal_of_another_epoch_renews_nothing(state: State, epoch: int) -> None:
    table, session = table_with(state)
    before = session.lease_until
    assert table.renew(KEY, epoch, 1.0) == "wrong_epoch"
    assert (session.confirmed, session.lease_until) == (False, before)


@pytest.mark.parametrize(("state", "ends"), [(State.OPENING, True), (State.OPEN, True), (State.ENDING, False)])
def test_ending_begins_once_and_keeps_the_slot_until_the_env_is_closed(state: State, ends: bool) -> None:
    table, session = table_with(state)
    assert table.ending(session, "closed") is ends
    assert session.state is State.ENDING
    assert table.free == 3
    table.ended(session)
    assert table.free == 4
    assert len(table) == 0


def test_the_first_reason_for_an_end_is_the_one_that_is_told() -> None:
    table, session = table_with(State.OPEN)
    table.ending(session, "session_expired")
    table.ending(session, "closed")
    table.ended(session)
    assert table.why_gone(KEY) == "session_expired"


# ---------------------------------------------------------------- opened once


def test_the_grant_goes_to_who_asked_last() -> None:
    table, session = table_with(State.OPENING)
    table.open(*KEY, EPOCH, "inbox.newest", 1.0)
    assert table.granted(session, b"grant", 2.0) == "inbox.newest"
    assert (session.state, session.grant) == (State.OPEN, b"grant")


def test_a_session_belongs_to_its_user() -> None:
    table, session = table_with(State.OPEN)
    opening, other = table.open("bob", "s1", EPOCH, "inbox", 1.0)
    assert opening is Opening.NEW
    assert other is not session
    assert table.renew(("eve", "s1"), EPOCH, 1.0) == "session_unknown"


def test_an_ended_session_does_not_take_its_successor_away() -> None:
    table, old = table_with(State.OPEN)
    table.ending(old, "wrong_epoch")
    table.ended(old)
    _, new = table.open(*KEY, EPOCH + 1, "inbox", 1.0)
    table.ended(old)
    assert table.get(KEY) is new


def test_a_pool_has_a_lane_for_each_sub_environment_and_any_other_session_has_one() -> None:
    table = SessionTable(6)
    _, vector = table.open("ann", "vector", 1, "inbox", 0.0, num_envs=3)
    _, pool = table.open("ann", "pool", 1, "inbox", 0.0, num_envs=3, pool=True)
    assert vector is not None
    assert pool is not None
    assert vector.lane is not None
    assert pool.lanes is not None
    assert (vector.lanes, pool.lane, len(pool.lanes)) == (None, None, 3)


def test_reasons_are_forgotten_in_the_order_of_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_REMEMBERED", 2)
    table = SessionTable(4)
    for n in range(3):
        _, session = table.open("ann", f"s{n}", 1, "inbox", 0.0)
        assert session is not None
        table.ending(session, "closed")
        table.ended(session)
    assert [table.why_gone(("ann", f"s{n}")) for n in range(3)] == ["session_unknown", "closed", "closed"]


# ---------------------------------------------------------------- answers


def test_cached_answers_are_counted_and_beyond_the_limit_no_slot_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_CACHED_BYTES", 10)
    table, session = table_with(State.OPEN)
    lane = session.lane
    assert lane is not None
    lane.receive(1, "inbox.1", 1.0)
    assert table.answered(lane, b"123456789") == "inbox.1"
    assert (table.cached_bytes, table.free) == (9, 3)
    lane.receive(2, "inbox.2", 1.0)
    table.answered(lane, b"1234567890")
    assert (table.cached_bytes, table.free) == (10, 0)
    assert table.open("bob", "s2", 1, "inbox", 1.0)[0] is Opening.FULL
    table.ending(session, "closed")
    table.ended(session)
    assert (table.cached_bytes, table.free) == (0, 4)


def test_the_answer_that_ended_a_session_can_be_had_again_by_exactly_its_request() -> None:
    table, session = table_with(State.OPEN)
    table.ending(session, "ended", last=(EPOCH, 0, 3, b"crash"))
    for _ in range(2):
        assert table.last_answer(KEY, EPOCH, 0, 3) == b"crash"
        assert table.probe(KEY, EPOCH, 0, 3) == "answered"
        for epoch, lane, seq in [(EPOCH + 1, 0, 3), (EPOCH, 1, 3), (EPOCH, 0, 2), (EPOCH, 0, 4)]:
            assert table.last_answer(KEY, epoch, lane, seq) is None
            assert table.probe(KEY, epoch, lane, seq) == "unknown"
        table.ended(session)


def test_the_answers_that_ended_sessions_are_kept_of_the_newest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_LAST_ANSWERS", 2)
    table = SessionTable(4)
    for n in range(3):
        _, session = table.open("ann", f"s{n}", 1, "inbox", 0.0)
        assert session is not None
        table.ending(session, "ended", last=(1, 0, 1, b"crash"))
        table.ended(session)
    assert [table.last_answer(("ann", f"s{n}"), 1, 0, 1) for n in range(3)] == [None, b"crash", b"crash"]
    assert [table.why_gone(("ann", f"s{n}")) for n in range(3)] == ["ended"] * 3


# ---------------------------------------------------------------- leased


def test_a_grant_that_is_neither_renewed_nor_used_lapses() -> None:
    table, session = table_with(State.OPEN)
    assert swept(table, GRANT_S) == []
    assert swept(table, GRANT_S + SWEEP_S, since=GRANT_S) == [session]


@pytest.mark.parametrize("how", ["renewed", "used", "renewed before the grant"])
def test_a_grant_that_was_renewed_or_used_holds_for_a_lease(how: str) -> None:
    table, session = table_with(State.OPENING)
    if how == "renewed before the grant":
        table.renew(KEY, EPOCH, 0.0)
    table.granted(session, b"grant", 0.0)
    if how == "renewed":
        table.renew(KEY, EPOCH, 0.0)
    elif how == "used":
        table.used(session, 0.0)
    assert swept(table, LEASE_S) == []
    assert swept(table, LEASE_S + SWEEP_S, since=LEASE_S) == [session]


def test_a_session_that_is_renewed_every_five_seconds_never_expires() -> None:
    table, session = table_with(State.OPEN)
    for at in range(0, 100, 5):
        table.renew(KEY, EPOCH, float(at))
        assert swept(table, at + 5.0, since=float(at)) == []
    assert table.get(KEY) is session


def test_a_repeated_open_gives_an_unconfirmed_grant_its_time_again_but_shortens_no_lease() -> None:
    table, session = table_with(State.OPEN)
    table.open(*KEY, EPOCH, "inbox", 1.5)
    assert session.lease_until == 1.5 + GRANT_S
    table.renew(KEY, EPOCH, 2.0)
    table.open(*KEY, EPOCH, "inbox", 2.5)
    assert session.lease_until == 2.0 + LEASE_S


@pytest.mark.parametrize("state", [State.OPENING, State.ENDING])
def test_what_is_not_open_does_not_expire(state: State) -> None:
    assert swept(table_with(state)[0], 60.0) == []


@pytest.mark.parametrize("confirmed", [True, False])
def test_the_countdown_stands_still_while_the_worker_is_disconnected(confirmed: bool) -> None:
    table, session = table_with(State.OPEN, confirmed=confirmed)
    now = 0.0
    while now < 60.0:
        now += SWEEP_S
        assert table.sweep(now, SWEEP_S, connected=False) == []
    lease = LEASE_S if confirmed else GRANT_S
    assert swept(table, now + lease, since=now) == []
    assert swept(table, now + lease + SWEEP_S, since=now + lease) == [session]


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_late_sweep_grants_full_leases_again(confirmed: bool) -> None:
    table, session = table_with(State.OPEN, confirmed=confirmed)
    table.sweep(0.0, SWEEP_S, connected=True)
    assert table.sweep(60.0, SWEEP_S, connected=True) == []
    assert session.lease_until == 60.0 + (LEASE_S if confirmed else GRANT_S)


def test_a_sweep_that_is_late_by_the_limit_itself_still_counts() -> None:
    table, session = table_with(State.OPEN)
    table.sweep(GRANT_S, SWEEP_S, connected=True)
    assert table.sweep(GRANT_S + LATE_SWEEPS * SWEEP_S, SWEEP_S, connected=True) == [session]


def test_a_reconnect_grants_full_leases_again_to_those_that_are_open() -> None:
    table, session = table_with(State.OPEN, confirmed=True)
    _, opening = table.open("bob", "s2", 1, "inbox", 0.0)
    assert opening is not None
    table.grant_again(14.0)
    assert session.lease_until == 14.0 + LEASE_S
    assert opening.lease_until == float("inf")


# ---------------------------------------------------------------- probed


@pytest.mark.parametrize(
    ("state", "epoch", "answer"),
    [
        (State.OPENING, EPOCH, "running"),
        (State.OPENING, EPOCH + 1, "not_received"),
        (State.OPEN, EPOCH, "answered"),
        (State.OPEN, EPOCH + 1, "not_received"),
        (State.ENDING, EPOCH, "not_received"),
        (None, EPOCH, "not_received"),
    ],
)
def test_a_probe_for_the_open_tells_what_became_of_it(state: State | None, epoch: int, answer: str) -> None:
    assert table_with(state)[0].probe(KEY, epoch, 0, 0) == answer


@pytest.mark.parametrize(
    ("seq", "running", "answer"),
    [
        (1, True, "answered"),
        (2, True, "running"),
        (3, True, "not_received"),
        (1, False, "answered"),
        (2, False, "answered"),
        (3, False, "not_received"),
    ],
)
def test_a_probe_for_a_request_tells_what_became_of_it(seq: int, running: bool, answer: str) -> None:
    table, session = table_with(State.OPEN)
    lane = session.lane
    assert lane is not None
    lane.receive(1, "inbox", 1.0)
    table.answered(lane, b"1")
    lane.receive(2, "inbox", 1.0)
    if not running:
        table.answered(lane, b"2")
    assert table.probe(KEY, EPOCH, 0, seq) == answer


@pytest.mark.parametrize(
    ("state", "epoch", "lane"),
    [
        (State.OPENING, EPOCH, 0),
        (State.ENDING, EPOCH, 0),
        (None, EPOCH, 0),
        (State.OPEN, EPOCH + 1, 0),
        (State.OPEN, EPOCH - 1, 0),
        (State.OPEN, EPOCH, 1),
        (State.OPEN, EPOCH, -1),
    ],
)
def test_a_probe_for_what_the_worker_does_not_hold_is_unknown(state: State | None, epoch: int, lane: int) -> None:
    assert table_with(state)[0].probe(KEY, epoch, lane, 1) == "unknown"


def test_probing_renews_nothing() -> None:
    table, session = table_with(State.OPEN)
    table.probe(KEY, EPOCH, 0, 0)
    table.probe(KEY, EPOCH, 0, 1)
    assert (session.confirmed, session.lease_until) == (False, GRANT_S)


class Meanwhile(float):
    """A moment in which the other thread renews: after the first thread has looked, before it has written."""

    table: SessionTable

    def __add__(self, other: float) -> float:
        self.table.renew(KEY, EPOCH, float(self))
        return float(self) + other


@pytest.mark.parametrize("how", ["granted", "opened again", "granted again"])
def test_a_renewal_by_the_other_thread_in_the_midst_of_a_grant_holds_for_a_lease(how: str) -> None:
    table, session = table_with(State.OPENING if how == "granted" else State.OPEN)
    now = Meanwhile(1.0)
    now.table = table
    if how == "granted":
        table.granted(session, b"grant", now)
    elif how == "opened again":
        table.open(*KEY, EPOCH, "inbox", now)
    else:
        table.grant_again(now)
    assert session.lease_until == 1.0 + LEASE_S


# ---------------------------------------------------------------- slots


def test_a_session_takes_a_slot_for_each_sub_environment_and_gives_them_all_back() -> None:
    table = SessionTable(16)
    opening, session = table.open(*KEY, EPOCH, "inbox", 0.0, num_envs=10)
    assert opening is Opening.NEW
    assert session is not None
    assert session.num_envs == 10
    assert (table.free, len(table)) == (6, 1)
    assert table.open(*KEY, EPOCH, "inbox", 0.0, num_envs=10)[0] is Opening.JOIN
    assert table.free == 6, "said again, it takes nothing more"
    table.ending(session, "closed")
    assert table.free == 6, "until its envs are closed"
    table.ended(session)
    table.ended(session)
    assert table.free == 16


@pytest.mark.parametrize(("num_envs", "opening"), [(1, Opening.NEW), (6, Opening.NEW), (7, Opening.FULL)])
def test_an_open_is_full_where_fewer_slots_are_free_than_it_needs(num_envs: int, opening: Opening) -> None:
    table = SessionTable(16)
    table.open("bob", "other", 1, "inbox", 0.0, num_envs=10)
    assert table.open(*KEY, EPOCH, "inbox", 0.0, num_envs=num_envs)[0] is opening
    assert table.free == (6 - num_envs if opening is Opening.NEW else 6)


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("share", "held", "num_envs", "opening"),
    [
        (None, 6, 2, Opening.NEW),
        (None, 6, 3, Opening.FULL),
        (4, 0, 4, Opening.NEW),
        (4, 2, 2, Opening.NEW),
        (4, 2, 3, Opening.FULL),
        (4, 4, 1, Opening.FULL),
        (99, 6, 2, Opening.NEW),
    ],
)
def test_an_open_beyond_its_users_share_is_full(share: int | None, held: int, num_envs: int, opening: Opening) -> None:
    table = SessionTable(8, max_slots_per_user=share)
    if held:
        table.open("ann", "first", 1, "", 0.0, num_envs=held)
    assert table.free_for("ann") == min(8 - held, 8 if share is None else share - held)
    assert table.open("ann", "s", 1, "", 0.0, num_envs=num_envs)[0] is opening


def test_a_share_is_of_each_user_and_comes_back_with_the_slots() -> None:
    table = SessionTable(4, max_slots_per_user=2)
    _, first = table.open("ann", "s1", 1, "", 0.0, num_envs=2)
    assert first is not None
    assert (table.free_for("ann"), table.free_for("bob"), table.free) == (0, 2, 2)
    assert table.open("bob", "s1", 1, "", 0.0, num_envs=2)[0] is Opening.NEW
    table.ending(first, "closed")
    assert table.free_for("ann") == 0, "its env is not closed yet"
    table.ended(first)
    table.ended(first)
    assert (table.held("ann"), table.free_for("ann"), table.held("bob")) == (0, 2, 2)
