"""In which order, and after which waits, a lost connection tries to come back."""

from __future__ import annotations

import inspect

from nats.aio.client import Client

from meshrl.bus.dialling import FIRST_WAIT_S, MAX_PINGS, PING_INTERVAL_S, RECONNECT_WAIT_S, REDIAL_S, Comeback
from meshrl.client.keeper import RENEWALS_A_LEASE
from meshrl.protocol.doubt import FROZEN_S, GRACE_S
from meshrl.protocol.session import LEASE_S

POOL = ["a", "b", "c"]


def latest(least: float, most: float) -> float:
    return most


def attempts(comeback: Comeback, count: int, pool: list[str] = POOL) -> list[tuple[str, float]]:
    return [comeback(pool) for _ in range(count)]


def test_each_server_is_tried_once_before_there_is_another_wait() -> None:
    first, again = FIRST_WAIT_S[1], RECONNECT_WAIT_S[1]
    expected = [("a", first), ("b", 0.0), ("c", 0.0), ("a", again), ("b", 0.0), ("c", 0.0), ("a", again)]
    assert attempts(Comeback(latest), 7) == expected


def test_the_one_server_there_is_is_tried_after_a_wait_each_time() -> None:
    first, again = FIRST_WAIT_S[1], RECONNECT_WAIT_S[1]
    assert attempts(Comeback(latest), 3, ["a"]) == [("a", first), ("a", again), ("a", again)]


def test_after_the_next_loss_it_begins_anew() -> None:
    comeback = Comeback(latest)
    attempts(comeback, 5)
    comeback.lost()
    assert attempts(comeback, 2) == [("a", FIRST_WAIT_S[1]), ("b", 0.0)]


def test_the_waits_of_many_are_spread() -> None:
    firsts = {Comeback()(POOL)[1] for _ in range(100)}
    assert len(firsts) == 100
    assert all(FIRST_WAIT_S[0] <= wait <= FIRST_WAIT_S[1] for wait in firsts)
    assert max(firsts) - min(firsts) > (FIRST_WAIT_S[1] - FIRST_WAIT_S[0]) / 2


def test_half_open_connections_are_noticed_before_workers_are_given_up_for_their_silence() -> None:
    noticed_s = PING_INTERVAL_S * (MAX_PINGS + 1) + RECONNECT_WAIT_S[1]
    assert noticed_s < FROZEN_S - 1.0
    assert noticed_s < LEASE_S - LEASE_S / RENEWALS_A_LEASE, "and before leases run out that cannot be renewed over one"


def test_a_worker_that_moves_to_another_node_is_back_before_it_is_taken_for_dead() -> None:
    assert FIRST_WAIT_S[1] <= GRACE_S / 2
    assert REDIAL_S < FROZEN_S / 2


def test_nats_py_asks_for_it() -> None:
    assert "reconnect_to_server_handler" in inspect.signature(Client.connect).parameters
