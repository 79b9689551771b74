from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshrl.errors import UsageError
from meshrl.protocol.directory import Entry
from meshrl.protocol.placement import Choice, Placement, Shard
from meshrl.wire.messages import Advertisement, Load

DRAWS = st.floats(0, 1, exclude_max=True)


def entry(worker: str = "w1", heard_at: float = 0.0, **changed: Any) -> Entry:
    fields: dict[str, Any] = {"slots": 16, "free": 16, "waiting": 0, "draining": False, "interval_s": 1.0}
    ad = Advertisement(v=1, kind="env", name="cartpole", worker=worker, description="h1", **{**fields, **changed})
    return Entry(ad, heard_at)


def load(free: int, waiting: int = 0, **changed: Any) -> Load:
    return Load(**{"slots": 16, "free": free, "waiting": waiting, **changed})


@settings(deadline=None)
@given(st.lists(DRAWS, min_size=16, max_size=16), st.sampled_from([4, 5, 16, 64]))
def test_sixteen_opens_of_one_client_in_one_instant_spread_evenly(draws: list[float], slots: int) -> None:
    entries = [entry(f"w{n}", slots=slots, free=slots) for n in range(4)]
    placement = Placement()
    asked: Counter[str] = Counter()
    for draw in draws:
        choice = placement.choose(entries, draw=draw)
        assert choice is not None
        assert choice.believed_free == slots - asked[choice.worker]
        placement.asked(choice.worker, 0.0)
        asked[choice.worker] += 1
    assert sorted(asked.values()) == [4, 4, 4, 4]


@settings(deadline=None)
@given(st.lists(DRAWS, min_size=16, max_size=16))
def test_sixteen_opens_granted_one_after_another_spread_evenly_too(draws: list[float]) -> None:
    entries = [entry(f"w{n}") for n in range(4)]
    placement = Placement()
    granted: Counter[str] = Counter()
    for n, draw in enumerate(draws):
        choice = placement.choose(entries, draw=draw)
        assert choice is not None
        placement.asked(choice.worker, n / 1000)
        placement.granted(choice.worker, n / 1000)
        granted[choice.worker] += 1
    assert sorted(granted.values()) == [4, 4, 4, 4]


@dataclass
class Worker:
    """A worker as far as R5 goes: it bounces who believes in more than it has, else it grants."""

    slots: int
    taken: int = 0

    def answer(self, believed_free: int | None) -> Load | None:
        """None for a grant, else its load; who says no belief is never bounced."""
        free = self.slots - self.taken
        if believed_free is not None and free < believed_free:
            return load(free, slots=self.slots)
        assert free > 0, "the client asked a full worker while others had room"
        self.taken += 1
        return None


@dataclass
class Opening:
    """One open on its way, and how often each worker bounced it."""

    client: Placement
    choice: Choice = field(default_factory=lambda: Choice("", 0))
    bounces: Counter[str] = field(default_factory=Counter)

    def send(self, entries: list[Entry], draw: float) -> None:
        choice = self.client.choose(entries, draw=draw)
        assert choice is not None
        self.choice = choice
        self.client.asked(choice.worker, 0.0)


# Whose open goes when: four of each of the four clients.
SENDERS = [n for n in range(4) for _ in range(4)]


def four_stale_clients(
    order: list[int], drawn: list[float], slots: int, *, at_once: bool, max_bounces: int
) -> list[int]:
    """16 opens by four clients that all heard four idle workers once; the slots taken at each.

    An open is bounced at most ``max_bounces`` times by one worker.
    """
    workers = {f"w{n}": Worker(slots) for n in range(4)}
    entries = [entry(name, slots=slots, free=slots) for name in workers]
    clients = [Placement() for _ in range(4)]
    draws = itertools.cycle(drawn)
    to_send = [Opening(clients[n]) for n in order]
    under_way: list[Opening] = []
    while to_send or under_way:
        if to_send and (at_once or not under_way):
            under_way.append(to_send.pop())
            under_way[-1].send(entries, next(draws))
            continue
        opening = under_way.pop(0)
        worker = opening.choice.worker
        checked = opening.bounces[worker] < max_bounces
        answer = workers[worker].answer(opening.choice.believed_free if checked else None)
        if answer is None:
            opening.client.granted(worker, 0.0, load(slots - workers[worker].taken, slots=slots))
        else:
            opening.bounces[worker] += 1
            opening.client.busier(worker, answer, 0.0)
            opening.send(entries, next(draws))
            under_way.append(opening)
    return sorted(worker.taken for worker in workers.values())


