from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import UsageError
from meshrl.protocol.directory import Directory, Event
from meshrl.wire.messages import Advertisement, Description


def ad(name: str = "cartpole", worker: str = "w1", **changed: Any) -> Advertisement:
    fields: dict[str, Any] = {
        "kind": "env",
        "slots": 4,
        "free": 4,
        "waiting": 0,
        "draining": False,
        "interval_s": 1.0,
        "description": "h1",
    }
    return Advertisement(v=1, name=name, worker=worker, **{**fields, **changed})


def described(name: str = "cartpole", worker: str = "w1", **capabilities: Any) -> Description:
    return Description(kind="env", name=name, worker=worker, capabilities=capabilities)


def kinds(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.key[2]) for event in events]


def awake(directory: Directory, start: float, end: float) -> list[Event]:
    """Sweep every quarter of a second in [start, end], as a client does that is awake."""
    events: list[Event] = []
    for quarter in range(int(start * 4), int(end * 4) + 1):
        events += directory.expire(quarter / 4)
    return events


def test_a_worker_joins_is_updated_when_it_says_something_new_and_leaves() -> None:
    directory = Directory()
    assert kinds(directory.heard(ad(), 0.0)) == [("joined", "w1")]
    assert directory.heard(ad(), 1.0) == []
    (event,) = directory.heard(ad(free=3), 2.0)
    assert (event.kind, event.key, event.advertisement.free) == ("updated", ("env", "cartpole", "w1"), 3)
    (event,) = directory.heard(ad(left=True), 3.0)
    assert (event.kind, event.advertisement.free) == ("left", 3)
    assert directory.entries() == []
    assert directory.next_expiry() is None


def test_a_repetition_that_says_nothing_new_still_counts_as_heard() -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    directory.heard(ad(), 3.0)
    assert directory.entries()[0].heard_at == 3.0
    assert awake(directory, 0, 6) == []


@pytest.mark.parametrize("interval_s", [1.0, 0.5, 4.0])
def test_a_silent_worker_expires_after_three_and_a_half_of_its_own_intervals(interval_s: float) -> None:
    directory = Directory()
    directory.heard(ad(interval_s=interval_s), 0.0)
    assert awake(directory, 0, 3.5 * interval_s - 0.25) == []
    assert kinds(directory.expire(3.5 * interval_s)) == [("left", "w1")]
    assert directory.expire(3.5 * interval_s) == []


@pytest.mark.parametrize("slept_s", [2.5, 3.0, 4.0, 60.0, 86400.0])
def test_a_client_that_slept_gives_every_worker_the_whole_period_again(slept_s: float) -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    assert awake(directory, 0, 3) == []
    wakes = 3 + slept_s
    assert directory.expire(wakes) == []
    assert awake(directory, wakes, wakes + 3.25) == []
    assert kinds(directory.expire(wakes + 3.5)) == [("left", "w1")]


def test_nobody_expires_while_the_server_is_away_and_afterwards_everyone_has_the_whole_period() -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    for quarter in range(1, 81):
        assert directory.expire(quarter / 4, connected=False) == []
    assert awake(directory, 20.25, 23.25) == []
    assert kinds(directory.expire(23.5)) == [("left", "w1")]


def test_what_was_heard_first_after_a_sleep_does_not_make_the_others_expire() -> None:
    directory = Directory()
    directory.heard(ad(worker="w1"), 0.0)
    directory.heard(ad(worker="w2"), 0.0)
    directory.expire(0.5)
    directory.heard(ad(worker="w1"), 60.0)
    assert directory.expire(60.0) == []
    directory.heard(ad(worker="w2"), 60.0)
    assert len(directory) == 2


def test_a_client_that_sleeps_before_its_first_sweep_is_tolerated_too() -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    assert directory.expire(5.0) == []
    assert kinds(awake(directory, 5, 9)) == [("left", "w1")]


def test_a_silent_worker_expires_in_time_for_an_owner_that_sweeps_only_when_told() -> None:
    directory = Directory()
    directory.heard(ad(), 10.0)
    events: list[Event] = []
    swept = []
    while (when := directory.next_expiry()) is not None:
        swept.append(when)
        events += directory.expire(when)
    assert kinds(events) == [("left", "w1")]
    assert swept == [11.0, 12.0, 13.0, 13.5]


