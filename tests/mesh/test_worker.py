"""Workers over a real server: what misbehaves inside one, and how it starts, serves on demand and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import nats
import numpy as np
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.client.context import context_of
from meshrl.errors import (
    AgentError,
    EnvError,
    InvalidName,
    MeshError,
    MeshUnreachable,
    SessionLost,
    SessionUnknown,
    UnknownName,
    UsageError,
    WrongEpoch,
    from_wire,
)
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Ask, Close, Grant, Known, Open, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Coroutine, Counter, Gated, Rewards, Waits

ROOT = Path(__file__).parents[2]
SUBJECTS = Subjects()


class Gate:
    """Where an env waits: ``reached`` when it is there, ``open`` to let it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def env(self, at: str, render_mode: str | None = None) -> Gated:
        return Gated(at, self.reached, self.open, render_mode)

    async def wait(self) -> None:
        await until(self.reached.is_set, "the env is there")


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


@contextlib.contextmanager
def registered(name: str, entry_point: Any) -> Iterator[None]:
    gymnasium.register(name, entry_point=entry_point, disable_env_checker=True)
    try:
        yield
    finally:
        del gymnasium.registry[name]


async def granted(raw: Connection, worker: EnvWorker, name: str, session: str = "s1", epoch: int = 1) -> Grant:
    subject = SUBJECTS.worker(worker.id, "open", raw.user)
    answer = await raw.ask(subject, Open(session=session, name=name, epoch=epoch).to_wire(), 10.0)
    assert answer is not None
    return parse(Grant, answer)


@contextlib.asynccontextmanager
async def heard(raw: Connection, body: bytes) -> AsyncIterator[asyncio.Queue[Any]]:
    """Everything that is answered to one ask."""
    answers: asyncio.Queue[Any] = asyncio.Queue()
    rid = raw.request(SUBJECTS.ask, body, lambda data: answers.put_nowait(None if data is None else unpack(data)))
    try:
        yield answers
    finally:
        raw.forget(rid)


# --------------------------------------------------------------------------- on demand


async def test_an_env_on_demand_may_take_its_time_to_construct_and_others_are_served_meanwhile(
    url: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.client.finding.UNKNOWN_S", 1.5)
    with registered("Slow-v0", lambda **_: gate.env("constructor")):
        async with EnvWorker({"counter": Counter}, url, on_demand=True) as worker, Mesh(url) as m, Mesh(url) as other:
            slow = asyncio.create_task(m.env("slow"))
            await gate.wait()
            async with await other.env("CartPole-v1") as env:
                await env.reset()
            assert "CartPole-v1" in {ad.name for ad in await other.envs()}
            async with connect(url) as raw, heard(raw, Ask(kind="env", name="slow").to_wire()) as answers:
                for _ in range(3):  # each a second after the one before: longer than an unknown name is looked for
                    assert (await answers.get())["making"] == ["slow"]
                assert not slow.done()
                gate.open.set()
                async with await slow as env:
                    assert (await env.reset())[0] == 0
                said = await answers.get()
                while said.get("making"):
                    said = await answers.get()
                assert [d["name"] for d in said["descriptions"]] == ["Slow-v0"]
            assert worker.provide("Slow-v0") is not None


async def test_one_constructor_answers_all_who_ask_for_it_meanwhile(url: str, gate: Gate) -> None:
    made = 0

    def make(**_: Any) -> Gated:
        nonlocal made
        made += 1
        return gate.env("constructor")

    with registered("Slow-v0", make):
        async with EnvWorker(url=url, on_demand=True), connect(url) as raw, contextlib.AsyncExitStack() as stack:
            queues = []
            for name in ("slow", "Slow-v0", "slow", "SLOW"):
                queues.append(await stack.enter_async_context(heard(raw, Ask(kind="env", name=name).to_wire())))
            for name, answers in zip(("slow", "Slow-v0", "slow", "SLOW"), queues, strict=True):
                assert (await answers.get())["making"] == [name]
            gate.open.set()
            for answers in queues:
                said = await answers.get()
                while said.get("making"):
                    said = await answers.get()
                assert [d["name"] for d in said["descriptions"]] == ["Slow-v0"]
            assert made == 1


class _Spaceless(gymnasium.Env[Any, Any]):
    pass


def _exits(**_: Any) -> Any:
    raise SystemExit(2)


def _needs(level: int, **_: Any) -> Any:
    return Counter(start=level)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_exits, "SystemExit"),
        (_needs, "--kwargs"),
        (lambda **_: _Spaceless(), "observation_space"),
    ],
    ids=["exits", "needs arguments", "no spaces"],
)
async def test_why_an_env_cannot_be_served_on_demand_is_told_to_the_one_who_asked(
    url: str, make: Any, says: str
) -> None:
    with registered("Odd-v0", make):
        async with EnvWorker(url=url, on_demand=True), Mesh(url) as m:
            with pytest.raises(EnvError, match=says):
                await m.env("Odd-v0", wait=10.0)
            async with await m.env("CartPole-v1") as env:
                await env.reset()