@settings(max_examples=200, deadline=None)
@given(st.permutations(SENDERS), st.lists(DRAWS, min_size=32, max_size=32), st.sampled_from([4, 6, 16]))
def test_sixteen_opens_of_four_stale_clients_spread_evenly_by_one_bounce(
    order: list[int], draws: list[float], slots: int
) -> None:
    assert four_stale_clients(order, draws, slots, at_once=False, max_bounces=1) == [4, 4, 4, 4]


@pytest.mark.parametrize("run", range(200))
def test_sixteen_opens_of_four_stale_clients_in_one_instant_spread_within_one_by_three_bounces(run: int) -> None:
    # All 16 are under way before the first is answered. With one bounce for each worker the last of them go
    # by loads that others have outdated, and one time in fifteen a worker ends two off; three are enough for
    # draws by chance, though not for the worst that one could think of.
    chance = random.Random(run)
    order = chance.sample(SENDERS, len(SENDERS))
    taken = four_stale_clients(order, [chance.random() for _ in range(320)], 16, at_once=True, max_bounces=3)
    assert sum(taken) == 16
    assert min(taken) >= 3
    assert max(taken) <= 5


@pytest.mark.parametrize(
    ("workers", "draw", "chosen", "believed_free"),
    [
        # the largest free fraction, not the largest number
        ([("a", 16, 8, 0), ("b", 4, 3, 0)], 0.0, "b", 3),
        # ties by the draw
        ([("a", 4, 2, 0), ("b", 8, 4, 0), ("c", 4, 1, 0)], 0.0, "a", 2),
        ([("a", 4, 2, 0), ("b", 8, 4, 0), ("c", 4, 1, 0)], 0.49, "a", 2),
        ([("a", 4, 2, 0), ("b", 8, 4, 0), ("c", 4, 1, 0)], 0.5, "b", 4),
        ([("a", 4, 2, 0), ("b", 8, 4, 0), ("c", 4, 1, 0)], 0.999999, "b", 4),
        # room goes before a short queue
        ([("a", 16, 1, 9), ("b", 16, 0, 0)], 0.5, "a", 1),
        # no room: the shortest queue for its slots
        ([("a", 16, 0, 9), ("b", 2, 0, 2)], 0.5, "a", 0),
        ([("a", 16, 0, 9), ("b", 16, 0, 8)], 0.0, "b", 0),
        # a worker without slots is no worker
        ([("a", 0, 0, 0), ("b", 1, 0, 50)], 0.0, "b", 0),
    ],
)
def test_the_choice_is(workers: list[tuple[str, int, int, int]], draw: float, chosen: str, believed_free: int) -> None:
    entries = [entry(name, slots=slots, free=free, waiting=wait) for name, slots, free, wait in workers]
    assert Placement().choose(entries, draw=draw) == Choice(chosen, believed_free)


def test_nothing_is_chosen_where_nobody_is_left() -> None:
    placement = Placement()
    assert placement.choose([], draw=0.5) is None
    assert placement.choose([entry(slots=0, free=0)], draw=0.5) is None
    assert placement.choose([entry("a"), entry("b")], draw=0.5, exclude={"a", "b"}) is None
    assert placement.choose([entry("a"), entry("b")], draw=0.0, exclude=["a"]) == Choice("b", 16)


def test_a_worker_that_drains_by_its_own_answer_is_not_asked() -> None:
    placement = Placement()
    placement.asked("w1", 0.0)
    placement.busier("w1", load(16, draining=True), 0.1)
    assert placement.choose([entry("w1")], draw=0.0) is None


def test_a_worker_that_drains_by_its_advertisement_is_not_asked_whatever_it_answered_before() -> None:
    placement = Placement()
    assert placement.choose([entry("w1", draining=True)], draw=0.0) is None
    placement.asked("w1", 0.0)
    placement.busier("w1", load(16), 0.0)
    assert placement.choose([entry("w1", heard_at=0.1, draining=True)], draw=0.0) is None


def test_opens_over_the_room_there_is_queue_up_at_the_shortest_queue() -> None:
    entries = [entry("a", slots=1, free=1), entry("b", slots=1, free=0)]
    placement = Placement()
    asked = []
    for _ in range(4):
        choice = placement.choose(entries, draw=0.0)
        assert choice is not None
        asked.append(choice)
        placement.asked(choice.worker, 0.0)
    assert asked == [Choice("a", 1), Choice("a", 0), Choice("b", 0), Choice("a", 0)]


