"""The hostile corpus: at each decoder, and over a real server on every subject that workers and clients listen to."""

import asyncio
import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.mesh import Mesh
from meshrl.errors import MalformedMessage, MeshError
from meshrl.wire import messages, of_recordings, spaces
from meshrl.wire.codec import pack, unpack
from meshrl.wire.frames import OPS, check_lanes, check_reply, check_request, is_of_lanes
from meshrl.wire.parts import Assembler, is_part
from meshrl.wire.subjects import Subjects
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from schemas import hostile
from tests.contract.asking import ANSWER_S, CODES, Entry, answer, bodies, code_of, is_reply
from tests.contract.reading import V1, corpus, fault, titles

FILES = ["values", "parts", "control", "requests", "vectors", "pools", "acts", "replies", "noise", "mutants"]
CORPUS = [entry for file in FILES for entry in corpus("hostile", file)]


def test_the_corpus_is_what_its_program_writes() -> None:
    assert {path.stem for path in (V1 / "hostile").iterdir()} == set(FILES)
    for file, entries in hostile.corpus().items():
        written = [{**entry._asdict(), "messages": [body.hex() for body in entry.messages]} for entry in entries]
        assert written == corpus("hostile", file)


# --------------------------------------------------------------------------- at each decoder


def decode(decoder: str, data: bytes) -> object:
    if decoder == "value":
        return unpack(data)
    if decoder == "request" or ":" in decoder:
        body: Any = unpack(data)
        return check_lanes(body, messages.MAX_NUM_ENVS) if is_of_lanes(body) else check_request(body)
    if decoder == "act":
        return unpack(data)
    if decoder == "reply":
        return check_reply(unpack(data), 1)
    return messages.parse(vars(messages).get(decoder) or getattr(of_recordings, decoder), data)


DECODED = [
    e for e in CORPUS if ":" not in e["decoder"] and e["decoder"] not in {"part", "act"} and e["expect"] != "any"
]
MUTANTS = corpus("hostile", "mutants")


@pytest.mark.parametrize("entry", DECODED, ids=titles(DECODED))
def test_a_decoder_raises_the_expected_error_and_no_other(entry: Entry) -> None:
    if entry["expect"] == "accepted":
        decode(entry["decoder"], bodies(entry)[0])
        return
    with pytest.raises(MeshError) as raised:
        decode(entry["decoder"], bodies(entry)[0])
    assert raised.value.code == entry["expect"]


@pytest.mark.parametrize("entry", MUTANTS, ids=titles(MUTANTS))
def test_a_decoder_raises_typed_errors_alone(entry: Entry) -> None:
    for decoder in ("value", "request", "reply", "Open", "Renew", "Probe", "Drain", "Ask", "Close"):
        with contextlib.suppress(MeshError):
            decode(decoder, bodies(entry)[0])


def test_random_bodies_get_past_their_first_bytes_and_mutants_are_near_right_ones() -> None:
    """Otherwise all of them would be one case."""
    random = [bodies(e)[0] for e in corpus("hostile", "noise") if e["name"].startswith("random body")]
    assert len({body[:1] for body in random}) >= 30
    assert len({len(body) for body in random}) >= 60

    def values_before_the_fault(body: bytes) -> int:
        reader = msgpack.Unpacker(raw=True, strict_map_key=False)
        reader.feed(body[1:])
        count = 0
        with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
            for _ in reader:
                count += 1
        return count

    assert sum(values_before_the_fault(body) > 3 for body in random) >= 60
    unharmed = [entry for entry in MUTANTS if not _refused(entry)]
    assert {entry["decoder"] for entry in unharmed} == {entry["decoder"] for entry in MUTANTS}, (
        "some of each pass the decoder, and reach what is behind it"
    )
    assert len(unharmed) < len(MUTANTS) / 2


def _refused(entry: Entry) -> bool:
    try:
        decode(entry["decoder"], bodies(entry)[0])
    except MeshError:
        return True
    return False


PARTS = corpus("hostile", "parts")


@pytest.mark.parametrize("entry", PARTS, ids=titles(PARTS))
def test_parts_are_joined_refused_or_kept_within_bounds(entry: Entry) -> None:
    joining = Assembler()
    *before, last = bodies(entry)
    for body in before:
        assert joining.feed("a peer", body, 0.0) is None
    if entry["expect"] == "ignored":
        assert joining.feed("a peer", last, 0.0) is None
        assert joining.buffered_bytes < 1000
        return
    with pytest.raises(MalformedMessage):
        messages.parse(messages.Ask, joining.feed("a peer", last, 0.0) or b"")
    assert joining.buffered_bytes == 0


SPACES = [e for e in corpus("hostile", "acts") if "space" in e["name"]]


