"""dm_env_rpc's server, a world a connection.

As its documentation builds one, a gRPC servicer on a pool of threads, and in gRPC's coroutines, for many clients.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import driver
import grpc
import gymnasium
import numpy as np
from dm_env_rpc.v1 import dm_env_rpc_pb2 as pb
from dm_env_rpc.v1 import dm_env_rpc_pb2_grpc, spec_manager, tensor_spec_utils
from google.rpc import status_pb2
from peers.served import Image, cartpole

MAX_CONNECTIONS = 128
ACTION, OBSERVATION, REWARD = 1, 1, 2
STATE = pb.EnvironmentStateType


class World:
    """One env by dm_env_rpc's rules: the step after a reset or an ending answers the first observation."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.fresh = env, True
        space = env.observation_space
        observation = pb.TensorSpec(name="observation", shape=space.shape, dtype=data_type(space.dtype))
        move = pb.TensorSpec(name="action", dtype=pb.INT64)
        tensor_spec_utils.set_bounds(move, minimum=0, maximum=1)
        self.specs = pb.ActionObservationSpecs(
            actions={ACTION: move},
            observations={OBSERVATION: observation, REWARD: pb.TensorSpec(name="reward", dtype=pb.DOUBLE)},
        )
        self.actions = spec_manager.SpecManager(self.specs.actions)
        self.observations = spec_manager.SpecManager(self.specs.observations)

    def step(self, request: Any) -> Any:
        if self.fresh:
            observation, _ = self.env.reset()
            reward, state = 0.0, STATE.RUNNING
        else:
            action = self.actions.unpack(request.actions)["action"]
            observation, gained, terminated, truncated, _ = self.env.step(action)
            reward = float(gained)
            state = STATE.TERMINATED if terminated else STATE.INTERRUPTED if truncated else STATE.RUNNING
        self.fresh = state != STATE.RUNNING
        packed = self.observations.pack({"observation": observation, "reward": reward})
        wanted = {uid: packed[uid] for uid in request.requested_observations}
        return pb.StepResponse(state=state, observations=wanted)


def data_type(dtype: Any) -> Any:
    return {np.dtype(np.float32): pb.FLOAT, np.dtype(np.uint8): pb.UINT8}[dtype]


def answered(world: World, request: Any) -> Any:
    """The response to any of the protocol's requests; a session here is one world, made with the stream."""
    kind = request.WhichOneof("payload")
    try:
        if kind == "step":
            return pb.EnvironmentResponse(step=world.step(request.step))
        if kind == "reset":
            world.fresh = True
            return pb.EnvironmentResponse(reset=pb.ResetResponse(specs=world.specs))
        if kind == "create_world":
            return pb.EnvironmentResponse(create_world=pb.CreateWorldResponse(world_name="world"))
        if kind == "join_world":
            return pb.EnvironmentResponse(join_world=pb.JoinWorldResponse(specs=world.specs))
        return pb.EnvironmentResponse(**{kind: {}})
    except Exception as error:  # noqa: BLE001  the protocol carries it
        return pb.EnvironmentResponse(error=status_pb2.Status(message=f"{type(error).__name__}: {error}"))


class OnThreads(dm_env_rpc_pb2_grpc.EnvironmentServicer):
    def __init__(self, make: Any) -> None:
        self.make = make

    def Process(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802  gRPC's name
        world = World(self.make())
        for request in request_iterator:
            yield answered(world, request)


class InCoroutines(dm_env_rpc_pb2_grpc.EnvironmentServicer):
    def __init__(self, make: Any) -> None:
        self.make = make

    async def Process(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        world = World(self.make())
        async for request in request_iterator:
            yield answered(world, request)


async def serve_in_coroutines(make: Any) -> None:
    server = grpc.aio.server()
    dm_env_rpc_pb2_grpc.add_EnvironmentServicer_to_server(InCoroutines(make), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    driver.announce(port)
    await server.wait_for_termination()


def serve_on_threads(make: Any) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(MAX_CONNECTIONS))
    dm_env_rpc_pb2_grpc.add_EnvironmentServicer_to_server(OnThreads(make), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    driver.announce(port)
    server.wait_for_termination()


def main() -> None:
    env, style = sys.argv[1:]
    make = {"cartpole": cartpole, "image": Image}[env]
    if style == "threads":
        serve_on_threads(make)
    else:
        asyncio.run(serve_in_coroutines(make))


if __name__ == "__main__":
    main()