def test_an_open_under_way_counts_until_it_comes_to_nothing() -> None:
    placement = Placement()
    placement.asked("w1", 0.0)
    placement.asked("w1", 0.0)
    assert placement.believed_free(entry()) == 14
    placement.withdrawn("w1")
    assert placement.believed_free(entry()) == 15
    placement.withdrawn("w1")
    placement.withdrawn("w1")
    assert placement.believed_free(entry()) == 16


@pytest.mark.parametrize(
    ("heard_at", "free", "believed"),
    [
        (9.0, 16, 15),  # before the grant
        (10.1, 16, 15),  # after it, but sent before it: not missed
        (10.1, 15, 14),  # after it, and sent after it: counted twice, for a moment
        (10.4, 15, 14),
        (10.5, 15, 15),  # half an interval later it must have been sent after it: counted once
        (11.1, 15, 15),
        (60.0, 3, 3),
    ],
)
def test_a_grant_counts_until_an_advertisement_must_hold_it(heard_at: float, free: int, believed: int) -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    placement.granted("w1", 10.01)
    assert placement.believed_free(entry(heard_at=heard_at, free=free)) == believed


def test_how_long_a_grant_counts_goes_by_the_workers_own_interval() -> None:
    placement = Placement()
    placement.granted("w1", 10.0)
    assert placement.believed_free(entry(heard_at=14.9, free=16, interval_s=10.0)) == 15
    assert placement.believed_free(entry(heard_at=15.0, free=15, interval_s=10.0)) == 15


def test_a_grant_whose_env_took_long_to_start_is_not_counted_on_top_of_advertisements_since_the_ask() -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    assert placement.believed_free(entry(heard_at=10.2, free=16)) == 15
    assert placement.believed_free(entry(heard_at=11.0, free=15)) == 15
    placement.granted("w1", 15.0)
    assert placement.believed_free(entry(heard_at=15.0, free=15)) == 15


def test_a_parked_open_is_not_counted_on_top_of_the_queue_that_holds_it() -> None:
    placement = Placement()
    placement.asked("a", 10.0)
    entries = [entry("a", heard_at=11.0, free=0, waiting=1), entry("b", heard_at=11.0, free=0, waiting=1)]
    assert placement.choose(entries, draw=0.0) == Choice("a", 0)
    assert placement.choose(entries, draw=0.9) == Choice("b", 0)


def test_a_release_undoes_a_grant_and_gives_a_slot_back_until_it_is_advertised() -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    placement.granted("w1", 10.0)
    placement.released("w1", 10.2)
    assert placement.believed_free(entry(heard_at=9.0, free=16)) == 16
    placement.released("w1", 20.0)
    assert placement.believed_free(entry(heard_at=19.9, free=3)) == 4
    assert placement.believed_free(entry(heard_at=20.6, free=4)) == 4


def test_belief_stays_within_the_slots_there_are() -> None:
    placement = Placement()
    placement.released("w1", 10.0)
    assert placement.believed_free(entry(heard_at=9.9, free=16)) == 16
    for _ in range(20):
        placement.granted("w2", 10.0)
    assert placement.believed_free(entry("w2", heard_at=9.9, free=16)) == 0


def test_a_workers_answer_stands_until_a_younger_advertisement() -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    placement.busier("w1", load(5, waiting=0), 10.0)
    assert placement.believed_free(entry(heard_at=9.5, free=16)) == 5
    assert placement.believed_free(entry(heard_at=10.2, free=16)) == 5
    assert placement.believed_free(entry(heard_at=10.6, free=7)) == 7


def test_a_workers_answer_holds_the_grants_before_it_and_not_those_after_it_nor_opens_under_way() -> None:
    placement = Placement()
    for _ in range(4):
        placement.asked("w1", 10.0)
    placement.granted("w1", 10.0)
    placement.busier("w1", load(9), 10.0)
    assert placement.believed_free(entry(heard_at=9.5)) == 7
    placement.granted("w1", 10.0)
    assert placement.believed_free(entry(heard_at=9.5)) == 7
    placement.withdrawn("w1")
    assert placement.believed_free(entry(heard_at=9.5)) == 8


def test_a_grant_with_its_load_is_the_newest_view() -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    placement.granted("w1", 10.0, load(3))
    assert placement.believed_free(entry(heard_at=9.5, free=16)) == 3


