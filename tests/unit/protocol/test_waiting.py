from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshrl.errors import UsageError
from meshrl.protocol.waiting import KEEP_S, TICKET_S, Waiter, Waiting

FAR = 1e9


def park_all(waiting: Waiting, *keys: str) -> None:
    """Park each "user session", in order."""
    for key in keys:
        user, session = key.split()
        assert waiting.park(user, session, 0.0, FAR) is not None


def served(waiting: Waiting) -> list[str]:
    """Free slots until nobody waits."""
    order = []
    while (waiter := waiting.next()) is not None:
        order.append(f"{waiter.user} {waiter.session}")
    return order


def test_one_user_is_served_first_come_first_served() -> None:
    waiting = Waiting()
    park_all(waiting, "a 3", "a 1", "a 2")
    assert served(waiting) == ["a 3", "a 1", "a 2"]


def test_users_are_served_in_turn() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "a 2", "a 3", "b 1", "b 2", "c 1")
    assert served(waiting) == ["a 1", "b 1", "c 1", "a 2", "b 2", "a 3"]


def test_a_user_that_was_served_goes_behind_those_that_wait() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "b 1", "b 2")
    assert waiting.next() is not None
    park_all(waiting, "a 2")
    assert served(waiting) == ["b 1", "a 2", "b 2"]


def test_a_freed_slot_takes_out_exactly_one() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "b 1")
    waiter = waiting.next()
    assert waiter is not None
    assert (waiter.user, waiter.session) == ("a", "1")
    assert len(waiting) == 1
    assert ("a", "1") not in waiting
    assert ("b", "1") in waiting


def test_nobody_gets_a_slot_where_nobody_waits() -> None:
    waiting = Waiting()
    assert waiting.next() is None
    assert waiting.due(FAR) == []
    assert waiting.next_due() is None


def test_resumes_go_before_opens_in_turn_among_themselves() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "b 1")
    for user, session in [("c", "1"), ("c", "2"), ("d", "1")]:
        assert waiting.park(user, session, 0.0, FAR, resume=True) is not None
    assert served(waiting) == ["c 1", "d 1", "c 2", "a 1", "b 1"]


def test_an_open_said_again_as_a_resume_moves_up_and_a_resume_stays_one() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "b 1", "b 2")
    waiting.park("b", "2", 0.0, FAR, resume=True)
    waiting.park("b", "2", 0.0, FAR)
    assert len(waiting) == 3
    assert served(waiting) == ["b 2", "a 1", "b 1"]


def test_parking_again_keeps_the_place_and_takes_the_new_end() -> None:
    waiting = Waiting()
    first = waiting.park("a", "1", 0.0, 5.0)
    park_all(waiting, "a 2", "b 1")
    again = waiting.park("a", "1", 1.0, 9.0)
    assert first is not None
    assert again == Waiter("a", "1", first.ticket, 9.0, resume=False)
    assert waiting.due(5.0) == []
    assert waiting.next_due() == 9.0
    assert served(waiting) == ["a 1", "b 1", "a 2"]


def test_who_leaves_is_not_served_and_the_user_keeps_its_turn() -> None:
    waiting = Waiting()
    park_all(waiting, "a 1", "a 2", "b 1")
    assert waiting.leave("a", "1") is True
    assert waiting.leave("a", "1") is False
    assert waiting.leave("x", "1") is False
    assert served(waiting) == ["a 2", "b 1"]


def test_those_whose_time_is_over_are_taken_out_the_earliest_first() -> None:
    waiting = Waiting()
    for session, until in [("1", 3.0), ("2", 1.0), ("3", 2.0), ("4", 2.5)]:
        waiting.park("a", session, 0.0, until)
    assert waiting.next_due() == 1.0
    assert [waiter.session for waiter in waiting.due(2.0)] == ["2", "3"]
    assert waiting.due(2.0) == []
    assert served(waiting) == ["a 1", "a 4"]