def test_a_long_time_without_any_worker_is_not_taken_for_a_sleep() -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    awake(directory, 0, 4)
    directory.heard(ad(worker="w2"), 100.0)
    assert directory.next_expiry() == 101.0
    assert kinds(awake(directory, 100, 103.5)) == [("left", "w2")]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 0.9)), max_size=60))
def test_under_any_pattern_an_awake_client_lists_whom_it_heard_within_the_period(
    heard: list[tuple[str, float]],
) -> None:
    directory = Directory()
    last: dict[str, float] = {}
    now = 0.0
    for worker, passed in heard:
        now += passed
        directory.expire(now)
        directory.heard(ad(worker=worker), now)
        last[worker] = now
        expected = {worker for worker, at in last.items() if now < at + 3.5}
        assert {entry.worker for entry in directory.entries()} == expected


def test_a_lost_worker_leaves_with_all_its_names_and_others_stay() -> None:
    directory = Directory()
    for name, worker in [("cartpole", "w1"), ("pong", "w1"), ("cartpole", "w2")]:
        directory.heard(ad(name, worker), 0.0)
    events = directory.lost("w1", 0.5)
    assert [(event.kind, event.key) for event in events] == [
        ("left", ("env", "cartpole", "w1")),
        ("left", ("env", "pong", "w1")),
    ]
    assert [entry.key for entry in directory.entries()] == [("env", "cartpole", "w2")]
    assert directory.lost("w1", 0.6) == []


@pytest.mark.parametrize("how", ["lost", "goodbye"])
def test_advertisements_under_way_are_ignored_for_one_interval_and_later_ones_bring_it_back(how: str) -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    events = directory.lost("w1", 0.5) if how == "lost" else directory.heard(ad(left=True), 0.5)
    assert kinds(events) == [("left", "w1")]
    assert directory.heard(ad(), 0.6) == []
    assert directory.heard(ad(), 1.4) == []
    assert directory.entries() == []
    assert kinds(directory.heard(ad(), 1.5)) == [("joined", "w1")]
    assert directory.heard(ad(), 1.6) == []
    assert len(directory) == 1


def test_a_goodbye_of_an_unknown_worker_says_nothing_but_silences_what_it_overtook() -> None:
    directory = Directory()
    assert directory.heard(ad(left=True), 0.0) == []
    assert directory.heard(ad(), 0.1) == []
    assert directory.entries() == []


def test_a_description_is_attached_to_every_worker_that_advertises_its_hash() -> None:
    directory = Directory()
    description = described(gpu=True)
    digest = description.digest()
    directory.heard(ad(worker="w1", description=digest), 0.0)
    directory.heard(ad(worker="w3", description="other"), 0.0)
    assert directory.missing() == {("w1", "cartpole", digest), ("w3", "cartpole", "other")}
    directory.described(description)
    directory.heard(ad(worker="w2", description=digest), 0.0)
    assert directory.missing() == {("w3", "cartpole", "other")}
    assert [entry.description for entry in directory.entries()] == [description, description, None]


def test_a_description_may_come_before_the_advertisement() -> None:
    directory = Directory()
    directory.described(described())
    directory.heard(ad(description=described().digest()), 0.0)
    assert directory.missing() == set()


def test_a_changed_hash_makes_the_description_missing_again() -> None:
    directory = Directory()
    directory.described(described())
    directory.heard(ad(description=described().digest()), 0.0)
    directory.heard(ad(description="new"), 1.0)
    assert directory.missing() == {("w1", "cartpole", "new")}
    assert directory.entries()[0].description is None


def test_a_hash_that_a_worker_claims_holds_for_that_worker_alone() -> None:
    directory = Directory()
    for worker in ("w1", "w2"):
        directory.heard(ad(worker=worker, description="h1"), 0.0)
    directory.described(described(worker="w1", gpu=True), digest="h1")
    assert directory.missing() == {("w2", "cartpole", "h1")}


def test_descriptions_nobody_advertises_any_more_are_forgotten() -> None:
    directory = Directory()
    digest = described().digest()
    directory.described(described())
    directory.heard(ad(description=digest), 0.0)
    directory.lost("w1", 0.1)
    directory.expire(0.2)
    directory.heard(ad(description=digest), 5.0)
    assert directory.missing() == {("w1", "cartpole", digest)}