def test_a_worker_that_left_is_forgotten() -> None:
    placement = Placement()
    placement.asked("w1", 10.0)
    placement.granted("w1", 10.0, load(3))
    placement.forget("w1")
    placement.forget("w1")
    assert placement.believed_free(entry(heard_at=9.5, free=16)) == 16


def test_what_is_heard_of_a_forgotten_workers_opens_and_sessions_does_not_bring_it_back() -> None:
    placement = Placement()
    for n in range(10):
        worker = f"w{n}"
        placement.asked(worker, 10.0)
        placement.granted(worker, 10.0, load(3))
        placement.forget(worker)
        placement.released(worker, 11.0)
        placement.withdrawn(worker)
        placement.busier(worker, load(3), 11.0)
    assert placement._own == {}


def test_what_was_done_long_ago_takes_no_memory() -> None:
    placement = Placement()
    for second in range(1000):
        placement.asked("w1", second)
        placement.granted("w1", second)
        placement.released("w1", second)
        assert placement.believed_free(entry(heard_at=second + 0.1, free=8)) == 8
    assert len(placement._own["w1"].marks) < 20


FULL = [("full", 0, 10)]


@pytest.mark.parametrize(
    ("workers", "draw", "target"),
    [
        ([*FULL, ("idle", 4, 0)], 0.0, "idle"),
        ([*FULL, ("idle", 4, 0)], 0.39, "idle"),
        ([*FULL, ("idle", 4, 0)], 0.4, None),  # 4 free for 10 that wait
        ([*FULL, ("idle", 4, 0), ("also_full", 0, 10)], 0.2, None),  # for 20
        ([*FULL, ("idle", 16, 0)], 0.999999, "idle"),
        ([*FULL, ("one", 1, 0), ("three", 3, 0)], 0.09, "one"),
        ([*FULL, ("one", 1, 0), ("three", 3, 0)], 0.11, "three"),
        ([*FULL, ("one", 1, 0), ("three", 3, 0)], 0.39, "three"),
        ([*FULL, ("queued", 4, 1)], 0.0, None),
        ([*FULL, ("also_full", 0, 0)], 0.0, None),
        ([("full", 5, 0)], 0.0, None),
        ([("full", 0, 0), ("idle", 1, 0)], 0.999999, "idle"),  # not advertised yet that one waits
        (FULL, 0.0, None),
        ([], 0.0, None),
    ],
)
def test_a_parked_open_moves(workers: list[tuple[str, int, int]], draw: float, target: str | None) -> None:
    entries = [entry(name, free=free, waiting=waiting) for name, free, waiting in workers]
    assert Placement().should_move(entries, "full", draw) == target


def test_a_parked_open_does_not_move_to_a_draining_worker_nor_for_slots_the_client_has_taken_itself() -> None:
    placement = Placement()
    entries = [entry("full", free=0, waiting=1), entry("idle", free=2)]
    assert placement.should_move([entries[0], entry("idle", free=2, draining=True)], "full", 0.0) is None
    placement.asked("idle", 0.0)
    assert placement.should_move(entries, "full", 0.0) == "idle"
    placement.asked("idle", 0.0)
    assert placement.should_move(entries, "full", 0.0) is None


@settings(deadline=None)
@given(free=st.integers(0, 16), waiting=st.integers(1, 200))
def test_as_many_waiters_move_as_there_are_free_slots(free: int, waiting: int) -> None:
    entries = [entry("full", free=0, waiting=waiting), entry("idle", free=free)]
    draws = [(n + 0.5) / waiting for n in range(waiting)]
    moves = [Placement().should_move(entries, "full", draw) for draw in draws]
    assert sum(move == "idle" for move in moves) == min(free, waiting)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    DRAWS,
)
def test_any_choice_is_among_the_least_loaded(workers: list[tuple[int, int, int, bool]], draw: float) -> None:
    entries = {
        f"w{n}": entry(f"w{n}", slots=slots, free=min(free, slots), waiting=waiting, draining=draining)
        for n, (slots, free, waiting, draining) in enumerate(workers)
    }
    choice = Placement().choose(entries.values(), draw=draw)
    usable = [e.advertisement for e in entries.values() if e.advertisement.slots and not e.advertisement.draining]
    if choice is None:
        assert not usable
        return
    chosen = entries[choice.worker].advertisement
    assert chosen in usable
    roomy = [ad for ad in usable if ad.free and not ad.waiting] or [ad for ad in usable if ad.free]
    if roomy:
        assert chosen in roomy
        assert chosen.free / chosen.slots == max(ad.free / ad.slots for ad in roomy)
    else:
        assert chosen.waiting / chosen.slots == min(ad.waiting / ad.slots for ad in usable)