def test_a_ticket_keeps_the_place_within_the_user_and_among_users() -> None:
    waiting = Waiting()
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "b 1", "c 1")
    (over,) = waiting.due(1.0)
    park_all(waiting, "a 2", "d 1")
    back = waiting.park("a", "1", 2.0, FAR, over.ticket)
    assert back is not None
    assert back.ticket == over.ticket
    assert served(waiting) == ["a 1", "b 1", "c 1", "d 1", "a 2"]


def test_a_ticket_of_a_users_only_open_keeps_its_turn() -> None:
    waiting = Waiting()
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "b 1")
    (over,) = waiting.due(1.0)
    assert waiting.park("a", "1", 1.1, FAR, over.ticket) is not None
    assert served(waiting) == ["a 1", "b 1"]


def test_a_ticket_does_not_give_back_a_turn_that_was_used_meanwhile() -> None:
    waiting = Waiting()
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "a 2", "b 1", "c 1")
    (over,) = waiting.due(1.0)
    first = waiting.next()
    assert first is not None
    assert (first.user, first.session) == ("a", "2")
    waiting.park("a", "1", 2.0, FAR, over.ticket)
    assert served(waiting) == ["b 1", "c 1", "a 1"]


def park_sizes(waiting: Waiting, **sizes: int) -> None:
    """Park an open of so many slots for each user, in order."""
    for user, num_envs in sizes.items():
        assert waiting.park(user, "1", 0.0, FAR, num_envs=num_envs) is not None


def test_who_needs_more_than_is_free_waits_and_nobody_overtakes_it() -> None:
    waiting = Waiting()
    park_sizes(waiting, big=10, small=1)
    for free in (0, 1, 9):
        assert waiting.next(free) is None
    assert len(waiting) == 2
    waiter = waiting.next(10)
    assert waiter is not None
    assert (waiter.user, waiter.num_envs) == ("big", 10)
    assert waiting.next(0) is None
    small = waiting.next(1)
    assert small is not None
    assert small.user == "small"


def test_a_big_resume_is_not_overtaken_by_an_open_that_would_fit() -> None:
    waiting = Waiting()
    park_sizes(waiting, small=1)
    waiting.park("big", "1", 0.0, FAR, resume=True, num_envs=10)
    assert waiting.next(9) is None
    assert waiting.next(10) is not None


@pytest.mark.parametrize("how", ["leaves", "is over"])
def test_when_a_big_one_goes_the_next_is_looked_at(how: str) -> None:
    waiting = Waiting()
    waiting.park("big", "1", 0.0, 1.0, num_envs=10)
    park_sizes(waiting, small=1)
    if how == "leaves":
        waiting.leave("big", "1")
    else:
        assert [waiter.num_envs for waiter in waiting.due(1.0)] == [10]
    waiter = waiting.next(1)
    assert waiter is not None
    assert waiter.user == "small"


def test_an_open_said_again_keeps_its_place_and_takes_the_new_size() -> None:
    waiting = Waiting()
    park_sizes(waiting, a=10, b=1)
    park_sizes(waiting, a=2)
    assert waiting.next(1) is None
    waiter = waiting.next(2)
    assert waiter is not None
    assert (waiter.user, waiter.num_envs) == ("a", 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), max_size=30), st.integers(8, 16))
def test_sizes_change_nothing_in_the_order(opens: list[tuple[str, int]], slots: int) -> None:
    sized, plain = Waiting(), Waiting()
    for number, (user, num_envs) in enumerate(opens):
        sized.park(user, str(number), 0.0, FAR, num_envs=num_envs)
        plain.park(user, str(number), 0.0, FAR)
    order, held = [], list[int]()
    while len(sized):
        while (waiter := sized.next(slots - sum(held))) is not None:
            order.append(f"{waiter.user} {waiter.session}")
            held.append(waiter.num_envs)
        held = held[1:]  # a session ends, and its slots are free
    assert order == served(plain)


