from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from meshrl.bus.connection import Connection
from meshrl.client.flights import Entry, Flights
from meshrl.client.lane_flight import LaneFlight
from meshrl.client.session import RemoteSession
from meshrl.errors import MeshError, MeshUnreachable, SessionLost
from meshrl.protocol.doubt import GRACE_S
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.messages import MAX_BATCH
from meshrl.wire.subjects import Subjects

SESSION = cast(
    "RemoteSession",
    SimpleNamespace(
        grant=SimpleNamespace(worker="w1", session="s1", epoch=3, step_deadline_s=60.0),
        subject="session.w1.u.s1.",
        num_envs=4096,
        grace_s=GRACE_S,
    ),
)


class Bus:
    """Keeps what is sent, and who waits for the answers."""

    user = "u"
    url = "nats://bus"
    connected = True

    def __init__(self) -> None:
        self.on_reconnect: list[Any] = []
        self.on_close: list[Any] = []
        self.sent: list[tuple[int, Any]] = []
        self.waiting: dict[int, Callable[[bytes | None], None]] = {}

    def request(self, subject: str, body: bytes, on_reply: Any, *, mark: Any = None, on_fail: Any = None) -> int:
        rid = len(self.sent) + 1
        self.waiting[rid] = on_reply
        self.sent.append((rid, unpack(body)))
        return rid

    def again(self, rid: int, subject: str, body: bytes, *, mark: Any = None) -> None:
        self.sent.append((rid, unpack(body)))

    def forget(self, rid: int) -> None:
        self.waiting.pop(rid, None)

    def sending(self, rid: int) -> bool:
        return False

    def up_for(self, now: float) -> float:
        return 1000.0


class Pool:
    """What a flight tells its pool."""

    def __init__(self) -> None:
        self.bus = Bus()
        self.flights = Flights(cast("Connection", self.bus), Subjects(), 10.0)
        self.answers: list[bytes] = []
        self.losses: list[tuple[list[int], MeshError]] = []

    def flight(self, lanes: list[int], op: str = "step", **fields: Any) -> LaneFlight:
        which = np.array(lanes, np.int64)
        fields = fields or {"actions": which * 10}
        return LaneFlight(
            self.flights,
            SESSION,
            op,
            which,
            which + 1,
            fields=fields,
            some_of=self._some_of,
            received=lambda _, data: self.answers.append(data),
            lost=lambda flight, exc: self.losses.append((flight.left().tolist(), exc)),
            now=0.0,
        )

    def _some_of(self, op: str, frame: Frame, rows: Indices) -> Frame:
        assert op == "step"
        return {"actions": frame["actions"][rows]}

    def sent(self, at: int = -1) -> tuple[list[int], list[int], list[int]]:
        body = self.bus.sent[at][1]
        assert body["epoch"] == 3
        return body["lanes"].tolist(), body["seqs"].tolist(), body["actions"].tolist()


@pytest.fixture
async def pool() -> Any:
    made = Pool()
    yield made
    made.flights.close()


def indices(*values: int) -> Indices:
    return np.array(values, np.int64)


async def test_a_request_names_its_lanes_their_seqs_and_the_epoch(pool: Pool) -> None:
    flight = pool.flight([4, 1, 7])
    pool.flights.send(flight)
    assert pool.sent() == ([4, 1, 7], [5, 2, 8], [40, 10, 70])
    assert flight.awaited() == [Entry("s1", 3, 4, 5), Entry("s1", 3, 1, 2), Entry("s1", 3, 7, 8)]


async def test_it_has_landed_when_every_lane_has_its_answer(pool: Pool) -> None:
    flight = pool.flight([4, 1, 7])
    pool.flights.send(flight)
    flight.land(indices(7, 4))
    assert not flight.landed
    assert flight.left().tolist() == [1]
    assert [entry.lane for entry in flight.awaited()] == [1]
    flight.land(indices(7))
    assert len(pool.flights) == 1
    flight.land(indices(1))
    assert flight.left().tolist() == []
    assert not pool.bus.waiting
    assert len(pool.flights) == 0


async def test_what_is_sent_again_is_what_was_sent_whatever_became_of_the_arrays(pool: Pool) -> None:
    actions = np.array([40, 10, 70])
    flight = pool.flight([4, 1, 7], actions=actions)
    pool.flights.send(flight)
    actions[:] = -1
    assert unpack(flight.again())["actions"].tolist() == [40, 10, 70]
    flight.land(indices(1))
    body = unpack(flight.again())
    assert (body["epoch"], body["lanes"].tolist(), body["seqs"].tolist()) == (3, [4, 7], [5, 8])
    assert body["actions"].tolist() == [40, 70]


@pytest.mark.parametrize(
    ("states", "word"),
    [
        (["running", "running"], "running"),
        (["answered", "running"], "answered"),
        (["running", "not_received"], "not_received"),
        (["not_received", "unknown", "answered"], "unknown"),
        (["later word"], "running"),
        ([], "running"),
    ],
)
async def test_the_word_that_counts_is_the_one_that_asks_for_most(pool: Pool, states: list[str], word: str) -> None:
    assert pool.flight([0, 1]).told(states) == word


async def test_of_more_lanes_than_a_probe_may_name_all_are_named_in_turn(pool: Pool) -> None:
    count = 2 * MAX_BATCH + 300
    flight = pool.flight(list(range(count)))
    named: set[int] = set()
    for _ in range(3):
        entries = flight.awaited()
        assert len(entries) == MAX_BATCH
        assert all(entry.seq == entry.lane + 1 for entry in entries)
        named |= {entry.lane for entry in entries}
    assert len(named) == count
    flight.land(np.arange(count - 5))
    assert [entry.lane for entry in flight.awaited()] == list(range(count - 5, count))


async def test_its_loss_is_told_once_with_the_lanes_that_are_left(pool: Pool) -> None:
    flight = pool.flight([4, 1, 7])
    pool.flights.send(flight)
    flight.land(indices(1))
    lost = SessionLost("gone")
    flight.failed(lost)
    flight.failed(SessionLost("gone again"))
    assert pool.losses == [([4, 7], lost)]
    assert not pool.bus.waiting
    flight.relaunch()
    assert len(pool.bus.sent) == 1, "what is lost is not sent again"


async def test_after_the_server_was_away_what_has_no_answer_is_sent_again(pool: Pool) -> None:
    flight = pool.flight([4, 1, 7])
    pool.flights.send(flight)
    flight.land(indices(1))
    for times in (1, 2):
        flight.failed(MeshUnreachable("away", url="nats://bus"))
        assert len(pool.losses) == times
        flight.relaunch()
        assert not flight.landed
        assert pool.sent() == ([4, 7], [5, 8], [40, 70])
    flight.land(indices(7))
    assert unpack(flight.again())["actions"].tolist() == [40]
    assert flight.left().tolist() == [4]
    flight.land(indices(4))
    assert flight.landed
    assert not pool.bus.waiting


async def test_an_answer_is_given_to_the_pool_and_word_that_nobody_listens_is_not(pool: Pool) -> None:
    flight = pool.flight([4])
    pool.flights.send(flight)
    pool.bus.waiting[1](b"data")
    assert pool.answers == [b"data"]
    pool.bus.waiting[1](None)
    assert pool.answers == [b"data"]
    assert flight.doubt is not None
    await asyncio.sleep(0)