# ---------------------------------------------------------------- many slots


@pytest.mark.parametrize(
    ("workers", "num_envs", "chosen", "believed_free"),
    [
        # the least loaded of those with room for all, though another is less loaded
        ([("a", 16, 8, 0), ("b", 4, 3, 0)], 4, "a", 8),
        ([("a", 16, 8, 0), ("b", 4, 3, 0)], 3, "b", 3),
        # room for all of them, not for some
        ([("a", 16, 9, 0), ("b", 16, 10, 0)], 10, "b", 10),
        # where others wait, free slots are for them: after those where nobody does, before a queue
        ([("a", 16, 9, 1), ("b", 16, 3, 0)], 3, "b", 3),
        ([("a", 16, 9, 1), ("b", 16, 2, 0)], 3, "a", 9),
        # no room: the shortest queue among workers that can ever hold it
        ([("a", 16, 3, 2), ("b", 4, 0, 0)], 5, "a", 0),
        ([("a", 16, 3, 2), ("b", 8, 0, 0)], 5, "b", 0),
    ],
)
def test_the_choice_for_many_slots_is(
    workers: list[tuple[str, int, int, int]], num_envs: int, chosen: str, believed_free: int
) -> None:
    entries = [entry(name, slots=slots, free=free, waiting=wait) for name, slots, free, wait in workers]
    assert Placement().choose(entries, draw=0.0, num_envs=num_envs) == Choice(chosen, believed_free)


def test_nobody_is_chosen_for_more_slots_than_any_worker_has() -> None:
    entries = [entry("a", slots=16), entry("b", slots=8, free=8)]
    assert Placement().choose(entries, draw=0.0, num_envs=17) is None
    assert Placement().choose(entries, draw=0.0, num_envs=9, exclude={"a"}) is None


def test_an_open_of_many_slots_counts_for_all_of_them_until_it_lands() -> None:
    placement = Placement()
    placement.asked("w1", 10.0, 5)
    placement.asked("w1", 10.0, 3)
    assert placement.believed_free(entry(heard_at=10.0)) == 8
    placement.granted("w1", 10.1, None, 3)
    assert placement.believed_free(entry(heard_at=10.0)) == 8
    placement.withdrawn("w1", 5)
    assert placement.believed_free(entry(heard_at=10.0)) == 13
    placement.released("w1", 10.2, 3)
    assert placement.believed_free(entry(heard_at=10.0)) == 16
    assert placement.believed_free(entry(heard_at=10.7, free=16)) == 16


def test_what_lands_is_the_oldest_ask_for_as_many_slots() -> None:
    placement = Placement()
    placement.asked("w1", 10.0, 5)
    placement.asked("w1", 20.0, 3)
    placement.asked("w1", 20.1, 5)
    placement.granted("w1", 20.2, None, 5)
    # The grant is as old as the first ask: an advertisement of 20 s holds it, and neither of the younger asks.
    assert placement.believed_free(entry(heard_at=20.0, free=11)) == 11 - 3 - 5


def test_a_worker_that_was_busier_than_believed_is_believed() -> None:
    placement = Placement()
    placement.asked("w1", 10.0, 10)
    placement.busier("w1", load(4), 10.0, 10)
    assert placement.believed_free(entry(heard_at=9.9)) == 4
    assert placement.choose([entry(heard_at=9.9)], draw=0.0, num_envs=5) == Choice("w1", 0)


def test_a_parked_open_of_many_slots_moves_only_where_there_is_room_for_it() -> None:
    entries = [entry("full", free=0, waiting=2), entry("some", free=4), entry("many", free=9)]
    move = Placement().should_move
    assert move(entries, "full", 0.0, 5) == "many"
    assert move(entries, "full", 0.49, 5) == "many"
    assert move(entries, "full", 0.5, 5) is None, "room for one, and two wait"
    assert move(entries, "full", 0.0, 10) is None


# ---------------------------------------------------------------- vectors