@pytest.mark.parametrize("entry", SPACES, ids=titles(SPACES))
def test_a_hostile_space_is_refused_before_it_takes_memory(entry: Entry) -> None:
    with pytest.raises(MalformedMessage):
        spaces.rebuild(unpack(bodies(entry)[0])["action_space"])


def test_every_truncation_of_every_golden_message_is_refused() -> None:
    for file in ("frames", "control", "arrays", "values"):
        for vector in corpus("golden", file):
            whole = bytes.fromhex(vector["hex"])
            for at in range(len(whole)):
                with pytest.raises(MalformedMessage):
                    unpack(whole[:at])


# --------------------------------------------------------------------------- over the bus


def still(obs: Any, deterministic: bool = False, action_space: Any = None) -> int:
    """Acts alike whatever it sees."""
    return 0


class Counting:
    """An agent that remembers."""

    def __init__(self) -> None:
        self.acts = 0

    def act(self, obs: Any, action_space: Any = None) -> int:
        self.acts += 1
        return self.acts


# Nobody renews the sessions that are opened by hand, and a busy machine takes its time over thousands of messages.
LEASE_S = 600.0


def env_worker(server: EmbeddedServer) -> EnvWorker:
    return EnvWorker({"cartpole": "CartPole-v1"}, url=server.url, lease_s=LEASE_S)


def agent_worker(server: EmbeddedServer) -> AgentWorker:
    agents = {"still": still, "still too": still, "counting": Counting}
    return AgentWorker(agents, url=server.url, lease_s=LEASE_S)


async def take_every_slot(worker: EnvWorker, connection: Connection) -> None:
    """Open a vector over all of a worker's slots, and close it: granted when none of them is taken any more."""
    everything = {"session": "everything", "name": "cartpole", "form": "vector", "num_envs": worker.table.slots}
    body = messages.Open.model_validate({**everything, "park_s": ANSWER_S}).to_wire()
    grant = await answer(connection, Subjects().worker(worker.id, "open", connection.user), [body])
    assert messages.parse(messages.Grant, grant).load.free == 0
    close = Subjects().session(worker.id, connection.user, "everything", "close")
    assert unpack(await answer(connection, close, [messages.Close(epoch=1).to_wire()]))["existed"]


def listened_to(env: EnvWorker, agent: AgentWorker, user: str) -> dict[str, list[str]]:
    """The subjects of requests, by the name of their operation in the AsyncAPI document; sessions do not exist."""
    subjects = Subjects()
    workers = (env.id, agent.id)
    return {
        "describe": [subjects.ask],
        "open": [subjects.worker(worker, "open", user) for worker in workers],
        "open_anywhere": [subjects.any_open("cartpole", user)],
        "probe": [subjects.worker(worker, "probe", user) for worker in workers],
        "renew": [subjects.worker(worker, "renew", user) for worker in workers],
        "drain": [subjects.worker(worker, "drain", user) for worker in workers],
        "watch": [subjects.tapping(user)],
        **{what: [subjects.recordings(what, user)] for what in ("read", "keep")},
        "act_at_worker": [subjects.worker(agent.id, "act", user)],
        "act_anywhere": [subjects.any_act("still", user)],
        **{
            f"session_{op}": [subjects.session(worker, user, "hostile", op) for worker in workers]
            for op in [*OPS, "close"]
        },
    }


DECODER_OF = {
    "describe": "Ask",
    "open": "Open",
    "open_anywhere": "Open",
    "probe": "Probe",
    "renew": "Renew",
    "drain": "Drain",
    "watch": "Watch",
    "read": "Read",
    "keep": "Keep",
    "act_at_worker": "act",
    "act_anywhere": "act",
    "session_close": "Close",
    **{f"session_{op}": "request" for op in OPS},
}
QUEUED = {"open_anywhere", "act_anywhere", "read", "keep"}


def expected(operation: str, entry: Entry) -> str | None:
    """The code that the corpus tells for an entry on a subject; None where it does not tell."""
    if entry["expect"] == "any":
        return None
    if entry["decoder"] == "part":
        return "malformed_message" if operation in QUEUED else entry["expect"]
    if entry["decoder"] in {"value", DECODER_OF[operation]}:
        return str(entry["expect"])
    return None


def sent_to(operation: str) -> list[Entry]:
    """All, but those that the worker would obey: it would leave."""
    return [entry for entry in CORPUS if operation != "drain" or not _drains(entry)]


def _drains(entry: Entry) -> bool:
    try:
        messages.parse(messages.Drain, bodies(entry)[-1])
    except MeshError:
        return False
    return True


def is_answered(operation: str, entry: Entry) -> bool:
    """An ask for what a worker does not serve is for others to answer; who watches is told nothing."""
    if operation == "watch" or expected(operation, entry) == "ignored":
        return False
    try:
        ask = messages.parse(messages.Ask, bodies(entry)[-1])
    except MeshError:
        return True
    return operation != "describe" or (ask.name is None and ask.worker is None)