def lost_ticket(how: str) -> Waiting:
    """A queue in which a's ticket is no good, for one reason or another; a is back in it, behind b."""
    waiting = Waiting(max_tickets=1)
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "b 1")
    (over,) = waiting.due(1.0)
    ticket: str | None = over.ticket
    session, now = "1", 1.0
    if how == "none":
        ticket = None
    elif how == "wrong":
        ticket = "another"
    elif how == "of another session":
        session = "2"
    elif how == "too old":
        now += TICKET_S
    elif how == "left":
        waiting.leave("a", "1")
    elif how == "pushed out":
        waiting.park("c", "1", 1.0, 1.0)
        waiting.due(1.0)
    waiting.park("a", session, now, FAR, ticket)
    return waiting


@pytest.mark.parametrize("how", ["none", "wrong", "too old", "left", "pushed out"])
def test_a_ticket_that_is_no_good_gives_a_place_at_the_end(how: str) -> None:
    assert served(lost_ticket(how)) == ["b 1", "a 1"]


def test_a_ticket_of_another_session_gives_no_place_within_the_user() -> None:
    waiting = Waiting()
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "a 2")
    (over,) = waiting.due(1.0)
    waiting.park("a", "3", 1.0, FAR, over.ticket)
    assert served(waiting) == ["a 2", "a 3"]


def test_a_ticket_is_good_until_just_before_its_end() -> None:
    waiting = Waiting()
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "b 1")
    (over,) = waiting.due(1.0)
    waiting.park("a", "1", 1.0 + TICKET_S - 0.01, FAR, over.ticket)
    assert served(waiting) == ["a 1", "b 1"]


def test_over_the_bound_an_open_is_refused_and_its_ticket_stays_good() -> None:
    waiting = Waiting(max_waiting=2)
    waiting.park("a", "1", 0.0, 1.0)
    park_all(waiting, "b 1")
    assert waiting.park("c", "1", 0.0, FAR) is None
    (over,) = waiting.due(1.0)
    park_all(waiting, "c 1")
    assert waiting.park("a", "1", 2.0, FAR, over.ticket) is None
    assert waiting.park("b", "1", 2.0, FAR) is not None
    assert waiting.leave("c", "1")
    assert waiting.park("a", "1", 3.0, FAR, over.ticket) is not None
    assert served(waiting) == ["a 1", "b 1"]


def test_with_no_room_to_wait_every_open_is_refused() -> None:
    assert Waiting(0).park("a", "1", 0.0, FAR) is None


@pytest.mark.parametrize("bounds", [(-1, None), (1, -1)])
def test_negative_bounds_are_a_usage_error(bounds: tuple[int, int | None]) -> None:
    with pytest.raises(UsageError):
        Waiting(bounds[0], max_tickets=bounds[1])


def test_ten_thousand_waiters_are_served_in_turn() -> None:
    waiting = Waiting(10_000)
    users, each = 100, 100
    for user in range(users):
        for session in range(each):
            assert waiting.park(f"u{user}", f"s{session}", 0.0, FAR) is not None
    assert waiting.park("late", "1", 0.0, FAR) is None
    expected = [f"u{user} s{session}" for session in range(each) for user in range(users)]
    assert served(waiting) == expected


def test_the_work_of_an_operation_does_not_grow_with_the_waiters() -> None:
    # Counted, not timed: the comparisons that the heaps make of their ranks, which is all they spend.
    class Counted(float):
        compared = 0

        def __lt__(self, other: float) -> bool:
            Counted.compared += 1
            return super().__lt__(other)

    waiting = Waiting(10_000)
    for n in range(10_000):
        waiting.park(f"u{n % 7}", f"s{n}", 0.0, Counted(n * 7919 % 10_007))
    Counted.compared = 0
    for n in range(0, 10_000, 2):
        waiting.leave(f"u{n % 7}", f"s{n}")
    over = waiting.due(FAR)
    assert len(over) == 5000
    # 10,000 entries leave a heap of depth 14, at about one comparison a level and one at the leaf's way up.
    assert 0 < Counted.compared < 10_000 * 14 * 3


