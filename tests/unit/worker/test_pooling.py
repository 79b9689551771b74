"""A worker's pools without a server: which requests run, what is answered together, and how a pool ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl.errors import from_wire
from meshrl.protocol.pace import FAST_STEPS
from meshrl.protocol.session import Session, State
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description, Open, Vectors
from meshrl.worker import pooling, spread
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from tests.mesh.pool_envs import ENDS, RAISES, Gated, GatedCoroutine, Gates
from tests.unit.worker.conftest import PREFIX, Bare


class Pools(Bare):
    """A worker of pools of three."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(make, slots=3)
        self.replies.marks = []
        self.admission.served = {"env": Description(kind="env", name="env", worker="w1", vectors=Vectors())}

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[Any, Description]:
        if open_.form == "single":
            env = HostedEnv(self.make(), name="env", session=open_.session, worker="w1", allow=(), threads=self.threads)
            return env, description
        envs = [self.make() for _ in range(open_.num_envs)]
        if open_.form == "vector":
            return HostedVector(envs, open_, allow=(), threads=self.threads), description
        return HostedPool(envs, open_, threads=self.threads), description

    def lanes(self, op: str, which: list[int], seq: int | list[int], **fields: Any) -> str:
        """One request of some lanes; gives the reply subject."""
        reply = f"{op} {which} {seq} {len(self.replies.sent)} {id(fields)}"
        seqs = np.full(len(which), seq, np.int64) if isinstance(seq, int) else np.array(seq, np.int64)
        body = pack({"epoch": 1, "lanes": np.array(which, np.int64), "seqs": seqs, **fields})
        self.execution.on_session(f"{PREFIX}anon.s1.{op}", reply, body)
        return reply

    def step(self, which: list[int], seq: int | list[int], actions: list[int] | None = None) -> str:
        return self.lanes("step", which, seq, actions=np.array(actions or [0] * len(which)))

    def told(self, reply: str) -> list[Any]:
        return [body for to, body in self.replies.sent if to == reply]

    async def all_of(self, reply: str, count: int) -> dict[int, Any]:
        """Answers to ``reply`` for ``count`` lanes: of each lane its observation, or its error's code."""
        got: dict[int, Any] = {}
        at = 0
        while len(got) < count:
            at += 1
            body = await self.replies.to(reply, at)
            values = [from_wire(body["error"]).code] * 9 if "error" in body else body["obs"].tolist()
            for lane, value in zip(body["lanes"].tolist(), values, strict=False):
                assert lane not in got, "answered twice"
                got[lane] = value
        return got


GATES = Gates()


@pytest.fixture(params=[Gated, GatedCoroutine], ids=["threads", "coroutines"])
def make(request: pytest.FixtureRequest) -> Any:
    GATES.at.clear()
    yield lambda: request.param(GATES)
    GATES.open()


async def pool(make: Any, *, reset: bool = True) -> tuple[Pools, Session]:
    worker = Pools(make)
    session = await worker.opened(form="pool", num_envs=3)
    if reset:
        await worker.all_of(worker.lanes("reset", [0, 1, 2], 1), 3)
    return worker, session


async def test_a_request_runs_once_and_its_answers_can_be_had_again(make: Any) -> None:
    worker, _ = await pool(make)
    first = await worker.all_of(worker.step([2, 0], 2), 2)
    assert first == {2: 1, 0: 1}
    assert await worker.all_of(worker.step([2, 0], 2), 2) == first
    assert (await worker.all_of(worker.step([0], 2), 1))[0] == 1
    assert GATES.at == {0: 2}
    assert await worker.all_of(worker.step([0, 1, 2], [3, 2, 3]), 3) == {0: 2, 1: 1, 2: 2}


async def test_an_answer_that_is_repeated_has_the_mark_of_its_first_sending(make: Any) -> None:
    """By it a large one that is still being sent is known, and several are told apart."""
    worker, _ = await pool(make)
    await worker.all_of(worker.step([2], 2), 1)
    await worker.all_of(worker.step([0], 2), 1)
    worker.replies.marks.clear()
    again = worker.step([1, 0, 2], [9, 2, 2])
    await worker.all_of(again, 3)
    assert worker.replies.marks == [(0, 2), (2, 2), (1, 9)]


