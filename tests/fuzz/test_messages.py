"""Mutated messages on every subject: no crash, no hang, nothing out of the dispatch path, no slot lost.

``MESHRL_FUZZ_MESSAGES`` says how many (``make fuzz``: a million), ``MESHRL_FUZZ_SEED`` which.
"""

from __future__ import annotations

import os
import time

import gymnasium
import numpy as np
import pytest

from meshrl import Mesh
from meshrl.bus.connect import connect
from tests.fuzz.fuzzed_workers import SLOTS, FuzzedWorkers
from tests.fuzz.fuzzing import Fuzzer
from tests.mesh.conftest import until

MESSAGES = int(os.environ.get("MESHRL_FUZZ_MESSAGES", "10000"))
SEED = int(os.environ.get("MESHRL_FUZZ_SEED", "1"))
# What a fuzzed minute takes on a slow machine that others use too.
MESSAGES_A_SECOND = 150


async def steps_as_ever(url: str) -> None:
    """A client that is new gets envs of each form that step as local ones do, and acts of agents."""
    local = gymnasium.make("CartPole-v1")
    async with Mesh(url) as m, await m.env("cartpole") as env:
        envs, pool = await m.vector("cartpole", 3), await m.pool("cartpole", 3)
        observation, _ = await env.reset(seed=5)
        assert observation.tolist() == local.reset(seed=5)[0].tolist()
        first, _ = await envs.reset(seed=5)
        assert first[0].tolist() == observation.tolist()
        await pool.reset(seed=5)
        batch = await pool.recv(min=3)
        assert batch.first.all()
        for action in (0, 1, 1):
            expected = local.step(action)
            observation, reward, *_ = await env.step(np.int64(action))
            assert (observation.tolist(), reward) == (expected[0].tolist(), expected[1])
            assert (await envs.step(np.full(3, action)))[0][0].tolist() == expected[0].tolist()
            await pool.send(np.full(3, action), range(3))
            batch = await pool.recv(min=3)
            at = batch.env_ids.tolist().index(0)
            assert batch.observations[at].tolist() == expected[0].tolist()
        stateless, stateful = await m.agent("still"), await m.agent("counting", stateful=True)
        assert await stateless.act(observation) == 0
        assert [await stateful.act(observation) for _ in range(3)] == [1, 2, 3]
        for session in (envs, pool, stateful):
            await session.close()


@pytest.mark.timeout(120 + MESSAGES / MESSAGES_A_SECOND)
async def test_mutated_messages_on_every_subject_harm_nobody(url: str) -> None:
    errors: list[Exception] = []
    async with FuzzedWorkers(url) as workers:
        async with connect(url, on_error=errors.append) as connection:
            fuzzer = Fuzzer(connection, workers, SEED)
            began = time.monotonic()
            await fuzzer.run(MESSAGES)
            seconds = time.monotonic() - began
            await fuzzer.close()

            async def all_free() -> bool:
                return (await workers.report()).free == [SLOTS, SLOTS]

            await until(all_free, "no slot is lost")
            await steps_as_ever(url)
            await until(all_free, "no slot is lost")
            report = await workers.report()
        print(f"{MESSAGES} messages in {seconds:.0f} s: {dict(fuzzer.sent)}")  # noqa: T201  # shown by `make fuzz`
        print(f"answers: {dict(fuzzer.answers)}; none: {dict(fuzzer.unanswered)}; {report}")  # noqa: T201
    assert report.complaints == []
    assert errors == []
    assert report.waiting == [0, 0]
    assert report.cached_bytes == [0, 0]
    assert fuzzer.sent.total() == MESSAGES
    assert fuzzer.answers.total() + fuzzer.unanswered.total() == MESSAGES
    # Mutants get past the decoder: otherwise this would be a test of msgpack.
    assert fuzzer.answers["accepted"] > MESSAGES / 20
    reached = {"stale_request", "sequence_gap", "wrong_epoch", "session_unknown", "env_error", "not_allowed"}
    assert reached <= set(fuzzer.answers)
