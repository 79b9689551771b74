"""The hostile corpus for vectors and pools: over a real server, each message in a session of three sub-environments."""

import asyncio
from typing import Any, NamedTuple

import numpy as np
import pytest

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.wire import messages
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import is_of_lanes
from meshrl.wire.subjects import Subjects
from meshrl.worker.env_worker import EnvWorker
from schemas.entry import LANE, LANES
from schemas.hostile_vectors import NUM_ENVS
from tests.contract.asking import ANSWER_S, CODES, Entry, answer, answers_of_lanes, bodies, code_of
from tests.contract.reading import corpus, fault, titles

FORMS = ["vector", "pool"]
SLOTS = 12
SUBJECTS = Subjects()


def entries(form: str, file: str) -> list[Entry]:
    return [entry for entry in corpus("hostile", file) if entry["decoder"].startswith(f"{form}:")]


class Opened(NamedTuple):
    """A session of a worker, asked by hand."""

    connection: Connection
    worker: EnvWorker
    id: str
    form: str

    async def ask(self, op: str, body: bytes) -> bytes:
        subject = SUBJECTS.session(self.worker.id, self.connection.user, self.id, op)
        return bytes(await answer(self.connection, subject, [body]))

    def request(self, seq: int, **fields: Any) -> bytes:
        """A request of all sub-environments."""
        if self.form == "vector":
            return pack({"epoch": 1, "lane": 0, "seq": seq, **fields})
        seqs = np.full(NUM_ENVS, seq, np.int64)
        return pack({"epoch": 1, "lanes": np.arange(NUM_ENVS, dtype=np.int64), "seqs": seqs, **fields})

    async def reset(self, seq: int) -> None:
        """Begin episodes; a pool's begin one by one."""
        body = self.request(seq, seeds=[1, 2, 3])
        if self.form == "vector":
            assert code_of(await self.ask("reset", body)) == "accepted"
        else:
            subject = SUBJECTS.session(self.worker.id, self.connection.user, self.id, "reset")
            assert all(told["first"] for told in await answers_of_lanes(self.connection, subject, body))

    async def close(self) -> bool:
        return messages.parse(messages.Closed, await self.ask("close", messages.Close(epoch=1).to_wire())).existed


async def opened(connection: Connection, worker: EnvWorker, id_: str, form: str, num_envs: int = NUM_ENVS) -> Opened:
    """A new session; waits for slots that are about to be free."""
    place = {"session": id_, "name": "cartpole", "form": form, "num_envs": num_envs}
    asked = {**place, "park_s": ANSWER_S, "digests": "all"}
    subject = SUBJECTS.worker(worker.id, "open", connection.user)
    grant = await answer(connection, subject, [messages.Open.model_validate(asked).to_wire()])
    messages.parse(messages.Grant, grant)
    return Opened(connection, worker, id_, form)


async def no_slot_is_lost(connection: Connection, worker: EnvWorker) -> None:
    """All of them together are granted to one session."""
    everything = await opened(connection, worker, "everything", "vector", SLOTS)
    assert await everything.close()


def seqs_of(body: Any) -> set[int]:
    """The sequence numbers that a request means, or an answer names."""
    return set(body["seqs"].tolist()) if "seqs" in body else {body["seq"]}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("form", FORMS)
async def test_a_session_of_several_refuses_hostile_requests_and_goes_on(server: EmbeddedServer, form: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS) as worker:
        async with connect(server.url) as connection:
            for number, entry in enumerate(entries(form, f"{form}s")):
                session = await opened(connection, worker, f"hostile-{number}", form)
                op, (body,) = entry["decoder"].partition(":")[2], bodies(entry)
                (seq,) = seqs_of(unpack(body))
                if seq == 2:
                    await session.reset(1)
                data = await session.ask(op, body)
                told = unpack(data)
                assert (code_of(data), seqs_of(told)) == (entry["expect"], {seq}), f"{entry['name']}: {told}"
                assert fault("error", data) == ""
                if form == "pool" and op == "replay":  # each lane by itself, so that there may be several answers
                    assert await session.close()
                    continue
                if form == "pool":
                    assert told["lanes"].tolist() == [0, 1, 2]
                # the same again is the same answer; and the session goes on
                assert await session.ask(op, body) == data
                await session.reset(seq + 1)
                stepped = unpack(await session.ask("step", session.request(seq + 2, actions=np.array([1, 0, 1]))))
                assert stepped["rewards"].tolist() == [1.0] * len(stepped["rewards"])
                assert await session.close()
            await no_slot_is_lost(connection, worker)