async def test_a_repeated_request_runs_only_the_lanes_that_had_not_run(make: Any) -> None:
    worker, _ = await pool(make)
    await worker.all_of(worker.step([1], 2, [5]), 1)
    reply = worker.step([0, 1, 2], 2, [4, 5, 6])
    assert await worker.all_of(reply, 3) == {0: 1, 1: 1, 2: 1}
    rewards: dict[int, float] = {}
    for body in worker.told(reply):
        rewards.update(zip(body["lanes"].tolist(), body["rewards"].tolist(), strict=True))
    assert rewards == {0: 4.0, 1: 5.0, 2: 6.0}
    assert GATES.at == {4: 1, 5: 1, 6: 1}


async def test_what_is_running_is_joined_and_answered_to_the_newest_subject(make: Any) -> None:
    worker, session = await pool(make)
    GATES.shut(1)
    old = worker.step([0, 1], 2, [1, 0])
    await worker.all_of(old, 1)
    new = worker.step([0, 1], 2, [1, 0])
    assert len(await worker.all_of(new, 1)) == 1, "what has its answer gets it again at once"
    assert session.running
    GATES.open()
    assert await worker.all_of(new, 2) == {0: 1, 1: 1}
    assert len(worker.told(old)) == 1
    assert GATES.at == {0: 1, 1: 1}


async def test_lanes_in_one_message_that_are_refused_do_not_keep_the_others_from_running(make: Any) -> None:
    worker, _ = await pool(make)
    got = await worker.all_of(worker.step([0, 1, 2], [2, 5, 9]), 3)
    assert got == {0: 1, 1: "sequence_gap", 2: "sequence_gap"}
    reply = worker.step([1, 2], 2)
    assert await worker.all_of(reply, 2) == {1: 1, 2: 1}


async def test_a_request_that_is_refused_takes_a_seq_and_touches_no_env(make: Any) -> None:
    worker, _ = await pool(make, reset=False)
    assert await worker.all_of(worker.step([0, 1], 1), 2) == {0: "reset_needed", 1: "reset_needed"}
    await worker.all_of(worker.lanes("reset", [0, 1], 2), 2)
    assert await worker.all_of(worker.lanes("step", [0], 3), 1) == {0: "malformed_message"}
    assert await worker.all_of(worker.lanes("reset", [0, 1], [4, 3], seeds=[1]), 2) == {
        0: "malformed_message",
        1: "malformed_message",
    }
    assert await worker.all_of(worker.lanes("dance", [0], 5), 1) == {0: "malformed_message"}
    assert await worker.all_of(worker.step([0, 1], [6, 4]), 2) == {0: 1, 1: 1}
    assert await worker.all_of(worker.step([2], 1), 1) == {2: "reset_needed"}
    assert GATES.at == {0: 2}


async def test_episodes_and_steps_are_counted_by_lane(make: Any) -> None:
    worker, _ = await pool(make)

    async def counts(reply: str, lanes: int) -> dict[int, tuple[int, int, bool]]:
        await worker.all_of(reply, lanes)
        return {
            lane: (episode, step, body["first"])
            for body in worker.told(reply)
            for lane, episode, step in zip(
                body["lanes"].tolist(), body["episodes"].tolist(), body["steps"].tolist(), strict=True
            )
        }

    assert await counts(worker.step([0, 2], 2, [ENDS, 0]), 2) == {0: (1, 1, False), 2: (1, 1, False)}
    assert await counts(worker.step([0, 2], 3), 2) == {0: (2, 1, False), 2: (1, 2, False)}
    assert await counts(worker.lanes("reset", [0, 1], [4, 2]), 2) == {0: (3, 0, True), 1: (2, 0, True)}
    assert await counts(worker.step([1], 3), 1) == {1: (2, 1, False)}


