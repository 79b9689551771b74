"""The program behind an embedded mesh: Gymnasium's registry on demand, and the agent ``random``.

``python -m meshrl.worker.host`` with ``MESHRL_URL`` set. It ends with the process that started it, which guards it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from typing import Any

from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.policies import random_policy
from meshrl.worker.service import Service

SLOTS = 256


async def host(url: str, *, namespace: str = "default", agents: bool = True) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        url: of the NATS server; it is this user's own, so clients may pass and call anything public.
        namespace: of the mesh.
        agents: serve the agent ``random`` too.
    """
    async with contextlib.AsyncExitStack() as stack:
        workers: list[Service] = [
            EnvWorker(url=url, namespace=namespace, slots=SLOTS, on_demand=True, allow_kwargs=("*",), allow=("*",))
        ]
        if agents:
            workers.append(AgentWorker({"random": random_policy}, url=url, namespace=namespace))
        for worker in workers:
            await stack.enter_async_context(worker)
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(name, workers[0].stop)
        await workers[0].serve_forever()


def run(main: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run`` on uvloop where it exists."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    run(host(os.environ["MESHRL_URL"]))
