"""Serving from this process: a worker's life from its announcement to its goodbye.

Programs wrap it in :func:`meshrl.worker.running.until_stopped`, which is what ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from meshrl.worker.service import Service

W = TypeVar("W", bound=Service)


async def stay_serving(worker: W, announcement: Callable[[W], str]) -> None:
    """Serve until cancelled; then the worker says goodbye.

    Args:
        worker: not yet entered.
        announcement: the line for stdout once it is advertised; its address is known by then.

    Raises:
        MeshError: it cannot start, or its connection ended for good.
    """
    async with worker:
        print(announcement(worker), flush=True)
        await worker.serve_forever()
