"""What workers and clients really send, as a listener on the server sees it, against the AsyncAPI document."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from meshrl.bus.connection import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.mesh import Mesh
from meshrl.errors import MeshError
from meshrl.wire.codec import unpack
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.policies import random_policy
from tests.contract.reading import asyncapi, fault

# No client of this package sends these: act_at_worker is for observations over the payload limit, the other for clients
# without a directory. probe needs a request that is quiet for long.
ELSEWHERE = {"act_at_worker", "open_anywhere", "probe"}


class Remembering:
    """A leased agent."""

    def __init__(self, step: int = 1) -> None:
        self.at = 0
        self.by = step

    def act(self, obs: Any) -> tuple[int, str]:
        self.at += self.by
        return (self.at, "so far")

    def observe(self, reward: float, terminated: bool, truncated: bool) -> None:
        self.at += int(reward)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as running:
        yield running


def _patterns() -> dict[str, re.Pattern[str]]:
    return {
        name: re.compile(re.sub(r"\\{\w+\\}", "[^.]+", re.escape(channel["address"])) + r"\Z")
        for name, channel in asyncapi()["channels"].items()
        if channel["address"] is not None
    }


async def _use_everything(server: EmbeddedServer) -> None:
    envs = EnvWorker(
        {"cartpole": "CartPole-v1"}, url=server.url, allow=("gravity",), allow_kwargs=("sutton_barto_reward",)
    )
    agents = AgentWorker({"random": random_policy, "remembering": Remembering}, url=server.url, slots=1)
    async with envs, agents, Mesh(server.url) as mesh:
        env = await mesh.env("cartpole", kwargs={"sutton_barto_reward": False}, render_mode="rgb_array")
        obs, _ = await env.reset(seed=3, options={"low": -0.01, "high": 0.01})
        agent = await mesh.agent("random", env=env)
        await env.step(await agent.act(obs, seed=1, step=0))
        await env.render()
        await env.state()
        await env.get_attr("gravity")
        await env.set_attr("gravity", 9.0)
        for refused in (env.call("close"), env.get_attr("_private"), mesh.env("cartpole", kwargs={"x": 1})):
            with pytest.raises(MeshError):
                await refused
        leased = await mesh.agent("remembering", stateful=True)
        await leased.reset(seed=1)
        assert await leased.act(obs) == (1, "so far")
        await leased.observe(1.0, False, False)
        with pytest.raises(MeshError):
            await mesh.agent("remembering", stateful=True, wait=0.3)
        await env.close()


async def test_everything_that_the_code_sends_is_on_a_channel_and_valid(server: EmbeddedServer) -> None:
    heard: list[tuple[str, str, bytes]] = []
    async with connect(server.url) as connection:
        await connection.subscribe(">", lambda *message: heard.append(message), join=False)
        await _use_everything(server)
        await connection.flush()
    patterns, document = _patterns(), asyncapi()
    operations = {op["channel"]["$ref"].rpartition("/")[2]: (name, op) for name, op in document["operations"].items()}
    asked: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for subject, reply, body in heard:
        if subject.startswith(("$", "meshrl.describe.")) or (subject.startswith("_INBOX.") and subject not in asked):
            continue  # JetStream's, micro services'
        if subject in asked:
            if not body:
                continue  # the server's own word that nobody listens
            _, operation = operations[asked[subject]]
            names = [ref["$ref"].rpartition("/")[2] for ref in operation["reply"]["messages"]]
            candidates = ["error"] if "error" in unpack(body) else [name for name in names if name != "error"]
            faults = [fault(name, body) for name in candidates]
            assert "" in faults, f"{asked[subject]}: {faults}"
            seen[f"answer to {asked[subject]}"] += 1
            continue
        found = [name for name, pattern in patterns.items() if pattern.match(subject)]
        assert len(found) == 1, f"{subject} is on {found}"
        (channel,) = found
        (message,) = document["channels"][channel]["messages"]
        assert fault(message, body) == "", f"{subject}: {fault(message, body)}"
        seen[channel] += 1
        if reply:
            asked[reply] = channel
    channels = set(patterns) - ELSEWHERE
    answered = {f"answer to {name}" for name in channels - {"advertisement"}}
    assert set(seen) >= channels | answered
