"""Pools over a real server among hostile peers: typed errors, and nobody else is disturbed (D4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from meshrl import EnvWorker
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.errors import (
    MalformedMessage,
    MeshError,
    NothingUnderWay,
    RequestTimeout,
)
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Close, Open
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.pool_envs import (
    Gated,
    GatedCoroutine,
    Gates,
    altered,
    ids,
    pooled,
    soon,
)

SUBJECTS = Subjects()


HOSTILE: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "lanes out of range": altered(lanes=lambda body: body["lanes"] + 100),
    "lanes below zero": altered(lanes=lambda body: body["lanes"] - 1),
    "a lane twice": altered(lanes=lambda body: body["lanes"] * 0),
    "lanes of another dtype": altered(lanes=lambda body: body["lanes"].astype(np.int32)),
    "lanes that are no array": altered(lanes=lambda body: body["lanes"].tolist()),
    "two-dimensional lanes": altered(lanes=lambda body: body["lanes"][None], seqs=lambda body: body["seqs"][None]),
    "no lanes": altered(lanes=None),
    "no seqs": altered(seqs=None),
    "fewer seqs": altered(seqs=lambda body: body["seqs"][:-1]),
    "no observations": altered(obs=None),
    "fewer observations": altered(obs=lambda body: body["obs"][:-1]),
    "observations of another dtype": altered(obs=lambda body: body["obs"].astype(np.float32)),
    "observations that are text": altered(obs="observations"),
    "no rewards": altered(rewards=None),
    "more rewards": altered(rewards=np.zeros(9)),
    "rewards that are text": altered(rewards="3"),
    "rewards of another dtype": altered(rewards=lambda body: body["rewards"].astype(np.float32)),
    "terminations that are numbers": altered(terminations=lambda body: body["rewards"]),
    "no truncations": altered(truncations=None),
    "no first": altered(first=None),
    "no episodes": altered(episodes=None),
    "steps of another form": altered(steps=lambda body: body["steps"][None]),
    "infos that are text": altered(infos="infos"),
    "infos of a lane that is not there": altered(infos={"entries": [[7, {"a": 1}]]}),
    "infos that do not go together": altered(infos={"entries": [[0, {"a": 1}], [1, {"a": "one"}]]}),
    "an error that is a number": altered(error=5),
    "an error without a code": altered(error={"message": "no"}),
    "no map": lambda _: pack([1, 2, 3]),
    "no msgpack": lambda _: b"\xc1\xc1",
    "an error alone": lambda _: pack({"error": {"code": "usage", "message": "no"}}),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_an_answer_that_is_none_is_a_typed_error_and_the_pool_can_be_reset(
    url: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pooled(url, GatedCoroutine, 3) as (pool, _, worker, _m):
        worker.alters = HOSTILE[what]
        await pool.send([0, 0, 0], range(3))
        with pytest.raises(MeshError) as caught:
            await soon(pool.recv(min=3))
        assert not isinstance(caught.value, (NothingUnderWay, RequestTimeout)), "it is told, not waited for"
        worker.alters = None
        await pool.reset(seed=1)
        batch = await soon(pool.recv(min=3))
        assert batch.first.all()
        await pool.send([4, 4, 4], range(3))
        assert (await soon(pool.recv(min=3))).rewards.tolist() == [4.0] * 3
        assert not caplog.records, "nothing was raised where messages are handed out"


async def test_a_bad_answer_of_one_worker_takes_no_result_of_another_away(url: str) -> None:
    async with pooled(url, GatedCoroutine, 4) as (pool, _, worker, _m):
        await pool.send([1, 1], [0, 1])
        await until(lambda: pool.ready == 2, "two are ready")
        worker.alters = altered(rewards=None)
        await pool.send([0, 0], [2, 3])
        batch = await soon(pool.recv(min=4))
        assert ids(batch) == [0, 1]
        with pytest.raises(MalformedMessage, match="rewards"):
            await soon(pool.recv())


async def test_infos_that_do_not_go_together_can_be_received_one_by_one(url: str) -> None:
    async with pooled(url, GatedCoroutine, 2) as (pool, _, worker, _m):
        worker.alters = altered(infos={"entries": [[0, {"a": 1}], [1, {"a": "one"}]]})
        await pool.send([0, 0], [0, 1])
        with pytest.raises(MeshError, match="infos"):
            await soon(pool.recv(min=2))
        one, two = await pool.recv(max=1), await pool.recv(max=1)
        assert (one.infos["a"].tolist(), two.infos["a"].tolist()) == ([1], ["one"])


async def test_an_answer_to_another_request_is_passed_over(url: str) -> None:
    async with pooled(url, GatedCoroutine, 3) as (pool, _, worker, _m):
        for wrong in (altered(seqs=lambda body: body["seqs"] + 1), altered(seqs=lambda body: body["seqs"] * 0 + 1)):
            answered: list[bytes] = []

            def once(body: dict[str, Any], wrong: Any = wrong, answered: Any = answered) -> bytes:
                answered.append(b"")
                return wrong(body) if len(answered) == 1 else pack(body)

            worker.alters = once
            await pool.send([2, 2, 2], range(3))
            assert (await soon(pool.recv(min=3))).rewards.tolist() == [2.0] * 3
            assert len(answered) > 1


async def opened(raw: Connection, worker: EnvWorker, session: str, **fields: Any) -> None:
    body = Open(session=session, name="gated", **fields).to_wire()
    answer = await raw.ask(SUBJECTS.worker(worker.id, "open", raw.user), body, 30.0)
    assert answer is not None
    assert "error" not in unpack(answer)


async def ask(raw: Connection, worker: EnvWorker, session: str, op: str, body: Any) -> Any:
    answer = await raw.ask(SUBJECTS.session(worker.id, raw.user, session, op), pack(body), 30.0)
    assert answer is not None
    return unpack(answer)


def lanes(*which: int, seq: int = 1, **more: Any) -> dict[str, Any]:
    return {"epoch": 1, "lanes": np.array(which, np.int64), "seqs": np.full(len(which), seq, np.int64), **more}


BAD_REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    ("step", lanes(0, 3), "malformed_message"),
    ("step", lanes(-1), "malformed_message"),
    ("step", lanes(1, 1), "malformed_message"),
    ("step", lanes(), "malformed_message"),
    ("step", lanes(0, seq=0), "malformed_message"),
    ("step", lanes(0, seq=2), "sequence_gap"),
    ("step", {**lanes(0), "epoch": 2}, "wrong_epoch"),
    ("step", {**lanes(0), "epoch": "1"}, "malformed_message"),
    ("step", {**lanes(0), "epoch": None}, "malformed_message"),
    ("step", {**lanes(0), "lanes": [0]}, "malformed_message"),
    ("step", {**lanes(0), "lanes": np.array([0.0])}, "malformed_message"),
    ("step", {**lanes(0), "seqs": np.array([1], np.uint64)}, "malformed_message"),
    ("step", {**lanes(0), "seqs": np.array([[1]])}, "malformed_message"),
    ("step", {"epoch": 1, "lane": 0, "seq": 1, "action": 0}, "malformed_message"),
    ("reset", {"epoch": 1, "lane": 0, "seq": 1}, "malformed_message"),
    ("nonsense", {"lanes": None}, "malformed_message"),
]
# They take a sequence number: what they ask for is wrong, not how.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("step", {"actions": np.zeros(1, np.int64)}, "reset_needed"),
    ("reset", {"seeds": [1, 2]}, "malformed_message"),
    ("reset", {"seeds": ["one"]}, "invalid_seed"),
    ("reset", {"seeds": [-1]}, "invalid_seed"),
    ("reset", {"options": 3}, "malformed_message"),
    ("render", {}, "malformed_message"),
    ("nonsense", {}, "malformed_message"),
    ("reset", {}, ""),
    ("step", {}, "malformed_message"),
    ("step", {"actions": np.zeros(2, np.int64)}, "malformed_message"),
    ("step", {"actions": "left"}, "malformed_message"),
    ("step", {"actions": np.zeros((1, 1), np.int64)}, "malformed_message"),
    ("step", {"actions": np.zeros(1, np.int64)}, ""),
]


async def test_requests_of_pools_that_are_none_are_refused_and_cost_nobody_anything(url: str) -> None:
    gates = Gates()
    async with EnvWorker({"gated": lambda: Gated(gates)}, url) as worker, connect(url) as raw:
        await opened(raw, worker, "pool", form="pool", num_envs=3)
        await opened(raw, worker, "single")
        for op, body, code in BAD_REQUESTS:
            answer = await ask(raw, worker, "pool", op, body)
            assert answer["error"]["code"] == code, (op, body)
        for session, code in (("single", "malformed_message"), ("nobody's", "session_unknown")):
            assert (await ask(raw, worker, session, "step", lanes(0)))["error"]["code"] == code
        for seq, (op, fields, code) in enumerate(REFUSED, 1):
            answer = await ask(raw, worker, "pool", op, lanes(1, seq=seq, **fields))
            assert answer.get("error", {"code": ""})["code"] == code, (op, fields)
            assert (answer["lanes"].tolist(), answer["seqs"].tolist()) == ([1], [seq])
        assert not gates.at.get(9)
        assert gates.at == {0: 1}
        answer = await ask(raw, worker, "single", "reset", {"epoch": 1, "lane": 0, "seq": 1})
        assert answer["obs"] == 0
        answer = await ask(raw, worker, "pool", "reset", lanes(0, 2))
        assert answer["obs"].tolist() == [0] * len(answer["lanes"])
        assert worker.table.free == worker.table.slots - 4
        for session in ("pool", "single"):
            await raw.ask(SUBJECTS.session(worker.id, raw.user, session, "close"), Close(epoch=1).to_wire(), 30.0)
        await until(lambda: worker.table.free == worker.table.slots, "all slots are free")
        assert worker.table.cached_bytes == 0
