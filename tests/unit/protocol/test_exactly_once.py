"""R1, R2, R3, R4 and R9 at once: clients and a worker with a network between them that does its worst.

The rules of both sides are the real ones (Turn, Doubt; SessionTable, Lane, frames). What ties them together is what
``meshrl.client`` and ``meshrl.worker`` do, without a bus: hypothesis delivers, duplicates, drops and reorders what is
in flight, lets time pass, and makes either side sleep, disconnect or die. It is derandomized, so that CI is stable;
run it with another seed and more examples when a rule changes.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshrl.errors import (
    ConcurrentStep,
    EnvError,
    MeshFull,
    NothingUnsettled,
    ResetNeeded,
    SessionExpired,
    SessionUnknown,
    StepUnsettled,
    WrongEpoch,
)
from meshrl.protocol.doubt import Do, Doubt
from meshrl.protocol.lane import Verdict
from meshrl.protocol.session import LATE_SWEEPS, Opening, Session, SessionTable, State
from meshrl.protocol.turn import READING, Begin, Phase, Turn
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import check_reply, check_request, error_reply

SLOTS, LEASE_S, GRANT_S, SWEEP_S, SILENCE_S = 2, 15.0, 2.0, 0.25, 10.0
MAX_IN_FLIGHT = 24
Done = tuple[str, int, int]  # session, epoch, seq


@dataclass
class Message:
    """Something in flight: to a worker by its id, or a reply (``to`` is empty) for whoever awaits ``rid``."""

    to: str
    kind: str
    rid: int
    body: Any


@dataclass
class Env:
    """The env of a session: it counts. ``since`` and ``confirmed`` are what the lease should rest on."""

    constructed: bool = False
    value: int = 0
    running: dict[str, Any] = field(default_factory=dict)
    since: float = float("inf")
    confirmed: bool = False


class Worker:
    """What meshrl.worker.service does with the rules."""

    def __init__(self, world: World, id_: str) -> None:
        self.world, self.id, self.connected = world, id_, True
        self.table = SessionTable(SLOTS, lease_s=LEASE_S, grant_s=GRANT_S)
        self.after_end: dict[tuple[str, str], tuple[int, int]] = {}
        self.swept: float | None = None
        self.live: set[int] = set()  # envs that are constructed or about to be

    def take(self, message: Message) -> None:
        body, rid, now = message.body, message.rid, self.world.now
        if message.kind == "open":
            self.open(body["key"], body["epoch"], rid)
        elif message.kind == "request":
            self.request(body["key"], body, rid)
        elif message.kind == "probe":
            self.world.reply(rid, self.table.probe(body["key"], body["epoch"], 0, body["seq"]))
        elif message.kind == "renew":
            why = self.table.renew(body["key"], body["epoch"], now)
            session = self.table.get(body["key"])
            if why is None:
                assert session is not None
                self.confirm(session)
            self.world.reply(rid, why)
        elif message.kind == "close":
            session = self.table.get(body["key"])
            if session is not None and session.epoch == body["epoch"]:
                self.table.ending(session, "closed")

    def open(self, key: tuple[str, str], epoch: int, rid: int) -> None:
        opening, session = self.table.open(*key, epoch, str(rid), self.world.now)
        if opening is Opening.FULL:
            self.world.reply(rid, pack(error_reply(MeshFull("full"))))
            return
        assert session is not None
        if opening is Opening.NEW:
            session.held = Env()
            self.live.add(id(session.held))
            assert len(self.live) <= SLOTS, "a slot is used twice"
        elif opening is Opening.REPEAT:
            if not session.held.confirmed:
                session.held.since = self.world.now
            self.world.reply(rid, session.grant)
        elif opening is Opening.WRONG_EPOCH:
            self.world.reply(rid, pack(error_reply(WrongEpoch("too late"))))
        elif opening is not Opening.JOIN:
            self.after_end[key] = (epoch, rid)
            self.table.ending(session, "wrong_epoch")

    def construct(self, session: Session, *, fails: bool) -> None:
        session.held.constructed = True
        if fails:
            self.world.reply(int(session.reply_to), pack(error_reply(EnvError("constructor"))))
            self.table.ending(session, "not_constructed")
        if session.state is not State.ENDING:
            session.held.since = self.world.now
            self.world.reply(int(self.table.granted(session, pack({"grant": 1}), self.world.now)), session.grant)

    def request(self, key: tuple[str, str], body: dict[str, Any], rid: int) -> None:
        epoch, number, seq = check_request(body)
        session = self.table.get(key)
        if session is None or session.state is not State.OPEN or session.epoch != epoch:
            last = self.table.last_answer(key, epoch, number, seq)
            if session is not None and session.state is State.OPEN:
                last = pack(error_reply(WrongEpoch("another"), seq))
            gone = SessionExpired if self.table.why_gone(key) == "session_expired" else SessionUnknown
            self.world.reply(rid, last or pack(error_reply(gone("gone"), seq)))
            return
        self.table.used(session, self.world.now)
        self.confirm(session)
        assert session.lane is not None
        assert number == 0
        lane = session.lane
        verdict = lane.receive(seq, str(rid), self.world.now)
        if verdict is Verdict.RUN:
            self.world.executed[key[1], epoch].append((seq, body["action"]))
            session.held.running = body
        elif verdict is Verdict.REPEAT:
            self.world.reply(rid, lane.cached)
        elif verdict is not Verdict.JOIN:
            self.world.reply(rid, pack(error_reply(lane.refusal(verdict, seq, key[1]), seq)))

    def confirm(self, session: Session) -> None:
        session.held.confirmed = True
        if session.state is State.OPEN:
            session.held.since = self.world.now

    def finish(self, session: Session, outcome: str) -> None:
        lane, env = session.lane, session.held
        assert lane is not None
        seq = lane.seq
        if outcome == "returns":
            env.value += env.running["action"]
            reply = {"seq": seq, "value": env.value}
        else:
            reply = error_reply(EnvError("crash") if outcome == "crashes" else ResetNeeded("refused"), seq)
        packed = pack(reply)
        self.world.produced[session.id, session.epoch, seq].append(packed)
        self.world.reply(int(self.table.answered(lane, packed)), packed)
        if outcome == "crashes":
            self.table.ending(session, "ended", last=(session.epoch, 0, seq, packed))

    def close_env(self, session: Session) -> None:
        self.live.discard(id(session.held))
        self.table.ended(session)
        after = self.after_end.pop(session.key, None)
        if after is not None:
            self.open(session.key, *after)

    def sweep(self) -> None:
        now, table = self.world.now, self.table
        on_time = self.swept is None or now - self.swept <= LATE_SWEEPS * SWEEP_S
        self.swept = now
        if not self.connected or not on_time:
            self.restart_countdowns()
        due = {s.key for s in table if s.state is State.OPEN and now > s.held.since + lease_of(s.held)}
        swept = table.sweep(now, SWEEP_S, connected=self.connected)
        assert {s.key for s in swept} == due, "swept too early, or not although its lease ran out"
        for session in swept:
            table.ending(session, "session_expired")

    def restart_countdowns(self) -> None:
        for session in self.table:
            session.held.since = self.world.now if session.state is State.OPEN else float("inf")

    def work(self) -> None:
        for session in self.table:
            if not session.held.constructed:
                self.construct(session, fails=False)
            if session.running:
                self.finish(session, "returns")
        for session in self.closable():
            self.close_env(session)

    def closable(self) -> list[Session]:
        return [s for s in self.table if s.state is State.ENDING and s.held.constructed and not s.running]


def lease_of(env: Env) -> float:
    return LEASE_S if env.confirmed else GRANT_S


@dataclass
class Flight:
    """A request of a client under way, as in meshrl.client.flights."""

    message: Message
    seq: int
    doubt: Doubt
    answer: bytes | None = None


class Client:
    """What meshrl.client.session and flights do with the rules; one session at a time."""

    def __init__(self, world: World, user: str) -> None:
        self.world, self.user, self.session, self.epoch = world, user, "", 0
        self.state, self.worker = "out", ""  # out, opening, open
        self.turn = Turn(user)
        self.flight: Flight | None = None
        self.probe_rid = self.renew_rid = 0
        self.then_reset = False
        self.begun: dict[Done, str] = {}  # what became of each request
        self.ticked = 0.0

    def send(self, kind: str, seq: int = 0, **more: Any) -> Message:
        body = {"key": (self.user, self.session), "epoch": self.epoch, "lane": 0, "seq": seq, **more}
        message = Message(self.worker, kind, self.world.new_rid(), body)
        self.world.put(message)
        return message

    def launch(self, kind: str, seq: int, **more: Any) -> None:
        message = self.send(kind, seq, **more)
        self.flight = Flight(message, seq, Doubt(self.world.now, deadline_s=300.0, silence_s=SILENCE_S))

    def open(self, session: str, epoch: int) -> None:
        self.lose("given up")
        self.session, self.epoch, self.state, self.worker = session, epoch, "opening", self.world.worker.id
        self.turn = Turn(self.user)
        self.launch("open", 0)

    def request(self, op: str, action: int = 1) -> None:
        if self.turn.may_begin(op) is Begin.AFTER_LAST:
            self.turn.discarding()
            self.then_reset = True
            if self.flight is not None and self.flight.answer is not None:
                self.land(cancelled=False)
            return
        seq = self.turn.begin(op)
        self.begun[self.session, self.epoch, seq] = ""
        self.launch("request", seq, action=action, op=op)

    def settle(self) -> None:
        self.turn.settling()
        self.take()

    def wait_again(self) -> None:
        """For whatever was cancelled, also what is not worth settling."""
        self.turn.discarding()
        self.take()

    def take(self) -> None:
        assert self.flight is not None
        if self.flight.answer is not None:
            self.land(cancelled=False)

    def cancel(self) -> None:
        self.turn.cancelled()
        self.then_reset = False

    def close(self) -> None:
        self.send("close")
        self.lose("closed")

    def lose(self, why: str) -> None:
        for done, fate in self.begun.items():
            self.begun[done] = fate or why
        self.state, self.flight, self.then_reset, self.probe_rid = "out", None, False, 0

    # what arrives

    def receive(self, rid: int, data: Any, *, cancelled: bool) -> None:
        flight = self.flight
        if rid == self.renew_rid and self.state == "open":
            if data is not None:
                self.lose(f"renewal: {data}")
        elif flight is None or flight.answer is not None:
            return
        elif data is None and rid in {flight.message.rid, self.probe_rid}:
            up_for = self.world.now - self.world.up_since
            self.act(flight.doubt.alone(self.world.now, up_for))
        elif rid == self.probe_rid:
            self.probe_rid = 0
            self.act(flight.doubt.heard(data, self.world.now))
        elif rid == flight.message.rid:
            flight.answer = data
            if self.state == "opening":
                self.opened(data)
            elif self.turn.phase is Phase.WAITING:
                self.land(cancelled=cancelled)

    def opened(self, data: bytes) -> None:
        self.flight = None
        body = unpack(data)
        if "error" in body:
            assert body["error"]["code"] in {"mesh_full", "env_error"}, "an open that still waits was refused"
            self.state = "out"
            return
        self.state = "open"
        self.renew_rid = self.send("renew").rid

    def land(self, *, cancelled: bool) -> None:
        """The answer is there; the caller wakes up, perhaps because it was cancelled in the same moment."""
        flight = self.flight
        assert flight is not None
        assert flight.answer is not None
        if cancelled:
            self.cancel()
        self.turn.answered()
        if cancelled:
            return
        done = (self.session, self.epoch, flight.seq)
        again, self.then_reset, self.flight = self.then_reset, False, None
        try:
            reply = check_reply(unpack(flight.answer), flight.seq)
        except (SessionUnknown, SessionExpired, WrongEpoch):
            self.lose("refused")
            return
        except (EnvError, ResetNeeded) as exc:
            reply = exc.to_wire()
        assert self.world.produced[done] == [flight.answer], "the answer is not that of the one execution"
        assert not self.begun[done], "answered twice"
        self.begun[done] = "dropped" if again else "answered"
        if reply.get("code") == "env_error":
            self.lose("ended")
        elif again:
            self.request("reset")

    def act(self, do: Do) -> None:
        assert self.flight is not None
        if do is Do.SEND_AGAIN:
            self.world.put(self.flight.message)
        elif do is Do.PROBE:
            self.probe_rid = self.send("probe", self.flight.seq).rid
        elif do is Do.LOST:
            self.lose(self.flight.doubt.reason)

    def tick(self) -> None:
        now, flight = self.world.now, self.flight
        heard = self.world.client_up and now - self.ticked <= 0.5
        self.ticked = now
        if flight is not None and flight.answer is None and (flight.doubt.due() <= now or not heard):
            self.act(flight.doubt.tick(now, connected=heard))


class World:
    """Time, the network, and what must be true of everything together."""

    def __init__(self) -> None:
        self.now, self.up_since, self.client_up, self.rids = 100.0, 0.0, True, 0
        self.net: list[Message] = []
        self.sent: list[Message] = []
        self.executed: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self.produced: defaultdict[Done, list[bytes]] = defaultdict(list)
        self.workers = 1
        self.worker = Worker(self, "w1")
        self.clients = [Client(self, f"u{n}") for n in range(3)]
        self.opened = 0

    def new_rid(self) -> int:
        self.rids += 1
        return self.rids

    def put(self, message: Message) -> None:
        self.net.append(message)
        self.sent.append(message)
        del self.net[:-MAX_IN_FLIGHT]

    def reply(self, rid: int, data: Any) -> None:
        self.put(Message("", "reply", rid, data))

    def deliver(self, message: Message, *, cancelled: bool = False) -> None:
        if not message.to:
            for client in self.clients:
                client.receive(message.rid, message.body, cancelled=cancelled)
        elif message.to == self.worker.id and self.worker.connected:
            self.worker.take(message)
        elif message.kind in {"open", "request", "probe"}:
            self.reply(message.rid, None)  # nobody listens

    def reconnect_client(self) -> None:
        self.client_up, self.up_since = True, self.now
        for client in self.clients:
            if client.flight is not None:
                client.flight.doubt.reconnected(self.now)

    def reconnect_worker(self) -> None:
        self.worker.connected = True
        self.worker.table.grant_again(self.now)
        self.worker.restart_countdowns()

    def renew_all(self) -> None:
        for client in self.clients:
            if client.state == "open" and client.worker == self.worker.id and self.worker.connected:
                body = {"key": (client.user, client.session), "epoch": client.epoch}
                self.worker.take(Message("", "renew", -1, body))


CLIENT = st.integers(0, 2)


class ExactlyOnce(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.end = "heals"

    @initialize(end=st.sampled_from(["heals", "heals", "worker is silent", "worker is gone"]))
    def how_it_will_end(self, end: str) -> None:
        self.end = end
        for n in range(SLOTS):  # so that most of the time there is something to lose
            self.open(n, resume=False)
        self.all_goes_well_for_a_while()

    # the network

    @precondition(lambda self: self.world.net)
    @rule(at=st.integers(0, MAX_IN_FLIGHT), keep=st.booleans(), cancelled=st.booleans())
    def deliver(self, at: int, keep: bool, cancelled: bool) -> None:
        at %= len(self.world.net)
        message = self.world.net[at] if keep else self.world.net.pop(at)
        self.world.deliver(message, cancelled=cancelled)

    @precondition(lambda self: self.world.net)
    @rule(count=st.integers(1, 6))
    def deliver_some_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.world.net))):
            self.world.deliver(self.world.net.pop(0))

    @precondition(lambda self: self.world.net)
    @rule(at=st.integers(0, MAX_IN_FLIGHT))
    def drop(self, at: int) -> None:
        self.world.net.pop(at % len(self.world.net))

    @rule(back=st.integers(1, 60))
    def something_old_arrives_once_more(self, back: int) -> None:
        self.world.deliver(self.world.sent[-min(back, len(self.world.sent))])

    # the clients

    @rule(n=CLIENT, resume=st.booleans())
    def open(self, n: int, resume: bool) -> None:
        client = self.world.clients[n]
        if client.state == "opening":
            return
        if resume and client.session:
            client.open(client.session, client.epoch + 1)
        elif client.state == "out":
            self.world.opened += 1
            client.open(f"s{self.world.opened}", 1)

    @rule(n=CLIENT, count=st.integers(1, 3))
    def steps_that_go_well(self, n: int, count: int) -> None:
        client = self.world.clients[n]
        for _ in range(count):
            if client.state == "open" and client.turn.phase is Phase.FREE:
                client.request("step")
                self.all_goes_well_for_a_while()

    @rule(n=CLIENT, what=st.sampled_from(["asked twice", "answer lost", "cancelled as it came", "session given up"]))
    def a_step_with_a_mishap(self, n: int, what: str) -> None:
        client, world = self.world.clients[n], self.world
        if client.state != "open" or client.turn.phase is not Phase.FREE or client.worker != world.worker.id:
            return
        client.request("step")
        assert client.flight is not None
        asked = client.flight.message
        world.deliver(asked)
        if what == "asked twice":
            world.deliver(asked)
        elif what == "session given up":
            client.open(client.session, client.epoch + 1)
        world.worker.work()
        answers = [message for message in world.net if message.rid == asked.rid and not message.to]
        if what == "answer lost":
            world.net = [message for message in world.net if message not in answers]
        for answer in answers:
            if what == "cancelled as it came":
                world.deliver(answer, cancelled=True)

    @rule(n=CLIENT, op=st.sampled_from(["step", "step", "reset", "render"]), action=st.integers(1, 9))
    def request(self, n: int, op: str, action: int) -> None:
        client = self.world.clients[n]
        if client.state != "open":
            return
        before, phase = client.turn.seq, client.turn.phase
        if phase is Phase.WAITING:
            with pytest.raises(ConcurrentStep):
                client.request(op, action)
            assert client.turn.seq == before
        elif phase is Phase.UNSETTLED and op != "reset" and client.turn.op not in READING:
            with pytest.raises(StepUnsettled):
                client.request(op, action)
            assert client.turn.seq == before
        else:
            client.request(op, action)

    @rule(n=CLIENT, settle=st.booleans())
    def cancel_or_settle(self, n: int, settle: bool) -> None:
        client = self.world.clients[n]
        if client.state == "open" and settle:
            with suppress(NothingUnsettled, ConcurrentStep):
                client.settle()
        elif client.state == "open":
            client.cancel()

    # the worker

    @rule(at=st.integers(0, 2), outcome=st.sampled_from(["returns"] * 4 + ["refuses", "crashes"]))
    def the_worker_works(self, at: int, outcome: str) -> None:
        worker = self.world.worker
        new = [s for s in worker.table if not s.held.constructed]
        running = [s for s in worker.table if s.running]
        if running:
            worker.finish(running[at % len(running)], outcome)
        elif new:
            worker.construct(new[at % len(new)], fails=outcome == "crashes")
        for session in worker.closable()[:at]:
            worker.close_env(session)

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        for _ in range(3):
            for message in list(self.world.net):
                if message in self.world.net:
                    self.world.net.remove(message)
                    self.world.deliver(message)
            self.world.worker.work()

    # trouble

    @rule(
        n=CLIENT, what=st.sampled_from(["close", "close", "cut", "cut", "back", "worker cut", "worker back", "death"])
    )
    def trouble(self, n: int, what: str) -> None:
        world = self.world
        if what == "close" and world.clients[n].state != "out":
            world.clients[n].close()
        elif what == "cut":
            world.client_up = False
        elif what == "back" and not world.client_up:
            world.reconnect_client()
        elif what == "worker cut":
            world.worker.connected = False
        elif what == "worker back" and not world.worker.connected:
            world.reconnect_worker()
        elif what == "death":
            world.workers += 1
            world.worker = Worker(world, f"w{world.workers}")

    # time

    @rule(
        seconds=st.sampled_from([0.1, 0.25, 0.75, 2.25, 6.0, 16.0]),
        asleep=st.sampled_from(["nobody", "nobody", "worker", "clients"]),
        renewing=st.booleans(),
    )
    def time_passes(self, seconds: float, asleep: str, renewing: bool) -> None:
        left = seconds
        while left > 0:
            took = min(SWEEP_S, left)
            left -= took
            self.world.now += took
            if asleep != "worker":
                if renewing and int(self.world.now / 5) != int((self.world.now - took) / 5):
                    self.world.renew_all()
                self.world.worker.sweep()
            if asleep != "clients":
                for client in self.world.clients:
                    client.tick()

    # what is always true

    @invariant()
    def every_request_ran_at_most_once_and_in_order(self) -> None:
        for session, ran in self.world.executed.items():
            assert [seq for seq, _ in ran] == list(range(1, len(ran) + 1)), session

    @invariant()
    def nothing_ran_that_was_not_asked_for_and_every_count_is_right(self) -> None:
        begun = {done for client in self.world.clients for done in client.begun}
        for (session, epoch), ran in self.world.executed.items():
            assert all((session, epoch, seq) in begun for seq, _ in ran)
        assert all(len(answers) <= 1 for answers in self.world.produced.values())

    @invariant()
    def the_slots_and_the_cached_bytes_add_up(self) -> None:
        table = self.world.worker.table
        assert len(self.world.worker.live) == len(table) == SLOTS - table.free
        assert table.cached_bytes == sum(s.cached_bytes for s in table)

    def teardown(self) -> None:
        """However it ends, every request that was begun is answered, or its session is reported lost."""
        world = self.world
        world.reconnect_client()
        if self.end == "heals" and not world.worker.connected:
            world.reconnect_worker()
        for turn in range(400):
            for client in world.clients:
                if client.state == "open" and client.turn.phase is Phase.UNSETTLED:
                    client.wait_again()
            if all(client.flight is None for client in world.clients):
                break
            self.worker_goes_on()
            world.now += 0.1
            if turn % 40 == 0:
                world.renew_all()
            world.worker.sweep()
            for client in world.clients:
                client.tick()
        for client in world.clients:
            waiting = [done for done, fate in client.begun.items() if not fate]
            assert not waiting, f"{client.user} waits for {waiting} for ever: {client.turn}"
            assert client.flight is None, f"{client.user} is {client.state} for ever"

    def worker_goes_on(self) -> None:
        world, net = self.world, self.world.net
        if self.end == "worker is gone":
            world.worker = Worker(world, "another")
        for message in list(net):
            net.remove(message)
            if not message.to or self.end != "worker is silent":
                world.deliver(message)
        if self.end == "heals":
            world.worker.work()


TestExactlyOnce = ExactlyOnce.TestCase
TestExactlyOnce.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
