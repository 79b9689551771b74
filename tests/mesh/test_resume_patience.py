"""A lost session waits for a worker that comes late, for as long as its user said (R8)."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.conftest import until
from tests.mesh.losing import Workers
from tests.mesh.worker_process import WorkerProcess


async def test_while_nobody_serves_its_name_and_others_serve_other_names_it_is_waited_for(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the only worker of an env is restarted: what was leased is no name that somebody mistyped."""
    monkeypatch.setattr("meshrl.client.finding.UNKNOWN_S", 0.3)
    with ExitStack() as stack:
        workers = Workers(server.url, stack)
        workers.start(1)
        stack.enter_context(WorkerProcess(server.url, {"other": "CartPole-v1"}))
        async with Mesh(server.url) as m, await m.env("Tuned") as env:
            await env.reset(seed=1)
            await env.step(1)
            await workers.kill(env.worker)
            stepping = asyncio.ensure_future(env.step(1))

            async def forgotten() -> bool:
                return [entry.name for entry in await m.envs()] == ["other"]

            await until(forgotten, "nobody serves it any more")
            await asyncio.sleep(1.0)  # the scenario: longer than a name that nobody serves is waited for
            await asyncio.to_thread(workers.start)
            obs, *_, info = await stepping
            assert (obs, info) == (2, {})
