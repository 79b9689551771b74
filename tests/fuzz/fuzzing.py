"""Sends mutants to every subject of two workers, and sees that each is answered.

Rule: *every message with a reply subject is answered*, if not at once then when the same bytes are sent again, as a
client does. The exceptions are those of the protocol:

    a part                      waits for the others of its message
    an ask that names somebody  is for others to answer
    a parked open               is answered when there is room, or when its time is over
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import msgpack

from meshrl.bus.connection import Connection
from meshrl.errors import MeshError
from meshrl.wire import messages
from meshrl.wire.codec import unpack
from meshrl.wire.frames import OPS
from meshrl.wire.parts import is_part
from meshrl.wire.subjects import Subjects
from schemas.entry import whole_numbers
from tests.fuzz import templates
from tests.fuzz.fuzzed_workers import FuzzedWorkers
from tests.fuzz.mutating import Mutator

SUBJECTS = Subjects()
# So many are under way at once: enough that neither side waits for the other.
WINDOW = 256
ANSWER_S = 60.0
AGAIN_S = 0.03
NUM_ENVS = 3
NAMES = {"env": ["cartpole", "cartpole", "nested", "awaited"], "agent": ["counting"]}
FORMS = ["env", "vector", "pool", "agent"]
KIND = {form: "agent" if form == "agent" else "env" for form in FORMS}
# Of messages that begin as an entry of the hostile corpus.
HOSTILE = 0.2
# Sessions that are live: so many that of one window few requests are of the same one, and get the same answer.
LIVE = 64
# Of what is granted, so much is left to lapse by itself.
LEFT = 0.05


class Live:
    """A session that is there for mutants of its requests.

    Attributes:
        id: of the session.
        form: env (a single one), vector, pool or agent.
        seq: of the last request that is known to have begun.
        seqs: the same for each lane of a pool.
        lost: whether its worker does not hold it any more.
    """

    def __init__(self, id_: str, form: str, worker: str, name: str) -> None:
        self.id = id_
        self.form = form
        self.worker = worker
        self.name = name
        self.seq = 0
        self.seqs = [0] * NUM_ENVS
        self.lost = False

    def open(self) -> bytes:
        """The body of its open."""
        single = self.form in {"env", "agent"}
        shape = {} if single else {"form": self.form, "num_envs": NUM_ENVS}
        return messages.Open.model_validate(
            {"session": self.id, "kind": KIND[self.form], "name": self.name, **shape}
        ).to_wire()

    def head(self) -> dict[str, Any]:
        """Of its next request."""
        if self.form == "pool":
            return {
                "epoch": 1,
                "lanes": whole_numbers(*range(NUM_ENVS)),
                "seqs": whole_numbers(*(seq + 1 for seq in self.seqs)),
            }
        return {"epoch": 1, "lane": 0, "seq": self.seq + 1}

    def heard(self, body: Any) -> None:
        """Take from an answer where its lanes are."""
        if not isinstance(body, dict):
            return
        error = body.get("error") or {}
        details = error.get("details") or {}
        code = error.get("code", "")
        last, lanes = details.get("last_seq"), details.get("lanes")
        if code in {"session_unknown", "session_expired", "env_error", "agent_error"}:
            self.lost = True
        elif last is not None and lanes:
            self.seqs[lanes[0]] = last
        elif last is not None:
            self.seq = last
        elif self.form == "pool":
            with suppress(TypeError, KeyError, struct.error, IndexError):
                pairs = zip(_numbers(body["lanes"]), _numbers(body["seqs"]), strict=True)
                for lane, seq in pairs:
                    self.seqs[lane] = seq
        elif isinstance(body.get("seq"), int) and code != "malformed_message":
            self.seq = body["seq"]
        elif isinstance(body.get("seq"), int):  # of a request that began, or of one that named another lane
            self.seq = max(self.seq, body["seq"]) if body["seq"] <= self.seq + 1 else self.seq


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _numbers(array: dict[str, Any]) -> tuple[int, ...]:
    return struct.unpack(f"<{len(array['data']) // 8}q", array["data"])


class Sent(NamedTuple):
    """A message that is under way."""

    target: str
    subject: str
    body: bytes
    live: Live | None


class Fuzzer:
    """Mutants from one connection; the same by seed, but for what depends on answers.

    Args:
        connection: to send on.
        workers: that are sent to.
        seed: of all draws.

    Attributes:
        sent: how many, by target.
        answers: how often each code came; ``accepted`` is none.
        unanswered: how many were answered nothing by right.
    """

    def __init__(self, connection: Connection, workers: FuzzedWorkers, seed: int) -> None:
        self.sent: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self._connection = connection
        self._workers = workers
        self._mutator = Mutator(seed)
        self._chance = random.Random(seed + 1)
        self._live: list[Live] = []
        self._opened = 0
        self._seed = seed
        self._progress = asyncio.Event()

    async def run(self, count: int) -> None:
        """Send so many mutants.

        Raises:
            AssertionError: one was not answered, or nobody listened.
        """
        while (left := count - self.sent.total()) > 0:
            await self._keep_alive()
            await self._window([self._draw() for _ in range(min(WINDOW, left))])

    async def close(self) -> None:
        """Close the sessions that are live."""
        for live in self._live:
            self._connection.publish(self._session(live, "close"), messages.Close(epoch=1).to_wire())
        await self._connection.flush()

    # ---------------------------------------------------------------- what is sent

    def _draw(self) -> Sent:
        chance, user = self._chance, self._connection.user
        either = chance.choice((self._workers.env, self._workers.agent))
        match chance.randrange(16):
            case 0:
                return self._of("ask", SUBJECTS.ask, *templates.control("Ask"))
            case 1:
                return self._of("open", SUBJECTS.worker(either, "open", user), *self._opens())
            case 2:
                return self._of("open anywhere", SUBJECTS.any_open("cartpole", user), *self._opens())
            case 3:
                return self._of("probe", SUBJECTS.worker(either, "probe", user), *self._probes())
            case 4:
                return self._of("renew", SUBJECTS.worker(either, "renew", user), *self._renewals())
            case 5:
                return self._of("act", SUBJECTS.worker(self._workers.agent, "act", user), *templates.control("act"))
            case 6:
                return self._of("act anywhere", SUBJECTS.any_act("still", user), *templates.control("act"))
            case 7:
                op = chance.choice([*OPS, "close"])
                subject = SUBJECTS.session(either, user, "nobody", op)
                return self._of("request of no session", subject, templates.anything(), [])
            case 9 if chance.random() < 0.2:
                return self._drain(SUBJECTS.worker(either, "drain", user))
            case 8 if chance.random() < 0.1:
                live = chance.choice(self._live)
                return self._of("close", self._session(live, "close"), *templates.control("Close"), live=live)
            case _:
                live = chance.choice(self._live)
                op, fields = chance.choice(templates.requests(live.form))
                if chance.random() < 0.05:
                    op = chance.choice(sorted(OPS))
                if chance.random() < 0.5 and isinstance(changed := self._mutator.changed(fields), dict):
                    fields = changed  # and the head as it should be, so that the request begins
                    return Sent(f"{live.form}:{op}", self._session(live, op), _packed({**fields, **live.head()}), live)
                whole = _packed({**live.head(), **fields})
                return self._of(f"{live.form}:{op}", self._session(live, op), [whole], [], live=live)

    def _of(
        self, target: str, subject: str, right: list[bytes], hostile: list[bytes], *, live: Live | None = None
    ) -> Sent:
        bodies = hostile if hostile and self._chance.random() < HOSTILE else right
        return Sent(target, subject, self._mutator.mutant(self._chance.choice(bodies), templates.anything()), live)

    def _opens(self) -> templates.Bodies:
        """Of new sessions of every form."""
        self._opened += 1
        right = [Live(f"brief-{self._opened}", form, "", NAMES[KIND[form]][0]).open() for form in FORMS]
        return templates.Bodies(right, templates.control("Open").hostile)

    def _probes(self) -> templates.Bodies:
        """Of requests of sessions that there are."""
        live = self._chance.choice(self._live)
        right = messages.Probe(awaited=[(live.id, 1, lane, live.seq) for lane in range(NUM_ENVS)])
        return templates.Bodies([right.to_wire()], templates.control("Probe").hostile)

    def _renewals(self) -> templates.Bodies:
        right = messages.Renew(sessions=[(live.id, 1) for live in self._live])
        return templates.Bodies([right.to_wire()], templates.control("Renew").hostile)

    def _drain(self, subject: str) -> Sent:
        """One that is wrong: of a right one the worker would leave."""
        while True:
            sent = self._of("drain", subject, *templates.control("Drain"))
            try:
                messages.parse(messages.Drain, sent.body)
            except MeshError:
                return sent

    def _session(self, live: Live, op: str) -> str:
        return SUBJECTS.session(live.worker, self._connection.user, live.id, op)

    # ---------------------------------------------------------------- and what comes back

    async def _window(self, window: list[Sent]) -> None:
        under_way: dict[int, Sent] = {}

        def answered(at: list[int], sent: Sent, data: bytes | None) -> None:
            if at[0] in under_way:
                del under_way[at[0]]
                self._heard(sent, data)
                if not under_way:
                    self._progress.set()

        self._progress.clear()
        rids = []
        for sent in window:
            self.sent[sent.target.partition(":")[0]] += 1
            at: list[int] = []
            rid = self._connection.request(sent.subject, sent.body, partial(answered, at, sent))
            at.append(rid)
            rids.append(rid)
            under_way[rid] = sent
        deadline = asyncio.get_running_loop().time() + ANSWER_S
        while under_way:
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    await self._progress.wait()
            for rid, sent in list(under_way.items()):
                why = await self._silent_by_right(sent)
                if rid not in under_way:
                    continue  # it was answered meanwhile
                if why:
                    del under_way[rid]
                    self.unanswered[why] += 1
                else:
                    self._connection.again(rid, sent.subject, sent.body)
            assert asyncio.get_running_loop().time() < deadline, _told(under_way)
        for rid in rids:
            self._connection.forget(rid)

    async def _silent_by_right(self, sent: Sent) -> str:
        """Why no answer to it is to be expected; empty where one is."""
        if is_part(sent.body):
            return "a part"
        if sent.target == "ask":
            return "an ask"
        if not sent.target.startswith("open"):
            return ""
        with suppress(MeshError):
            open_ = messages.parse(messages.Open, sent.body)
            for worker in (self._workers.env, self._workers.agent):
                close = SUBJECTS.session(worker, self._connection.user, open_.session, "close")
                probe = messages.Probe(awaited=[(open_.session, open_.epoch, 0, 0)]).to_wire()
                subject = SUBJECTS.worker(worker, "probe", self._connection.user)
                answer = await self._connection.ask(subject, probe, ANSWER_S)
                if answer is not None and messages.parse(messages.Probed, answer).states == ["parked"]:
                    self._connection.publish(close, messages.Close(epoch=open_.epoch).to_wire())
                    return "a parked open"
        return ""

    def _heard(self, sent: Sent, data: bytes | None) -> None:
        assert data is not None, f"nobody listens on {sent.subject}"
        if is_part(data):
            self.answers["accepted"] += 1  # longer than one message: it is the first part of it
            return
        body = msgpack.unpackb(data, strict_map_key=False)
        assert isinstance(body, dict), f"{sent.target}: an answer that is no map: {data[:100]!r}"
        code = body["error"]["code"] if "error" in body else "accepted"
        self.answers[code] += 1
        if sent.live is not None:
            sent.live.heard(body)
        if sent.target.startswith("open") and "grant_s" in body and self._chance.random() >= LEFT:
            subject = SUBJECTS.session(body["worker"], self._connection.user, body["session"], "close")
            self._connection.publish(subject, messages.Close(epoch=body["epoch"]).to_wire())

    # ---------------------------------------------------------------- sessions that are live

    async def _keep_alive(self) -> None:
        """Open others in the place of those that are lost."""
        for live in [live for live in self._live if live.lost]:
            self._live.remove(live)
            self._connection.publish(self._session(live, "close"), messages.Close(epoch=1).to_wire())
        while len(self._live) < LIVE:
            form = min(FORMS, key=[live.form for live in self._live].count)
            worker = self._workers.agent if form == "agent" else self._workers.env
            self._opened += 1
            live = Live(f"live-{self._seed}-{self._opened}", form, worker, self._chance.choice(NAMES[KIND[form]]))
            subject = SUBJECTS.worker(worker, "open", self._connection.user)
            for body in _until_granted(live):
                answer = await self._connection.ask(subject, body, ANSWER_S)
                assert answer is not None
                if "grant_s" in (told := unpack(answer)):
                    break
                assert "load" in told, f"a right open is answered {told}"
                await asyncio.sleep(AGAIN_S)  # full of grants that lapse within two seconds
            first = await self._connection.ask(self._session(live, "reset"), msgpack.packb(live.head()), ANSWER_S)
            assert first is not None
            live.heard(msgpack.unpackb(first, strict_map_key=False))
            assert not live.lost
            self._live.append(live)


def _until_granted(live: Live) -> Iterator[bytes]:
    for _ in range(int(ANSWER_S / AGAIN_S)):
        yield live.open()
    raise AssertionError(f"no slot for a {live.form} within {ANSWER_S:g} s: slots are lost")


def _told(under_way: dict[int, Sent]) -> str:
    shown = [f"{sent.target} {sent.subject} {sent.body[:200].hex()}" for sent in under_way.values()]
    return f"{len(shown)} messages were not answered within {ANSWER_S:g} s: " + "; ".join(shown[:5])