def test_an_open_that_is_repeated_without_end_does_not_grow_the_queue() -> None:
    waiting = Waiting()
    for n in range(10_000):
        waiting.park("a", "1", 0.0, FAR + n)
    assert len(waiting) == 1
    assert len(waiting._ends._heap) < 100


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), unique=True, max_size=40))
def test_between_two_slots_of_a_user_every_other_waiting_user_gets_one(keys: list[tuple[str, int]]) -> None:
    waiting = Waiting()
    for user, session in keys:
        waiting.park(user, str(session), 0.0, FAR)
    order = [key.split()[0] for key in served(waiting)]
    for at, user in enumerate(order):
        if user in order[at + 1 :]:
            between = order[at + 1 : order.index(user, at + 1)]
            assert sorted(between) == sorted(set(between))
            assert set(order[at + 1 :]) - {user} <= set(between) | set(order[: at + 1])


@dataclass
class Place:
    arrival: int
    until: float
    resume: bool
    ticket: str


class WaitingIsItsNaiveModel(RuleBasedStateMachine):
    """Against lists that are searched from end to end: who is next, who is over, whom a ticket stands for."""

    MAX_WAITING = 6
    MAX_TICKETS = 3

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Waiting(self.MAX_WAITING, max_tickets=self.MAX_TICKETS)
        self.now = 0.0
        self.places: dict[tuple[str, str], Place] = {}
        self.tickets: list[tuple[float, tuple[str, str], Place]] = []
        self.given: dict[tuple[str, str], str] = {}
        self.issued: set[str] = set()
        self.turns: dict[tuple[bool, str], int] = {}
        self.arrivals = 0
        self.turn = 0
        self.shares = {"a": 2, "b": 9, "c": 1}  # what each user may still have

    def forget_idle(self) -> None:
        alive = {(place.resume, key[0]) for key, place in self.places.items()}
        alive |= {(place.resume, key[0]) for _, key, place in self.tickets}
        self.turns = {key: turn for key, turn in self.turns.items() if key in alive}

    def expire_tickets(self) -> None:
        self.tickets = [kept for kept in self.tickets if kept[0] > self.now]
        self.forget_idle()

    def drop_ticket(self, key: tuple[str, str]) -> None:
        self.tickets = [kept for kept in self.tickets if kept[1] != key]
        self.forget_idle()

    def enter(self, key: tuple[str, str], place: Place) -> None:
        self.places[key] = place
        if (place.resume, key[0]) not in self.turns:
            self.turn += 1
            self.turns[place.resume, key[0]] = self.turn

    users = st.sampled_from("abc")
    sessions = st.sampled_from("123")

    @rule(user=users, session=sessions, park_s=st.floats(0, 8), resume=st.booleans(), honest=st.booleans())
    def park(self, user: str, session: str, park_s: float, *, resume: bool, honest: bool) -> None:
        key, until = (user, session), self.now + park_s
        ticket = self.given.get(key) if honest else None
        result = self.waiting.park(user, session, self.now, until, ticket, resume=resume)
        self.expire_tickets()
        there = self.places.get(key)
        if there is not None:
            assert result is not None
            assert result.ticket == there.ticket
            there.until = until
            if resume and not there.resume:
                del self.places[key]
                self.forget_idle()
                there.resume = True
                self.enter(key, there)
            return
        if len(self.places) >= self.MAX_WAITING:
            assert result is None
            return
        assert result is not None
        kept = [place for _, kept_key, place in self.tickets if kept_key == key and place.ticket == ticket]
        if kept:
            assert result.ticket == kept[0].ticket
            arrival = kept[0].arrival
        else:
            assert result.ticket not in self.issued, "a place of its own, not one that was given up or used"
            self.drop_ticket(key)
            self.arrivals += 1
            arrival = self.arrivals
        self.issued.add(result.ticket)
        self.enter(key, Place(arrival, until, resume, result.ticket))
        self.drop_ticket(key)

    @rule()
    def next(self) -> None:
        waiter = self.waiting.next(1, self.now, self.shares.__getitem__)
        within = [key for key in self.places if self.shares[key[0]]]
        if not within:
            assert waiter is None
            assert self.waiting.in_line == 0, "whoever is left stands aside"
            assert [self.waiting.before(user) for user in "abc"] == [
                any(key[0] == user for key in self.places) for user in "abc"
            ]
            return
        key = min(
            within,
            key=lambda key: (
                not self.places[key].resume,
                self.turns[self.places[key].resume, key[0]],
                self.places[key].arrival,
            ),
        )
        assert waiter is not None
        assert (waiter.user, waiter.session) == key
        place = self.places.pop(key)
        self.shares[key[0]] -= 1
        self.turn += 1
        self.turns[place.resume, key[0]] = self.turn
        self.forget_idle()

    @rule(user=users)
    def a_session_of_the_user_ends(self, user: str) -> None:
        self.shares[user] += 1
        self.waiting.share_freed(user)

    @rule(user=users, session=sessions)
    def leave(self, user: str, session: str) -> None:
        assert self.waiting.leave(user, session) is ((user, session) in self.places)
        self.places.pop((user, session), None)
        self.drop_ticket((user, session))

    @precondition(lambda self: self.places)
    @rule()
    def wait_for_the_first_to_be_over(self) -> None:
        self.now = max(self.now, min(place.until for place in self.places.values()))
        self.due()

    @rule(passed=st.floats(0, 7))
    def some_time_passes(self, passed: float) -> None:
        self.now += passed

    @rule()
    def due(self) -> None:
        waiters = self.waiting.due(self.now)
        self.expire_tickets()
        over = {key for key, place in self.places.items() if place.until <= self.now}
        assert {(waiter.user, waiter.session) for waiter in waiters} == over
        assert [waiter.until for waiter in waiters] == sorted(waiter.until for waiter in waiters)
        for waiter in waiters:
            key = (waiter.user, waiter.session)
            assert waiter.ticket == self.places[key].ticket
            self.given[key] = waiter.ticket
            self.tickets.append((self.now + TICKET_S, key, self.places.pop(key)))
        self.tickets = self.tickets[-self.MAX_TICKETS :]
        self.forget_idle()

    @invariant()
    def those_in_line_are_some_of_those_who_wait(self) -> None:
        within = sum(bool(self.shares[key[0]]) for key in self.places)
        assert within <= self.waiting.in_line <= len(self.places)

    @invariant()
    def it_holds_whom_the_model_holds(self) -> None:
        assert len(self.waiting) == len(self.places) <= self.MAX_WAITING
        assert all(key in self.waiting for key in self.places)
        ends = [place.until for place in self.places.values()]
        assert self.waiting.next_due() == (min(ends) if ends else None)
        assert len(self.waiting._tickets) <= self.MAX_TICKETS
        assert len({place.ticket for place in self.places.values()}) == len(self.places)


