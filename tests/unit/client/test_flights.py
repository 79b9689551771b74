"""When requests under way are looked at: in time for each, and no more often than that."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshrl.bus.connection import Connection
from meshrl.client import flights as flying
from meshrl.client.flights import TICK_S, Entry, Flights
from meshrl.protocol.doubt import AGAIN_IN_GRACE_S, PROBE_AGAIN_S, QUIET_S
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Probed
from meshrl.wire.subjects import Subjects
from tests.unit.client.test_lane_flight import Bus


class Clock:
    """Time that passes when it is told to, and the loop that lives in it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.looks = 0
        self.timers: list[SimpleNamespace] = []

    def monotonic(self) -> float:
        return self.now

    def create_future(self) -> Any:
        def nothing(*_: object) -> None:
            return None

        return SimpleNamespace(done=lambda: False, set_result=nothing, set_exception=nothing, exception=nothing)

    def call_later(self, seconds: float, call: Callable[..., None], *args: Any) -> Any:
        timer = SimpleNamespace(at=self.now + seconds, call=call, args=args)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def pass_until(self, until: float) -> None:
        while due := [timer for timer in self.timers if timer.at <= until]:
            timer = min(due, key=lambda timer: timer.at)
            self.timers.remove(timer)
            self.now = max(self.now, timer.at)
            self.looks += timer.call.__name__ == "_look"
            timer.call(*timer.args)
        self.now = until


class Watched:
    """Flights on a bus of which each probe is known, with its time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bus = Bus()
        self.flights = Flights(cast("Connection", self.bus), Subjects(), 10.0)
        self.flights.loop = cast("Any", clock)
        self.probes: list[tuple[float, list[Any]]] = []
        self.state: Any = "running"
        request = self.bus.request

        def noted(subject: str, body: bytes, on_reply: Any, **more: Any) -> int:
            rid = request(subject, body, on_reply, **more)
            if ".probe." in subject:
                awaited = unpack(body)["awaited"]
                self.probes.append((clock.now - 100.0, [one[0] for one in awaited]))
                if self.state is not None:
                    clock.call_later(0.001, on_reply, Probed(states=[self.state] * len(awaited)).to_wire())
            return rid

        self.bus.request = noted  # type: ignore[method-assign]

    def launch(self, session: str) -> Any:
        body = b"\x81\xa1x\x01"
        return self.flights.launch("w1", Entry(session, 1, 0, 1), f"session.w1.u.{session}.step", body, 600.0)


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    clock = Clock()
    monkeypatch.setattr(flying, "time", clock)
    return Watched(clock)


async def test_each_is_asked_about_as_soon_as_it_is_quiet_whenever_it_was_sent(watched: Watched) -> None:
    sent = {}
    for n in range(20):
        watched.clock.pass_until(100.0 + 0.037 * n)
        sent[f"s{n}"] = watched.clock.now - 100.0
        watched.launch(f"s{n}")
    watched.clock.pass_until(102.0)
    first: dict[str, float] = {}
    for at, sessions in watched.probes:
        for session in sessions:
            first.setdefault(session, at)
    assert first.keys() == sent.keys()
    for session, at in sent.items():
        assert QUIET_S - 1e-6 <= first[session] - at <= QUIET_S + TICK_S + 1e-6


async def test_what_runs_long_is_seldom_looked_at(watched: Watched) -> None:
    watched.launch("s")
    watched.clock.pass_until(130.0)
    times = [at for at, _ in watched.probes[:4]]
    assert times[0] == pytest.approx(QUIET_S)
    assert [two - one for one, two in pairwise(times)] == pytest.approx([0.4, 0.8, 1.6], abs=2 * TICK_S)
    assert watched.clock.looks <= 30.0 / QUIET_S + len(watched.probes)


async def test_what_is_answered_at_once_is_looked_at_once_in_a_while(watched: Watched) -> None:
    for n in range(1000):
        flight = watched.launch("s")
        watched.clock.pass_until(100.0 + 0.001 * (n + 1))
        flight.answered(b"\x80")
    assert not watched.probes
    assert watched.clock.looks <= 1.0 / QUIET_S
    watched.clock.pass_until(101.0 + QUIET_S)
    assert not watched.clock.timers, "nothing is looked at that is not there"


async def test_where_nobody_listens_it_is_looked_at_in_time(watched: Watched) -> None:
    flight = watched.launch("s")
    watched.state = None
    sent = len(watched.bus.sent)
    flight.answered(None)
    watched.clock.pass_until(100.0 + AGAIN_IN_GRACE_S + TICK_S)
    assert len(watched.bus.sent) == sent + 1, "it was sent again"


async def test_a_silent_worker_is_asked_again_and_given_up(watched: Watched) -> None:
    watched.state = None
    flight = watched.launch("s")
    watched.clock.pass_until(109.0)
    gaps = [two - one for (one, _), (two, _) in pairwise(watched.probes)]
    assert gaps == pytest.approx([PROBE_AGAIN_S] * len(gaps), abs=TICK_S)
    assert not flight.landed
    watched.clock.pass_until(112.0)
    assert flight.landed


async def test_who_slept_blames_nobody_for_the_silence(watched: Watched) -> None:
    watched.state = None
    flight = watched.launch("s")
    watched.clock.pass_until(101.0)
    watched.clock.now = 150.0  # nothing was looked at meanwhile
    watched.clock.pass_until(151.0)
    assert not flight.landed
    watched.clock.pass_until(162.0)
    assert flight.landed


async def test_after_a_reconnect_it_is_looked_at_at_once(watched: Watched) -> None:
    watched.launch("s")
    watched.clock.pass_until(103.5)
    asked = len(watched.probes)
    for back in watched.bus.on_reconnect:
        back()
    watched.clock.pass_until(103.5 + 1e-6)
    assert len(watched.probes) == asked + 1


async def test_nothing_is_looked_at_once_it_is_closed(watched: Watched) -> None:
    watched.launch("s")
    watched.flights.close()
    watched.launch("t")
    assert not watched.clock.timers