def check_answer(operation: str, data: bytes, entry: Entry, codes: set[str]) -> None:
    code = code_of(data)
    told = expected(operation, entry)
    assert told in {None, code}, f"{operation}: {entry['name']}: {code} and not {told}"
    assert code in (CODES if entry["expect"] == "any" else codes) or code == "accepted", f"{operation}: {entry['name']}"
    assert is_reply(operation, data), f"{operation}: {entry['name']}: {data[:200]!r}"


# What a refusal may be where an entry meets a subject that it was not made for.
REFUSALS = {"malformed_message", "unsupported_version", "session_unknown", "unknown_name"}


async def use_normally(mesh: Mesh) -> None:
    env = await mesh.env("cartpole")
    obs, _ = await env.reset(seed=1)
    assert obs.shape == (4,)
    obs, reward, *_ = await env.step(np.int64(1))
    assert (obs.dtype, reward) == (np.float32, 1.0)
    agent = await mesh.agent("still")
    assert await agent.act(obs) == 0
    await env.close()


@pytest.mark.usefixtures("nothing_runs")
async def test_every_hostile_message_on_every_subject_is_answered_by_an_error_and_harms_nobody(
    server: EmbeddedServer,
) -> None:
    async with (
        env_worker(server) as env,
        agent_worker(server) as agent,
        connect(server.url) as connection,
        Mesh(server.url) as mesh,
    ):
        held = await mesh.env("cartpole")
        vector, pool = await mesh.vector("cartpole", 3), await mesh.pool("cartpole", 3)
        await held.reset(seed=1)
        await vector.reset(seed=1)
        await pool.reset(seed=1)
        silent = 0
        for operation, subjects in listened_to(env, agent, connection.user).items():
            for subject in subjects:
                loud = [entry for entry in sent_to(operation) if is_answered(operation, entry)]
                waits = [answer(connection, subject, bodies(entry)) for entry in loud]
                for entry, data in zip(loud, await asyncio.gather(*waits), strict=True):
                    check_answer(operation, data, entry, REFUSALS)
                for entry in (e for e in sent_to(operation) if e not in loud):
                    silent += 1
                    for body in bodies(entry):
                        connection.publish(subject, body)
        assert silent > 0
        await use_normally(mesh)
        await held.step(np.int64(0))
        await vector.step(np.array([0, 1, 0]))
        await pool.send(np.array([1, 0, 1]), (await pool.recv(min=3)).env_ids)
        assert not (await pool.recv(min=3)).first.any()
        for session in (held, vector, pool):
            await session.close()
        await take_every_slot(env, connection)


@pytest.mark.usefixtures("nothing_runs")
async def test_what_has_no_reply_subject_is_dropped_in_silence(server: EmbeddedServer) -> None:
    async with (
        env_worker(server) as env,
        agent_worker(server) as agent,
        connect(server.url) as connection,
        Mesh(server.url) as mesh,
    ):
        for operation, subjects in listened_to(env, agent, connection.user).items():
            for subject, entry in itertools.product(subjects, sent_to(operation)):
                for body in bodies(entry):
                    if not is_part(body):  # of those the bus tells its owner: no request has them without a reply
                        connection.publish(subject, body)
        await connection.flush()
        await use_normally(mesh)


def _ops(kind: str) -> list[Entry]:
    return [entry for entry in corpus("hostile", "requests") if entry["decoder"].startswith(f"{kind}:")]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("kind", "name"), [("env", "cartpole"), ("agent", "counting")])