IMPLEMENTED: list[tuple[str, dict[str, Any], str]] = [
    ("step", {"actions": np.array([1, 0, 1])}, "reset_needed"),
    ("render", {}, "reset_needed"),
    ("reset", {"mask": np.array([True, False, True])}, "usage"),
    ("reset", {"seeds": [1]}, "malformed_message"),
    ("reset", {"seeds": [-1, 0, 1]}, "invalid_seed"),
    ("reset", {"options": [1]}, "malformed_message"),
    ("get_attr", {"name": "gravity"}, "not_allowed"),
    ("is_wrapped", {"wrapper": "a:B"}, "not_allowed"),
    ("fly", {}, "not_allowed"),
    ("reset", {"seeds": [1, 2, 3]}, "accepted"),
    ("step", {}, "malformed_message"),
    ("step", {"actions": [1, 0, 1]}, "malformed_message"),
    ("step", {"actions": np.array([1, 0])}, "malformed_message"),
    ("step", {"actions": np.array(1)}, "malformed_message"),
    ("step", {"actions": np.array([1, 0, 1])}, "accepted"),
]


@pytest.mark.usefixtures("nothing_runs")
async def test_a_vector_implementation_refuses_hostile_requests_and_goes_on(server: EmbeddedServer) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS, vectors="gymnasium") as worker:
        async with connect(server.url) as connection:
            asked = {"session": "implemented", "name": "cartpole", "form": "vector", "num_envs": NUM_ENVS}
            subject = SUBJECTS.worker(worker.id, "open", connection.user)
            for fields in ({}, {"autoreset_mode": "SameStep", "seeding": "implementation"}, {"form": "pool"}):
                data = await answer(connection, subject, [pack({**asked, **fields})])
                assert (code_of(data), fault("error", data)) == ("usage", ""), fields
            grant = await answer(connection, subject, [pack({**asked, "seeding": "implementation"})])
            assert messages.parse(messages.Grant, grant).load.free == SLOTS - NUM_ENVS
            session = Opened(connection, worker, "implemented", "vector")
            for seq, (op, fields, code) in enumerate(IMPLEMENTED, 1):
                data = await session.ask(op, session.request(seq, **fields))
                assert (code_of(data), seqs_of(unpack(data))) == (code, {seq}), f"{op}: {fields}: {data!r}"
            assert await session.close()


# Op and body of requests whose head is right for another form of session: nothing is begun by them.
OF_ANOTHER_FORM = [
    ("single", "step", {**LANES, "actions": 0}),
    ("vector", "step", {**LANES, "actions": 0}),
    ("vector", "step", {**LANE, "lane": 1, "actions": 0}),
    ("pool", "step", {**LANE, "actions": 0}),
    ("pool", "reset", LANE),
]


@pytest.mark.usefixtures("nothing_runs")
async def test_a_head_of_another_form_of_session_is_malformed_and_uses_up_no_seq(server: EmbeddedServer) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS) as worker:
        async with connect(server.url) as connection:
            for number, (form, op, body) in enumerate(OF_ANOTHER_FORM):
                num_envs = 1 if form == "single" else NUM_ENVS
                session = await opened(connection, worker, f"other-{number}", form, num_envs)
                data = await session.ask(op, pack(unpack(pack(body))))
                assert (code_of(data), fault("error", data)) == ("malformed_message", "")
                if form == "single":
                    assert code_of(await session.ask("reset", pack({**LANE, "seed": 1}))) == "accepted"
                else:
                    await session.reset(1)
                assert await session.close()
            session = await opened(connection, worker, "beyond", "pool")
            beyond = {"epoch": 1, "lanes": np.array([0, 3]), "seqs": np.array([1, 1])}
            assert code_of(await session.ask("reset", pack(beyond))) == "malformed_message"
            await session.reset(1)
            assert await session.close()
            await no_slot_is_lost(connection, worker)