TestWaitingIsItsNaiveModel = WaitingIsItsNaiveModel.TestCase
TestWaitingIsItsNaiveModel.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)


def test_slots_are_kept_for_one_that_needs_many_for_a_while_and_then_given_to_who_fits() -> None:
    waiting = Waiting()
    waiting.park("big", "b", 0.0, 3600.0, num_envs=64)
    waiting.park("small", "s", 0.0, 3600.0)
    assert waiting.next(63, 0.0) is None
    assert waiting.next(63, KEEP_S - 0.1) is None
    served = waiting.next(63, KEEP_S)
    assert served is not None
    assert served.session == "s"
    # It has not lost its place for good: with nobody before it, slots are kept for it again.
    waiting.park("small", "s2", KEEP_S, 3600.0)
    assert waiting.next(62, KEEP_S) is None
    served = waiting.next(64, KEEP_S + 1.0)
    assert served is not None
    assert served.session == "b"


def test_when_all_who_wait_need_more_than_there_is_nobody_is_served_and_their_order_is_theirs() -> None:
    waiting = Waiting()
    for name in ("a", "b", "c"):
        waiting.park(name, name, 0.0, 3600.0, num_envs=8)
    for now in (0.0, KEEP_S, 2 * KEEP_S, 3 * KEEP_S, 10 * KEEP_S):
        assert waiting.next(4, now) is None
    assert len(waiting) == 3
    served = [waiting.next(8, 11 * KEEP_S) for _ in range(3)]
    assert sorted(one.session for one in served if one is not None) == ["a", "b", "c"]