async def test_a_session_refuses_hostile_requests_and_goes_on(server: EmbeddedServer, kind: str, name: str) -> None:
    async with env_worker(server) as env, agent_worker(server) as agent, connect(server.url) as connection:
        worker = env if kind == "env" else agent
        subjects = Subjects()
        for number, entry in enumerate(_ops(kind)):
            session = f"hostile-{number}"

            async def ask(op: str, body: bytes, session: str = session) -> bytes:
                subject = subjects.session(worker.id, connection.user, session, op)
                return bytes(await answer(connection, subject, [body]))

            open_ = messages.Open.model_validate({"session": session, "kind": kind, "name": name})
            subject = subjects.worker(worker.id, "open", connection.user)
            messages.parse(messages.Grant, await answer(connection, subject, [open_.to_wire()]))
            op = entry["decoder"].partition(":")[2]
            data = await ask(op, bodies(entry)[0])
            assert (code_of(data), unpack(data)["seq"]) == (entry["expect"], 1), entry["name"]
            # the same again is the same answer; and the session goes on
            assert await ask(op, bodies(entry)[0]) == data
            lane = {"epoch": 1, "lane": 0}
            assert code_of(await ask("reset", pack({**lane, "seq": 2, "seed": 1}))) == "accepted"
            state = unpack(await ask("state", pack({**lane, "seq": 3})))["state"]
            assert (state["phase"], state["episode"], state["seed"]) == ("running", 1, 1)
            closed = await ask("close", messages.Close(epoch=1).to_wire())
            assert messages.parse(messages.Closed, closed).existed


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("kind", "name"), [("env", "cartpole"), ("agent", "counting")])
async def test_a_session_in_use_answers_noise_and_mutants_and_harms_no_other(
    server: EmbeddedServer, kind: str, name: str
) -> None:
    """Whatever they do to their own session, each is answered, and the session closes."""
    subjects = Subjects()
    async with (
        env_worker(server) as env,
        agent_worker(server) as agent,
        connect(server.url) as connection,
        Mesh(server.url) as mesh,
    ):
        worker, user = env if kind == "env" else agent, connection.user
        held = await mesh.env("cartpole")
        await held.reset(seed=1)
        for operation in sorted({e["decoder"] for e in MUTANTS if e["decoder"].startswith(f"{kind}:")}):
            op = operation.partition(":")[2]
            session = f"noisy-{op}"
            open_ = messages.Open.model_validate({"session": session, "kind": kind, "name": name})
            await answer(connection, subjects.worker(worker.id, "open", user), [open_.to_wire()])
            renew = messages.Renew(sessions=[(session, 1)])  # or the grant lapses in noise, which is no use of it
            await answer(connection, subjects.worker(worker.id, "renew", user), [renew.to_wire()])
            # Noise first: a mutant may be an action that the env raises at, which ends the session.
            codes = set()
            for entry in corpus("hostile", "noise") + [e for e in MUTANTS if e["decoder"] == operation]:
                data = await answer(connection, subjects.session(worker.id, user, session, op), bodies(entry))
                told = {"malformed_message"} if entry["expect"] != "any" else CODES | {"accepted"}
                codes.add(code_of(data))
                assert codes <= told | {"malformed_message"}, entry["name"]
                assert "" in {fault(f"{op}.reply", data), fault("error", data)}, f"{entry['name']}: {data[:200]!r}"
            close = subjects.session(worker.id, user, session, "close")
            closed = await answer(connection, close, [messages.Close(epoch=1).to_wire()])
            assert messages.parse(messages.Closed, closed).existed or "env_error" in codes
        await held.step(np.int64(0))
        await held.close()
        await use_normally(mesh)


@pytest.mark.usefixtures("nothing_runs")
async def test_hostile_advertisements_do_not_disturb_a_client(server: EmbeddedServer) -> None:
    subjects = Subjects()
    async with (
        env_worker(server) as env,
        agent_worker(server),
        connect(server.url) as connection,
        Mesh(server.url) as mesh,
    ):
        before = [(ad.name, ad.worker) for ad in await mesh.envs()]
        assert before == [("cartpole", env.id)]
        theirs = subjects.advertisement("env", "cartpole", env.id)
        mine = subjects.advertisement("env", "trap", "mallory")
        for entry in CORPUS:
            if entry["decoder"] == "part":
                continue
            for subject in (theirs, mine):
                connection.publish(subject, bodies(entry)[0])
        # A well-formed one that speaks for another worker: it would send that worker away, or its clients elsewhere.
        claim = {"kind": "env", "name": "cartpole", "worker": env.id, "slots": 1, "free": 1, "description": "x"}
        connection.publish(mine, msgpack.packb({**claim, "left": True}))
        connection.publish(mine, msgpack.packb({**claim, "worker": "mallory"}))
        marker = {**claim, "name": "marker", "worker": "m1"}
        connection.publish(subjects.advertisement("env", "marker", "m1"), msgpack.packb(marker))
        seen = []
        async for event in mesh.watch():
            seen.append((event.kind, *event.key))
            if event.key == ("env", "marker", "m1"):
                break
        assert {key for key in seen if key[3] != "m1" and key[1] == "env"} == {("joined", "env", "cartpole", env.id)}
        await use_normally(mesh)


def test_every_error_code_that_the_corpus_expects_is_one_of_the_contract() -> None:
    assert {entry["expect"] for entry in CORPUS} <= CODES | {"accepted", "ignored", "any"}


def test_the_pickle_of_the_corpus_would_run_if_anybody_let_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the absence of its file would prove nothing.
    import pickle

    monkeypatch.chdir(tmp_path)
    entry = next(e for e in CORPUS if e["name"] == "a pickle as msgpack-numpy sends object arrays")
    pickle.loads(msgpack.unpackb(bodies(entry)[0])["x"][b"data"]).close()
    assert [path.name for path in tmp_path.iterdir()] == [hostile.EVIDENCE]
    assert json.dumps(entry)