OPENS: list[tuple[dict[str, Any], str]] = [
    ({"form": "single", "num_envs": 2}, "malformed_message"),
    ({"form": "vector", "num_envs": SLOTS + 1}, "usage"),
    ({"form": "pool", "num_envs": messages.MAX_NUM_ENVS}, "usage"),
    ({"form": "vector", "num_envs": 2, "seeding": "implementation"}, "usage"),
    ({"form": "pool", "num_envs": 2, "seeding": "implementation"}, "usage"),
    ({"form": "vector", "num_envs": 2, "kwargs": {"gravity": 1.0}}, "kwargs_not_allowed"),
    ({"form": "vector", "num_envs": 2, "name": "pendulum"}, "unknown_name"),
    ({"form": "pool", "num_envs": 2, "kind": "agent"}, "unknown_name"),
]


@pytest.mark.usefixtures("nothing_runs")
async def test_an_open_of_what_a_worker_cannot_hold_is_refused_and_takes_no_slot(server: EmbeddedServer) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS) as worker:
        async with connect(server.url) as connection:
            subject = SUBJECTS.worker(worker.id, "open", connection.user)
            for fields, code in OPENS:
                body = pack({"session": "refused", "name": "cartpole", **fields})
                assert fault("open", body) == ""
                data = await answer(connection, subject, [body])
                assert (code_of(data), fault("error", data)) == (code, ""), fields
            await no_slot_is_lost(connection, worker)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("form", FORMS)
async def test_noise_in_a_session_of_several_is_refused_and_the_session_goes_on(
    server: EmbeddedServer, form: str
) -> None:
    noise = corpus("hostile", "noise")
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS) as worker:
        async with connect(server.url) as connection:
            session = await opened(connection, worker, "noisy", form)
            told = await asyncio.gather(*(session.ask("step", bodies(entry)[0]) for entry in noise))
            assert {code_of(data) for data in told} == {"malformed_message"}
            await session.reset(1)
            assert await session.close()
            await no_slot_is_lost(connection, worker)


MUTANTS = [(form, entry) for form in FORMS for entry in entries(form, "mutants")]


@pytest.mark.usefixtures("nothing_runs")
async def test_mutants_in_sessions_of_several_are_answered_and_lose_no_slot(server: EmbeddedServer) -> None:
    """Each in a session of its own, after a reset: whatever they do to it, it is answered, and the slots are free."""
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, slots=SLOTS) as worker:
        async with connect(server.url) as connection:
            codes = set()
            for number, (form, entry) in enumerate(MUTANTS):
                session = await opened(connection, worker, f"mutant-{number}", form)
                await session.reset(1)
                op = entry["decoder"].partition(":")[2]
                data = await session.ask(op, bodies(entry)[0])
                codes.add(code_of(data))
                assert code_of(data) in CODES | {"accepted"}, entry["name"]
                assert "" in {fault(f"{form}_{op}.reply", data), fault("error", data)}, f"{entry['name']}: {data!r}"
                await session.close()
            assert {"accepted", "malformed_message", "sequence_gap"} <= codes, "they reach what is behind the decoder"
            await no_slot_is_lost(connection, worker)


def test_every_op_of_vectors_and_pools_has_hostile_entries() -> None:
    from schemas.ops import POOL_OPS, VECTOR_OPS

    for form, ops in (("vector", VECTOR_OPS), ("pool", POOL_OPS)):
        for told in (entries(form, f"{form}s"), entries(form, "mutants")):
            assert {entry["decoder"].partition(":")[2] for entry in told} >= set(ops)
            assert len(set(titles(told))) == len(told)
        assert all(is_of_lanes(unpack(bodies(e)[0])) == (form == "pool") for e in entries(form, f"{form}s"))