class _ClosesBadly(Counter):
    def close(self) -> None:
        raise RuntimeError("cannot be closed")


async def test_an_env_whose_close_raises_is_served_and_the_operator_is_warned(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with registered("Bad-v0", lambda **_: _ClosesBadly()):
        async with EnvWorker(url=url, on_demand=True), Mesh(url) as m:
            async with await m.env("Bad-v0", wait=10.0) as env:
                assert (await env.reset())[0] == 0
        assert any("cannot be closed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("make", "says"), [(_exits, "SystemExit"), (_Spaceless, "observation_space")])
async def test_what_cannot_be_described_is_an_env_error_at_the_start(url: str, make: Any, says: str) -> None:
    with pytest.raises(EnvError, match=says):
        async with EnvWorker({"odd": make}, url):
            pass


async def test_the_micro_service_tells_what_is_served_now(url: str) -> None:
    async with EnvWorker(url=url, on_demand=True) as worker, Mesh(url) as m:
        async with await m.env("CartPole-v1"):
            nc = await nats.connect(url)
            try:
                told = json.loads((await nc.request(f"meshrl.describe.{worker.id}", timeout=5)).data)
                assert [d["name"] for d in told] == ["CartPole-v1"]
                inbox = nc.new_inbox()
                answers = await nc.subscribe(inbox)

                async def names() -> bool:
                    await nc.publish("$SRV.INFO.meshrl-env", b"", reply=inbox)
                    info = json.loads((await answers.next_msg(timeout=5)).data)
                    return bool(info["metadata"]["names"] == "CartPole-v1")

                await until(names, "the name stands in the service's facts")
            finally:
                await nc.close()


async def test_a_micro_service_whose_answer_would_be_too_long_tells_a_part_of_it(url: str) -> None:
    envs: dict[str, Any] = {f"counter{n}": Counter for n in range(30)}
    async with EnvWorker(envs, url, capabilities={"long": "x" * 240_000}) as worker:
        nc = await nats.connect(url)
        try:
            told = json.loads((await nc.request(f"meshrl.describe.{worker.id}", timeout=5)).data)
        finally:
            await nc.close()
    assert told[0]["name"] == "counter0"
    assert 5 < len(told) < 30
    assert told[-1] == {"left_out": 31 - len(told)}


# --------------------------------------------------------------------------- coroutine envs


async def test_a_step_and_a_close_that_arrive_together_free_the_slot_of_a_coroutine_env(url: str) -> None:
    async with EnvWorker({"waits": Waits}, url, lease_s=60.0) as worker, connect(url) as raw:
        Waits.closed = 0
        sessions = [f"s{number}" for number in range(32)]  # of so many, some arrive in one read with their close
        for session in sessions:
            await granted(raw, worker, "waits", session)
            subject = SUBJECTS.session(worker.id, raw.user, session, "reset")
            assert await raw.ask(subject, pack({"epoch": 1, "lane": 0, "seq": 1}), 5.0)
        for session in sessions:
            step = pack({"epoch": 1, "lane": 0, "seq": 2, "action": "wait"})
            raw.publish(SUBJECTS.session(worker.id, raw.user, session, "step"), step)
            raw.publish(SUBJECTS.session(worker.id, raw.user, session, "close"), Close(epoch=1).to_wire())
        await until(lambda: worker.table.free == 64, "the slots are free")
        assert Waits.closed == len(sessions)


@pytest.mark.parametrize(("action", "type_"), [("exit", "SystemExit"), ("cancel", "CancelledError")])
async def test_a_coroutine_env_that_exits_ends_its_session_alone(url: str, action: str, type_: str) -> None:
    async with EnvWorker({"waits": Waits}, url) as worker, Mesh(url) as m:
        env = await m.env("waits")
        await env.reset()
        with pytest.raises(EnvError) as caught:
            await env.step(action)
        assert caught.value.details["type"] == type_
        await until(lambda: worker.table.free == 64, "its slot is free")
        async with await m.env("waits") as another:
            await another.reset()
            assert (await another.step("hi"))[0] == "HI"


async def test_an_env_that_raises_cancelled_error_inline_or_on_a_thread_ends_its_session_alone(url: str) -> None:
    class Cancels(Counter):
        def step(self, action: int) -> Any:
            if action == 1:
                raise asyncio.CancelledError
            return super().step(action)

    async with EnvWorker({"cancels": Cancels}, url) as worker, Mesh(url) as m:
        for steps in (1, 300):
            env = await m.env("cancels")
            await env.reset()
            for _ in range(steps):
                await env.step(0)
            with pytest.raises(EnvError, match="CancelledError"):
                await env.step(1)
        await until(lambda: worker.table.free == 64, "the slots are free")


class _AsyncClose(Coroutine):
    closed = 0

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        type(self).closed += 1


class _SyncWithAsyncClose(Counter):
    closed = 0

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        type(self).closed += 1


@pytest.mark.parametrize("env_class", [_AsyncClose, _SyncWithAsyncClose])
async def test_a_close_that_is_a_coroutine_function_is_awaited(url: str, env_class: Any) -> None:
    env_class.closed = 0
    async with EnvWorker({"env": env_class}, url) as worker, Mesh(url) as m:
        assert env_class.closed == 1, "the one that was described"
        async with await m.env("env") as env:
            await env.reset()
        await until(lambda: worker.table.free == 64, "the slot is free")
        assert env_class.closed == 2


async def test_what_is_no_coroutine_function_of_a_coroutine_env_blocks_no_other_session(url: str, gate: Gate) -> None:
    class Renders(Coroutine):
        metadata = {"render_modes": ["ansi"]}

        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__()
            self.render_mode = render_mode

        def render(self) -> str:
            gate.reached.set()
            gate.open.wait(60.0)
            return "a picture"

        def paint(self) -> str:
            return self.render()

        @property
        def canvas(self) -> str:
            return self.render()

    async with EnvWorker({"renders": Renders, "counter": Counter}, url, allow=("*",)) as worker, Mesh(url) as m:
        async with await m.env("renders", render_mode="ansi") as env, await m.env("counter") as other:
            await env.reset()
            for op in (env.render, lambda: env.call("paint"), lambda: env.get_attr("canvas")):
                gate.reached.clear()
                gate.open.clear()
                rendering = asyncio.create_task(op())
                await gate.wait()
                await other.reset()
                gate.open.set()
                assert await rendering == "a picture"
            assert worker.table.free == 62


async def test_an_env_that_cannot_be_cancelled_does_not_hold_its_worker(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("meshrl.worker.service.CLOSE_S", 0.2)
    made: list[Waits] = []

    def make() -> Waits:
        made.append(Waits())
        return made[-1]

    async with Mesh(url) as m:
        async with EnvWorker({"waits": make}, url):
            env = await m.env("waits", on_loss="raise")
            await env.reset()
            stepping = asyncio.create_task(env.step("stubborn"))
            await made[-1].under_way.wait()
        assert any("behind" in record.getMessage() for record in caplog.records)
        with pytest.raises(SessionLost):
            await stepping
    made[-1].let_go.set()


# --------------------------------------------------------------------------- what an env returns


@pytest.mark.parametrize(
    "rewards",
    [[np.array([1.0, 2.0])], [None], [10**400], ["much"], [{"a": 1.0}], [1.0, None, 2.0]],
    ids=["array", "none", "huge", "text", "map", "mixed"],
)
async def test_a_reward_that_is_no_number_leaves_the_session_alone(url: str, rewards: list[Any]) -> None:
    async with EnvWorker({"rewards": lambda: Rewards(rewards)}, url), Mesh(url) as m:
        async with await m.env("rewards") as env:
            await env.reset()
            for reward in rewards:
                got = (await env.step(0))[1]
                assert np.array_equal(got, reward)
            state = await env.state()
            assert state.episode_return is None
            assert state.steps == len(rewards)
            await env.reset()
            assert (await env.state()).episode_return == 0.0


async def test_a_render_mode_that_a_factory_cannot_take_is_refused_by_name(url: str) -> None:
    class Plain(Counter):
        def __init__(self) -> None:
            super().__init__()

    async with EnvWorker({"plain": Plain, "fixed": lambda: Counter(render_mode="ansi")}, url) as worker, Mesh(url) as m:
        with pytest.raises(UsageError, match=r"render_mode.*ansi"):
            await m.env("plain", render_mode="ansi")
        async with await m.env("fixed", render_mode="ansi") as env:
            await env.reset()
            assert await env.render() == "count 0"
        await until(lambda: worker.table.free == 64, "nothing is left behind")


# --------------------------------------------------------------------------- opens that wait


async def test_an_open_parked_for_want_of_room_for_answers_is_granted_when_there_is_room(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Counter):
        def step(self, action: int) -> Any:
            return self.count, 0.0, False, False, {"large": "x" * action}

    monkeypatch.setattr("meshrl.protocol.session.MAX_CACHED_BYTES", 100_000)
    async with EnvWorker({"large": Large}, url) as worker, Mesh(url) as m:
        async with await m.env("large") as env:
            await env.reset()
            await env.step(200_000)
            waiting = asyncio.create_task(m.env("large", wait=20.0))
            await until(lambda: worker.waiting_count() == 1, "it is parked")
            await env.step(1)
            async with await waiting as other:
                await other.reset()


async def test_an_open_given_up_while_the_epoch_before_closes_is_not_granted(url: str, gate: Gate) -> None:
    class Closes(Counter):
        closed = 0

        def close(self) -> None:
            type(self).closed += 1
            if type(self).closed == 2:  # the first was the one that was described
                gate.reached.set()
                gate.open.wait(60.0)

    async with EnvWorker({"closes": Closes}, url) as worker, connect(url) as raw:
        await granted(raw, worker, "closes")
        granted_: list[Any] = []
        subject = SUBJECTS.worker(worker.id, "open", raw.user)
        raw.request(subject, Open(session="s1", name="closes", epoch=2).to_wire(), granted_.append)
        await gate.wait()
        close = SUBJECTS.session(worker.id, raw.user, "s1", "close")
        answer = await raw.ask(close, Close(epoch=2).to_wire(), 5.0)
        assert answer is not None
        assert unpack(answer)["existed"] is True
        gate.open.set()
        await until(lambda: worker.table.free == 64, "the slot is free")
        await granted(raw, worker, "closes", session="s2")
        assert granted_ == []


# --------------------------------------------------------------------------- what errors say


async def test_errors_of_sessions_that_are_gone_say_what_to_do(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url) as worker, connect(url) as raw:
        grant = await granted(raw, worker, "counter", epoch=3)

        async def error(session: str, body: dict[str, Any]) -> MeshError:
            subject = SUBJECTS.session(grant.worker, raw.user, session, "reset")
            answer = await raw.ask(subject, pack(body), 5.0)
            assert answer is not None
            return from_wire(unpack(answer)["error"])

        wrong = await error("s1", {"epoch": 2, "lane": 0, "seq": 1})
        assert isinstance(wrong, WrongEpoch)
        assert "open a new session" in str(wrong)
        unknown = await error("s9", {"epoch": 2, "lane": 0, "seq": 1})
        assert isinstance(unknown, SessionUnknown)
        assert "open a new session" in str(unknown)
        answer = await raw.ask(
            SUBJECTS.worker(worker.id, "open", raw.user), Open(session="s2", name="countr").to_wire(), 5.0
        )
        assert answer is not None
        near = from_wire(unpack(answer)["error"])
        assert isinstance(near, UnknownName)
        assert "did you mean counter" in str(near)


def test_a_worker_of_no_names_or_no_slots_is_a_usage_error() -> None:
    for names in ({}, {"": Counter}):
        with pytest.raises(InvalidName, match="at least one name"):
            EnvWorker(names)
    with pytest.raises(UsageError, match="slots"):
        EnvWorker({"counter": Counter}, slots=0)


# --------------------------------------------------------------------------- agents


class _Poisoned:
    """Answers in batches, but not if 13 is among them."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def act(self, obs: int) -> int:
        raise AssertionError("requests are answered by act_batch")

    def act_batch(self, observations: list[int], offered: list[dict[str, Any]]) -> list[int]:
        self.gate.reached.set()
        self.gate.open.wait(60.0)
        if 13 in observations:
            raise ValueError("unlucky")
        return [obs + 1 for obs in observations]


async def test_one_observation_that_an_agent_cannot_take_fails_no_other(url: str, gate: Gate) -> None:
    async with AgentWorker({"poisoned": _Poisoned(gate)}, url), Mesh(url) as m:
        agent = await m.agent("poisoned")
        first = asyncio.create_task(agent.act(0))
        await gate.wait()
        rest = asyncio.gather(*(agent.act(n) for n in range(1, 20)), return_exceptions=True)
        await asyncio.sleep(0)
        await context_of(m).connection.flush()
        gate.open.set()
        assert await first == 1
        for number, answer in enumerate(await rest, 1):
            if number == 13:
                assert isinstance(answer, AgentError)
                assert "unlucky" in str(answer)
            else:
                assert answer == number + 1


async def test_an_act_that_is_sent_again_while_it_waits_is_computed_once(url: str, gate: Gate) -> None:
    seen: list[int] = []

    def slow(obs: int) -> int:
        seen.append(obs)
        gate.reached.set()
        gate.open.wait(60.0)
        return obs

    async with AgentWorker({"slow": slow, "quick": lambda obs: obs}, url), connect(url) as raw:
        answers: asyncio.Queue[Any] = asyncio.Queue()
        subject = SUBJECTS.any_act("slow", raw.user)
        rids = [raw.request(subject, pack({"obs": n}), answers.put_nowait) for n in range(3)]
        await gate.wait()
        for _ in range(5):
            for number, rid in enumerate(rids):
                raw.again(rid, subject, pack({"obs": number}))
        last = raw.request(subject, pack({"obs": 3}), answers.put_nowait)
        # Answered behind them all, by the same worker: it has taken the others, and not only the server.
        assert await raw.ask(SUBJECTS.any_act("quick", raw.user), pack({"obs": 0}), 60.0) is not None
        gate.open.set()
        assert [unpack(await answers.get())["action"] for _ in range(4)] == [0, 1, 2, 3]
        assert seen == [0, 1, 2, 3]
        raw.again(last, subject, pack({"obs": 3}))  # its answer may have been lost
        assert unpack(await answers.get())["action"] == 3


async def test_an_agent_that_cancels_or_returns_what_cannot_travel_goes_on(url: str) -> None:
    def odd(obs: int) -> Any:
        if obs == 1:
            raise asyncio.CancelledError
        return object() if obs == 2 else obs

    async with AgentWorker({"odd": odd}, url), Mesh(url) as m:
        agent = await m.agent("odd")
        for _ in range(120):  # on a thread at first, then inline
            assert await agent.act(0) == 0
            with pytest.raises(AgentError, match="CancelledError"):
                await agent.act(1)
        with pytest.raises(MeshError, match="object"):
            await agent.act(2)
        assert await agent.act(3) == 3


async def test_stateless_coroutine_agents_answer_many_at_once(url: str) -> None:
    barrier = asyncio.Barrier(8)

    async def meets(obs: int, *, seed: int | None) -> tuple[int, int | None]:
        await barrier.wait()
        return obs, seed

    class Acts:
        async def act(self, obs: int) -> int:
            if obs == 1:
                raise SystemExit(1)
            return -obs

    class InBatches(Acts):
        async def act_batch(self, observations: list[int], offered: list[dict[str, Any]]) -> list[int]:
            await asyncio.sleep(0)
            if 13 in observations:
                raise ValueError("unlucky")
            return [obs + 1 for obs in observations]

    agents = {"meets": meets, "acts": Acts(), "batches": InBatches()}
    async with AgentWorker(agents, url), Mesh(url) as m:
        meeting = await m.agent("meets")
        assert await asyncio.gather(*(meeting.act(n, seed=n) for n in range(8))) == [(n, n) for n in range(8)]
        acting = await m.agent("acts")
        with pytest.raises(AgentError, match="SystemExit"):
            await acting.act(1)
        assert await acting.act(2) == -2
        batches = await m.agent("batches")
        answers = await asyncio.gather(*(batches.act(n) for n in range(20)), return_exceptions=True)
        assert isinstance(answers[13], AgentError)
        assert [a for a in answers if not isinstance(a, AgentError)] == [n + 1 for n in range(20) if n != 13]


async def test_a_stateful_coroutine_agent_is_leased_and_others_act_meanwhile(url: str) -> None:
    barrier = asyncio.Barrier(2)

    class Meets:
        closed = 0

        def __init__(self) -> None:
            self.total = 0.0

        async def reset(self, seed: int | None = None) -> None:
            self.total = float(seed or 0)

        async def act(self, obs: Any) -> float:
            await barrier.wait()
            return self.total

        def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
            self.total += reward

        async def close(self) -> None:
            type(self).closed += 1

    async with AgentWorker({"meets": Meets}, url) as worker, Mesh(url) as m:
        one, two = await m.agent("meets", stateful=True), await m.agent("meets", stateful=True)
        await one.reset(seed=1)
        await two.reset(seed=2)
        await one.observe(0.5, False, False)
        assert list(await asyncio.gather(one.act(0), two.act(0))) == [1.5, 2.0]
        state = await one.state()
        assert (state.steps, state.episode_return, state.seed) == (1, 0.5, 1)
        await one.close()
        await two.close()
        await until(lambda: worker.table.free == 64, "the slots are free")
        assert Meets.closed == 2


# --------------------------------------------------------------------------- start and end


async def test_a_start_that_is_cancelled_leaves_nobody_advertised(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from meshrl.bus.micro import advertise_service

    reached, go = threading.Event(), threading.Event()

    async def slow(*args: Any, **kwargs: Any) -> Any:
        reached.set()
        await asyncio.get_running_loop().run_in_executor(None, go.wait, 60.0)
        return await advertise_service(*args, **kwargs)

    monkeypatch.setattr("meshrl.worker.pulse.advertise_service", slow)
    said: list[str] = []
    async with connect(url) as ear:
        await ear.subscribe(SUBJECTS.advertisements, lambda subject, _r, _b: said.append(subject))
        worker = EnvWorker({"counter": Counter}, url)
        starting = asyncio.create_task(worker.__aenter__())
        await until(reached.is_set, "its pulse is about to begin")
        starting.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until(lambda: not _pulses(worker), "its pulse has ended")
        assert await ear.ask(SUBJECTS.worker(worker.id, "probe", ear.user), b"", 5.0) is None, "nobody is there"
        goodbyes = [subject for subject in said if worker.id in subject]
        assert len(goodbyes) in {0, 2}, "what it said, it took back"


async def test_a_server_that_does_not_take_the_second_connection_is_an_error_of_the_start(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_args: Any, **_kwargs: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("meshrl.worker.pulse.advertise_service", never)
    monkeypatch.setattr("meshrl.worker.pulse.START_S", 0.2)
    worker = EnvWorker({"counter": Counter}, url)
    with pytest.raises(MeshUnreachable, match="second connection"):
        async with worker:
            pass
    assert _pulses(worker) == []


def _pulses(worker: EnvWorker) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == f"pulse-{worker.id}"]


async def test_a_drain_is_advertised_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshrl.worker.pulse.ADVERTISE_S", 600.0)
    async with EnvWorker({"counter": Counter}, url) as worker, Mesh(url) as m:
        async for event in m.watch():
            if event.advertisement.draining:
                assert event.advertisement.draining_s is not None
                assert event.advertisement.draining_s > 100
                break
            worker.drain(200.0)


@pytest.mark.skipif(sys.platform == "win32", reason="ends by signal")
@pytest.mark.parametrize("when", ["start", "on demand"])
async def test_a_constructor_that_hangs_does_not_hold_a_process_that_is_told_to_end(url: str, when: str) -> None:
    program = """
        import asyncio, sys, threading
        import gymnasium
        from meshrl import EnvWorker, Mesh
        from meshrl.worker.running import run, until_stopped
        def hangs(**_):
            print("there", flush=True)
            threading.Event().wait()
        async def main(url, when):
            if when == "start":
                async with EnvWorker({"hangs": hangs}, url):
                    raise AssertionError
            gymnasium.register("Hangs-v0", entry_point=hangs, disable_env_checker=True)
            async with EnvWorker(url=url, on_demand=True) as worker, Mesh(url) as m:
                asyncio.get_running_loop().create_task(m.describe("Hangs-v0", wait=600.0))
                await worker.serve_forever()
        run(until_stopped(main(*sys.argv[1:])))
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), url, when, cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60.0):
            assert await process.stdout.readline() == b"there\n"
            os.kill(process.pid, signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_worker_that_serves_on_demand_says_nothing_of_what_it_already_serves_being_made(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, on_demand=True), connect(url) as raw:
        async with heard(raw, Ask(kind="env", name="counter").to_wire()) as answers:
            known = Known.model_validate(await answers.get())
            assert known.making == []
            assert [d.name for d in known.descriptions] == ["counter"]


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "meshrl")
