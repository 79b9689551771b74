"""Works of one env a message: bare echoes, single envs, 16 clients, a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import driver
from hosts import FIRST, RESPONDER, Hosts

from meshrl import Mesh
from meshrl.client.context import context_of

BODY = bytes(64)
# After a hundred fast steps an env is stepped in the worker's event loop.
WARM_UP_STEPS = 120

Stepper = tuple[Callable[[], Awaitable[bool]], Callable[[], Awaitable[Any]]]


def stepper(env: Any) -> Stepper:
    count = 0

    async def step() -> bool:
        nonlocal count
        _, _, terminated, truncated, _ = await env.step(driver.action(count))
        count += 1
        return bool(terminated or truncated)

    return step, env.reset


async def opened(mesh: Mesh, name: str) -> Any:
    env = await mesh.env(name, where=FIRST)
    await env.reset(seed=1)
    await warmed(env)
    return env


async def warmed(env: Any) -> None:
    step, reset = stepper(env)
    for _ in range(WARM_UP_STEPS):
        if await step():
            await reset()


async def echo(hosts: Hosts, subject: str, seconds: float) -> driver.Answer:
    """A request-reply on the client's own connection, by the means that a step has."""
    connection = context_of(await hosts.mesh()).connection

    async def responder() -> bool:
        hosts.spawn("responder.py", hosts.url)
        for _ in range(200):
            if await connection.ask("bench.image32", BODY, 5.0) is not None:  # it subscribes to this one last
                break
            await asyncio.sleep(0.05)
        return True

    await hosts.kept(RESPONDER, responder)
    create_future = asyncio.get_running_loop().create_future

    async def step() -> bool:
        future: asyncio.Future[bytes | None] = create_future()
        rid = connection.request(subject, BODY, future.set_result)
        try:
            await future
        finally:
            connection.forget(rid)
        return False

    return await driver.timed_async(step, lambda: asyncio.sleep(0), seconds)


async def single(hosts: Hosts, name: str, seconds: float) -> driver.Answer:
    mesh = await hosts.mesh()
    env = await hosts.kept(name, lambda: opened(mesh, name))
    return await driver.timed_async(*stepper(env), seconds)


async def clients16(hosts: Hosts, meshes: int, seconds: float) -> driver.Answer:
    """16 envs, each stepped on its own, of 1 mesh or of 16; opened for this turn, as the other systems do."""
    await hosts.mesh()
    async with AsyncExitStack() as stack:
        opened_meshes = [await stack.enter_async_context(Mesh(hosts.url)) for _ in range(meshes)]
        envs = [
            await stack.enter_async_context(await opened_meshes[number % meshes].env("cartpole", where=FIRST))
            for number in range(driver.CLIENTS)
        ]
        for env in envs:
            await env.reset(seed=1)
        await asyncio.gather(*(warmed(env) for env in envs))
        return await driver.counted_async([stepper(env) for env in envs], seconds)
