"""Messages over the server's payload limit, which is small here: split where one peer is meant, refused elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.errors import MessageTooLarge
from meshrl.wire.messages import Grant, Open, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.envs import Counter, Picture

MAX_PAYLOAD = 16 * 1024
# 102,000 bytes: seven messages.
SHAPE = (200, 170, 3)
SUBJECTS = Subjects()


class Big(Picture):
    """Observations of 100 KB."""

    def __init__(self) -> None:
        super().__init__(SHAPE)


def parity(obs: np.ndarray) -> int:
    """An agent that needs all of the picture."""
    assert obs.shape == SHAPE
    (value,) = np.unique(obs)
    return int(value % 2)


@pytest.fixture
def small() -> Iterator[str]:
    """The address of a server that takes at most 16 KB in one message."""
    with EmbeddedServer.start(max_payload=MAX_PAYLOAD) as server:
        yield server.url


class Sizes:
    """The sizes of all messages under each subject, as a third party hears them."""

    def __init__(self) -> None:
        self.bytes: dict[str, list[int]] = {}

    def note(self, subject: str, _reply: str, body: bytes) -> None:
        self.bytes.setdefault(subject, []).append(len(body))

    def under(self, part: str) -> list[int]:
        """Of those whose subject contains ``part``."""
        return [size for subject, sizes in self.bytes.items() if part in subject for size in sizes]


async def test_an_observation_over_the_servers_limit_is_split_and_joined(small: str) -> None:
    async with EnvWorker({"big": Big}, small), connect(small) as ear, Mesh(small) as m:
        sizes = Sizes()
        await ear.subscribe("_INBOX.>", sizes.note, join=False)
        async with await m.env("big") as env:
            assert context_of(m).connection.max_payload == MAX_PAYLOAD
            obs, _ = await env.reset(seed=0)
            assert (obs.shape, obs.dtype, obs.max()) == (SHAPE, np.uint8, 0)
            for step in range(1, 6):
                obs, *_ = await env.step(1)
                assert (obs == step).all()
        await ear.flush()
        heard = sizes.under("_INBOX.")
        assert max(heard) <= MAX_PAYLOAD
        assert sum(heard) > 6 * np.prod(SHAPE)


async def test_envs_whose_observations_are_split_step_at_the_same_time(small: str) -> None:
    async with EnvWorker({"big": Big}, small), Mesh(small) as m:
        envs = [await m.env("big") for _ in range(8)]
        await asyncio.gather(*(env.reset(seed=0) for env in envs))
        for number, env in enumerate(envs):
            for _ in range(number):
                await env.step(0)
        results = await asyncio.gather(*(env.step(1) for env in envs))
        assert [int(obs.max()) for obs, *_ in results] == list(range(1, 9))
        for env in envs:
            await env.close()


async def test_an_act_over_the_servers_limit_goes_to_one_worker_and_not_to_the_queue_group(small: str) -> None:
    async with (
        AgentWorker({"parity": parity, "small": lambda obs: obs}, small) as one,
        AgentWorker({"parity": parity, "small": lambda obs: obs}, small) as two,
        connect(small) as ear,
        Mesh(small) as m,
    ):
        sizes = Sizes()
        await ear.subscribe("meshrl.>", sizes.note, join=False)
        agent, little = await m.agent("parity"), await m.agent("small")
        assert await asyncio.gather(*(agent.act(np.full(SHAPE, n, np.uint8)) for n in range(6))) == [0, 1] * 3
        assert await little.act(5) == 5
        await ear.flush()
        directed = [size for worker in (one, two) for size in sizes.under(f"worker.{worker.id}.act.")]
        assert len(directed) == 6 * 7
        assert max(directed) <= MAX_PAYLOAD
        user = context_of(m).connection.user
        assert sizes.under(SUBJECTS.any_act("parity", user)) == []
        assert len(sizes.under(SUBJECTS.any_act("small", user))) == 1


async def test_arguments_over_the_servers_limit_reach_the_constructor(small: str) -> None:
    async with EnvWorker({"counter": Counter}, small, allow_kwargs=("render_mode", "slow_s")), Mesh(small) as m:
        # What the env makes of it is its own affair; here it takes anything.
        async with await m.env("counter", {"render_mode": "x" * 3 * MAX_PAYLOAD}) as env:
            assert await env.get_attr("render_mode") == "x" * 3 * MAX_PAYLOAD


async def test_a_message_over_the_limit_is_refused_unsent_where_its_subject_carries_no_parts(small: str) -> None:
    async with EnvWorker({"counter": Counter}, small) as worker, connect(small) as raw:
        anywhere = SUBJECTS.any_open("counter", raw.user)
        body = Open(session="s1", name="counter", kwargs={"slow_s": "x" * MAX_PAYLOAD}).to_wire()
        with pytest.raises(MessageTooLarge, match="raise max_payload") as caught:
            raw.request(anywhere, body, lambda _answer: None)
        assert caught.value.details == {"size_bytes": len(body), "limit_bytes": MAX_PAYLOAD}
        assert isinstance(caught.value, ValueError)
        # Nothing was sent, and both go on.
        answer = await raw.ask(anywhere, Open(session="s1", name="counter").to_wire(), 20.0)
        assert answer is not None
        assert parse(Grant, answer).worker == worker.id
