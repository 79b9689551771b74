"""What the coverage-guided fuzzer drives: each target takes bytes, and raises only where something is wrong.

    target    drives                                       must hold
    codec     unpack, pack, control messages, frames       errors are typed; what was read can be written, and is read
              and parts                                    again as the same
    lanes     Lanes, beside one Lane for each              they say the same
    sessions  SessionTable with its sessions and lanes     nothing runs twice, no slot is lost, no byte is miscounted

The inputs are kept in ``tests/fuzz/corpus``, and every run of the suite replays them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance

from meshrl.errors import MalformedMessage, MeshError
from meshrl.protocol.lane import Lane, Verdict
from meshrl.protocol.lanes import Lanes
from meshrl.protocol.session import Opening, Session, SessionTable, State
from meshrl.wire import messages
from meshrl.wire.codec import Codec, pack, unpack
from meshrl.wire.frames import check_lanes, check_reply, check_request, is_of_lanes
from meshrl.wire.parts import Assembler

# --------------------------------------------------------------------------- codec

CONTROL: list[type[messages.Message]] = [
    messages.Open,
    messages.Renew,
    messages.Probe,
    messages.Close,
    messages.Ask,
    messages.Advertisement,
    messages.Known,
    messages.Grant,
    messages.Full,
    messages.Renewed,
    messages.Probed,
    messages.Closed,
    messages.Drain,
    messages.Drained,
]
BYTES_KEYS = Codec("bytes")
MAX_PARTS_BYTES = 4096


def codec(data: bytes) -> None:
    """The first byte says who reads the rest."""
    if not data:
        return
    who, body = data[0], data[1:]
    if who < len(CONTROL):
        _message(CONTROL[who], body)
    elif who < 64:
        _parts(body)
    else:
        _value(body)


def _message(model: type[messages.Message], body: bytes) -> None:
    with suppress(MeshError):
        read = messages.parse(model, body)
        again = messages.parse(model, read.to_wire())
        assert repr(again) == repr(read)  # by text, since NaN is not itself


def _value(body: bytes) -> None:
    try:
        value = unpack(body)
    except MeshError:
        return
    assert same(unpack(pack(value)), value)
    assert same(unpack(BYTES_KEYS.pack(value)), value)
    for check in (check_request, lambda value: check_reply(value, 1)):
        with suppress(MeshError):
            check(value)
    if is_of_lanes(value):
        with suppress(MeshError):
            _, lanes, seqs = check_lanes(value, 8)
            assert len(set(lanes.tolist())) == len(lanes) == len(seqs)
            assert set(lanes.tolist()) <= set(range(8))


def _parts(body: bytes) -> None:
    """Pieces of up to 255 bytes, each after its length, from one of two senders."""
    joining = Assembler(max_bytes=MAX_PARTS_BYTES)
    at = 0
    while at < len(body):
        piece = body[at + 1 : at + 1 + body[at]]
        at += 1 + body[at]
        with suppress(MalformedMessage):
            whole = joining.feed(f"sender {len(piece) % 2}", b"\x96" + piece, float(at))
            assert whole is None or len(whole) <= len(body)
        assert 0 <= joining.buffered_bytes <= MAX_PARTS_BYTES


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same types and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(key, other_key) and same(value, other_value)
            for (key, value), (other_key, other_value) in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, list | tuple | GraphInstance):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, complex):
        return same([one.real, one.imag], [other.real, other.imag])
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)


# --------------------------------------------------------------------------- lanes

COUNT = 4


def lanes(data: bytes) -> None:
    """Two bytes a move: which lanes, and what of them."""
    many, each = Lanes(COUNT), [Lane() for _ in range(COUNT)]
    for number, (which, what) in enumerate(_moves(data, 2)):
        named = np.array([lane for lane in range(COUNT) if which >> lane & 1], np.int64)
        reply_to = f"inbox {number}"
        if not len(named):
            continue
        if what & 1:
            # Two bits a lane, from one below to two beyond what the lane is at.
            ahead = [(which >> 4 | what << 3) >> 2 * lane & 3 for lane in named.tolist()]
            seqs = np.array([max(1, each[lane].seq + step - 1) for lane, step in zip(named, ahead, strict=True)])
            _receive(many, each, named, seqs, reply_to, float(number))
        else:
            running = named[many.running[named]]
            if len(running):
                packed = bytes([number % 256]) * (1 + what % 7)
                expected = {each[lane].answer(packed) for lane in running.tolist()}
                assert many.answer(running, packed) == expected
        assert many.seqs.tolist() == [lane.seq for lane in each]
        assert many.running.tolist() == [lane.running for lane in each]
        for lane in range(COUNT):
            seq = max(1, each[lane].seq + what % 3 - 1)
            state = "answered" if seq <= each[lane].seq else "not_received"
            state = "running" if each[lane].running and seq == each[lane].seq else state
            assert many.state_of(lane, seq) == state


def _receive(many: Lanes, each: list[Lane], named: Any, seqs: Any, reply_to: str, now: float) -> None:
    verdicts = [each[lane].receive(seq, reply_to, now) for lane, seq in zip(named.tolist(), seqs.tolist(), strict=True)]
    received = many.receive(named, seqs, reply_to, now)
    refused = {Verdict.STALE, Verdict.GAP, Verdict.BUSY}
    assert received.run.tolist() == [at for at, verdict in enumerate(verdicts) if verdict is Verdict.RUN]
    assert received.refused == [(at, verdict) for at, verdict in enumerate(verdicts) if verdict in refused]
    repeated = {each[lane].cached for lane, verdict in zip(named, verdicts, strict=True) if verdict is Verdict.REPEAT}
    assert {answer.packed for answer in received.repeat} == repeated
    if received.refused:
        error = many.refusal(received.refused, named, seqs, "s")
        at, verdict = received.refused[0]
        expected = each[int(named[at])].refusal(verdict, int(seqs[at]), "s")
        assert type(error) is type(expected)
        assert error.details["last_seq"] == expected.details["last_seq"]


def _moves(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data) - size + 1, size):
        yield data[at : at + size]


# --------------------------------------------------------------------------- sessions

SLOTS = 4
SWEEP_S = 0.25
WAITS_S = (0.1, 0.25, 1.9, 2.1, 14.0, 16.0)


def sessions(data: bytes) -> None:
    """Three bytes a move: of whom, which move, and how."""
    world = _World()
    for move in _moves(data, 3):
        world.move(*move)
        world.check()


class _World:
    """A worker's table, what its worker does around it, and what has happened so far."""

    def __init__(self) -> None:
        self.table = SessionTable(SLOTS)
        self.now = 100.0
        self.ran: set[tuple[object, ...]] = set()  # user, session, epoch, lane and seq
        self.answers: dict[tuple[object, ...], bytes] = {}
        self.number = 0

    def move(self, who: int, what: int, how: int) -> None:
        self.number += 1
        key = (f"u{who & 1}", f"s{who >> 1 & 1}")
        epoch = 1 + (who >> 2) % 3
        session = self.table.get(key)
        match what % 9:
            case 0 | 1:
                self._open(key, epoch, how)
            case 2 if session is not None and session.state is State.OPENING:
                self.table.granted(session, b"grant", self.now)
            case 3 | 4 | 5:
                if session is not None and session.state is State.OPEN and session.epoch == epoch:
                    self._request(session, how)
            case 6 if session is not None and session.running:
                self._answer(session, how)
            case 7:
                self._renew_or_probe(key, epoch, session, how)
            case 8 if how & 1:
                self._sweep(WAITS_S[(how >> 1) % len(WAITS_S)], connected=not how & 128)
            case _ if session is not None:
                self._end(session, "closed")

    def _open(self, key: tuple[str, str], epoch: int, how: int) -> None:
        num_envs, pool = 1 + (how & 1), bool(how & 2)
        before = self.table.get(key)
        free = self.table.free
        opening, session = self.table.open(*key, epoch, "inbox", self.now, num_envs=num_envs, pool=pool)
        if opening is Opening.NEW:
            assert before is None
            assert self.table.free == free - num_envs
        else:
            assert self.table.free == free, "nothing else takes a slot"
        if opening is Opening.FULL:
            assert num_envs > free
            assert session is None
        if opening in {Opening.JOIN, Opening.REPEAT}:
            assert session is not None
            assert session is before
            assert session.epoch == epoch
        if opening is Opening.RAISED:
            assert session is not None
            self._end(session, "wrong_epoch")

    def _request(self, session: Session, how: int) -> None:
        self.table.used(session, self.now)
        step = how % 4 - 1
        if session.lane is not None:
            seq = max(0, session.lane.seq + step)
            verdict = session.lane.receive(seq, "inbox", self.now)
            if verdict is Verdict.RUN:
                self._began(session, 0, seq)
            elif verdict is Verdict.REPEAT:
                assert session.lane.cached == self.answers[*session.key, session.epoch, 0, seq]
            return
        assert session.lanes is not None
        named = np.arange(session.num_envs)[: 1 + (how >> 2 & 1)]
        seqs = np.maximum(1, session.lanes.seqs[named] + step)
        received = session.lanes.receive(named, seqs, "inbox", self.now)
        for at in received.run.tolist():
            self._began(session, int(named[at]), int(seqs[at]))
        for answer in received.repeat:
            assert answer.packed == self.answers[*session.key, session.epoch, answer.lane, answer.seq]

    def _began(self, session: Session, lane: int, seq: int) -> None:
        run = (*session.key, session.epoch, lane, seq)
        assert run not in self.ran, f"{run} runs a second time"
        assert seq == 1 or (*run[:-1], seq - 1) in self.ran, "none is skipped"
        self.ran.add(run)

    def _answer(self, session: Session, how: int) -> None:
        packed = b"%d" % self.number * (1 + how % 3)
        if session.lane is not None:
            self.table.answered(session.lane, packed)
            self.answers[*session.key, session.epoch, 0, session.lane.seq] = packed
        else:
            assert session.lanes is not None
            which = np.flatnonzero(session.lanes.running)[: 1 + how % 2]
            self.table.answered_together(session.lanes, which, packed)
            for lane in which.tolist():
                self.answers[*session.key, session.epoch, lane, int(session.lanes.seqs[lane])] = packed
        if session.state is State.ENDING and not session.running:
            self.table.ended(session)

    def _end(self, session: Session, reason: str) -> None:
        """As the worker does: what still runs is waited for, and so is an env that is being constructed."""
        if self.table.ending(session, reason) and not session.running:
            self.table.ended(session)

    def _renew_or_probe(self, key: tuple[str, str], epoch: int, session: Session | None, how: int) -> None:
        if how & 1:
            why = self.table.renew(key, epoch, self.now)
            alive = session is not None and session.state is not State.ENDING and session.epoch == epoch
            assert (why is None) is alive
            if alive and session is not None and session.state is State.OPEN:
                assert session.lease_until == self.now + self.table.lease_s
            return
        seq = how >> 1 & 3
        state = self.table.probe(key, epoch, 0, seq)
        ran = (*key, epoch, 0, seq) in self.ran
        if state == "running" and seq:
            assert ran
        if state == "answered" and seq:
            assert (*key, epoch, 0, seq) in self.answers
        if state == "not_received":
            assert not ran or not seq

    def _sweep(self, wait_s: float, *, connected: bool) -> None:
        self.now += wait_s
        due = {session for session in self.table if session.lease_until < self.now and session.state is State.OPEN}
        expired = self.table.sweep(self.now, SWEEP_S, connected=connected)
        assert set(expired) in (due, set())
        if not connected:
            assert expired == []
        for session in expired:
            self._end(session, "session_expired")

    def check(self) -> None:
        """What holds after every move."""
        held = list(self.table)
        taken = sum(session.num_envs for session in held)
        assert taken <= SLOTS
        assert self.table.free == SLOTS - taken
        assert self.table.cached_bytes == sum(session.cached_bytes for session in held)


TARGETS: dict[str, Callable[[bytes], None]] = {"codec": codec, "lanes": lanes, "sessions": sessions}