WORKERS = st.lists(
    st.tuples(
        st.integers(0, 12), st.integers(0, 12), st.sampled_from([0, 0, 0, 1]), st.sampled_from([False] * 5 + [True])
    ),
    min_size=1,
    max_size=6,
)


def workers_of(listed: list[tuple[int, int, int, bool]]) -> dict[str, Entry]:
    return {
        f"w{n}": entry(f"w{n}", slots=slots, free=min(free, slots), waiting=waiting, draining=draining)
        for n, (slots, free, waiting, draining) in enumerate(listed)
    }


def plan(
    workers: list[tuple[str, int, int]], num_envs: int, shards: int | None = None, **how: Any
) -> list[tuple[str, int]]:
    """Workers are (name, slots, free)."""
    entries = [entry(name, slots=slots, free=free) for name, slots, free in workers]
    return [(shard.worker, shard.num_envs) for shard in Placement().spread(entries, num_envs, shards, **how)]


THREE = [("a", 16, 16), ("b", 16, 16), ("c", 16, 16)]


@pytest.mark.parametrize(
    ("workers", "num_envs", "shards"),
    [
        (THREE, 12, [("a", 4), ("b", 4), ("c", 4)]),
        (THREE, 13, [("a", 5), ("b", 4), ("c", 4)]),
        (THREE, 2, [("a", 1), ("b", 1)]),
        (THREE, 48, [("a", 16), ("b", 16), ("c", 16)]),
        (THREE, 49, []),
        # slots are room, not speed
        ([("a", 32, 32), ("b", 16, 16)], 12, [("a", 6), ("b", 6)]),
        ([("a", 16, 16), ("b", 16, 8)], 12, [("a", 6), ("b", 6)]),
        # what does not fit into an equal share goes to the others
        ([("a", 8, 8), ("b", 1024, 1024)], 64, [("a", 8), ("b", 56)]),
        ([("a", 8, 8), ("b", 64, 64), ("c", 64, 64)], 48, [("a", 8), ("b", 20), ("c", 20)]),
        # the least loaded have the remainder, and are taken where there are more workers than sub-environments
        ([("a", 16, 8), ("b", 16, 16)], 7, [("a", 3), ("b", 4)]),
        ([("a", 16, 8), ("b", 16, 16)], 1, [("b", 1)]),
        # every worker with room takes part
        ([("a", 16, 16), ("b", 16, 1)], 4, [("a", 3), ("b", 1)]),
        ([("a", 16, 16), ("b", 16, 0)], 4, [("a", 4)]),
        # what there is no room for waits, within the slots
        ([("a", 8, 8), ("b", 8, 2)], 12, [("a", 8), ("b", 4)]),
        ([("a", 8, 0), ("b", 8, 0)], 12, [("a", 6), ("b", 6)]),
        ([("a", 8, 0), ("b", 8, 0)], 17, []),
        ([], 1, []),
    ],
)
def test_a_vector_is_cut_into_shards_as_equal_as_the_room_there_is(
    workers: list[tuple[str, int, int]], num_envs: int, shards: list[tuple[str, int]]
) -> None:
    assert plan(workers, num_envs) == shards


@pytest.mark.parametrize(
    ("workers", "num_envs", "shards", "expected"),
    [
        (THREE, 10, 3, [("a", 4), ("b", 3), ("c", 3)]),
        (THREE, 10, 1, [("a", 10)]),
        # the least loaded ones
        ([("a", 16, 4), ("b", 16, 16), ("c", 16, 8)], 6, 2, [("b", 3), ("c", 3)]),
        # several on one worker
        ([("a", 16, 16)], 10, 3, [("a", 4), ("a", 3), ("a", 3)]),
        (THREE, 8, 4, [("a", 2), ("b", 2), ("c", 2), ("a", 2)]),
        # with room first, also where that makes two on one worker
        ([("a", 16, 16), ("b", 16, 2)], 8, 2, [("a", 4), ("a", 4)]),
        # a shard that no worker could ever hold
        (THREE, 34, 2, []),
        (THREE, 48, 3, [("a", 16), ("b", 16), ("c", 16)]),
    ],
)
def test_a_number_of_shards_that_is_given_is_kept(
    workers: list[tuple[str, int, int]], num_envs: int, shards: int, expected: list[tuple[str, int]]
) -> None:
    assert plan(workers, num_envs, shards) == expected


