"""Work that is finished although its caller is cancelled: what was taken has to be given back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, however often the caller is cancelled meanwhile; then the cancellation goes on.

    ``asyncio.shield`` would end the waiting at the first cancellation. Scopes such as anyio's cancel at every
    ``await`` again, so nothing that is awaited in the caller's own task would get far. ``asyncio.wait`` would do, and
    take several times as long.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    cut: asyncio.CancelledError | None = None
    while not task.done():
        over: asyncio.Future[None] = loop.create_future()
        task.add_done_callback(partial(_end, over))
        try:
            await over
        except asyncio.CancelledError as exc:
            cut = cut or exc
    if cut is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # the cancellation is what is told
    raise cut


def _end(over: asyncio.Future[None], _: object) -> None:
    if not over.done():
        over.set_result(None)