async def test_a_lane_that_raises_ends_the_session_and_the_others_are_answered(make: Any) -> None:
    worker, session = await pool(make)
    GATES.shut(1)
    waiting = worker.step([0], 2, [1])
    error = await worker.replies.to(worker.step([1, 2], 2, [RAISES, RAISES]))
    assert error["error"]["code"] == "env_error"
    assert error["error"]["details"]["env_id"] in {1, 2}
    assert session.state is State.ENDING
    again = await worker.replies.to(worker.step([1], 2, [RAISES]))
    assert again["error"] == error["error"]
    assert (await worker.replies.to(worker.step([2, 0], 7)))["error"]["code"] == "env_error", "whatever is asked"
    GATES.open()
    assert set(await worker.all_of(waiting, 1)) == {0}
    await worker.emptied()
    assert (worker.table.free, worker.table.cached_bytes) == (3, 0)
    assert (await worker.replies.to(worker.step([0], 3)))["error"] == error["error"]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
async def test_closing_at_any_moment_frees_the_slots(make: Any, turns: int) -> None:
    worker, _ = await pool(make)
    GATES.shut(1)
    worker.step([0, 1, 2], 2, [1, 0, 1])
    for _ in range(turns):
        await asyncio.sleep(0)
    closed = worker.close()
    assert (await worker.replies.to(closed))["existed"]
    GATES.open()
    await worker.emptied()
    assert (worker.table.free, worker.table.cached_bytes) == (3, 0)


async def test_a_close_ends_coroutines_without_waiting_for_them() -> None:
    GATES.shut(1)
    worker, _ = await pool(lambda: GatedCoroutine(GATES))
    worker.step([0, 1, 2], 2, [1, 1, 1])
    await asyncio.sleep(0)
    worker.close()
    await worker.emptied()  # with the gate shut
    GATES.open()


async def test_an_answer_over_the_limit_is_an_error_of_its_lanes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = await pool(make)
    monkeypatch.setattr(pooling, "MAX_MESSAGE_BYTES", 100)
    got = await worker.all_of(worker.step([0, 1], 2), 2)
    assert got == {0: "message_too_large", 1: "message_too_large"}
    monkeypatch.undo()
    assert await worker.all_of(worker.step([0, 1], 3), 2) == {0: 2, 1: 2}


class Odd(gymnasium.Env[Any, Any]):
    """Gives what cannot travel: at the action 1 an info, at 2 an observation outside of every dtype."""

    observation_space = spaces.Discrete(100)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return ("much" if action == 2 else 1), 0.0, False, False, {"thing": object()} if action == 1 else {}


async def test_what_cannot_travel_is_told_and_what_is_no_observation_ends_the_session() -> None:
    worker, session = await pool(Odd)
    assert await worker.all_of(worker.step([0], 2, [1]), 1) == {0: "unencodable_value"}
    assert await worker.all_of(worker.step([0], 3), 1) == {0: 1}
    assert await worker.all_of(worker.step([0], 4, [2]), 1) == {0: "env_error"}
    assert session.state is State.ENDING
    await worker.emptied()
    assert worker.table.cached_bytes == 0


@pytest.mark.parametrize("inline", [False, True], ids=["threads", "inline"])
async def test_of_lanes_that_are_answered_together_only_one_whose_info_cannot_travel_gets_an_error(
    inline: bool,
) -> None:
    worker = Pools(Odd)
    session = await worker.opened(form="pool", num_envs=3, first_env_id=10)
    await worker.all_of(worker.lanes("reset", [0, 1, 2], 1), 3)
    if inline:
        session.held.pool.pace.took(0.0, FAST_STEPS)
    reply = worker.step([2, 0, 1], 2, [0, 1, 0])
    assert await worker.all_of(reply, 3) == {2: 1, 0: "unencodable_value", 1: 1}
    (refused,) = [body for body in worker.told(reply) if "error" in body]
    assert refused["error"]["details"]["env_id"] == 10
    assert [body["steps"].tolist() for body in worker.told(reply) if "error" not in body] != []
    assert not session.running
    again = worker.step([0, 1, 2], 3)
    assert await worker.all_of(again, 3) == {0: 1, 1: 1, 2: 1}
    counts = {
        lane: step
        for body in worker.told(again)
        for lane, step in zip(body["lanes"].tolist(), body["steps"].tolist(), strict=True)
    }
    assert counts == {0: 2, 1: 2, 2: 2}
    worker.close()
    await worker.emptied()
    assert worker.table.cached_bytes == 0