@pytest.mark.parametrize(("num_envs", "shards"), [(0, None), (-1, None), (4, 0), (4, 5)])
def test_a_vector_of_nothing_or_of_more_shards_than_sub_environments_is_a_usage_error(
    num_envs: int, shards: int | None
) -> None:
    with pytest.raises(UsageError, match=str(num_envs)):
        plan(THREE, num_envs, shards)


def test_equal_workers_are_taken_by_the_draw() -> None:
    assert [plan(THREE, 2, 1, draw=draw)[0][0] for draw in (0.0, 0.4, 0.7)] == ["a", "b", "c"]


def test_within_room_means_that_nothing_waits() -> None:
    workers = [("a", 8, 3), ("b", 8, 2)]
    assert plan(workers, 5, within_room=True) == [("a", 3), ("b", 2)]
    assert plan(workers, 6, within_room=True) == []
    assert plan(workers, 6) == [("a", 3), ("b", 3)]


def test_where_others_wait_there_is_no_room_but_for_the_one_who_waits_alone() -> None:
    entries = [entry("a", slots=8, free=3, waiting=1), entry("b", slots=8, free=3)]
    spread = Placement().spread
    assert spread(entries, 6, within_room=True) == []
    assert spread(entries, 6, within_room=True, parked_at="b") == []
    assert spread(entries, 6, within_room=True, parked_at="a") == [Shard("a", 3), Shard("b", 3)]


def test_a_plan_counts_what_this_client_asked_for_already() -> None:
    placement = Placement()
    placement.asked("a", 0.0, 8)
    assert placement.spread([entry("a"), entry("b")], 12) == [Shard("a", 6), Shard("b", 6)]


@settings(deadline=None)
@given(WORKERS, st.integers(1, 60), DRAWS)
def test_any_plan_is_whole_level_and_within_the_room_there_is(
    listed: list[tuple[int, int, int, bool]], num_envs: int, draw: float
) -> None:
    entries = workers_of(listed)
    shards = Placement().spread(entries.values(), num_envs, draw=draw)
    usable = {name: e.advertisement for name, e in entries.items() if not e.advertisement.draining}
    if not shards:
        assert sum(ad.slots for ad in usable.values()) < num_envs
        return
    sizes = {shard.worker: shard.num_envs for shard in shards}
    assert len(sizes) == len(shards) <= num_envs, "one shard a worker"
    assert sum(sizes.values()) == num_envs
    room = {name: 0 if ad.waiting else ad.free for name, ad in usable.items()}
    assert all(1 <= size <= usable[name].slots for name, size in sizes.items())
    if num_envs > sum(room.values()):
        assert all(sizes.get(name, 0) >= free for name, free in room.items()), "all the room there is is used"
        return
    assert all(size <= room[name] for name, size in sizes.items())
    assert len(sizes) == min(num_envs, sum(free > 0 for free in room.values()))

    def taken(name: str) -> float:
        return (usable[name].slots - usable[name].free) / usable[name].slots

    for one, other in itertools.permutations(sizes, 2):
        if sizes[other] < room[other]:
            assert sizes[one] <= sizes[other] + 1, "no sub-environment were better elsewhere"
            if sizes[one] == sizes[other] + 1:
                assert taken(one) <= taken(other), "the least loaded have one more"


@settings(deadline=None)
@given(WORKERS, st.integers(1, 40), st.integers(1, 8), DRAWS)
def test_any_plan_of_so_many_shards_has_them_nearly_equal(
    listed: list[tuple[int, int, int, bool]], num_envs: int, shards: int, draw: float
) -> None:
    entries = workers_of(listed)
    shards = min(shards, num_envs)
    cut = Placement().spread(entries.values(), num_envs, shards, draw=draw)
    usable = {name: e.advertisement for name, e in entries.items() if not e.advertisement.draining}
    if not cut:
        assert sum(ad.slots // -(-num_envs // shards) for ad in usable.values()) < shards
        return
    sizes = [shard.num_envs for shard in cut]
    assert (len(sizes), sum(sizes)) == (shards, num_envs)
    assert max(sizes) - min(sizes) <= 1
    of_worker: Counter[str] = Counter()
    for shard in cut:
        of_worker[shard.worker] += shard.num_envs
    assert all(total <= usable[name].slots for name, total in of_worker.items())
    roomy = [name for name, ad in usable.items() if not ad.waiting and ad.free >= max(sizes)]
    if len(roomy) >= shards:
        assert len(of_worker) == shards, "one a worker, where there are enough of them"
        assert all(total <= usable[name].free for name, total in of_worker.items())