def test_a_description_is_attached_whether_it_or_the_advertisement_comes_first_and_whoever_sent_it() -> None:
    directory = Directory()
    digest = described().digest()
    directory.described(described(worker="w1"))
    directory.heard(ad(worker="w2", description="h2"), 0.0)
    directory.described(described(worker="w2"), digest="h2")
    directory.described(described(worker="w3"))
    directory.heard(ad(worker="w3", description=digest), 0.0)
    assert directory.missing() == set()


def test_a_worker_is_there_as_long_as_it_serves_one_name() -> None:
    directory = Directory()
    directory.heard(ad("pong"), 0.0)
    directory.heard(ad("cartpole"), 0.0)
    directory.heard(ad("pong", left=True), 1.0)
    assert directory.has("w1")
    assert directory.get(("env", "pong", "w1")) is None
    directory.heard(ad("cartpole", left=True), 1.0)
    assert not directory.has("w1")
    assert directory.names("env") == []


class Untouched(dict[str, Any]):
    """The entries of a name, looked at one by one alone."""

    def __iter__(self) -> Any:
        raise AssertionError("it looked at all of them")

    values = items = keys = __iter__


def test_an_advertisement_is_taken_in_without_a_look_at_the_others() -> None:
    directory = Directory()
    for n in range(10):
        directory.heard(ad(worker=f"w{n}"), 0.0)
    directory._served = {key: Untouched(entries) for key, entries in directory._served.items()}
    assert kinds(directory.heard(ad(worker="w3", free=1), 1.0)) == [("updated", "w3")]
    assert kinds(directory.heard(ad(worker="w10"), 1.0)) == [("joined", "w10")]
    assert kinds(directory.heard(ad(worker="w4", left=True), 1.0)) == [("left", "w4")]


def test_candidates_serve_that_name_and_kind_and_do_not_drain_full_ones_included() -> None:
    directory = Directory()
    for one in [
        ad(worker="w3", free=0),
        ad(worker="w1"),
        ad(worker="w2", draining=True),
        ad("pong", "w1"),
        ad(worker="w4", kind="agent"),
    ]:
        directory.heard(one, 0.0)
    assert [entry.worker for entry in directory.candidates("env", "cartpole", None)] == ["w1", "w3"]
    assert [entry.worker for entry in directory.candidates("agent", "cartpole")] == ["w4"]
    assert directory.candidates("env", "CartPole") == []
    assert directory.names("env") == ["cartpole", "pong"]
    assert directory.names("agent") == ["cartpole"]
    assert [entry.key for entry in directory.entries("agent")] == [("agent", "cartpole", "w4")]
    assert len(directory.entries()) == 5


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ({}, True),
        ({"gpu": True}, True),
        ({"gpu": False}, False),
        ({"zone": "eu"}, True),
        ({"zone": "EU"}, False),
        ({"zone": "eu", "gpu": True}, True),
        ({"zone": "eu", "gpu": False}, False),
        ({"games": "pong"}, True),
        ({"games": "tetris"}, False),
        ({"games": ["pong", "breakout"]}, True),
        ({"games": ("pong", "breakout")}, True),
        ({"games": ["breakout", "pong"]}, False),
        ({"zone": "e"}, False),
        ({"absent": None}, False),
        ({"absent": "x"}, False),
        ({"nothing": None}, True),
        ({"memory_gb": 64}, True),
        ({"memory_gb": 64.0}, True),
    ],
)
def test_where_matches_capabilities(where: dict[str, object], *, fits: bool) -> None:
    directory = Directory()
    description = described(gpu=True, zone="eu", games=["pong", "breakout"], nothing=None, memory_gb=64)
    directory.heard(ad(description=description.digest()), 0.0)
    directory.described(description)
    assert bool(directory.candidates("env", "cartpole", where)) is fits


def test_a_worker_whose_description_is_not_known_matches_no_where() -> None:
    directory = Directory()
    directory.heard(ad(), 0.0)
    assert directory.candidates("env", "cartpole", {"gpu": True}) == []
    assert len(directory.candidates("env", "cartpole", {})) == 1


def test_a_callable_in_where_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="gpu"):
        Directory().candidates("env", "cartpole", {"gpu": bool})