@pytest.mark.parametrize("form", ["pool", "vector"])
async def test_what_has_not_begun_when_its_session_is_closed_does_not_begin(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "FAST_S", 3600.0)  # it stays on one thread
    begun = threading.Semaphore(0)

    class Noted(Gated):
        def step(self, action: int) -> Any:
            begun.release()
            return super().step(action)

    worker = Pools(lambda: Noted(GATES))
    session = await worker.opened(form=form, num_envs=3)
    GATES.at.clear()
    GATES.shut(1)
    if form == "pool":
        await worker.all_of(worker.lanes("reset", [0, 1, 2], 1), 3)
        worker.step([0, 1, 2], 2, [1, 1, 1])
    else:
        await worker.replies.to(worker.ask("reset", 1))
        worker.ask("step", 2, actions=np.ones(3, np.int64))
    await asyncio.to_thread(begun.acquire)
    worker.close()
    assert session.state is State.ENDING
    GATES.open()
    await worker.emptied()
    assert GATES.at == {1: 1}
    assert (worker.table.free, worker.table.cached_bytes) == (3, 0)


class Short(Gated):
    """Its step gives too little."""

    def step(self, action: int) -> Any:
        return 0, 0.0, False, {}


class ShortCoroutine(GatedCoroutine):
    async def step(self, action: int) -> Any:
        return 0, 0.0, False, {}


@pytest.mark.parametrize(("env", "inline"), [(Short, False), (Short, True), (ShortCoroutine, False)])
async def test_what_is_no_steps_result_is_told_by_its_env_id(env: Any, inline: bool) -> None:
    worker, session = await pool(lambda: env(GATES))
    if inline:
        session.held.pool.pace.took(0.0, FAST_STEPS)
    answer = await worker.replies.to(worker.step([2], 2))
    assert answer["error"]["details"]["env_id"] == 2
    assert answer["error"]["details"]["type"] == "ValueError"
    await worker.emptied()


async def test_fast_lanes_are_stepped_inline_and_one_that_raises_there_is_told_as_well() -> None:
    worker, session = await pool(lambda: Gated(GATES))
    session.held.pool.pace.took(0.0, FAST_STEPS)
    reply = worker.step([0, 1, 2], 2)
    assert [body["lanes"].tolist() for body in worker.told(reply)] == [[0, 1, 2]], "in the same turn"
    session.held.pool.pace.took(0.0, FAST_STEPS)  # on a busy machine that one may have taken long
    reply = worker.step([2, 1], 3, [0, RAISES])
    (answer,) = worker.told(reply)
    assert (answer["lanes"].tolist(), answer["error"]["details"]["env_id"]) == ([2, 1], 1)
    await worker.emptied()
    assert (worker.table.free, worker.table.cached_bytes) == (3, 0)


async def test_a_pool_has_no_single_lane_and_a_single_env_no_lanes(make: Any) -> None:
    worker, _ = await pool(make)
    answer = await worker.replies.to(worker.ask("step", 2, action=0))
    assert from_wire(answer["error"]).code == "malformed_message"
    worker.close()
    await worker.emptied()
    if isinstance(make(), gymnasium.Env):
        await worker.opened("s1", epoch=2)
        body = pack({"epoch": 2, "lanes": np.zeros(1, np.int64), "seqs": np.ones(1, np.int64)})
        worker.execution.on_session(f"{PREFIX}anon.s1.step", "odd", body)
        assert from_wire((await worker.replies.to("odd"))["error"]).code == "malformed_message"