def test_a_worker_that_is_full_keeps_everybodys_place() -> None:
    waiting = Waiting()
    waiting.park("big", "b", 0.0, 3600.0, num_envs=2)
    waiting.park("small", "s", 0.0, 3600.0)
    assert waiting.next(0, 0.0) is None
    assert waiting.next(0, 100 * KEEP_S) is None  # it keeps nothing from anybody
    served = waiting.next(2, 100 * KEEP_S)
    assert served is not None
    assert served.session == "b"


# ---------------------------------------------------------------- shares


def test_who_has_its_share_is_passed_over_and_has_its_old_turn_when_its_own_slots_are_freed() -> None:
    waiting = Waiting()
    park_all(waiting, "greedy 1", "greedy 2", "b 1", "c 1", "c 2")
    share = {"greedy": 0, "b": 9, "c": 9}
    order = [waiting.next(9, 0.0, share.__getitem__) for _ in range(2)]
    assert [waiter.user for waiter in order if waiter is not None] == ["b", "c"]
    assert waiting.in_line == 1
    share["greedy"] = 1
    waiting.share_freed("greedy")
    waiter = waiting.next(9, 0.0, share.__getitem__)
    assert waiter is not None
    assert (waiter.user, waiter.session) == ("greedy", "1"), "before c, which came later and was served since"


def test_who_stands_aside_keeps_no_slots_from_others_and_nobody_waiting() -> None:
    waiting = Waiting()
    waiting.park("greedy", "1", 0.0, FAR, num_envs=4)
    share = {"greedy": 3, "b": 9}
    assert waiting.before("b")
    assert waiting.next(8, 0.0, share.__getitem__) is None
    assert not waiting.before("b"), "b overtakes nobody whose turn it could be"
    assert waiting.before("greedy"), "the user's own are served in their order"
    waiting.park("greedy", "2", 0.0, FAR)
    assert waiting.next(8, 0.0, share.__getitem__) is None, "though that one would be within the share"
    assert (len(waiting), waiting.in_line) == (2, 0)


@pytest.mark.parametrize("how", ["gives up", "is over", "asks for less"])
def test_the_next_of_a_users_opens_is_looked_at_when_the_one_before_it_goes(how: str) -> None:
    waiting = Waiting()
    waiting.park("greedy", "big", 0.0, 1.0, num_envs=4)
    waiting.park("greedy", "small", 0.0, FAR)
    share = {"greedy": 1}
    assert waiting.next(8, 0.0, share.__getitem__) is None
    if how == "gives up":
        waiting.leave("greedy", "big")
    elif how == "is over":
        assert [waiter.session for waiter in waiting.due(1.0)] == ["big"]
    else:
        waiting.park("greedy", "big", 0.0, FAR, num_envs=1)
    waiter = waiting.next(8, 1.0, share.__getitem__)
    assert waiter is not None
    assert waiter.session == ("big" if how == "asks for less" else "small")


def test_a_resume_beyond_its_users_share_lets_opens_of_others_pass() -> None:
    waiting = Waiting()
    waiting.park("greedy", "r", 0.0, FAR, resume=True)
    park_all(waiting, "b 1")
    waiter = waiting.next(1, 0.0, {"greedy": 0, "b": 1}.__getitem__)
    assert waiter is not None
    assert waiter.user == "b"
