"""A mesh in which nothing runs any more that made the recordings in it.

::

    async with restarted(tmp_path, served, play, "SIGTERM") as (m, told):
        told.check(await of_all(m.episode, told.episodes))

Whatever else gives recordings back is tried on them in the same way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.learners import Learned
from tests.mesh.recordings import listed
from tests.mesh.worker_process import WorkerProcess

Signal = Literal["SIGTERM", "SIGKILL"]


@asynccontextmanager
async def restarted(
    store: Path,
    served: Mapping[str, str],
    play: Callable[[Mesh], Awaitable[Learned]],
    how: Signal,
    *,
    then: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> AsyncIterator[tuple[Mesh, Learned]]:
    """A mesh of a new server on a store, new workers and a new client, and what was recorded there before.

    Args:
        store: a directory.
        served: what workers serve; factories as texts.
        play: steps envs, which it closes, and gives what they told.
        how: workers and server end: in good order, right after the last session; or killed, once all is stored.
        then: what of ``kwargs`` is another for the new workers.
        kwargs: of the workers.

    Yields:
        the mesh, and what was told.
    """
    with EmbeddedServer.start(store=store) as server:
        workers = _workers(server, served, kwargs)
        try:
            async with Mesh(server.url) as m:
                told = await play(m)
                if how == "SIGKILL":
                    for env, count in Counter(one.env for one in told.episodes.values()).items():
                        await listed(m, env, count)
                    server.kill()
            for worker in workers:
                if how == "SIGKILL":
                    await asyncio.to_thread(worker.kill)
                else:
                    worker.terminate()
            if how == "SIGTERM":
                assert [await asyncio.to_thread(worker.ended) for worker in workers] == [0, 0]
        finally:
            for worker in workers:
                await asyncio.to_thread(worker.stop)
    with EmbeddedServer.start(store=store) as server:
        workers = _workers(server, served, {**kwargs, **(then or {})})
        try:
            async with Mesh(server.url) as m:
                yield m, told
        finally:
            for worker in workers:
                await asyncio.to_thread(worker.stop)


def _workers(server: EmbeddedServer, served: Mapping[str, str], kwargs: Mapping[str, Any]) -> list[WorkerProcess]:
    workers = [WorkerProcess(server.url, served, wait=False, **kwargs) for _ in range(2)]
    for worker in workers:
        worker.wait_advertised()
    return workers
