"""Answers go to inboxes: nobody has a worker publish anywhere else what only a worker may."""

from __future__ import annotations

import math

import pytest

from meshrl import AgentWorker, EnvWorker
from meshrl.bus import answering
from meshrl.bus.connect import connect
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Ask, Close, Open, Probe, Renew
from meshrl.wire.subjects import Subjects
from meshrl.worker.policies import random_policy
from tests.mesh.envs import Counter

AT = Subjects()
BROKEN = b"\xc1"
# What workers may publish on, and learners may not.
ELSEWHERE = [
    AT.audit("e1"),
    AT.advertisement("env", "counter", "e1"),
    AT.recording("counter", "t"),
    AT.episodes("counter", "t"),
    "_INBOXES.x",
    "x",
]


def asked(seq: int, **fields: object) -> bytes:
    return pack({"epoch": 1, "lane": 0, "seq": seq, **fields})


@pytest.fixture(autouse=True)
def said_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering._Refused, "said_at", -math.inf)


async def test_what_wants_its_answer_elsewhere_is_answered_nowhere(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        EnvWorker({"counter": Counter}, url) as worker,
        AgentWorker({"random": random_policy}, url) as agents,
        connect(url) as bus,
    ):
        user, heard = bus.user, list[str]()

        def session(op: str) -> str:
            return AT.session(worker.id, user, "s", op)

        requests = [
            (AT.ask, Ask().to_wire()),
            (AT.ask, Ask(name="counter").to_wire()),
            (AT.worker(worker.id, "probe", user), Probe(awaited=[]).to_wire()),
            (AT.worker(agents.id, "renew", user), Renew(sessions=[]).to_wire()),
            (AT.worker(worker.id, "drain", user), BROKEN),
            (AT.any_open("counter", user), Open(session="other", name="counter").to_wire()),
            (AT.worker(worker.id, "open", user), Open(session="s", name="counter").to_wire()),
            (session("reset"), asked(1, seed=1)),
            (session("step"), asked(2, action=1)),
            (session("get_attr"), asked(3, name="count")),
            (session("fly"), asked(4)),
            (session("step"), BROKEN),
            (session("step"), pack({"epoch": 7, "lane": 0, "seq": 1, "action": 1})),
            (session("close"), Close(epoch=1).to_wire()),
            (AT.any_act("random", user), pack({"obs": 1})),
            (AT.worker(agents.id, "act", user), BROKEN),
            *((f"$SRV.{verb}{whose}", b"") for verb in ("PING", "INFO", "STATS") for whose in ("", ".meshrl-env")),
            (f"meshrl.describe.{worker.id}", b""),
        ]
        for subject in ELSEWHERE:
            await bus.subscribe(subject, lambda at, _reply, _body: heard.append(at))
        for subject, body in requests:
            for reply in ELSEWHERE:
                bus.publish(subject, body, reply)
            answer = await bus.ask(subject, body, 10.0)
            assert answer is not None, f"{subject} is answered on an inbox"
            if answer[:1] not in b"{[":  # of NATS's own services
                assert type(unpack(answer)) is dict
        await bus.flush()
        assert heard == []
        said = [record for record in caplog.records if "nobody gets them" in record.message]
        assert 1 <= len(said) <= 4, "of more than a hundred, one, or one a thread: who may ask does not fill a log"
