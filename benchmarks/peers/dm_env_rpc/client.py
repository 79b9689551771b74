"""dm_env_rpc: one client through its own dm_env adaptor, many through its asynchronous connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import driver
import grpc
from dm_env_rpc.v1 import async_connection, connection, dm_env_adaptor, spec_manager
from dm_env_rpc.v1 import dm_env_rpc_pb2 as pb

OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
"""The first: channels of one process share a connection otherwise."""


@cache
def server(env: str, style: str) -> str:
    return "127.0.0.1:" + driver.Server(Path(__file__).with_name("server.py"), env, style).address


def single(env: str) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        with grpc.insecure_channel(server(env, "threads"), OPTIONS) as channel:
            adaptor, _ = dm_env_adaptor.create_and_join_world(connection.Connection(channel), {}, {})
            adaptor.reset()
            count = 0

            def step() -> bool:
                nonlocal count
                timestep = adaptor.step({"action": driver.action(count)})
                count += 1
                return bool(timestep.last())

            # The step after an ending answers the next episode's first observation.
            return driver.timed(step, lambda: adaptor.step({}), command["seconds"])

    return work


class Joined:
    """A joined world by way of an asynchronous connection, of which the package has no adaptor."""

    def __init__(self, channel: Any) -> None:
        self.link = async_connection.AsyncConnection(channel)
        self.count = 0

    async def join(self) -> None:
        await self.link.send(pb.CreateWorldRequest())
        specs = (await self.link.send(pb.JoinWorldRequest(world_name="world"))).specs
        self.actions = spec_manager.SpecManager(specs.actions)
        self.observations = spec_manager.SpecManager(specs.observations)
        self.wanted = sorted(self.observations.uids())
        await self.reset()

    async def step(self) -> bool:
        actions = self.actions.pack({"action": driver.action(self.count)})
        self.count += 1
        response = await self.link.send(pb.StepRequest(requested_observations=self.wanted, actions=actions))
        self.observations.unpack(response.observations)
        return bool(response.state != pb.EnvironmentStateType.RUNNING)

    async def reset(self) -> None:
        response = await self.link.send(pb.StepRequest(requested_observations=self.wanted))
        self.observations.unpack(response.observations)


async def counted(address: str, count: int, seconds: float) -> driver.Answer:
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address, OPTIONS)) for _ in range(count)]
        clients = [Joined(channel) for channel in channels]
        for client in clients:
            await client.join()
        return await driver.counted_async([(client.step, client.reset) for client in clients], seconds)


def concurrent(count: int) -> driver.Work:
    def work(command: Mapping[str, Any]) -> driver.Answer:
        return asyncio.run(counted(server("cartpole", "coroutines"), count, command["seconds"]))

    return work


def main() -> None:
    server("cartpole", "threads")
    driver.obey(
        {
            "single": single("cartpole"),
            "clients16": concurrent(driver.CLIENTS),
            "image": single("image"),
            "vector64": concurrent(64),
        },
        versions=driver.versions_of("dm-env-rpc", "grpcio", "protobuf", "gymnasium", "numpy"),
        notes="gRPC streams; one client: its dm_env adaptor and a server on threads; many: its AsyncConnection, a "
        "channel each, and a server in coroutines, ahead of adaptors on threads; no vector API: vector64 is 64 clients",
    )


if __name__ == "__main__":
    main()
